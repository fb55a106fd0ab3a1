"""Classifiers on top of features: cosine, and the aggregation of intermediate features (IFA).

The linear head is timm's own. Models get their heads in `create` and `ifa`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion_training.tokens.feature_head import FeatureHead


class CosineHead(nn.Module):
    """Logits are scaled cosines between the feature and the weight of each class, so norms cannot favour a class.

    `logits = scale * <f / |f|, w_c / |w_c|>`, without bias (Gidaris and Komodakis, CVPR 2018, eq. 2 and 3).

    Args:
        in_features: D.
        num_classes: number of classes.
        scale: inverse temperature; its initial value if it is learned. With 16 a softmax over a few thousand classes
            can become confident; LDAM uses a fixed 30.
        learn_scale: train the scale; otherwise it is a buffer.

    Shape:
        (B, D) to (B, num_classes), each logit within [-scale, scale].
    """

    scale: Tensor

    def __init__(self, in_features: int, num_classes: int, *, scale: float = 16.0, learn_scale: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.trunc_normal_(self.weight, std=0.02)
        start = torch.tensor(float(scale))
        if learn_scale:
            self.scale = nn.Parameter(start)
        else:
            self.register_buffer("scale", start)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to logits (B, num_classes)."""
        cosines = functional.linear(functional.normalize(features, dim=-1), functional.normalize(self.weight, dim=-1))
        return self.scale * cosines

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class IFAHead(FeatureHead):
    """Intermediate-feature aggregation over the class tokens of all blocks (Animesion, ISCAS 2022).

    `Linear(L, 1)` shared over channels, ReLU, LayerNorm, `Linear(D, num_classes)`.

    Args:
        num_layers: L, number of blocks whose class tokens are gathered.
        width: D.
        num_classes: number of classes; 0 for features alone.
        eps: epsilon of the norm; CLCA's variant of the head has 1e-5.

    Shape:
        (B, D, L) to (B, num_classes).
    """

    def __init__(self, num_layers: int, width: int, num_classes: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.layers = nn.Linear(num_layers, 1)
        self.act = nn.ReLU()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.num_features = width
        self.reset(num_classes)

    def last_layer(self, num_classes: int) -> nn.Module:
        """See `FeatureHead.last_layer`."""
        return nn.Linear(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Class tokens (B, D, L), first block first, to the input of the last layer (B, D)."""
        aggregated = self.layers(x).squeeze(-1)  # (B, D, L) to (B, D)
        features: Tensor = self.norm(self.act(aggregated))
        return features


def exclusion_loss(class_tokens: Tensor, *, temperature: float = 1.0, distance: int = 2) -> Tensor:
    """The divergence of the class tokens of blocks i and i + `distance`; the original subtracts 0.01 times it.

    `T^2 * sum_i KL(softmax(c[i + distance] / T) || softmax(c[i] / T))`, mean over the batch (Animesion, ISCAS 2022).

    Args:
        class_tokens: (B, D, L), the output of `IFAVisionTransformer.forward_features`.
        temperature: T.
        distance: number of blocks between the two of a pair.

    Returns:
        A scalar, >= 0; 0 if L <= `distance`.
    """
    scaled = class_tokens.float() / temperature
    total = scaled.new_zeros(())
    for i in range(scaled.shape[-1] - distance):
        far = scaled[..., i + distance].softmax(dim=1)
        total = total + functional.kl_div(scaled[..., i].log_softmax(dim=1), far, reduction="batchmean")
    return temperature**2 * total
