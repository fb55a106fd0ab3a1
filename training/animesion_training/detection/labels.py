"""What the detector learns from: face crops, illustrations with labelled boxes, and grounds without faces."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from animesion.errors import UsageError

FACES = frozenset({"face", "chibi", "profile", "covered"})
"""Kinds of a label that are faces; boxes of any other kind are neither right nor wrong."""

EMPTY = "none"
"""Kind of a row without a box: the image shows no face."""

COLUMNS = ("sha256", "width", "height", "left", "top", "right", "bottom", "kind")
"""Columns that a table of labels must have; boxes in pixels of the upright image."""

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


@dataclass(frozen=True)
class Label:
    """One row of a table of labels."""

    box: Box
    kind: str
    size: tuple[int, int]


def read_labels(path: Path) -> dict[str, list[Label]]:
    """Labels by the SHA-256 of their image's bytes; an image without faces has an empty list.

    Raises:
        UsageError: the table cannot be read, lacks a column, or has a row that is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a table of labels: {error}") from None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
        raise UsageError(f"{path} has no column '{missing[0]}'; a table of labels has {', '.join(COLUMNS)}")
    found: dict[str, list[Label]] = {}
    for number, row in enumerate(rows, 2):
        digest = (row["sha256"] or "").strip().lower()
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise UsageError(f"{path}, line {number}: '{digest[:80]}' is no SHA-256")
        labels = found.setdefault(digest, [])
        if (row["kind"] or "").strip() == EMPTY:
            continue
        try:
            left, top, right, bottom = (float(row[name]) for name in ("left", "top", "right", "bottom"))
            size = int(row["width"]), int(row["height"])
        except (TypeError, ValueError):
            raise UsageError(f"{path}, line {number}: the box or the size is not made of numbers") from None
        if not all(map(math.isfinite, (left, top, right, bottom))) or right <= left or bottom <= top or min(size) < 1:
            raise UsageError(f"{path}, line {number}: the box has no area")
        labels.append(Label((left, top, right, bottom), (row["kind"] or "").strip(), size))
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


def illustrations(labels: Mapping[str, Sequence[Label]], path: Path) -> dict[str, Labelled]:
    """The images of a folder or tar file that the labels are about, by digest."""
    found = {}
    for _, content in images(path):
        digest = hashlib.sha256(content).hexdigest()
        if digest in labels and digest not in found:
            boxes = tuple((label.box, label.kind in FACES) for label in labels[digest])
            found[digest] = Labelled(content, boxes)
    return found
