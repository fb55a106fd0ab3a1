"""Boxes of a build's images, for the page: what the detector found, and where a curator decided.

Boxes are read from `features/`, part by part.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from animesion.report.images import Images
from animesion.schemas import FACE_REASONS

#: Longest side of a thumbnail with boxes in a file, in pixels.
BOXED_SIDE = 144

#: Most boxes of an image that the page shows, those with the best scores.
MOST = 100


class Boxes:
    """Boxes of the images of a build.

    Args:
        images: of the build; without its `features/` there are no boxes.
    """

    def __init__(self, images: Images) -> None:
        self._images = images
        crop = images.dataset.recipe.crop
        #: Whether a curator can decide on boxes: images are cropped, and each is one sample.
        self.decidable = crop.detector != "none" and crop.faces != "each"
        self._part = functools.lru_cache(maxsize=4)(self._read)

    def of(self, row: Mapping[str, Any]) -> list[list[float]]:
        """The detector's boxes of an image: left, top, right, bottom, relative, and score; best first.

        Args:
            row: an element of `Images.rows`.
        """
        return self._part(row["part"]).get(row["key"], []) if row["width"] > 0 else []

    def add(self, items: Sequence[dict[str, Any]]) -> None:
        """Add `boxes` to the entries of images that were dropped for their boxes, see `animesion.report.facts.item`."""
        for item in items:
            if item["reason"] in FACE_REASONS and self.decidable:
                item["boxes"] = self.of(self._images.rows[item["row"]])

    def _read(self, part: int) -> dict[str, list[list[float]]]:
        """Boxes by key of a part; empty if its table is missing or damaged, which the histograms report."""
        path = self._images.dataset.path / "features" / f"part-{part:05d}.parquet"
        try:
            table = pq.read_table(path, columns=["key", "boxes"])
            table = table.filter(pc.is_valid(table["boxes"]))
            keys, boxes = table["key"].to_pylist(), table["boxes"].to_pylist()
        except (pa.ArrowException, OSError, KeyError, ValueError):
            return {}
        names = ("left", "top", "right", "bottom", "score")
        try:
            return {
                key: [[round(float(box[name]), 4) for name in names] for box in of_image[:MOST]]
                for key, of_image in zip(keys, boxes, strict=True)
            }
        except (KeyError, TypeError, ValueError, OverflowError):
            return {}
