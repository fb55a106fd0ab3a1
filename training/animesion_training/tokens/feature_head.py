"""The interface of classifiers with learned layers before the last one."""

from __future__ import annotations

from torch import Tensor, nn


class FeatureHead(nn.Module):
    """A classifier that computes features, and classifies them with one last layer, `fc`.

    A subclass sets `num_features` and calls `reset` at the end of its constructor.

    Attributes:
        num_features: width of the features.
        fc: the last layer; an identity for 0 classes, with which the output is the features.
    """

    def features(self, x: Tensor) -> Tensor:
        """The input of the last layer, (B, `num_features`)."""
        raise NotImplementedError

    def last_layer(self, num_classes: int) -> nn.Module:
        """A last layer with initial weights."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """To logits (B, num_classes), or to the features without classes."""
        return self.classify(self.features(x).to(x.dtype))  # some features are computed in float32

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, `num_features`) to logits (B, num_classes), or unchanged without classes."""
        logits: Tensor = self.fc(features)
        return logits

    def reset(self, num_classes: int, like: Tensor | None = None) -> None:
        """Replace the last layer by one for another number of classes, 0 for none. The layers before it are kept.

        Args:
            num_classes: number of classes.
            like: a tensor whose device and type the layer has; None for torch's defaults.
        """
        layer = self.last_layer(num_classes) if num_classes else nn.Identity()
        self.fc: nn.Module = (layer if like is None else layer.to(like)).train(self.training)
