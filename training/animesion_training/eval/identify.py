"""Embed single images and faces with the weights of a gallery, to add them to it or to identify them.

`gallery` has the format and the comparison, `known` builds galleries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from animesion.errors import UsageError
from animesion.images.given import Given
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval import embed, tta
from animesion_training.eval.gallery import Gallery, Match, matches, mismatch
from animesion_training.eval.pieces import FaceCrop, Piece, batches, load_detector, pieces
from animesion_training.eval.reading import Reading
from animesion_training.eval.similarity import Embedded, FloatArray
from animesion_training.models.embedding import Embedder
from animesion_training.weights import load_model


class EmbeddedPiece(NamedTuple):
    """An image or face, and its embedding (D,); None if it cannot be read, which `problem` explains."""

    piece: Piece
    vector: FloatArray | None
    problem: str


class ImageEmbedder:
    """A network that turns images into embeddings, as they are given.

    Args:
        weights: a file of weights, or a checkpoint that describes its network.
        context: device to compute on.
        views: views of an image whose embeddings are averaged.
        advance: called with the number of images of a split that were embedded.

    Attributes:
        network: the network.
        card: of the weights.
        digest: of the weights, see `embed.network_digest`.

    Raises:
        UsageError: unusable weights, or a network without embeddings.
    """

    def __init__(
        self,
        weights: Path,
        context: DistributedContext,
        views: tta.TTA = "none",
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        model, self.card = load_model(weights)
        self.digest = embed.network_digest(model)
        self.network: nn.Module = model.to(context.device)
        self.context = context
        self.reading = Reading.of(self.card, weights, tta=views, advance=advance)
        self._embedder = Embedder(self.network).eval()

    def __call__(self, given: Iterable[Piece], batch_size: int = 32) -> Iterator[EmbeddedPiece]:
        """Embed images or faces, in their order.

        Raises:
            AnimesionError: see `embed.check_lengths`.
        """
        for chosen, problems, images in batches(given, self.reading, self.context.device, batch_size):
            with torch.inference_mode():
                vectors = embed.embed(self._embedder, images, self.reading.img_size, self.reading.tta).cpu().numpy()
            embed.check_lengths(vectors[[not problem for problem in problems]])
            for piece, problem, vector in zip(chosen, problems, vectors, strict=True):
                yield EmbeddedPiece(piece, None if problem else vector, problem)

    def split(self, data: DataSplits, split: str) -> Embedded:
        """Embed a split of whole images.

        Raises:
            AnimesionError: an image cannot be read, or embeddings are not finite.
        """
        return embed.embed_split(self.network, data, split, self.reading, self.context)

    def faces(
        self, data: DataSplits, split: str, faces: FaceCrop, *, problems: list[str]
    ) -> tuple[FloatArray, list[str], list[str]]:
        """Embed the faces in a split of illustrations: vectors (M, D), the class and the name of each.

        Args:
            data: the data.
            split: its name.
            faces: how faces are cropped.
            problems: sentences on images that cannot be read, or have no face, are added here.
        """
        samples, detector = data.select(split), load_detector(faces)
        vectors, classes, names = [], [], []
        for i, key in enumerate(samples.keys):
            given = Given(key, bytes(samples.read(i)))
            self.reading.advance(1)
            for each in self(pieces(given, detector, faces)):
                if each.vector is None:
                    problems.append(f"{key}: {each.problem}")
                    continue
                vectors.append(each.vector)
                classes.append(data.classes[samples.labels[i]])
                names.append(key)
        width = vectors[0].shape[0] if vectors else 1
        return np.stack(vectors) if vectors else np.zeros((0, width), dtype=np.float32), classes, names


@dataclass(frozen=True)
class Identity:
    """Who is in an image or face.

    Attributes:
        piece: the image or face.
        matches: the most similar classes, best first; empty if there is a problem.
        known: whether the best is similar enough.
        problem: why the image cannot be read, or that it contains no face; empty without a problem.
    """

    piece: Piece
    matches: tuple[Match, ...] = ()
    known: bool = False
    problem: str = ""


def identify(
    embedder: ImageEmbedder,
    gallery: Gallery,
    given: Iterable[Given],
    *,
    top: int = 5,
    threshold: float | None = None,
    faces: FaceCrop | None = None,
) -> Iterator[Identity]:
    """Identify images by a gallery, in their order.

    Args:
        embedder: of the weights of the gallery.
        gallery: the gallery.
        given: the images.
        top: number of classes for each.
        threshold: similarity below which an image is unknown; that of the gallery by default.
        faces: how to crop faces, several for an image possible; None for whole images.

    Raises:
        UsageError: a detector that is not ready.
    """
    limit = gallery.card.threshold if threshold is None else threshold
    detector = load_detector(faces)
    found = (piece for each in given for piece in pieces(each, detector, faces))
    for each in embedder(found):
        if each.vector is None:
            yield Identity(each.piece, problem=each.problem)
            continue
        [best] = matches(gallery, each.vector[None], top)
        yield Identity(each.piece, best, best[0].similarity >= limit)


def embedder_of(gallery: Gallery, path: Path, weights: Path | None, context: DistributedContext) -> ImageEmbedder:
    """Load the weights of a gallery.

    Args:
        gallery: the gallery.
        path: its file.
        weights: the weights; None for those that it names.
        context: device to compute on.

    Raises:
        UsageError: the weights are not found, or are not those of the gallery.
    """
    chosen = weights or path.parent / gallery.card.weights
    # the path is from the gallery, which may name a pipe that never ends
    if not (chosen.is_file() or chosen.is_dir()):
        raise UsageError(f"{path} was made with the weights {chosen}, which are not there: give them with --checkpoint")
    views: tta.TTA = gallery.card.views  # type: ignore[assignment]  # checked when it was read
    embedder = ImageEmbedder(chosen, context, views)
    if problem := mismatch(gallery.card, embedder.digest, embedder.card.name):
        raise UsageError(f"{path}: {problem}")
    if (embedder.reading.img_size, embedder.reading.crop_pct) != (gallery.card.img_size, gallery.card.crop_pct):
        raise UsageError(
            f"{path} has embeddings of images of {gallery.card.img_size} px, and the weights take "
            f"{embedder.reading.img_size} px: build it again"
        )
    return embedder
