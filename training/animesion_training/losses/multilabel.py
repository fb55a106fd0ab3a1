"""Losses for tags: each output is a binary decision of its own, and an image has any number of labels.

`objectives` creates them by name. Conventions are those of `classification`; the loss of an image is the sum over its
tags, as in the papers, so that its gradient for one tag does not depend on the number of tags.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from animesion_training.losses.classification import LossReduction, Objective
from animesion_training.options import in_range


class MultiLabelObjective(Objective):
    """Base class: targets are shares 0..1 of each tag, floating (B, T), in place of a class.

    Losses are linear in the targets, as MixUp needs it: `y l_+ + (1 - y) l_-`. Subclasses compute `terms`.
    """

    takes_soft: ClassVar[bool] = True

    def __init__(self, *, label_smoothing: float = 0.0, reduction: LossReduction = "mean") -> None:
        """Create one; with label smoothing e in 0..1, a target y becomes y (1 - e) + e / 2.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(reduction)
        self.label_smoothing = in_range("label_smoothing", label_smoothing, low=0.0, high=1.0)

    def terms(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of each output where the tag is present and where it is absent, (B, T) each."""
        raise NotImplementedError

    def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Compute the loss of each sample, (B,)."""
        present, absent = self.terms(logits)
        shares = targets.to(logits.dtype)
        if self.label_smoothing:
            shares = shares * (1 - self.label_smoothing) + self.label_smoothing / 2
        return (shares * present + (1 - shares) * absent).sum(1)

    def _check(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> None:
        if not targets.is_floating_point() or targets.shape != logits.shape:
            raise ValueError(
                f"targets must be floating (B, T) for logits {tuple(logits.shape)}, not {targets.dtype} "
                f"{tuple(targets.shape)}"
            )
        super()._check(logits, targets, teacher_logits)


class BinaryCrossEntropy(MultiLabelObjective):
    """Binary cross-entropy of sigmoids."""

    def terms(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `MultiLabelObjective.terms`."""
        return -functional.logsigmoid(logits), -functional.logsigmoid(-logits)


class AsymmetricLoss(MultiLabelObjective):
    """Asymmetric loss: focusing that differs for present and absent tags, and a margin that ignores easy absent ones.

    Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021 (arXiv 2009.14119), eq. 7: with
    p = sigmoid(z) and p_m = max(p - m, 0), `l_+ = -(1 - p)^gamma_pos log p` and
    `l_- = -p_m^gamma_neg log(1 - p_m)`. Gradients flow through the focusing weights too.
    """

    def __init__(
        self,
        *,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        margin: float = 0.05,
        label_smoothing: float = 0.0,
        reduction: LossReduction = "mean",
    ) -> None:
        """Create one from the focusing parameters, >= 0, and the margin m, 0 <= m < 1.

        Raises:
            UsageError: an option outside its range.
        """
        super().__init__(label_smoothing=label_smoothing, reduction=reduction)
        self.gamma_pos = in_range("gamma_pos", gamma_pos, low=0.0)
        self.gamma_neg = in_range("gamma_neg", gamma_neg, low=0.0)
        self.margin = in_range("margin", margin, low=0.0, high=1.0, high_open=True)

    def terms(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `MultiLabelObjective.terms`."""
        tiny = torch.finfo(logits.dtype).tiny  # keeps the slope of a power below 1 finite at 0
        present, absent = -functional.logsigmoid(logits), -functional.logsigmoid(-logits)
        shifted = logits.sigmoid()
        if self.margin:
            shifted = (shifted - self.margin).clamp_min(0)
            absent = -torch.log1p(-shifted)
        if self.gamma_pos:
            present = torch.sigmoid(-logits).clamp_min(tiny) ** self.gamma_pos * present
        if self.gamma_neg:
            absent = shifted.clamp_min(tiny) ** self.gamma_neg * absent
        return present, absent
