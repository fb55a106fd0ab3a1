"""Thumbnails of a build's images by key: kept images from the shards, dropped images from `raw/`.

Only images that the build itself decoded are decoded here, so that no image can crash the decoder.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.images import codec
from animesion.schemas import CURATED, FACE_REASONS, DropReason
from animesion.storage import parquet

#: Longest side of a thumbnail on the page, in pixels.
SIDE = 96

#: Columns of `curated.parquet` that the page shows or that locate an image.
COLUMNS = ["key", "kept", "reason", "detail", "keeper", "label", "class_id", "split", "cluster", "crop", "width"]
COLUMNS += ["height", "source_id", "page_url", "sha256", "pixels_blake3", "part", "offset", "bytes", "extension"]

_QUALITY = 60
_MOST_BYTES = 200_000_000


class Images:
    """Thumbnails of a built dataset; keeps no file open.

    Args:
        dataset: the build. Dropped images need its `raw/`.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Every image that the build has seen, by key, with the columns of `COLUMNS`.

        Raises:
            UsageError: `curated.parquet` is missing, damaged or of another version.
        """
        try:
            table = parquet.read(self.dataset.path / "curated.parquet", CURATED, COLUMNS)
        except OSError as error:
            raise UsageError(
                f"cannot read {self.dataset.path / 'curated.parquet'} ({error.strerror or 'damaged'}): "
                "run `animesion build` again"
            ) from None
        except (KeyError, ValueError):
            raise UsageError(
                f"{self.dataset.path / 'curated.parquet'} is damaged or of another version: run `animesion build` again"
            ) from None
        rows: list[dict[str, Any]] = table.to_pylist()
        return [{name: _plain(name, value) for name, value in row.items()} for row in rows]

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Index in `rows` of each key."""
        return {row["key"]: i for i, row in enumerate(self.rows)}

    def thumbnail(self, row: Mapping[str, Any], side: int = SIDE) -> bytes | None:
        """An image as WebP; None if it cannot be read.

        Args:
            row: an element of `rows`.
            side: longest side in pixels; a smaller image keeps its size.
        """
        found = self._kept(row) if row["kept"] else self._dropped(row)
        if found is None:
            return None
        found.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        out = io.BytesIO()
        found.save(out, "WEBP", quality=_QUALITY, method=4)
        return out.getvalue()

    def _kept(self, row: Mapping[str, Any]) -> Image.Image | None:
        try:
            return self.dataset.sample(row["key"]).decode()
        except (KeyError, UsageError):  # `animesion verify` reports what is wrong with it
            return None

    def original(self, row: Mapping[str, Any]) -> Image.Image | None:
        """The upright image that the source gave, from `raw/`; None if it is not there or was not decoded before."""
        if row["width"] < 1 or row["reason"] == DropReason.CRASHED_DECODER or not 0 < row["bytes"] <= _MOST_BYTES:
            return None
        path = self.dataset.path / "raw" / f"part-{row['part']:05d}.tar"
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                content = os.pread(descriptor, row["bytes"], max(0, row["offset"]))
            finally:
                os.close(descriptor)
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() != row["sha256"]:  # raw/ is from another build
            return None
        try:
            return codec.decode(content, codec.Limits()).image
        except codec.RejectedImageError:
            return None

    def _dropped(self, row: Mapping[str, Any]) -> Image.Image | None:
        image = self.original(row)
        if image is None or row["reason"] in FACE_REASONS:  # which face it is about shows only in the whole image
            return image
        left, top, right, bottom = row["crop"]
        box = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
        return image.crop(box) if box[0] < box[2] and box[1] < box[3] else image


class Album:
    """Thumbnails as base64 text within a budget of bytes; equal thumbnails are stored once.

    Attributes:
        images: WebP files as base64.
        used: their total size in bytes, before base64.
    """

    def __init__(self) -> None:
        self.images: list[str] = []
        self.used = 0
        self._known: dict[bytes, int] = {}

    def add(self, content: bytes | None, until: int) -> int:
        """Add a thumbnail.

        Args:
            content: WebP file, None for no thumbnail.
            until: budget in bytes for everything added so far and this thumbnail.

        Returns:
            Its index in `images`; -1 if there is no thumbnail, -2 if it would exceed the budget.
        """
        if content is None:
            return -1
        if content in self._known:
            return self._known[content]
        if self.used + len(content) > until:
            return -2
        self.used += len(content)
        self._known[content] = len(self.images)
        self.images.append(base64.b64encode(content).decode("ascii"))
        return self._known[content]


def _plain(name: str, value: Any) -> Any:
    """The value, or an empty value of the column's type if it is null."""
    if value is not None:
        return value
    return {"crop": [0, 0, 0, 0], "kept": False}.get(name, 0 if CURATED.field(name).type in _NUMBERS else "")


_NUMBERS = {CURATED.field(name).type for name in ("class_id", "width")}
