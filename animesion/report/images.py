"""Images of a build by key, small enough to look at: kept ones from the shards, dropped ones from `raw/`.

Only what the build itself could decode is decoded again, so that nothing that kills a decoder is met here.
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
from animesion.schemas import CURATED, DropReason
from animesion.storage import parquet

#: Longest side of a thumbnail on the page, in pixels.
SIDE = 96

#: Columns of `curated.parquet` that the page shows or needs to find an image again.
COLUMNS = ["key", "kept", "reason", "detail", "keeper", "label", "class_id", "split", "cluster", "crop", "width"]
COLUMNS += ["height", "source_id", "page_url", "sha256", "part", "offset", "bytes", "extension"]

_QUALITY = 60
_MOST_BYTES = 200_000_000


class Images:
    """Thumbnails of a built dataset; holds no open file.

    Args:
        dataset: the build. Dropped images are found where its `raw/` is still there.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Every image ever seen, in the order of the keys: the columns of `COLUMNS`."""
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
        """Row of each key."""
        return {row["key"]: i for i, row in enumerate(self.rows)}

    def thumbnail(self, row: Mapping[str, Any], side: int = SIDE) -> bytes | None:
        """An image as WebP, or None where there is none that can be shown.

        Args:
            row: of `rows`.
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
            return self.dataset.sample(row["key"]).image()
        except (KeyError, UsageError):  # `animesion verify` tells what is wrong with it
            return None

    def _dropped(self, row: Mapping[str, Any]) -> Image.Image | None:
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
        if hashlib.sha256(content).hexdigest() != row["sha256"]:  # raw/ of another build
            return None
        try:
            image = codec.decode(content, codec.Limits()).image
        except codec.RejectedImageError:
            return None
        left, top, right, bottom = row["crop"]
        box = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
        return image.crop(box) if box[0] < box[2] and box[1] < box[3] else image


class Album:
    """Thumbnails as base64 text under a budget of bytes; equal ones are kept once.

    Attributes:
        images: WebP files as base64.
        used: their bytes before base64.
    """

    def __init__(self) -> None:
        self.images: list[str] = []
        self.used = 0
        self._known: dict[bytes, int] = {}

    def add(self, content: bytes | None, until: int) -> int:
        """The place of an image in `images`; -1 when there is none, -2 when it would exceed `until` bytes in all."""
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
    """A value of the column's type where the file has none."""
    if value is not None:
        return value
    return {"crop": [0, 0, 0, 0], "kept": False}.get(name, 0 if CURATED.field(name).type in _NUMBERS else "")


_NUMBERS = {CURATED.field(name).type for name in ("class_id", "width")}
