"""Names for single images, or for the faces on them: top-k predictions of a weight file, for files and folders."""

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
from animesion_training.data import Augment, Resize
from animesion_training.data.decode import Within, decode_into
from animesion_training.distributed import DistributedContext
from animesion_training.eval.evaluate import as_rgb
from animesion_training.weights import load_model

_LARGEST = 256 * 1024 * 1024


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        path: the image.
        guesses: class name and probability, most probable first; empty when there is a problem.
        problem: why it cannot be read, or that no face is on it.
        box: the face that was cut out with its margin: left, top, right, bottom in pixels of the upright image.
        score: the detector's score of the face.
    """

    path: Path
    guesses: tuple[tuple[str, float], ...] = ()
    problem: str = ""
    box: tuple[int, int, int, int] | None = None
    score: float = 0.0


@dataclass(frozen=True)
class FaceCrop:
    """How faces are cut out before the model sees them.

    Attributes:
        detector: name of the detector.
        margin: added on each side, as a share of the box's side; what the training data were cut with.
        every: all faces of an image; otherwise the one with the highest score.
        min_score: least score of a face.
        or_whole: take the whole image where no face is found; otherwise that is a problem.
        options: the detector's own.
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
    """Predictions for images, in the order of the paths; a folder stands for the images below it, sorted.

    Args:
        weights: a file of `save_model`.
        paths: files and folders.
        context: where to compute.
        top: guesses an image, at most the number of classes.
        batch_size: images at a time.
        faces: cut these out first; a prediction is then one of a face, and an image may have several.

    Raises:
        UsageError: a path that does not exist, an unusable weight file, or a detector that is not ready.
    """
    if faces and faces.detector == "boxes":
        raise UsageError("the detector 'boxes' reads a source's table, which single images have not; take another")
    detector = detectors.load(faces.detector, faces.options) if faces else None
    model, card = load_model(weights)
    model = model.to(context.device)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{weights} takes images of {card.img_size}; only square inputs are predicted on")
    transform = Resize(card.img_size, card.crop_pct)
    normalise = Augment.plain(as_rgb(card.mean), as_rgb(card.std))
    names = card.classes or tuple(str(i) for i in range(card.num_classes))
    pieces = (piece for path in files(paths) for piece in _pieces(path, detector, faces))
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


def files(paths: Sequence[Path]) -> Iterator[Path]:
    """The images of paths, a folder's below it sorted; hidden files are left out.

    Raises:
        UsageError: a path that does not exist.
    """
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        elif path.exists():
            yield path
        else:
            raise UsageError(f"there is no image or folder {path}")


def decoded(path: Path, out: np.ndarray, transform: Resize) -> str:
    """Decode an image into `out` (S, S, 3); returns why that failed, or an empty string."""
    [piece] = _pieces(path, None, None)
    return piece.into(out, transform)


@dataclass(frozen=True)
class _Piece:
    """An image, or a face of one, that is to be predicted on."""

    path: Path
    content: bytes = b""
    problem: str = ""
    box: tuple[int, int, int, int] | None = None
    score: float = 0.0

    def into(self, out: np.ndarray, transform: Resize) -> str:
        """Decode into a place of the batch; returns why that failed, or an empty string."""
        if not self.problem:
            try:
                decode_into(out, self.content, Within(transform, self.box) if self.box else transform, ())
            except codec.RejectedImageError as error:
                return str(error)
        return self.problem


def _pieces(path: Path, detector: detectors.Detector | None, faces: FaceCrop | None) -> Iterator[_Piece]:
    """What of an image is to be predicted on."""
    try:
        if path.stat().st_size > _LARGEST:
            yield _Piece(path, problem="too many bytes")
            return
        content = path.read_bytes()
    except OSError as error:
        yield _Piece(path, problem=(error.strerror or "cannot be read").lower())
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
    found = [(codec.crop_pixels(box, *image.size, faces.margin, square=False), box.score) for box in good]
    cut = [(crop, score) for crop, score in found if crop is not None]
    for crop, score in cut if faces.every else cut[:1]:
        yield _Piece(path, content, box=crop, score=score)
    if not cut:
        yield _Piece(path, content) if faces.or_whole else _Piece(path, problem="no face found")
