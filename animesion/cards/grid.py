"""Sample grid of a dataset card: a few images of classes from head to tail, as a JPEG."""

from __future__ import annotations

import io
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from animesion.dataset import shards
from animesion.images import codec
from animesion.storage.workspace import Workspace

CLASSES, IMAGES = 8, 6
_SIDE, _GAP = 96, 4
_T = TypeVar("_T")

#: Ratings that a card may show; the empty rating is for sources without ratings.
SHOWN_RATINGS = ("", "g", "s", "general", "safe")


def chosen(keys: pa.ChunkedArray, labels: npt.NDArray[np.int64]) -> list[tuple[int, list[str]]]:
    """Choose the images of the grid: classes evenly spaced by size rank, images evenly spaced by key.

    Args:
        keys: key of each sample that may be shown.
        labels: class id of each.

    Returns:
        Class id and keys of each row.
    """
    count = np.bincount(labels)
    there = np.flatnonzero(count)
    ranked = there[np.argsort(-count[there], kind="stable")].tolist()
    return [
        (label, _spaced(sorted(keys.take(pa.array(np.flatnonzero(labels == label))).to_pylist()), IMAGES))
        for label in _spaced(ranked, CLASSES)
    ]


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
