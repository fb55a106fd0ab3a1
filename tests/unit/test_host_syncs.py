"""A training step waits for nothing on the device: it runs on torch's `meta` device, where no number can be read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from animesion_training.distributed import DistributedContext
from animesion_training.engine.feed import feed
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.eval.scores import Scores
from animesion_training.models import create_model
from animesion_training.recipe import load
from animesion_training.weights import save_model
from tests import ranks

META = torch.device("meta")
STRONG = ("augment.mixup=0.4", "augment.cutmix=1.0", "objective.smoothing=0.1", "augment.erasing=0.5")
CASES = {
    "plain": (),
    "strong": (*STRONG, "augment.color_jitter=0.4", "run.ema=0.9", "optimizer.name=adamw", "run.accumulate=2"),
    "bf16": ("run.precision=bf16",),
    "cached": ("data.cache=device",),
    "cal": ("model.selector=cal", "run.accumulate=2"),
    "kd": ("teacher.weights=TEACHER",),
    "tgda": ("teacher.weights=TEACHER", "teacher.views=true"),
    "ldam": ("objective.name=ldam-drw", "model.head=cosine"),
    "evit": ("model.options.depth=12", "model.reduction=evit", "model.keep_rate=0.7"),
    "glsim": ("model.options.depth=12", "model.selector=glsim"),
    "clc": ("model.options.depth=12", "model.cache=clc", "model.head=cla"),
}


class Copies(TorchDispatchMode):
    """Counts copies between devices, each of which waits unless its source is page-locked."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            self.count += source.device != result.device
        return result


@pytest.fixture
def without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` has neither autocast nor generators: autocast does nothing, and generators are the CPU's."""
    autocast, generator = torch.autocast, torch.Generator
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *args, **kwargs: contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs),
    )
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("without_devices")
def test_a_step_reads_nothing_from_the_device(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    teacher = tmp_path / "teacher.safetensors"
    if any("TEACHER" in each for each in overrides):
        small: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2}
        save_model(create_model("vit_tiny_patch16", 3, 32, selector="cal", **small), teacher, ("a", "b", "c"))
    settings = [each.replace("TEACHER", str(teacher)) for each in overrides]
    recipe = load("scratch", [*ranks.SMALL, "run.batch_size=4", *settings])
    trainer = Trainer(recipe, ranks.drawn(12), tmp_path, DistributedContext(0, 1, META), Watcher())
    copies = []
    batches = feed(trainer.stream, META)
    while True:
        with Copies() as counter:
            if (fed := next(batches, None)) is None:
                break
            report = trainer.train_batch(fed.batch)
        copies.append(counter.count)
    with pytest.raises(NotImplementedError, match="meta"):  # here it would have waited
        report.numbers.tolist()
    # images, labels, indices, seeds and places of the batch, and the plan of a mixture (partners, blend or boxes,
    # shares); the first step also copies constants, once
    assert max(copies[1:]) <= 5 + (3 if "augment.mixup=0.4" in overrides else 0)


def test_evaluation_reads_nothing_before_its_end() -> None:
    scores = Scores(5)
    with Copies() as copies:
        for start in (0, 4):
            outputs = torch.empty((4, 5), device=META)
            scores.add(outputs, torch.arange(4), torch.arange(start, start + 4))
    assert len(scores) == 8
    assert copies.count == 2 * 2  # targets and indices of each batch to the device, nothing back
