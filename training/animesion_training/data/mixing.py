"""MixUp and CutMix on the device: mix each image and its label with those of another image of the batch.

MixUp: Zhang et al., ICLR 2018 (arXiv 1710.09412). CutMix: Yun et al., ICCV 2019 (arXiv 1905.04899). The partner of an
image is its mirror image in the batch, as in timm; batches are in random order, so this is as random as a permutation.
Processes that hold pairs of a batch (`schedule.share`) mix it as one process would. `mix` is `draw_plan` followed by
`apply_plan`. Losses for the soft labels are in `animesion_training.losses`.
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
    """Settings of MixUp and CutMix.

    Attributes:
        mixup_alpha: MixUp weights are drawn from Beta(alpha, alpha); 0 disables MixUp.
        cutmix_alpha: the same for CutMix.
        probability: share of the draws that mix.
        cutmix_share: share of CutMix among them when both are enabled.
        per: whether method, weight and box are drawn once per batch, as in the papers, or once per sample.
        label_smoothing: e; before mixing, the label of the class is 1 - e + e / C, of the others e / C.

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
    """Images (B, channels, H, W) of unchanged type and layout, and soft labels (B, C), float32, rows that sum to 1."""

    images: Tensor
    targets: Tensor


@dataclass(frozen=True)
class MixingPlan:
    """The drawn mixture of each sample of a batch.

    Attributes:
        partners: (B,) index of its partner in the batch: the last for the first, and so on.
        blend: (B,) its own weight in MixUp; 1 without MixUp.
        boxes: (B, 4) box that is pasted from its partner: top, left, bottom, right in pixels, the ends exclusive; empty
            without CutMix.
        shares: (B,) share of its own label, 0..1: the blend, or the share of its own pixels.
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
        mixing: the settings.
        generator: the only source of randomness, one draw per batch; its state is all that a resumed run needs. With a
            generator on the CPU, the device is not synchronised.

    Raises:
        ValueError: shapes or types other than these.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating (B, channels, H, W), not {images.dtype} {tuple(images.shape)}")
    return apply_plan(images, targets, classes, draw_plan(images.shape, mixing, generator), mixing.label_smoothing)


def draw_plan(shape: tuple[int, ...], mixing: Mixing, generator: torch.Generator) -> MixingPlan:
    """Draw the mixtures for a batch of shape (B, channels, H, W), by one draw from the generator.

    What is drawn once per batch does not depend on B.
    """
    batch, _, height, width = shape
    # torch cannot draw Beta variates from a generator: one draw seeds numpy's
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
    rng = np.random.default_rng(int(seed))
    partners = np.arange(batch)[::-1]
    draws = batch if mixing.per == "sample" else 1  # D: arrays below are (D,) until they are broadcast
    cut_share = mixing.cutmix_share if mixing.mixup_alpha and mixing.cutmix_alpha else float(mixing.cutmix_alpha > 0)
    mixed = (rng.random(draws) < mixing.probability) & mixing.active
    cut = rng.random(draws) < cut_share
    # own weight in MixUp, and the share of the image that CutMix keeps
    blend = np.where(mixed & ~cut, _beta(rng, mixing.mixup_alpha, draws), 1.0)
    kept = np.where(mixed & cut, _beta(rng, mixing.cutmix_alpha, draws), 1.0)
    boxes = np.broadcast_to(_boxes(rng, kept, height, width), (batch, 4))
    # boxes are clipped at the border, so labels follow the pasted pixels and not `kept`
    pasted = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    blend = np.broadcast_to(blend, (batch,))
    return MixingPlan(partners, blend, boxes, blend * (1 - pasted / max(1, height * width)))


def apply_plan(images: Tensor, targets: Tensor, classes: int, plan: MixingPlan, label_smoothing: float = 0.0) -> Mixed:
    """Mix images (B, channels, H, W) and class ids (B,) by a plan, without synchronising with the device.

    Targets of tags, floating (B, T), are mixed as they are.
    """
    partners = _to(plan.partners, images.device)
    top, left, bottom, right = plan.boxes.T
    pastes = bool(((bottom > top) & (right > left)).any())
    blends = bool((plan.blend < 1).any())  # numpy, so the device is not synchronised
    if blends or pastes:
        others = images[partners]
        mixed = images
        if blends:
            mixed = torch.lerp(others, images, _to(plan.blend, images.device).to(images.dtype)[:, None, None, None])
        if pastes:
            mixed = torch.where(_inside(plan.boxes, images)[:, None], others, mixed)
        images = mixed
    labels = targets if targets.is_floating_point() else smooth_labels(targets, classes, label_smoothing)
    shares = _to(plan.shares, images.device).float()[:, None]
    return Mixed(images, torch.lerp(labels[partners], labels, shares))


def smooth_labels(targets: Tensor, classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Convert class ids (B,) to soft labels (B, C), float32: 1 - e + e / C for the class and e / C for the others."""
    rest = label_smoothing / classes
    labels = torch.full((len(targets), classes), rest, device=targets.device)
    return labels.scatter_(1, targets[:, None], 1 - label_smoothing + rest)


def _beta(rng: np.random.Generator, alpha: float, draws: int) -> FloatArray:
    return rng.beta(alpha, alpha, draws) if alpha > 0 else np.ones(draws)


def _boxes(rng: np.random.Generator, kept: FloatArray, height: int, width: int) -> IntArray:
    """Boxes (D, 4) that cover 1 - kept of the image around a uniform centre, clipped at the border (eq. 2)."""
    sides = np.sqrt(1 - kept)
    edges = []
    for length in (height, width):
        centre, side = rng.integers(length, size=len(kept)), (length * sides).astype(np.int64)
        edges.append((np.clip(centre - side // 2, 0, length), np.clip(centre - side // 2 + side, 0, length)))
    (top, bottom), (left, right) = edges
    return np.stack([top, left, bottom, right], axis=1)


def _inside(boxes: IntArray, images: Tensor) -> Tensor:
    """Mask (B, H, W), true inside each box."""
    top, left, bottom, right = _to(boxes, images.device)[:, :, None].unbind(1)
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    return ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]


def _to(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    # from_numpy shares memory and refuses broadcast views, which are read-only
    tensor = torch.from_numpy(np.array(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
