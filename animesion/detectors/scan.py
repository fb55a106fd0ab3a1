"""Run detectors over image files, and find the labelled boxes of each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from animesion.dataset.box_tables import ImageBoxes
from animesion.detectors import Detector
from animesion.errors import UsageError
from animesion.images import codec, files
from animesion.schemas import Box, DropReason

#: The problem of an image that is passed over.
NO_LABELS = "no labels"

_NO_IMAGES = {DropReason.NOT_AN_IMAGE, DropReason.UNSUPPORTED_FORMAT, DropReason.EMPTY_FILE}


@dataclass(frozen=True)
class Scanned:
    """What detectors found in a file.

    Attributes:
        path: the file.
        name: its path below the folder that was given, with slashes; the path as given for a single file.
        sha256: digest of its bytes as hex.
        width: of the upright image in pixels.
        height: of the upright image in pixels.
        boxes: by detector, by descending score.
        seconds: time of each detector.
        problem: why there are none; empty without a problem.
        no_image: whether the file is of another kind, which is no fault of a folder.
    """

    path: Path
    name: str
    sha256: str = ""
    width: int = 0
    height: int = 0
    boxes: Mapping[str, list[Box]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    no_image: bool = False


def scan(
    paths: Sequence[Path], detectors: Mapping[str, Detector], min_score: float = 0.0, wanted: Labels | None = None
) -> Iterator[Scanned]:
    """Run detectors over files and folders.

    Args:
        paths: image files, and folders, which are searched recursively.
        detectors: by name; none of them needs the boxes of a source.
        min_score: least score of a box.
        wanted: labels without which an image is passed over.

    Raises:
        UsageError: a path does not exist, or a detector refuses to work.
    """
    for path, name in listed(paths):
        content, problem = files.read(path)
        if problem:
            yield Scanned(path, name, problem=problem)
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        if wanted is not None and wanted.of(name, sha256) is None:
            yield Scanned(path, name, sha256, problem=NO_LABELS, no_image=not codec.sniff(content))
            continue
        try:
            image = codec.decode(content, codec.Limits()).image
        except codec.RejectedImageError as error:
            yield Scanned(path, name, sha256, problem=str(error), no_image=error.reason in _NO_IMAGES)
            continue
        boxes, seconds = {}, {}
        for detector, find in detectors.items():
            start = time.perf_counter()
            [found] = find([image], [None])
            seconds[detector] = time.perf_counter() - start
            boxes[detector] = sorted((box for box in found if box.score >= min_score), key=lambda box: -box.score)
        yield Scanned(path, name, sha256, *image.size, boxes, seconds)


def listed(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The files of paths with their names, see `Scanned.name`.

    With several folders, names start with the folder, so that two files do not share one.
    """
    for path in paths:
        for file in files.files([path]):
            below = file.relative_to(path) if path.is_dir() and len(paths) == 1 else file
            # bytes that are no UTF-8 are lone surrogates in Python's names, which no file of boxes can hold
            yield file, below.as_posix().encode("utf-8", "backslashreplace").decode()


class Labels:
    """Labelled boxes by image.

    An image is found by the digest of its bytes where the labels have digests, else by its path.

    Args:
        images: as `animesion.dataset.box_tables.read` returns them.

    Raises:
        UsageError: equal bytes have different boxes.
    """

    def __init__(self, images: Iterable[ImageBoxes]) -> None:
        self.images = list(images)
        self._by_digest: dict[str, list[ImageBoxes]] = {}
        self._by_name: dict[str, list[ImageBoxes]] = {}
        for image in self.images:
            if image.sha256:
                equal = self._by_digest.setdefault(image.sha256, [])
                if equal and equal[0].boxes != image.boxes:
                    raise UsageError(
                        f"{equal[0].file or image.sha256} and {image.file or 'another entry'} are the same bytes with "
                        "different boxes: correct one of them"
                    )
                equal.append(image)
            else:
                for key in {_last(image.file), _last(_stem(image.file))}:
                    self._by_name.setdefault(key, []).append(image)

    def of(self, name: str, sha256: str) -> ImageBoxes | None:
        """The labels of an image; None if there are none.

        Raises:
            UsageError: several entries without a digest fit its path.
        """
        if equal := self._by_digest.get(sha256):
            return next((image for image in equal if _ends(name, image.file)), equal[0])
        fitting = []
        for image in self._by_name.get(_last(name), []) or self._by_name.get(_last(_stem(name)), []):
            if _ends(name, image.file) or _ends(_stem(name), image.file):
                fitting.append(image)
        if len(fitting) > 1:
            longest = max(len(image.file) for image in fitting)
            fitting = [image for image in fitting if len(image.file) == longest]
        if len(fitting) > 1:
            raise UsageError(f"the boxes list {fitting[0].file} twice: remove one of them")
        return fitting[0] if fitting else None


def check_size(scanned: Scanned, labels: ImageBoxes) -> None:
    """Refuse labels that were drawn on an image of another shape, such as one that was not turned upright.

    Raises:
        UsageError: the sides of the image and of the labels have another ratio.
    """
    if labels.width and abs(labels.width * scanned.height - labels.height * scanned.width) > max(
        scanned.width + labels.width, scanned.height + labels.height
    ):
        raise UsageError(
            f"{scanned.path} has {scanned.width}x{scanned.height} px, but its boxes were drawn on "
            f"{labels.width}x{labels.height}: correct the size in the file of boxes"
        )


def _last(name: str) -> str:
    return PurePosixPath(name).name


def _stem(name: str) -> str:
    """The path without the suffix of an image."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix else name


def _ends(name: str, end: str) -> bool:
    """Whether a path is another one, or ends in it."""
    return name == end or name.endswith(f"/{end}") or end.endswith(f"/{name}")
