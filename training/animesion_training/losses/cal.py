"""The loss of counterfactual attention learning (CAL), and the feature centers that it pulls features to.

Rao et al., ICCV 2021 (arXiv 2108.08728), in the form that the teachers of TGDA use (Rios et al., arXiv 2507.12157).
The network is `models.cal.CALClassifier`, its steps of training are in `engine.steps`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.losses.classification import SoftmaxObjective
from animesion_training.models.cal import CALOutput
from animesion_training.options import in_range


class FeatureCenters(nn.Module):
    """A running center of the features of each class, which training pulls them to.

    A call returns `c_y`, the center of each sample's class, normalised to length 1. `move` then moves the centers by
    `rate * (f - c_y)`, once per optimizer step. If a class has several samples in the batch, only the last one counts,
    as in the original. Centers start at 0. (arXiv 2507.12157; center loss: Wen et al., ECCV 2016.)

    Args:
        num_classes: number of classes.
        width: width of the features, M C.
        rate: share of the distance that a center moves, in [0, 1].

    Shape:
        class ids (B,) int64 to (B, width), float32, without a gradient.
    """

    centers: Tensor

    def __init__(self, num_classes: int, width: int, rate: float = 0.05) -> None:
        super().__init__()
        self.rate = in_range("rate", rate, low=0.0, high=1.0)
        self.register_buffer("centers", torch.zeros(num_classes, width))

    @torch.no_grad()
    def forward(self, targets: Tensor) -> Tensor:
        """See the class."""
        return functional.normalize(self.centers[targets], dim=1)

    @torch.no_grad()
    def move(self, features: Tensor, targets: Tensor) -> None:
        """Move the centers.

        Args:
            features: of the whole batch, in its order, (B, width).
            targets: class ids (B,), int64; rows of -1 are ignored.
        """
        present = targets >= 0
        classes = targets.clamp(min=0)
        step = self.rate * (features.to(self.centers) - self(classes))
        # whether a later sample has the same class, (B,)
        later = (targets[:, None] == targets).triu(1).any(1)
        # only one step per class is not 0, so the order of additions, which varies on GPUs, does not matter
        self.centers.index_add_(0, classes, step.masked_fill((later | ~present)[:, None], 0.0))


def center_loss(features: Tensor, centers: Tensor) -> Tensor:
    """Squared distance of features (B, D) from their centers (B, D): mean over the batch, sum over D; a scalar."""
    return (features.float() - centers).square().sum() / max(1, len(features))


def cal_loss(
    raw: CALOutput, aug: CALOutput, targets: Tensor, centers: nn.Module, *, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """The training loss of a CAL classifier, on images and on the views made by its own attention.

    `CE(raw) / 3 + n/3 CE(aug) + (n + 1)/3 CE(effects of both) + center_loss(features of raw)` with n views of each
    image: 2 in arXiv 2507.12157, crop and drop, and 3 in CALMix (arXiv 2605.18700), with the mixture between them. The
    second and third are means over n B and (n + 1) B, so every image has weight 1/3.

    Args:
        raw: output for B images.
        aug: output for n B views, the same view of all images one after the other.
        targets: class ids (B,), int64.
        centers: a `FeatureCenters`; it is read only.
        label_smoothing: label smoothing of all three cross-entropies, in [0, 1].

    Returns:
        The terms `label`, `views`, `effect` and `center`, weighted scalars; their sum is the loss.

    Raises:
        UsageError: soft labels; the centers need one class per image.
        ValueError: the number of views is not a multiple of the number of images.
    """
    if targets.is_floating_point():
        raise UsageError("a CAL classifier needs one class per image: switch MixUp and CutMix off")
    times, rest = divmod(len(aug.logits), max(1, len(targets)))
    if rest:
        raise ValueError(
            f"the number of views, {len(aug.logits)}, is not a multiple of the number of images, {len(targets)}"
        )
    cross_entropy = SoftmaxObjective(label_smoothing=label_smoothing)
    repeated = targets.repeat(times)
    effects = torch.cat((raw.effect, aug.effect))
    return {
        "label": cross_entropy(raw.logits, targets) / 3,
        "views": cross_entropy(aug.logits, repeated) * times / 3,
        "effect": cross_entropy(effects, torch.cat((targets, repeated))) * (times + 1) / 3,
        "center": center_loss(raw.features, centers(targets)),
    }
