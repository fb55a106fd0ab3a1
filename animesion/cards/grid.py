"""The sample grid of a card: a few images of classes from the head to the tail, as a JPEG."""

from __future__ import annotations

import io
from typing import TypeVar

from PIL import Image

from animesion.dataset import shards
from animesion.images import codec
from animesion.storage.workspace import Workspace

CLASSES, IMAGES = 8, 6
_SIDE, _GAP = 96, 4
_T = TypeVar("_T")

#: Images of other ratings are not shown on a card; empty is a source that tells none.
SHOWN_RATINGS = ("", "g", "s", "general", "safe")


def chosen(keys: list[str], labels: list[int], ratings: dict[str, str]) -> list[tuple[int, list[str]]]:
    """Class id and keys of each row of the grid: classes evenly spaced by rank, images spaced by key.

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
    return [(label, _spaced(by_class[label], IMAGES)) for label in rows]


def draw(workspace: Workspace, places: list[list[tuple[str, int, int]]], limits: codec.Limits) -> bytes:
    """The grid as a JPEG: one row a class, white where a class has fewer images.

    Args:
        workspace: whose shards.
        places: shard, offset and size of each image, row by row.
        limits: that the images were packed under.
    """
    width = IMAGES * (_SIDE + _GAP) + _GAP
    grid = Image.new("RGB", (width, len(places) * (_SIDE + _GAP) + _GAP), "white")
    for row, images in enumerate(places):
        for column, (shard, offset, size) in enumerate(images):
            image = codec.decode(shards.read(workspace.path(shard), offset, size), limits).image
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            left = _GAP + column * (_SIDE + _GAP) + (_SIDE - image.width) // 2
            grid.paste(image, (left, _GAP + row * (_SIDE + _GAP) + (_SIDE - image.height) // 2))
    out = io.BytesIO()
    grid.save(out, "JPEG", quality=85)
    return out.getvalue()


def _spaced(values: list[_T], most: int) -> list[_T]:
    """So many of a list, the first and the last among them, evenly spaced."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]
