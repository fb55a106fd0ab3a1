"""The training images that are most similar to an image, by the embeddings of its network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from animesion.errors import AnimesionError
from animesion.images import codec
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval.embed import check_lengths, embed_split
from animesion_training.eval.reading import Reading
from animesion_training.eval.similarity import Embedded
from animesion_training.models.cal import CALClassifier
from animesion_training.models.create import bare
from animesion_training.models.embedding import last_layer
from animesion_training.weights import WeightsCard


@dataclass(frozen=True)
class Neighbour:
    """A training image.

    Attributes:
        key: its key.
        label: name of its class.
        similarity: cosine of the embeddings, -1 to 1.
        pixels: (h, w, 3), as stored, at most `SIDE` pixels a side.
    """

    key: str
    label: str
    similarity: float
    pixels: npt.NDArray[np.uint8]


#: Longest side of the pixels of a neighbour.
SIDE = 128


class Neighbours:
    """Embeddings of a split that images are compared with.

    Args:
        data: the data.
        embedded: embeddings of the split.
        split: its name.
        count: training images for each image.
        taps: whether the features of an image are read during the forward pass that classifies it.
    """

    def __init__(self, data: DataSplits, embedded: Embedded, split: str, count: int, *, taps: bool) -> None:
        self.taps = taps
        self.count = min(count, len(embedded))
        self.embedded = embedded
        self._samples = data.select(split)
        self._places = {key: i for i, key in enumerate(self._samples.keys)}

    @classmethod
    def of_split(
        cls,
        model: nn.Module,
        card: WeightsCard,
        data: DataSplits,
        split: str,
        context: DistributedContext,
        *,
        count: int = 4,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Neighbours:
        """Embed a split.

        Raises:
            UsageError: a network without embeddings, or images that are not square.
            AnimesionError: an image cannot be read.
        """
        last_layer(model)
        embedded = embed_split(model, data, split, Reading.of(card, "the network", advance=advance), context)
        return cls(data, embedded, split, count, taps=not isinstance(bare(model), CALClassifier))

    def of(self, model: nn.Module, x: Tensor, features: Tensor | None, *, without: str = "") -> tuple[Neighbour, ...]:
        """The most similar images of an input (1, 3, H, W), most similar first.

        Args:
            model: the network.
            x: the input.
            features: of its last layer, (1, D), if they were read.
            without: key of an image that is left out, because it is the image itself.
        """
        if features is None:
            with torch.inference_mode():
                features = bare(model).forward_features(x)  # type: ignore[operator]
        vector = functional.normalize(features.float(), dim=1).cpu().numpy()
        check_lengths(vector)
        return self.of_vector(vector[0], without=without)

    def of_vector(self, vector: npt.NDArray[np.float32], *, without: str = "") -> tuple[Neighbour, ...]:
        """The most similar images of an embedding (D,) of length 1."""
        similarity = self.embedded.vectors @ vector
        order = np.argsort(-similarity, kind="stable")[: self.count + 1].tolist()
        found = []
        for i in order:
            key = self.embedded.keys[i]
            pixels = self._pixels(key)
            if key != without and pixels is not None:
                label = self.embedded.classes[self.embedded.labels[i]]
                found.append(Neighbour(key, label, float(similarity[i]), pixels))
        return tuple(found[: self.count])

    def _pixels(self, key: str) -> npt.NDArray[np.uint8] | None:
        try:
            image = codec.decode(bytes(self._samples.read(self._places[key])), codec.Limits()).image.convert("RGB")
        except (AnimesionError, codec.RejectedImageError):
            return None
        image.thumbnail((SIDE, SIDE))
        return np.asarray(image)
