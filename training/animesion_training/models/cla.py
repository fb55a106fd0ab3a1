"""Cross-layer aggregation (CLA): a classifier on the class tokens at the ends of groups of blocks.

`TokenVisionTransformer` gathers the class tokens. `heads.IFAHead` is the head that sums them, with one weight each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.options import whole_number
from animesion_training.tokens.feature_head import FeatureHead


@torch.fx.wrap
def check_batch(x: Tensor) -> None:
    """Raise `UsageError` for a batch of one, which has no batch statistics."""
    if x.shape[0] == 1:
        raise UsageError("head cla normalises over the batch and cannot be trained on a batch of one: drop that batch")


class CLAHead(FeatureHead):
    """Cross-layer aggregation head (CLCA, arXiv 2501.00243).

    BatchNorm over channels, depthwise convolution over the L class tokens, BatchNorm, GELU, 1x1 convolution to classes.
    Initial values are torch's own.

    Args:
        num_layers: L, number of gathered class tokens.
        width: D.
        num_classes: number of classes; 0 for features alone.
        groups: outputs per channel of the depthwise convolution.

    Shape:
        (B, D, L) to (B, num_classes).

    Raises:
        UsageError: fewer than one group; or, in training, a batch of one, which has no batch statistics.
    """

    def __init__(self, num_layers: int, width: int, num_classes: int, groups: int = 2) -> None:
        super().__init__()
        whole_number("groups of head cla", groups)
        self.norm_in = nn.BatchNorm1d(width)
        self.layers = nn.Conv1d(width, groups * width, num_layers, stride=num_layers, groups=width)
        self.norm = nn.BatchNorm1d(groups * width)
        self.act = nn.GELU()
        self.num_features = groups * width
        self.reset(num_classes)

    def last_layer(self, num_classes: int) -> nn.Module:
        """See `FeatureHead.last_layer`."""
        return nn.Conv1d(self.num_features, num_classes, 1)

    def features(self, x: Tensor) -> Tensor:
        """Class tokens (B, D, L), first block first, to the input of the last layer (B, groups * D)."""
        if self.training:
            check_batch(x)
        aggregated = self.layers(self.norm_in(x))  # (B, D, L) to (B, groups * D, 1)
        features: Tensor = self.act(self.norm(aggregated))
        return features.squeeze(-1)

    def classify(self, features: Tensor) -> Tensor:
        """See `FeatureHead.classify`."""
        logits: Tensor = self.fc(features[:, :, None])  # (B, num_classes, 1)
        return logits.squeeze(-1)
