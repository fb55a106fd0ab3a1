"""Embeddings of images: the input of the last layer of a network, as vectors of length 1.

Every classifier that applies one last layer to one vector per image has embeddings. They compare images by their
cosine, also of classes that the network was not trained on. Objectives that train them are in `losses.metric`.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.models.cal import CALClassifier
from animesion_training.models.create import bare
from animesion_training.tokens.feature_head import FeatureHead


def last_layer(model: nn.Module) -> nn.Module:
    """Return the layer that turns features into logits; an identity for a network without classes.

    Raises:
        UsageError: the network has no such layer, or several.
    """
    network = bare(model)
    get: Any = getattr(network, "get_classifier", None)
    layer = get() if get else None
    if isinstance(layer, FeatureHead):
        layer = layer.fc
    if not isinstance(layer, nn.Module):
        raise UsageError(
            f"{type(network).__name__} has {'no' if layer is None else 'several'} last layers, so it has no embeddings"
        )
    return layer


def feature_width(layer: nn.Module) -> int:
    """Return the number of features that a last layer reads.

    Raises:
        UsageError: it does not say.
    """
    width = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    if not isinstance(width, int):
        raise UsageError(f"the last layer {type(layer).__name__} does not say how many features it reads")
    return width


class FeatureTap:
    """Reads the input of the last layer during a forward pass: `with tap: model(x)`, then `tap.take()`.

    Args:
        model: the network.

    Raises:
        UsageError: see `last_layer`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(bare(model)).__name__
        self._layer = last_layer(model)
        self._inputs: list[Tensor] = []

    def __enter__(self) -> Self:
        self._inputs = []
        self._hook = self._layer.register_forward_pre_hook(lambda _, args: self._inputs.append(args[0]))
        return self

    def __exit__(self, *failure: object) -> None:
        self._hook.remove()

    def take(self) -> Tensor:
        """Return the features of the pass, (B, D).

        Raises:
            UsageError: the last layer was not applied once, to one vector per image.
        """
        inputs, self._inputs = self._inputs, []
        if len(inputs) != 1:
            raise UsageError(
                f"{self._name} applies its last layer {len(inputs)} times to an image, so it has no one embedding of it"
            )
        features = inputs[0]
        if features.ndim == 4 and features.shape[2:] == (1, 1):  # before a convolution as the last layer
            features = features.flatten(1)
        if features.ndim != 2:
            raise UsageError(
                f"the last layer of {self._name} classifies several vectors of an image ({tuple(features.shape)}), so "
                "it has no one embedding of it"
            )
        return features


class Whitening(nn.Module):
    """A linear map of embeddings, in which classes vary alike in all directions, after a power of each value.

    A network has one as its child `whitening`, with its weights in the same file; `eval.whitening` fits it.

    Args:
        width: D, length of embeddings.

    Attributes:
        power: exponent of absolute values; 1 changes none. Less spreads the influence of few strong features over
            more (Perronnin et al., ECCV 2010).
        mean: subtracted, (D,).
        matrix: (D, D).

    Shape:
        (B, D), rows of length 1, to the same.
    """

    power: Tensor
    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("power", torch.ones(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = functional.normalize(x.sign() * x.abs() ** self.power, dim=1)
        return functional.normalize((x - self.mean) @ self.matrix, dim=1)


class Embedder(nn.Module):
    """A network whose output is embeddings in place of logits.

    Args:
        model: a network of `create_model`; it is used, not copied.

    Raises:
        UsageError: see `last_layer`; in the first forward pass, see `FeatureTap.take`.

    If the network has a `Whitening`, embeddings are whitened.

    Shape:
        (B, C, H, W) to (B, D), float32, rows of length 1.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._reads_features = isinstance(bare(model), CALClassifier)  # its head is not called as a module
        self._tap = None if self._reads_features else FeatureTap(model)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self._tap is None:
            features: Tensor = bare(self.model).forward_features(x)  # type: ignore[operator]
        else:
            with self._tap:
                self.model(x)
            features = self._tap.take()
        whitening = getattr(bare(self.model), "whitening", None)
        with torch.autocast(x.device.type, enabled=False):
            vectors = functional.normalize(features.float(), dim=1)
            return whitening(vectors) if isinstance(whitening, Whitening) else vectors
