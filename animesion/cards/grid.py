"""Sample grid of a dataset card: a few images of classes from head to tail, as a JPEG."""

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

#: Ratings that a card may show; the empty rating is for sources without ratings.
SHOWN_RATINGS = ("", "g", "s", "general", "safe")


def chosen(keys: list[str], labels: list[int], ratings: dict[str, str]) -> list[tuple[int, list[str]]]:
    """Choose the images of the grid: classes evenly spaced by size rank, images evenly spaced by key.

    Args:
        keys: key of each sample.
        labels: class id of each sample.
        ratings: rating by key; samples with a rating outside `SHOWN_RATINGS` are skipped.

    Returns:
        Class id and keys of each row.
    """
    by_class: dict[int, list[str]] = {}
    for key, label in sorted(zip(keys, labels, strict=True)):
        if ratings.get(key, "") in SHOWN_RATINGS:
            by_class.setdefault(label, []).append(key)
    ranked = sorted(by_class, key=lambda label: (-len(by_class[label]), label))
    rows = _spaced(ranked, CLASSES)
    return [(label, _spaced(by_class[label], IMAGES)) for label in rows]


def draw(workspace: Workspace, places: list[list[tuple[str, int, int]]], limits: codec.Limits) -> bytes:
    """Draw the grid as a JPEG: one row per class, with white cells for classes that have fewer images.

    Args:
        workspace: the build, with its shards.
        places: shard, offset and size in bytes of each image, row by row.
        limits: decoding limits of the build.
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
    """At most `most` elements of a list, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]
