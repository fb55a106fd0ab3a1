"""Top-k predictions of trained weights for image files and folders, or for the faces in the images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from animesion import detectors
from animesion.errors import UsageError
from animesion.images import codec
from animesion.images import files as image_files
from animesion_training.data import Augment, Resize
from animesion_training.data.decode import Within, decode_into
from animesion_training.distributed import DistributedContext
from animesion_training.eval.evaluate import as_rgb
from animesion_training.weights import load_model


@dataclass(frozen=True)
class Prediction:
    """Predictions for one image or face.

    Attributes:
        path: the image.
        guesses: class names and probabilities, most probable first; empty when there is a problem.
        problem: why the image cannot be read, or that it contains no face; empty without a problem.
        box: the face with its margin: left, top, right, bottom in pixels of the upright image.
        score: score of the face by the detector.
    """

    path: Path
    guesses: tuple[tuple[str, float], ...] = ()
    problem: str = ""
    box: tuple[int, int, int, int] | None = None
    score: float = 0.0


@dataclass(frozen=True)
class FaceCrop:
    """How faces are cropped before prediction.

    Attributes:
        detector: name of the detector.
        margin: added on each side, as a share of the side of the box; use the margin of the training data.
        every: whether to use all faces of an image; otherwise the one with the highest score.
        min_score: lowest score of a face.
        or_whole: whether to use the whole image where no face is found; otherwise that is a problem.
        options: options of the detector.
    """

    detector: str
    margin: float = 0.0
    every: bool = False
    min_score: float = 0.0
    or_whole: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def predict(
    weights: Path,
    paths: Sequence[Path],
    context: DistributedContext,
    *,
    top: int = 5,
    batch_size: int = 32,
    faces: FaceCrop | None = None,
) -> Iterator[Prediction]:
    """Predict the classes of images, in the order of the paths.

    Args:
        weights: a file written by `save_model`.
        paths: image files, and folders, which are searched recursively.
        context: device to compute on.
        top: number of guesses per image, at most the number of classes.
        batch_size: images per batch.
        faces: how to crop faces; predictions are then of faces, several per image possible. None for whole images.

    Raises:
        UsageError: a path that does not exist, an unusable weights file, or a detector that is not ready.
    """
    if faces and faces.detector == "boxes":
        raise UsageError(
            "the detector 'boxes' needs the boxes of a source, which single images do not have: choose another"
        )
    detector = detectors.load(faces.detector, faces.options) if faces else None
    model, card = load_model(weights)
    model = model.to(context.device)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{weights} takes images of {card.img_size}: only square inputs are supported")
    transform = Resize(card.img_size, card.crop_pct)
    normalise = Augment.plain(as_rgb(card.mean), as_rgb(card.std))
    names = card.classes or tuple(str(i) for i in range(card.num_classes))
    pieces = (piece for path in image_files.files(paths) for piece in _pieces(path, detector, faces))
    while chosen := list(itertools.islice(pieces, batch_size)):
        pixels = np.zeros((len(chosen), card.img_size, card.img_size, 3), dtype=np.uint8)
        problems = [piece.into(pixels[i], transform) for i, piece in enumerate(chosen)]
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(context.device)
            seeds = torch.zeros(len(chosen), dtype=torch.int64, device=context.device)
            best = model(normalise(batch, seeds)).float().softmax(1).topk(min(top, card.num_classes))
        for piece, problem, values, ids in zip(
            chosen, problems, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            guesses = tuple((names[i], value) for i, value in zip(ids, values, strict=True))
            yield Prediction(piece.path, () if problem else guesses, problem, piece.box, piece.score)


def decode_file(path: Path, out: np.ndarray, transform: Resize) -> str:
    """Decode an image into `out` (S, S, 3); return the reason of a failure, or an empty string."""
    [piece] = _pieces(path, None, None)
    return piece.into(out, transform)


@dataclass(frozen=True)
class _Piece:
    """An image, or a face in one, to predict on."""

    path: Path
    content: bytes = b""
    problem: str = ""
    box: tuple[int, int, int, int] | None = None
    score: float = 0.0

    def into(self, out: np.ndarray, transform: Resize) -> str:
        """Decode into a row of the batch, (S, S, 3); return the reason of a failure, or an empty string."""
        if not self.problem:
            try:
                decode_into(out, self.content, Within(transform, self.box) if self.box else transform, ())
            except codec.RejectedImageError as error:
                return str(error)
        return self.problem


def _pieces(path: Path, detector: detectors.Detector | None, faces: FaceCrop | None) -> Iterator[_Piece]:
    """Yield the image, or the faces found in it."""
    content, problem = image_files.read(path)
    if problem:
        yield _Piece(path, problem=problem)
        return
    if detector is None or faces is None:
        yield _Piece(path, content)
        return
    try:
        image = codec.decode(content, codec.Limits()).image
    except codec.RejectedImageError as error:
        yield _Piece(path, problem=str(error))
        return
    [boxes] = detector([image], [None])
    good = sorted((box for box in boxes if box.score >= faces.min_score), key=lambda box: -box.score)
    padded = [(codec.crop_pixels(box, *image.size, faces.margin, square=False), box.score) for box in good]
    crops = [(crop, score) for crop, score in padded if crop is not None]  # None for a box outside the image
    for crop, score in crops if faces.every else crops[:1]:
        yield _Piece(path, content, box=crop, score=score)
    if not crops:
        yield _Piece(path, content) if faces.or_whole else _Piece(path, problem="no face found")
