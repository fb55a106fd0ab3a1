"""The images that a command is given, or the faces in them, as the input of a network.

`animesion.images.given` reads their bytes, `animesion.images.codec` decodes them. An image that cannot be read is a
problem of that image, not of the command.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from animesion import detectors
from animesion.errors import UsageError
from animesion.images import codec, given
from animesion_training.data import Resize
from animesion_training.data.decode import Within, decode_into
from animesion_training.eval.reading import Reading


class FaceOptions(TypedDict, total=False):
    """The arguments of functions that crop faces first: the attributes of `FaceCrop`."""

    detector: str
    margin: float
    all_faces: bool
    min_score: float
    or_whole: bool
    options: Mapping[str, Any]


@dataclass(frozen=True)
class FaceCrop:
    """How faces are cropped first.

    Attributes:
        detector: name of the detector, see `animesion detectors`; `none` for whole images.
        margin: added on each side, as a share of the side of the box; use the margin of the training data.
        all_faces: whether to use all faces of an image; otherwise the one with the highest score.
        min_score: lowest score of a face.
        or_whole: whether to use the whole image where no face is found; otherwise that is a problem.
        options: options of the detector.
    """

    detector: str = "none"
    margin: float = 0.0
    all_faces: bool = False
    min_score: float = 0.0
    or_whole: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: FaceOptions) -> FaceCrop | None:
        """How faces are cropped by the arguments of a function; None for whole images.

        Raises:
            UsageError: arguments that need a detector, without one.
        """
        crop = cls(**given)
        if crop.detector != "none":
            return crop
        if crop != cls():
            raise UsageError(
                "margin, min-score, all-faces, or-whole and the options of a detector are for faces: name a detector"
            )
        return None


def load_detector(faces: FaceCrop | None) -> detectors.Detector | None:
    """Create the detector that crops faces; None for whole images.

    Raises:
        UsageError: an unknown detector or option, one that is not ready, or one that needs the boxes of a source.
    """
    if faces is None:
        return None
    if faces.detector == "boxes":
        raise UsageError(
            "the detector 'boxes' needs the boxes of a source, which single images do not have: choose another"
        )
    return detectors.load(faces.detector, faces.options)


def decode_file(path: Path, out: np.ndarray, transform: Resize) -> str:
    """Decode an image into `out` (S, S, 3); return the reason of a failure, or an empty string."""
    [image] = given.from_files([path])
    [piece] = pieces(image, None, None)
    return piece.into(out, transform)


@dataclass(frozen=True)
class Piece:
    """An image, or a face in one, to predict on."""

    name: str
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


def pieces(image: given.Given, detector: detectors.Detector | None, faces: FaceCrop | None) -> Iterator[Piece]:
    """Yield the image, or the faces found in it."""
    name, content = image.name, image.content
    if image.problem:
        yield Piece(name, problem=image.problem)
        return
    if detector is None or faces is None:
        yield Piece(name, content)
        return
    try:
        decoded = codec.decode(content, codec.Limits()).image
    except codec.RejectedImageError as error:
        yield Piece(name, problem=str(error))
        return
    [boxes] = detector([decoded], [None])
    good = sorted((box for box in boxes if box.score >= faces.min_score), key=lambda box: -box.score)
    padded = [(codec.crop_pixels(box, *decoded.size, faces.margin, square=False), box.score) for box in good]
    crops = [(crop, score) for crop, score in padded if crop is not None]  # None for a box outside the image
    for crop, score in crops if faces.all_faces else crops[:1]:
        yield Piece(name, content, box=crop, score=score)
    if not crops:
        yield Piece(name, content) if faces.or_whole else Piece(name, problem="no face found")


def batches(
    found: Iterable[Piece], reading: Reading, device: torch.device, batch_size: int = 32
) -> Iterator[tuple[list[Piece], list[str], Tensor]]:
    """Yield images or faces in batches, in their order, as the input of a network.

    Args:
        found: the images or faces.
        reading: how they are resized and normalised.
        device: to compute on.
        batch_size: images per batch.

    Yields:
        The images; for each, why it cannot be read, or an empty string; and their normalised pixels, (B, 3, L, L),
        which are black before normalisation where an image cannot be read.
    """
    side, crop_pct = reading.decoded
    transform, pending = Resize(side, crop_pct), iter(found)
    while chosen := list(itertools.islice(pending, batch_size)):
        pixels = np.zeros((len(chosen), side, side, 3), dtype=np.uint8)
        problems = [piece.into(pixels[i], transform) for i, piece in enumerate(chosen)]
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
            images = reading.normalise(batch, torch.zeros(len(chosen), dtype=torch.int64, device=device))
        yield chosen, problems, images
