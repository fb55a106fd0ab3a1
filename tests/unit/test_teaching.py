"""A teacher's answers, and those that are kept for images that return as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.distributed import DistributedContext
from animesion_training.engine.feed import feed
from animesion_training.engine.steps import DistilStep
from animesion_training.engine.teaching import Taught, Teaching
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.models import create_model
from animesion_training.models.cal import CALClassifier
from animesion_training.recipe import ViewsSection, load
from animesion_training.weights import save_model
from tests import ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))
IMAGES = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def teacher() -> CALClassifier:
    torch.manual_seed(0)
    return CALClassifier(timm.create_model("resnet10t", num_classes=3), 4, num_maps=4).eval()


def asked(network: torch.nn.Module) -> list[int]:
    """Sizes of the batches that the network is given from now on."""
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def same(found: Taught, expected: Taught) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [None, ViewsSection(), ViewsSection(sample=False, maps=2, pool=True)])
def test_kept_answers_are_those_of_the_teacher(settings: ViewsSection | None) -> None:
    network, seeds = teacher(), torch.tensor([7, -3, 2**62, 0, 1])
    fresh = Teaching(network, torch.enable_grad, settings)
    keeping = Teaching(network, torch.enable_grad, settings, keeps=True)
    expected = fresh(IMAGES, seeds)
    same(keeping(IMAGES, seeds), expected)
    sizes = asked(network)
    order = torch.tensor([3, 0, 4])
    found = keeping(IMAGES[order], seeds[order])
    assert sizes == []
    same(found, fresh(IMAGES[order], seeds[order]))


def test_only_what_is_missing_is_asked() -> None:
    network = teacher()
    keeping = Teaching(network, torch.enable_grad, ViewsSection(), keeps=True)
    keeping(IMAGES[:2], torch.tensor([0, 1]))
    sizes = asked(network)
    found = keeping(IMAGES, torch.arange(5))
    keeping(IMAGES[:1], torch.tensor([9]))  # another seed is another augmentation
    assert sizes == [3, 6, 1, 2]
    same(found, Teaching(network, torch.enable_grad, ViewsSection())(IMAGES, torch.arange(5)))


def test_no_gradient_reaches_the_teacher() -> None:
    network = teacher()
    taught = Teaching(network, torch.enable_grad, ViewsSection())(IMAGES, torch.arange(5))
    assert not any(value.requires_grad for value in taught if value is not None)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def trainer(folder: Path, *overrides: str) -> Trainer:
    return Trainer(load("scratch", [*ranks.SMALL, *overrides]), ranks.drawn(8), folder, ALONE, Watcher())


def epochs(run: Trainer, count: int) -> list[dict[int, Tensor]]:
    """Training images of each epoch by sample, augmented."""
    found: list[dict[int, Tensor]] = []
    for _ in range(count):
        seen: dict[int, Tensor] = {}
        for batch, _ in feed(run.stream, ALONE.device):
            images, _ = run.inputs(batch, run.mix_generator)
            seen |= dict(zip(batch.indices.tolist(), images, strict=True))
        found.append(seen)
    return found


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_versions_take_turns(tmp_path: Path, cache: str) -> None:
    run = trainer(tmp_path, "data.versions=2", f"data.cache={cache}", "augment.trivial=true")
    first, second, third, fourth = epochs(run, 4)
    for sample in first:
        assert torch.equal(first[sample], third[sample])
        assert torch.equal(second[sample], fourth[sample])
    assert any(not torch.equal(first[sample], second[sample]) for sample in first)
    orders = [run.stream.order(epoch).tolist() for epoch in (0, 2)]
    assert orders[0] != orders[1]


def test_a_run_asks_once_per_version(tmp_path: Path) -> None:
    data = ranks.drawn(8)
    network = create_model("resnet10t", len(data.classes), 32, selector="cal")
    save_model(network, tmp_path / "teacher.safetensors", data.classes)
    taught: tuple[Any, ...] = ("data.versions=2", f"teacher.weights={tmp_path / 'teacher.safetensors'}")
    run = trainer(tmp_path / "run", *taught, "teacher.views=true")
    step = run.update.step
    assert isinstance(step, DistilStep)
    sizes = asked(step.teaching.network)
    per_epoch = []
    for _ in range(5):
        for batch, _ in feed(run.stream, ALONE.device):
            run.train_batch(batch)
        per_epoch.append(sum(sizes))
        sizes.clear()
    assert per_epoch == [24, 24, 0, 0, 0]
    with pytest.raises(UsageError, match=r"each version of an image once.*switch augment\.mixup"):
        trainer(tmp_path / "mixed", *taught, "augment.mixup=1.0")
