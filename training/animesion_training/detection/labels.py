"""What the detector learns from: face crops, illustrations with labelled boxes, and grounds without faces."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from animesion.dataset import box_tables
from animesion.dataset.box_tables import ImageBoxes
from animesion.errors import UsageError

FACES = frozenset({"face", "chibi", "profile", "covered"})
"""Kinds of a label that are faces; boxes of any other kind are neither right nor wrong."""

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

_LARGEST = 64 << 20
"""Most bytes of an image."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Labelled:
    """An illustration.

    Attributes:
        content: the encoded image.
        boxes: left, top, right, bottom in pixels, and whether it is a face.
    """

    content: bytes
    boxes: tuple[tuple[Box, bool], ...]


@dataclass
class Material:
    """All that scenes are made of.

    Attributes:
        faces: encoded square crops.
        illustrations: labelled images; an entry that is listed more than once is shown more often.
        grounds: encoded images without faces.
        share: share of scenes that are windows of illustrations.
    """

    faces: Sequence[bytes] = field(default_factory=list)
    illustrations: Sequence[Labelled] = field(default_factory=list)
    grounds: Sequence[bytes] = field(default_factory=list)
    share: float = 0.5


def read_labels(path: Path) -> dict[str, ImageBoxes]:
    """Labelled boxes by the SHA-256 of their image's bytes.

    Raises:
        UsageError: the file cannot be read, or an image has no digest.
    """
    found = {}
    for image in box_tables.read(path):
        if not image.sha256:
            raise UsageError(f"{path}: {image.file} has no SHA-256, by which labels and images are joined")
        found[image.sha256] = image
    return found


def images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the images in a folder, at any depth, or in a tar file; sorted by name.

    Raises:
        UsageError: the path is neither.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in _SUFFIXES and file.is_file() and file.stat().st_size <= _LARGEST:
                yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(path) as tar:
            for member in sorted(tar.getmembers(), key=lambda each: each.name):
                if member.isfile() and member.size <= _LARGEST and Path(member.name).suffix.lower() in _SUFFIXES:
                    opened = tar.extractfile(member)
                    assert opened is not None
                    yield member.name, opened.read()
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{path} is neither a folder nor a tar file of images: {error}") from None


def illustrations(labels: Mapping[str, ImageBoxes], paths: Sequence[Path]) -> dict[str, Labelled]:
    """The images of folders or tar files that the labels are about, by digest."""
    found: dict[str, Labelled] = {}
    for path in paths:
        for _, content in images(path):
            digest = hashlib.sha256(content).hexdigest()
            if digest not in labels or digest in found:
                continue
            of = labels[digest]
            sides = (of.width, of.height, of.width, of.height)
            boxes = []
            for each in of.boxes:
                left, top, right, bottom = (share * side for share, side in zip(each.box[:4], sides, strict=True))
                boxes.append(((left, top, right, bottom), each.kind in FACES))
            found[digest] = Labelled(content, tuple(boxes))
    return found


def face_crops(paths: Sequence[Path], left_out: Collection[str] = ()) -> tuple[list[bytes], list[bytes]]:
    """Face crops to learn from, and those to be tested on.

    Args:
        paths: folders or tar files whose crops are `<character>/<post>-<number>.<suffix>`, or have other names.
        left_out: characters to be tested on. Crops from a post of theirs are in neither list, whoever they show.

    Raises:
        UsageError: a character that is left out has no crop.
    """
    named = [(Path(name), content) for path in paths for name, content in images(path)]
    if missing := sorted(set(left_out) - {name.parent.name for name, _ in named}):
        raise UsageError(f"no face crops of '{missing[0]}' are there to be left out")
    tested = [(name, content) for name, content in named if name.parent.name in left_out]
    posts = {name.stem.rpartition("-")[0] or name.stem for name, _ in tested}
    learned = [
        content
        for name, content in named
        if name.parent.name not in left_out and (name.stem.rpartition("-")[0] or name.stem) not in posts
    ]
    return learned, [content for _, content in tested]
