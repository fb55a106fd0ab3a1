"""The loss of counterfactual attention learning (CAL), and the feature centers that it pulls features to.

Rao et al., ICCV 2021 (arXiv 2108.08728), in the form that the teachers of TGDA use (Rios et al., arXiv 2507.12157).
The network is `models.cal.CALClassifier`, its steps of training are in `engine.steps`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.losses.classification import SoftmaxObjective
from animesion_training.models.cal import CALOutput
from animesion_training.options import in_range


class FeatureCenters(nn.Module):
    """A running center of each class's features, which training pulls them to.

    A call gives `c_y`, the center of each sample's class scaled to length 1 as it was before the call, and in training
    mode moves the center itself by `rate * (f - c_y)`. Where a class has several samples in the batch, the last one
    counts alone, as in the original; on any device, and over the batches of all processes in the order of their ranks.
    Centers start at 0. (arXiv 2507.12157; center loss: Wen et al., ECCV 2016.)

    Args:
        num_classes: number of classes.
        width: of the features, M C.
        rate: share of the way.

    Shape:
        features (B, width) and class ids (B,) int64 to (B, width), float32, without a gradient.
    """

    centers: Tensor

    def __init__(self, num_classes: int, width: int, rate: float = 0.05) -> None:
        super().__init__()
        self.rate = in_range("rate", rate, low=0.0, high=1.0)
        self.register_buffer("centers", torch.zeros(num_classes, width))

    @torch.no_grad()
    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        read = functional.normalize(self.centers[targets], dim=1)
        if self.training:
            step, moved = self.rate * (features.to(read) - read), targets
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                step, moved = _gather_rows(step), _gather_rows(targets)
            later = (moved[:, None] == moved).triu(1).any(1)
            # a class has one step that is not 0, so that the order of additions, which GPUs choose, has no say
            self.centers.index_add_(0, moved, step.masked_fill(later[:, None], 0.0))
        return read


def _gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, ...) of every process, by rank; B may differ."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(counts).max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([each[: int(count)] for each, count in zip(gathered, counts, strict=True)])


def center_loss(features: Tensor, centers: Tensor) -> Tensor:
    """Squared distance of features (B, D) from their centers (B, D), mean over the batch, sum over D; a scalar."""
    return (features.float() - centers).square().sum() / max(1, len(features))


def cal_loss(
    raw: CALOutput, aug: CALOutput, targets: Tensor, centers: nn.Module, *, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """What a CAL classifier is trained on: images and the views that its own attention made of them.

    `CE(raw) / 3 + 2/3 CE(aug) + CE(effects of both) + center_loss(features of raw)`, arXiv 2507.12157. The second and
    third are means over 2 B and 3 B.

    Args:
        raw: of the images, B of them.
        aug: of the views, 2 B: crops, then drops.
        targets: (B,), int64, class ids.
        centers: a `FeatureCenters`; in training mode it moves.
        label_smoothing: of all three cross-entropies, 0..1.

    Returns:
        The terms `label`, `views`, `effect` and `center`, scalars with their weights; their sum is the loss.

    Raises:
        UsageError: soft labels: the centers need one class an image.
        ValueError: views that are no multiple of the images.
    """
    if targets.is_floating_point():
        raise UsageError("a CAL classifier is trained on one class an image; switch MixUp and CutMix off")
    times, rest = divmod(len(aug.logits), max(1, len(targets)))
    if rest:
        raise ValueError(f"{len(aug.logits)} views are no multiple of {len(targets)} images")
    cross_entropy = SoftmaxObjective(label_smoothing=label_smoothing)
    repeated = targets.repeat(times)
    effects = torch.cat((raw.effect, aug.effect))
    return {
        "label": cross_entropy(raw.logits, targets) / 3,
        "views": cross_entropy(aug.logits, repeated) * 2 / 3,
        "effect": cross_entropy(effects, torch.cat((targets, repeated))),
        "center": center_loss(raw.features, centers(raw.features, targets)),
    }
