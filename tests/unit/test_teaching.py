"""A teacher's answers, and those that are kept for images that return as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.data import views
from animesion_training.distributed import DistributedContext
from animesion_training.engine.distil import DistilStep
from animesion_training.engine.feed import feed
from animesion_training.engine.teaching import Taught, Teaching
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.losses.distillation import kl, trl
from animesion_training.models import create_model
from animesion_training.models.cal import CALClassifier, CALOutput
from animesion_training.recipe import ViewsSection, load
from animesion_training.weights import save_model
from tests import ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))
IMAGES = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def teacher() -> CALClassifier:
    torch.manual_seed(0)
    network = create_model("resnet10t", 4, 64, selector="cal").eval()
    assert isinstance(network, CALClassifier)
    assert network(IMAGES).abs().min() > 0  # its maps are not empty
    return network


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


@pytest.mark.parametrize("settings", [None, ViewsSection()])
@pytest.mark.parametrize("selector", ["", "cal"])
def test_features_are_those_of_the_last_layer(selector: str, settings: ViewsSection | None) -> None:
    if settings and not selector:
        return
    torch.manual_seed(0)
    network = create_model("resnet10t", 4, 64, selector=selector).eval()
    seeds = torch.arange(5)
    taught = Teaching(network, torch.enable_grad, settings, with_features=True)(IMAGES, seeds)
    everything = IMAGES if taught.view_images is None else torch.cat((IMAGES, taught.view_images))
    with torch.no_grad():
        maps: Tensor = network.backbone(everything) if selector else network.forward_features(everything)
        if selector:
            output = network(everything, parts=True)
            expected = output.features.view(len(everything), 32, 512).mean(1)
        else:
            expected = maps.mean((2, 3))
    assert taught.features is not None
    torch.testing.assert_close(taught.features, expected, rtol=1e-4, atol=1e-5)
    keeping = Teaching(network, torch.enable_grad, settings, keeps=True, with_features=True)
    keeping(IMAGES, seeds)
    same(keeping(IMAGES, seeds), taught)


def test_displaced_maps_move_together_and_keep_their_values() -> None:
    attention = torch.rand(64, 3, 4, 5)
    moved = views.displace(attention, torch.arange(64))
    offsets = set()
    for before, after in zip(attention, moved, strict=True):
        found = [(i, j) for i in range(4) for j in range(5) if torch.equal(torch.roll(before, (-i, -j), (1, 2)), after)]
        assert len(found) == 1
        offsets.update(found)
    assert len(offsets) > 15
    assert torch.equal(moved, views.displace(attention, torch.arange(64)))


class Pointing(torch.nn.Module):
    """Attends to the upper left of 4 x 4 cells."""

    def forward(self, images: Tensor, *, parts: bool = False) -> Any:
        attention = torch.zeros(len(images), 2, 4, 4)
        attention[:, :, 0, 0] = 1.0
        logits = images.mean((2, 3))
        return CALOutput(logits, logits, logits, attention) if parts else logits


def test_views_can_be_displaced() -> None:
    seeds = torch.arange(5)
    crops, moved = (
        Teaching(Pointing(), torch.enable_grad, ViewsSection(padding=0, displace=displace))(IMAGES, seeds).view_images
        for displace in (False, True)
    )
    assert crops is not None
    assert moved is not None
    # the drop blanks the attended cell, or another one
    assert (crops[5:, :, 0, 0] == 0).all()
    assert (moved[5:, :, 0, 0] != 0).all(1).tolist().count(True) >= 4
    assert all((drop == 0).any() for drop in moved[5:])


class PointingApart(torch.nn.Module):
    """Attends to the first of 4 x 4 cells of a bright image, and to the last of a dark one."""

    def forward(self, images: Tensor, *, parts: bool = False) -> Any:
        attention = torch.zeros(len(images), 2, 4, 4)
        bright = images.mean((1, 2, 3)) > 0
        attention[bright, :, 0, 0] = 1.0
        attention[~bright, :, 3, 3] = 1.0
        logits = images.mean((2, 3))
        return CALOutput(logits, logits, logits, attention) if parts else logits


@pytest.mark.parametrize("keeps", [False, True])
def test_transplants_have_the_region_of_the_partner_and_its_answer(keeps: bool) -> None:
    bright, dark, alone = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.1
    images = torch.stack((bright, -dark, alone))
    # a neighbour of the peak has 1 - 3 / 7 = 0.57 of its value, so the regions are the first and the last pixel
    settings = ViewsSection(crop=(0.6, 0.8), mix_threshold=(0.6, 0.8), padding=0)
    network = PointingApart()
    teaching = Teaching(network, torch.enable_grad, settings, transplants=True, keeps=keeps)
    sizes = asked(network)
    taught = teaching(images, torch.arange(3), torch.tensor([1, 0, 2]))
    assert sizes == [3, 3]  # images and crops; nobody is asked about transplants
    assert taught.view_images is not None
    assert taught.view_logits is not None
    expected = images.clone()
    expected[0, :, 0, 0] = images[1, :, 7, 7]
    expected[1, :, 7, 7] = images[0, :, 0, 0]
    torch.testing.assert_close(taught.view_images[3:], expected)
    crops = torch.stack((images[0, :, 0, 0], images[1, :, 7, 7], images[2, :, 0, 0]))
    torch.testing.assert_close(taught.view_images[:3], crops[:, :, None, None].expand(3, 3, 8, 8))
    torch.testing.assert_close(taught.view_logits, torch.cat((crops, crops[[1, 0, 2]])))


def test_features_of_transplants_are_those_of_the_crops_they_show() -> None:
    partners = torch.tensor([1, 0, 3, 2, 4])
    options: dict[str, Any] = {"transplants": True, "with_features": True}
    taught = Teaching(teacher(), torch.enable_grad, ViewsSection(), **options)(IMAGES, torch.arange(5), partners)
    assert taught.features is not None
    _, crops, transplants = taught.features.chunk(3)
    torch.testing.assert_close(transplants, crops[partners])
    keeping = Teaching(teacher(), torch.enable_grad, ViewsSection(), keeps=True, **options)
    keeping(IMAGES, torch.arange(5), partners)
    others = torch.tensor([4, 1, 2, 3, 0])
    again = keeping(IMAGES, torch.arange(5), others).features
    assert again is not None
    _, crops, transplants = again.chunk(3)
    torch.testing.assert_close(transplants, crops[others])


def distilling(folder: Path, *overrides: str) -> DistilStep:
    data = ranks.drawn(8)
    if not (folder / "teacher.safetensors").exists():
        torch.manual_seed(0)
        network = create_model("resnet10t", len(data.classes), 32, selector="cal")
        save_model(network, folder / "teacher.safetensors", data.classes)
    settings = (f"teacher.weights={folder / 'teacher.safetensors'}", "teacher.views=true", *overrides)
    step = trainer(folder / "run", *settings).update.step
    assert isinstance(step, DistilStep)
    return step


def test_views_count_where_the_teacher_is_right(tmp_path: Path) -> None:
    images, seeds = torch.rand(6, 3, 32, 32), torch.arange(6)
    step = distilling(tmp_path, "teacher.right=true", "teacher.view_weights=[0,1,1]")
    taught = step.teaching(step._for_teacher(images), seeds)
    assert taught.view_logits is not None
    told = taught.view_logits.argmax(1).view(2, 6)
    right = told[0].clone()  # the label is what the teacher says of the crop: all crops count
    same_drop = told[1] == told[0]
    _, view_logits, _, _ = step._student_logits(images, taught.view_images, right)
    divergence = kl(view_logits, taught.view_logits, 7.0, "none").view(2, 6)
    expected = 10 / 49 * 49 * (divergence[0].mean() + (divergence[1] * same_drop).mean())
    found = step.terms(images, right, seeds)["distillation"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_transplants_count_where_the_teacher_is_right_about_the_partner(tmp_path: Path) -> None:
    images, seeds = torch.rand(6, 3, 32, 32), torch.arange(6)
    settings = ("teacher.transplants=true", "teacher.right=true", "teacher.view_weights=[0,0,1]")
    step = distilling(tmp_path, *settings, "teacher.auxiliary=trl")
    partners = torch.tensor([1, 0, 3, 2, 5, 4])
    taught = step.teaching(step._for_teacher(images), seeds, partners)
    assert taught.view_logits is not None
    right = taught.view_logits[:6].argmax(1)  # the label is what the teacher says of the crop: all transplants count
    wrong = torch.where(torch.arange(6) == 1, (right + 1) % 2, right)  # but the one with the region of image 1
    _, view_logits, _, _ = step._student_logits(images, taught.view_images, right)
    divergence = kl(view_logits, taught.view_logits, 7.0, "none")[6:]
    for labels, counts in ((right, torch.ones(6)), (wrong, torch.tensor([0.0, 1, 1, 1, 1, 1]))):
        step.begin(ALONE, torch.arange(6), 6, 1)
        found = step.terms(images, labels, seeds)
        torch.testing.assert_close(found["distillation"], 10 * (divergence * counts).mean(), rtol=1e-4, atol=1e-6)
        view_labels = torch.cat((labels, labels[partners]))
        logits = step.model(images)
        expected = trl(logits, taught.logits, labels) / 2 + trl(view_logits, taught.view_logits, view_labels)
        torch.testing.assert_close(found["trl"], expected, rtol=1e-4, atol=1e-6)


def test_transplants_stay_in_pieces_of_a_batch(tmp_path: Path) -> None:
    images, seeds, labels = torch.rand(6, 3, 32, 32), torch.arange(6), torch.zeros(6, dtype=torch.int64)
    step = distilling(tmp_path, "teacher.transplants=true", "model.name=vitfs_nano_patch16", "model.options={}")
    assert step.unit == 2
    step.model.eval()
    step.begin(ALONE, torch.arange(6), 6, 1)
    whole = step.terms(images, labels, seeds)["distillation"]
    step.begin(ALONE, torch.arange(6), 6, 1)
    parts = [step.terms(images[at], labels[at], seeds[at])["distillation"] for at in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close((4 * parts[0] + 2 * parts[1]) / 6, whole, rtol=1e-4, atol=1e-6)


def test_transplants_need_views(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"teacher\.transplants needs views: set teacher\.views = true"):
        distilling(tmp_path, "teacher.transplants=true", "teacher.views=false")
    with pytest.raises(UsageError, match=r"needs a second image: set run\.batch_size to 2 or more"):
        distilling(tmp_path, "teacher.transplants=true", "run.batch_size=1")
    with pytest.raises(UsageError, match=r"pairs images otherwise than augment\.mixup and augment\.cutmix"):
        distilling(tmp_path, "teacher.transplants=true", "augment.cutmix=1.0")


def test_features_are_distilled_through_a_layer_of_the_run(tmp_path: Path) -> None:
    step = distilling(tmp_path, "teacher.feature_weight=2", "optimizer.weight_decay=0.1")
    images, seeds = torch.rand(6, 3, 32, 32), torch.arange(6)
    terms = step.terms(images, torch.zeros(6, dtype=torch.int64), seeds)
    taught = step.teaching(step._for_teacher(images), seeds)
    _, _, features, _ = step._student_logits(images, taught.view_images, torch.zeros(6, dtype=torch.int64))
    assert features is not None
    assert features.shape == (18, 16)
    assert step.projection is not None
    cosines = torch.nn.functional.cosine_similarity(step.projection(features), taught.features, dim=1)  # type: ignore[arg-type]
    torch.testing.assert_close(terms["features"], 2 * (1 - cosines).mean(), rtol=1e-4, atol=1e-6)
    terms["features"].backward()
    assert step.projection.weight.grad is not None
    assert set(step.method_state()) == {"weight", "bias"}


@pytest.mark.parametrize("setting", ["run.compile=true", "teacher.compile=true"])
def test_features_within_compiled_networks_are_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(UsageError, match=r"reads features within the (student|teacher): set \S+ = false"):
        distilling(tmp_path, "teacher.feature_weight=1", setting)
