"""Lookup of head boxes (`faces.tsv` of DanbooruAnimeFaces) by post."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from animesion.dataset.label_files import read_faces
from animesion.schemas import Box


@dataclass(frozen=True)
class FaceTable:
    """Boxes by post.

    Attributes:
        boxes: boxes by post, in the order of the table.
        row: index of each post's first row; the order of the published DAF:re splits.
        rows: number of rows.
    """

    boxes: dict[int, tuple[Box, ...]]
    row: dict[int, int]
    rows: int


def load(source: Path | Iterable[bytes], name: str = "faces.tsv") -> FaceTable:
    """Read a whole table.

    Raises:
        UsageError: the table is unreadable, or a row is malformed (the message states its line).
    """
    boxes: dict[int, tuple[Box, ...]] = {}
    first: dict[int, int] = {}
    rows = 0
    for face in read_faces(source, name):
        boxes[face.post_id] = (*boxes.get(face.post_id, ()), face.box)
        first.setdefault(face.post_id, face.row)
        rows = face.row + 1
    return FaceTable(boxes, first, rows)
