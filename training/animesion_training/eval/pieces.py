"""The images that a command is given, from files, URLs or standard input, and the faces in them.

Everything is untrusted: sizes are limited, addresses are checked by the downloader of `animesion_scrapers`, and pixels
are decoded by `animesion.images.codec`. An image that cannot be read is a problem of that image, not of the command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from animesion import detectors
from animesion.errors import UsageError
from animesion.images import codec
from animesion.images import files as image_files
from animesion_training.data import Resize
from animesion_training.data.decode import Within, decode_into

_LARGEST = 64 << 20  # bytes of an image from a URL or from standard input


@dataclass(frozen=True)
class Given:
    """An image as it was given.

    Attributes:
        name: its path or URL, or `-`.
        content: its bytes.
        problem: why there are none; empty without a problem.
    """

    name: str
    content: bytes = b""
    problem: str = ""


def files_given(paths: Sequence[Path]) -> Iterator[Given]:
    """Read image files, and folders, which are searched recursively.

    Raises:
        UsageError: a path that does not exist.
    """
    for path in image_files.files(paths):
        content, problem = image_files.read(path)
        yield Given(str(path), content, problem)


def read_given(places: Sequence[str], *, contact: str = "", allow_private: Sequence[str] = ()) -> Iterator[Given]:
    """Read images from paths, URLs (`http:`, `https:`) and standard input (`-`).

    Args:
        places: where they are.
        contact: e-mail address or URL under which the hosts of URLs can reach the user.
        allow_private: hosts on a LAN or loopback that may be asked, each as `host:port`.

    Raises:
        UsageError: a path that does not exist, or a URL without a contact.
    """
    for place in places:
        if place == "-":
            content = sys.stdin.buffer.read(_LARGEST + 1)
            problem = "too many bytes" if len(content) > _LARGEST else "" if content else "no bytes"
            yield Given("-", b"" if problem else content, problem)
        elif place.lower().startswith(("http://", "https://")):
            yield _downloaded(place, contact, allow_private)
        elif "://" in place:
            raise UsageError(f"{place} is no image: give a path, a URL that starts with http:// or https://, or -")
        else:
            yield from files_given([Path(place)])


def _downloaded(url: str, contact: str, allow_private: Sequence[str]) -> Given:
    from animesion_scrapers import Download, ScraperError, download_all

    if not contact:
        raise UsageError(
            f"downloading {url} needs --contact: an e-mail address or URL under which its host can reach you"
        )
    try:
        [got] = download_all(
            [Download(url, url, image=True)],
            user_agent=f"animesion/{version('animesion')} ({contact})",
            max_bytes=_LARGEST,
            allow_private=allow_private,
        )
    except ScraperError as error:
        raise UsageError(f"{url}: {error}") from None
    return Given(url, got.content, "" if got.status == "ok" else f"{got.status} {got.detail}".rstrip())


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
    [given] = files_given([path])
    [piece] = pieces(given, None, None)
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


def pieces(given: Given, detector: detectors.Detector | None, faces: FaceCrop | None) -> Iterator[Piece]:
    """Yield the image, or the faces found in it."""
    name, content = given.name, given.content
    if given.problem:
        yield Piece(name, problem=given.problem)
        return
    if detector is None or faces is None:
        yield Piece(name, content)
        return
    try:
        image = codec.decode(content, codec.Limits()).image
    except codec.RejectedImageError as error:
        yield Piece(name, problem=str(error))
        return
    [boxes] = detector([image], [None])
    good = sorted((box for box in boxes if box.score >= faces.min_score), key=lambda box: -box.score)
    padded = [(codec.crop_pixels(box, *image.size, faces.margin, square=False), box.score) for box in good]
    crops = [(crop, score) for crop, score in padded if crop is not None]  # None for a box outside the image
    for crop, score in crops if faces.every else crops[:1]:
        yield Piece(name, content, box=crop, score=score)
    if not crops:
        yield Piece(name, content) if faces.or_whole else Piece(name, problem="no face found")
