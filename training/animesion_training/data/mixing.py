"""MixUp and CutMix: batches in which images, and their labels, are mixtures of two; on the device, replayable.

MixUp: Zhang et al., ICLR 2018 (arXiv 1710.09412). CutMix: Yun et al., ICCV 2019 (arXiv 1905.04899). The partner of each
image is another place of the same batch, by a random permutation. `mix` draws and applies in one; `draw_plan` and
`apply_plan` are its two halves. Losses for the soft labels are in `losses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.options import in_range

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed.

    Attributes:
        mixup_alpha: MixUp weights are drawn from Beta(alpha, alpha); 0 leaves MixUp out.
        cutmix_alpha: the same for CutMix.
        probability: share of the draws that mix at all.
        cutmix_share: share of CutMix among them where both are on.
        per: whether method, weight and box are drawn once a batch, as in the papers, or for each sample.
        label_smoothing: e; the label of a class is 1 - e + e / C, of the others e / C, before labels are mixed.

    Raises:
        UsageError: a value outside its range.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    cutmix_share: float = 0.5
    per: Literal["batch", "sample"] = "batch"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        in_range("mixup_alpha", self.mixup_alpha, low=0.0)
        in_range("cutmix_alpha", self.cutmix_alpha, low=0.0)
        in_range("probability", self.probability, low=0.0, high=1.0)
        in_range("cutmix_share", self.cutmix_share, low=0.0, high=1.0)
        in_range("label_smoothing", self.label_smoothing, low=0.0, high=1.0)
        if self.per not in ("batch", "sample"):
            raise UsageError(f"per must be batch or sample, not {self.per!r}")

    @property
    def active(self) -> bool:
        """Whether any image is ever mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


class Mixed(NamedTuple):
    """Images (B, channels, H, W) as given in type and layout, and soft labels (B, C), float32, rows that sum to 1."""

    images: Tensor
    targets: Tensor


@dataclass(frozen=True)
class MixingPlan:
    """What happens to each sample of a batch.

    Attributes:
        partners: (B,) the place of its partner.
        blend: (B,) its own weight in MixUp, 1 where that does not happen.
        boxes: (B, 4) what is pasted from its partner: top, left, bottom, right in pixels, the ends exclusive; empty
            where CutMix does not happen.
        shares: (B,) share of its own label, 0..1: the blend, or the share of its pixels that were left.
    """

    partners: IntArray
    blend: FloatArray
    boxes: IntArray
    shares: FloatArray


def mix(images: Tensor, targets: Tensor, classes: int, mixing: Mixing, generator: torch.Generator) -> Mixed:
    """Mix a batch.

    Args:
        images: (B, channels, H, W), floating, on any device.
        targets: class ids 0..classes - 1, int64 (B,), on the same device.
        classes: C.
        mixing: how.
        generator: the only source of chance, one draw a batch: its state is all that a resume needs. A generator on the
            CPU spares the device a wait.

    Raises:
        ValueError: shapes or types other than these.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating (B, channels, H, W), not {images.dtype} {tuple(images.shape)}")
    return apply_plan(images, targets, classes, draw_plan(images.shape, mixing, generator), mixing.label_smoothing)


def draw_plan(shape: tuple[int, ...], mixing: Mixing, generator: torch.Generator) -> MixingPlan:
    """Draw what happens to each sample of a batch of shape (B, channels, H, W); one draw from the generator."""
    batch, _, height, width = shape
    # torch has no Beta variates from a generator: one draw of it seeds one that has
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
    random = np.random.default_rng(int(seed))
    partners = random.permutation(batch)
    draws = batch if mixing.per == "sample" else 1
    cut_share = mixing.cutmix_share if mixing.mixup_alpha and mixing.cutmix_alpha else float(mixing.cutmix_alpha > 0)
    mixed = (random.random(draws) < mixing.probability) & mixing.active
    cut = random.random(draws) < cut_share
    blend = np.where(mixed & ~cut, _beta(random, mixing.mixup_alpha, draws), 1.0)
    kept = np.where(mixed & cut, _beta(random, mixing.cutmix_alpha, draws), 1.0)
    boxes = np.broadcast_to(_boxes(random, kept, height, width), (batch, 4))
    pasted = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    blend = np.broadcast_to(blend, (batch,))
    return MixingPlan(partners, blend, boxes, blend * (1 - pasted / max(1, height * width)))


def apply_plan(images: Tensor, targets: Tensor, classes: int, plan: MixingPlan, label_smoothing: float = 0.0) -> Mixed:
    """Mix images (B, channels, H, W) and class ids (B,) as planned; nothing here waits for the device."""
    partners = _to(plan.partners, images.device)
    top, left, bottom, right = plan.boxes.T
    pastes = bool(((bottom > top) & (right > left)).any())
    blends = bool((plan.blend < 1).any())
    if blends or pastes:
        others = images[partners]
        mixed = images
        if blends:
            mixed = torch.lerp(others, images, _to(plan.blend, images.device).to(images.dtype)[:, None, None, None])
        if pastes:
            mixed = torch.where(_inside(plan.boxes, images)[:, None], others, mixed)
        images = mixed
    labels = smooth_labels(targets, classes, label_smoothing)
    shares = _to(plan.shares, images.device).float()[:, None]
    return Mixed(images, torch.lerp(labels[partners], labels, shares))


def smooth_labels(targets: Tensor, classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Soft labels (B, C), float32, of class ids (B,): 1 - e + e / C for the class and e / C for the others."""
    rest = label_smoothing / classes
    labels = torch.full((len(targets), classes), rest, device=targets.device)
    return labels.scatter_(1, targets[:, None], 1 - label_smoothing + rest)


def _beta(random: np.random.Generator, alpha: float, draws: int) -> FloatArray:
    return random.beta(alpha, alpha, draws) if alpha > 0 else np.ones(draws)


def _boxes(random: np.random.Generator, kept: FloatArray, height: int, width: int) -> IntArray:
    """Boxes (draws, 4) of the share 1 - kept of the image around a uniform centre, clipped at the border (eq. 2)."""
    sides = np.sqrt(1 - kept)
    edges = []
    for length in (height, width):
        centre, side = random.integers(length, size=len(kept)), (length * sides).astype(np.int64)
        edges.append((np.clip(centre - side // 2, 0, length), np.clip(centre - side // 2 + side, 0, length)))
    (top, bottom), (left, right) = edges
    return np.stack([top, left, bottom, right], axis=1)


def _inside(boxes: IntArray, images: Tensor) -> Tensor:
    """(B, H, W), true for the pixels of each box."""
    top, left, bottom, right = _to(boxes, images.device)[:, :, None].unbind(1)
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    return ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]


def _to(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    # from_numpy shares memory and refuses broadcast views, which are read-only
    held = torch.from_numpy(np.array(values))
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)
