"""Classification losses for balanced and long-tailed datasets, as modules over logits and labels.

`objectives` creates them by name, `animesion_training.data.mixing` makes soft labels. All losses share these
conventions:

- They compute in float32, also under autocast, and in float64 for float64 logits. Logits up to 1e30 in magnitude give a
  finite loss and gradient.
- `reduction="mean"` divides by the number of samples, also where classes are weighted. The mean of a batch is then the
  mean of its equal parts, so gradient accumulation and several processes change nothing; dividing by the sum of the
  weights, as `torch.nn.CrossEntropyLoss` does, has no such property. The mean over an empty batch is 0.
- A class without training images is treated as one with a single image, and is ignored when weights or margins are
  normalised.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.options import in_range

LossReduction = Literal["mean", "sum", "none"]


class Objective(nn.Module):
    """Base class of objectives: checks shapes, disables autocast and reduces; subclasses compute the loss per sample.

    Attributes:
        needs_teacher: whether the call takes the teacher's logits as its third argument.
        takes_soft: whether soft labels (B, C) are accepted, as MixUp and CutMix make them.
        needs_cosines: whether the logits must be cosines, of the head `cosine` with a fixed scale of 1.
    """

    needs_teacher: ClassVar[bool] = False
    takes_soft: ClassVar[bool] = True
    needs_cosines: ClassVar[bool] = False

    def __init__(self, reduction: LossReduction = "mean") -> None:
        """Create an objective.

        Raises:
            UsageError: an unknown reduction.
        """
        super().__init__()
        if reduction not in get_args(LossReduction):
            raise UsageError(f"reduction must be one of {', '.join(get_args(LossReduction))}, not {reduction!r}")
        self.reduction = reduction

    def set_epoch(self, epoch: int) -> None:
        """Notify the objective that an epoch begins, counted from 0, also after a resume; most objectives ignore it."""

    def forward(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            logits: (B, C), floating.
            targets: class ids 0..C-1, int64 (B,), or soft labels, floating (B, C), whose rows sum to 1.
            teacher_logits: (B, C), floating, exactly when `needs_teacher`.

        Returns:
            A scalar, or (B,) with `reduction="none"`; float32, or float64 for float64 logits.

        Raises:
            ValueError: shapes or types other than these.
            UsageError: soft labels for an objective that does not support them.
        """
        self._check(logits, targets, teacher_logits)
        with torch.autocast(logits.device.type, enabled=False):
            teacher = () if teacher_logits is None else (_full_precision(teacher_logits),)
            losses = self.losses(_full_precision(logits), targets, *teacher)
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total if self.reduction == "sum" else total / max(1, len(losses))

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss per sample, (B,), from logits (B, C) in full precision; `teacher` is () or one (B, C)."""
        raise NotImplementedError

    def _check(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> None:
        if logits.ndim != 2 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating (B, C), not {logits.dtype} {tuple(logits.shape)}")
        hard = targets.dtype == torch.int64 and targets.shape == logits.shape[:1]
        soft = targets.is_floating_point() and targets.shape == logits.shape
        if not hard and not soft:
            raise ValueError(
                f"targets must be int64 (B,) or floating (B, C) for logits {tuple(logits.shape)}, "
                f"not {targets.dtype} {tuple(targets.shape)}"
            )
        if soft and not self.takes_soft:
            raise UsageError(f"{type(self).__name__} needs one class per image: switch MixUp and CutMix off")
        if self.needs_teacher != (teacher_logits is not None):
            raise ValueError(f"{type(self).__name__} {'needs' if self.needs_teacher else 'does not take'} a teacher")
        if teacher_logits is not None and teacher_logits.shape != logits.shape:
            raise ValueError(f"the teacher's logits are {tuple(teacher_logits.shape)}, not {tuple(logits.shape)}")


class SoftmaxObjective(Objective):
    """Weighted focal cross-entropy of a shifted softmax; all objectives but LDAM are special cases.

    With q the label, smoothed by `label_smoothing` e as q (1 - e) + e / C, the loss of a sample is
    `-sum_c q_c w_c (1 - p_c)^gamma log p_c` with `p = softmax(z + shift)`. It is linear in the label: the loss of a
    mixture of two labels is the mixture of their losses.
    """

    weights: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        *,
        weights: npt.ArrayLike | None = None,
        shift: npt.ArrayLike | None = None,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: LossReduction = "mean",
    ) -> None:
        """Create one from class weights (C,), a shift of the logits (C,), gamma >= 0 and label smoothing 0..1.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(reduction)
        self.gamma = in_range("gamma", gamma, low=0.0)
        self.label_smoothing = in_range("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.register_buffer("weights", _per_class(weights), persistent=False)
        self.register_buffer("shift", _per_class(shift), persistent=False)

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss of each sample, (B,)."""
        if self.shift is not None:
            logits = logits + _per_logit(self.shift, logits)
        gains = torch.log_softmax(logits, dim=1)  # (B, C): w_c (1 - p_c)^gamma log p_c, built up below
        if self.gamma:
            # expm1 keeps 1 - p exact near p = 1; the floor keeps its slope finite there for gamma < 1
            misses = (-torch.expm1(gains)).clamp_min(torch.finfo(gains.dtype).tiny)
            gains = misses**self.gamma * gains
        if self.weights is not None:
            gains = gains * _per_logit(self.weights, logits)
        of_label = gains.gather(1, targets[:, None]).squeeze(1) if targets.ndim == 1 else (targets * gains).sum(1)
        if self.label_smoothing:
            of_label = (1 - self.label_smoothing) * of_label + self.label_smoothing * gains.mean(1)
        return -of_label


class LDAM(Objective):
    """Label-distribution-aware margins with deferred re-weighting.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019
    (arXiv 1906.07413), section 3.2 and algorithm 1. The loss of a sample of class y is `w_y` times the cross-entropy
    of `s (z - m_y [c = y])`, with margins proportional to `n_c^(-1/4)` and scaled so that the largest is `max_m`. `w`
    is 1 before epoch `drw_epoch` and `class_balanced_weights` from then on. The logits should be cosines (-1..1), as
    `s` multiplies them here: use a cosine head with a fixed scale of 1.
    """

    takes_soft: ClassVar[bool] = False
    margins: Tensor
    weights: Tensor

    def __init__(
        self,
        counts: npt.ArrayLike,
        *,
        max_m: float = 0.5,
        scale: float = 30.0,
        drw_epoch: int | None = None,
        beta: float = 0.9999,
        reduction: LossReduction = "mean",
    ) -> None:
        """Create one.

        Args:
            counts: training images of each class, (C,).
            max_m: the largest margin, >= 0.
            scale: s, > 0.
            drw_epoch: the first epoch with class weights, counted from 0; None for no class weights.
            beta: of the effective number of images, from which the weights are computed, 0 <= beta < 1.
            reduction: mean, sum or none.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(reduction)
        self.scale = in_range("scale", scale, low=0.0, low_open=True)
        if drw_epoch is not None and (type(drw_epoch) is not int or drw_epoch < 0):
            raise UsageError(f"drw_epoch must be an epoch, counted from 0, not {drw_epoch!r}")
        self.drw_epoch = drw_epoch
        self.reweighted = False
        images = _counts(counts)
        rarity = np.maximum(images, 1.0) ** -0.25  # n^(-1/4), (C,)
        # normalised by the rarest class that has images; classes without any are capped at the same margin
        margins = np.minimum(rarity / rarity[images > 0].max(), 1.0) * in_range("max_m", max_m, low=0.0)
        self.register_buffer("margins", _per_class(margins), persistent=False)
        self.register_buffer("weights", _per_class(class_balanced_weights(images, beta)), persistent=False)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Switch class weights on from `drw_epoch`."""
        self.reweighted = self.drw_epoch is not None and epoch >= self.drw_epoch

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss of each sample, (B,)."""
        margins = _per_logit(self.margins, logits)[targets]  # (B,), of each sample's class
        shifted = self.scale * logits.scatter_add(1, targets[:, None], -margins[:, None])
        losses = -torch.log_softmax(shifted, dim=1).gather(1, targets[:, None]).squeeze(1)
        return losses * self.weights[targets].to(losses.dtype) if self.reweighted else losses


def class_balanced_weights(counts: npt.ArrayLike, beta: float = 0.9999) -> npt.NDArray[np.float64]:
    """Compute class weights `(1 - beta) / (1 - beta^n)`, normalised to mean 1 over the classes that have images.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019 (arXiv 1901.05555),
    section 4. beta = 0 gives equal weights; beta towards 1 approaches inverse frequencies.

    Args:
        counts: training images of each class, (C,); an empty class gets the weight of one with a single image.
        beta: 0 <= beta < 1.

    Raises:
        UsageError: beta out of range, or no class has an image.
    """
    beta = in_range("beta", beta, low=0.0, high=1.0, high_open=True)
    images = _counts(counts)
    weights: npt.NDArray[np.float64] = np.ones(len(images))
    if beta:
        weights = (1 - beta) / -np.expm1(np.maximum(images, 1.0) * math.log(beta))
    weights /= weights[images > 0].mean()
    return weights


def log_prior(counts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute the logarithm of each class's share of the training images, (C,); an empty class counts as one image.

    Raises:
        UsageError: no class has an image.
    """
    images = _counts(counts)
    logs: npt.NDArray[np.float64] = np.log(np.maximum(images, 1.0) / images.sum())
    return logs


def _counts(counts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    images = np.asarray(counts, dtype=np.float64)
    if images.ndim != 1 or not np.isfinite(images).all() or (images < 0).any():
        raise ValueError("counts must be the non-negative numbers of images of the classes, (C,)")
    if not images.any():
        raise UsageError("no class has a training image; the objective needs the counts of the training split")
    return images


def _per_class(values: npt.ArrayLike | None) -> Tensor | None:
    return None if values is None else torch.tensor(np.asarray(values), dtype=torch.float32)


def _per_logit(per_class: Tensor, logits: Tensor) -> Tensor:
    if len(per_class) != logits.shape[1]:
        raise ValueError(f"the objective has {len(per_class)} classes, the logits have {logits.shape[1]}")
    return per_class.to(logits.dtype)


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
