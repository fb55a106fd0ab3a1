"""The sample grid of a card: a few pictures of classes from the head to the tail, as a JPEG."""

from __future__ import annotations

import io
from typing import TypeVar

from PIL import Image

from animesion.dataset import shards
from animesion.images import codec
from animesion.storage.workspace import Workspace

CLASSES, PICTURES = 8, 6
_SIDE, _GAP = 96, 4
_T = TypeVar("_T")

#: Pictures of other ratings are not shown on a card; empty is a source that tells none.
SHOWN_RATINGS = ("", "g", "s", "general", "safe")


def chosen(keys: list[str], labels: list[int], ratings: dict[str, str]) -> list[tuple[int, list[str]]]:
    """Class id and keys of each row of the grid: classes evenly spaced by rank, pictures spaced by key.

    Args:
        keys: of every sample.
        labels: class id of each.
        ratings: rating by key; samples of a rating that is not shown are passed over.
    """
    by_class: dict[int, list[str]] = {}
    for key, label in sorted(zip(keys, labels, strict=True)):
        if ratings.get(key, "") in SHOWN_RATINGS:
            by_class.setdefault(label, []).append(key)
    ranked = sorted(by_class, key=lambda label: (-len(by_class[label]), label))
    rows = _spaced(ranked, CLASSES)
    return [(label, _spaced(by_class[label], PICTURES)) for label in rows]


def draw(workspace: Workspace, places: list[list[tuple[str, int, int]]], limits: codec.Limits) -> bytes:
    """The grid as a JPEG: one row a class, white where a class has fewer pictures.

    Args:
        workspace: whose shards.
        places: shard, offset and size of each picture, row by row.
        limits: that the pictures were packed under.
    """
    width = PICTURES * (_SIDE + _GAP) + _GAP
    grid = Image.new("RGB", (width, len(places) * (_SIDE + _GAP) + _GAP), "white")
    for row, pictures in enumerate(places):
        for column, (shard, offset, size) in enumerate(pictures):
            picture = codec.decode(shards.read(workspace.path(shard), offset, size), limits).image
            picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            left = _GAP + column * (_SIDE + _GAP) + (_SIDE - picture.width) // 2
            grid.paste(picture, (left, _GAP + row * (_SIDE + _GAP) + (_SIDE - picture.height) // 2))
    out = io.BytesIO()
    grid.save(out, "JPEG", quality=85)
    return out.getvalue()


def _spaced(values: list[_T], most: int) -> list[_T]:
    """So many of a list, the first and the last among them, evenly spaced."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]
