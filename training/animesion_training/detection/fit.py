"""Training of the detector: batches of scenes, the optimiser, the average of the weights, and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.detection import network, scenes
from animesion_training.detection.labels import Material


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: batches from the first to the last.
        batch: scenes of 256 x 256 pixels in a batch; larger ones are fewer.
        sides: sides of scenes in pixels, multiples of 32; each batch has one of them.
        rate: learning rate of the pyramid and the heads.
        low_rate: learning rate of the backbone as a share of `rate`.
        decay: share of the steps at the end in which the rate falls to nothing.
        average: how much of the averaged weights each step keeps, in the long run.
        seed: of the scenes.
        every: steps between checkpoints.
    """

    steps: int = 2000
    batch: int = 16
    sides: tuple[int, ...] = (192, 256, 320, 448, 576)
    rate: float = 2e-3
    low_rate: float = 0.3
    decay: float = 0.4
    average: float = 0.998
    seed: int = 0
    every: int = 50


def backbone_weights(path: Path, module: network.FaceNetwork) -> None:
    """Start from a classifier's weights: a state dict of the whole backbone, in the order of timm's own.

    Raises:
        UsageError: the file holds no state dict, or its tensors do not fit.
    """
    state = _loaded(path)
    given = [value for value in state.values() if isinstance(value, Tensor)]
    parts = [*module.low, *module.eight, *module.sixteen]
    own = [value for part in parts for value in part.state_dict().values()]
    if len(given) < len(own) or any(a.shape != b.shape for a, b in zip(given, own, strict=False)):
        raise UsageError(f"{path} does not fit the backbone: its tensors have other shapes or another order")
    for mine, theirs in zip(own, given, strict=False):
        mine.copy_(theirs)


def load(path: Path, module: network.FaceNetwork) -> dict[str, Any]:
    """Read a checkpoint, and put its weights into the network.

    Raises:
        UsageError: there is none, or it is of another network.
    """
    state = _loaded(path)
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    for part in ("weights", "average"):
        found = state.get(part)
        if (
            not isinstance(found, dict)
            or {name: value.shape for name, value in found.items() if isinstance(value, Tensor)} != shapes
        ):
            raise UsageError(f"{path} is not a checkpoint of this detector: its weights have other names or shapes")
    if any(not isinstance(state.get(name), int) for name in ("count", "step")) or "optimiser" not in state:
        raise UsageError(f"{path} is not a checkpoint of a detector's training")
    module.load_state_dict(state["weights"])
    return state


def _loaded(path: Path) -> dict[str, Any]:
    """A file of torch that holds nothing but tensors and plain values."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own classes, which differ by version
        raise UsageError(
            f"{path} cannot be read as weights of torch: {next(iter(str(error).splitlines()), '')[:200]}"
        ) from None
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds no state dict")
    return state


class Average:
    """Moving average of a network's weights and statistics."""

    def __init__(self, module: torch.nn.Module, keep: float) -> None:
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self._keep, self.count = keep, 0

    def update(self, module: torch.nn.Module) -> None:
        """Take in the weights after a step."""
        self.count += 1
        keep = min(self._keep, (1 + self.count) / (10 + self.count))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - keep)
            else:
                self.state[name].copy_(value)


def batch(
    material: Material, side: int, count: int, rng: Random, device: torch.device
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Scenes as the network takes them: images (B, 3, side, side) from -1 to 1, faces, and areas that do not count."""
    made = [scenes.compose(material, side, rng) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([each.pixels for each in made])).to(device).permute(0, 3, 1, 2)
    images = pixels.to(torch.float32).div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
    return (
        images,
        [torch.tensor(each.faces, dtype=torch.float32, device=device).reshape(-1, 4) for each in made],
        [torch.tensor(each.ignored, dtype=torch.float32, device=device).reshape(-1, 4) for each in made],
    )


def fit(
    module: network.FaceNetwork,
    material: Material,
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    resume: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = print,
) -> Average:
    """Train the network; writes `out` every so often, so that a killed run can go on from it.

    Args:
        module: the network, changed in place.
        material: of the scenes.
        settings: how to train.
        out: checkpoint to write.
        device: where to train.
        resume: a checkpoint's content to go on from, with its optimiser and step.
        report: takes a line now and then.

    Returns:
        The averaged weights.
    """
    cv2.setNumThreads(1)
    try:
        place = torch.device(device)
        module.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {str(error).splitlines()[0][:200]}") from None
    low = [*module.eight.parameters(), *module.sixteen.parameters()]
    module.freeze()
    high = [
        weight
        for name, weight in module.named_parameters()
        if weight.requires_grad and not name.startswith(("low.", "eight.", "sixteen."))
    ]
    groups = [
        {"params": high, "lr": settings.rate, "share": 1.0},
        {"params": low, "lr": settings.rate, "share": settings.low_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    average = Average(module, settings.average)
    start = 0
    if resume is not None:
        optimiser.load_state_dict(resume["optimiser"])
        average.state = {name: value.to(place) for name, value in resume["average"].items()}
        average.count = resume["count"]
        start = resume["step"]
    began, seen, sums, summed = time.monotonic(), 0, np.zeros(2), 0
    for step in range(start, settings.steps):
        module.train()
        rng = Random(f"{settings.seed}/{step}")
        side = rng.choice(settings.sides)
        count = max(2, round(settings.batch * (256 / side) ** 2))
        images, faces, ignored = batch(material, side, count, rng, place)
        share = min(1.0, (step + 1) / 50, (settings.steps - step) / max(1.0, settings.decay * settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * group["share"] * share
        optimiser.zero_grad(set_to_none=True)
        losses = network.loss(module(images), faces, ignored)
        total = losses[0] + losses[1]
        if not math.isfinite(total.item()):
            report(f"step {step}: the loss is not finite, the batch is left out")
            continue
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*high, *low], 10.0)
        optimiser.step()
        average.update(module)
        seen += count
        sums += [float(each.detach()) for each in losses]
        summed += 1
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            rate = seen / (time.monotonic() - began)
            mean = sums / max(1, summed)
            report(f"step {step + 1}/{settings.steps}  score {mean[0]:.3f}  box {mean[1]:.3f}  {rate:.1f} scenes/s")
            sums[:], summed = 0, 0
            save(out, module, average, optimiser, step + 1)
    return average


def save(
    path: Path, module: network.FaceNetwork, average: Average, optimiser: torch.optim.Optimizer, step: int
) -> None:
    """Write a checkpoint; a reader sees the old one or the new one, never a part."""
    fresh = path.with_suffix(".part")
    torch.save(
        {
            "weights": module.state_dict(),
            "average": average.state,
            "count": average.count,
            "optimiser": optimiser.state_dict(),
            "step": step,
        },
        fresh,
    )
    fresh.replace(path)
