"""Thumbnails of a build's images by key: kept images from the shards, dropped images from `raw/`.

Only images that the build itself decoded are decoded here, so that no image can crash the decoder.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from animesion.dataset.dataset import Dataset
from animesion.dataset.places import Places
from animesion.errors import UsageError
from animesion.images import codec
from animesion.schemas import CURATED, FACE_REASONS, DropReason
from animesion.storage import parquet

#: Longest side of a thumbnail on the page, in pixels.
SIDE = 96

#: Longest side of an image that `animesion browse` shows at full size, in pixels.
FULL_SIDE = 4096

#: Columns of `curated.parquet` that the page shows or that locate an image.
COLUMNS = ["key", "kept", "reason", "detail", "keeper", "label", "class_id", "split", "cluster", "crop", "width"]
COLUMNS += ["height", "source_id", "page_url", "sha256", "pixels_blake3", "part", "offset", "bytes", "extension"]

_QUALITY = 60
_MOST_BYTES = 200_000_000


class Rows(Sequence[dict[str, Any]]):
    """Rows of a table as dictionaries, which are made when they are asked for.

    A value that is null in the table is an empty one of the column's type.

    Args:
        table: with columns of `CURATED`.
    """

    def __init__(self, table: pa.Table) -> None:
        self._columns = {name: _filled(name, table[name]) for name in table.column_names}
        self._length = len(table)

    @classmethod
    def read(cls, path: Path) -> Rows:
        """The columns of `COLUMNS` of a `curated.parquet`, read one after another to save memory.

        Raises:
            OSError, KeyError, ValueError, UsageError: the table is missing, damaged or of another version.
        """
        rows = cls(pa.table({}))
        for name in COLUMNS:
            # nulls are allowed in some rows, which these columns tell
            wanted = list(dict.fromkeys([name, "kept", "reason"]))
            column = parquet.read(path, CURATED, wanted)[name]
            rows._columns[name], rows._length = _filled(name, column), len(column)
        return rows

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[dict[str, Any]]: ...

    def __getitem__(self, i: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return {name: column[i].as_py() for name, column in self._columns.items()}

    def value(self, name: str, i: int) -> Any:
        """One value of a row."""
        return self._columns[name][i].as_py()

    def column(self, name: str) -> pa.Array:
        """A column as an Arrow array; of texts that are few, as a dictionary array."""
        return self._columns[name]

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers or truth values as an array."""
        found: npt.NDArray[Any] = self._columns[name].to_numpy(zero_copy_only=False)
        return found

    def equal(self, name: str, text: str) -> npt.NDArray[np.bool_]:
        """Which rows have a text."""
        column = self._columns[name]
        if isinstance(column, pa.DictionaryArray):
            codes = column.indices.to_numpy()
            found: npt.NDArray[np.bool_] = codes == column.dictionary.index(text).as_py()
            return found
        same: npt.NDArray[np.bool_] = pc.equal(column, text).to_numpy(zero_copy_only=False)
        return same


class Images:
    """Thumbnails of a built dataset; keeps no file open.

    Args:
        dataset: the build. Dropped images need its `raw/`.
        ready: thumbnails of kept images that were made before, by key and side; those that are made here are added.
        drawn: thumbnails of dropped images and strips of pairs that were made before, by `drawn_id`; likewise.
    """

    def __init__(
        self,
        dataset: Dataset,
        ready: MutableMapping[tuple[str, int], bytes] | None = None,
        drawn: MutableMapping[str, bytes] | None = None,
    ) -> None:
        self.dataset = dataset
        self._ready = ready
        self._drawn = drawn

    @functools.cached_property
    def rows(self) -> Rows:
        """Every image that the build has seen, by key, with the columns of `COLUMNS`.

        Raises:
            UsageError: `curated.parquet` is missing, damaged or of another version.
        """
        try:
            return Rows.read(self.dataset.path / "curated.parquet")
        except OSError as error:
            raise UsageError(
                f"cannot read {self.dataset.path / 'curated.parquet'} ({error.strerror or 'damaged'}): "
                "run `animesion build` again"
            ) from None
        except (KeyError, ValueError):
            raise UsageError(
                f"{self.dataset.path / 'curated.parquet'} is damaged or of another version: run `animesion build` again"
            ) from None

    @functools.cached_property
    def places(self) -> Places:
        """Index in `rows` of each key."""
        return Places(self.rows.column("key"))

    def thumbnail(self, row: Mapping[str, Any], side: int = SIDE) -> bytes | None:
        """An image as WebP; None if it cannot be read.

        Args:
            row: an element of `rows`.
            side: longest side in pixels; a smaller image keeps its size.
        """
        if not row["kept"]:
            whole = row["reason"] in FACE_REASONS
            return self.once(drawn_id([row], whole, side), lambda: self._encoded(row, side))
        made = self._ready.get((row["key"], side)) if self._ready is not None else None
        if made is None and (found := self.image(row)) is not None:
            made = encoded(found, side)
            if self._ready is not None:
                self._ready[row["key"], side] = made
        return made

    def _encoded(self, row: Mapping[str, Any], side: int) -> bytes | None:
        found = self.image(row)
        return None if found is None else encoded(found, side)

    def once(self, name: str, draw: Callable[[], bytes | None]) -> bytes | None:
        """What was drawn before under a name, or else what is drawn now; None if that cannot be drawn."""
        if self._drawn is None:
            return draw()
        made = self._drawn.get(name) or draw()
        if made is not None:
            self._drawn[name] = made
        return made

    def image(self, row: Mapping[str, Any]) -> Image.Image | None:
        """The image of a row; None if it cannot be read."""
        return self._kept(row) if row["kept"] else self._dropped(row)

    def _kept(self, row: Mapping[str, Any]) -> Image.Image | None:
        try:
            return self.dataset[row["key"]].decode()
        except (KeyError, UsageError):  # `animesion verify` reports what is wrong with it
            return None

    def has_original(self, row: Mapping[str, Any]) -> bool:
        """Whether `original` has a file to read, which may still be from another build."""
        decoded = row["width"] > 0 and row["reason"] != DropReason.CRASHED_DECODER
        return decoded and 0 < row["bytes"] <= _MOST_BYTES and self._raw(row).is_file()

    def _raw(self, row: Mapping[str, Any]) -> Path:
        return self.dataset.path / "raw" / f"part-{row['part']:05d}.tar"

    def original(self, row: Mapping[str, Any]) -> Image.Image | None:
        """The upright image that the source gave, from `raw/`; None if it is not there or was not decoded before."""
        if not self.has_original(row):
            return None
        path = self._raw(row)
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

    def fits(self, content: bytes, until: int) -> bool:
        """Whether a thumbnail can be added within a budget, see `add`."""
        return content in self._known or self.used + len(content) <= until

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
        if not self.fits(content, until):
            return -2
        self.used += len(content)
        self._known[content] = len(self.images)
        self.images.append(base64.b64encode(content).decode("ascii"))
        return self._known[content]


def drawn_id(rows: Sequence[Mapping[str, Any]], *how: object) -> str:
    """What a drawing from originals is known by: their bytes, the parts that are samples, and how they are drawn."""
    samples = [(row["sha256"], list(row["crop"]), row["kept"]) for row in rows]
    return hashlib.sha256(repr((samples, how)).encode()).hexdigest()


def encoded(image: Image.Image, side: int) -> bytes:
    """An image as WebP, with a longest side in pixels; a smaller image keeps its size."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=_QUALITY, method=4)
    return out.getvalue()


def large(image: Image.Image) -> bytes:
    """An image as JPEG at full size, but at most `FULL_SIDE` pixels on its longest side."""
    image = image.convert("RGB")
    image.thumbnail((FULL_SIDE, FULL_SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    # not WebP: of ten megapixels it takes a second, and its colours have half the resolution
    image.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


#: Columns with few different texts.
_REPEATED = ("reason", "label", "split", "extension")

#: What stands for a null of a column.
_EMPTY: dict[str, Any] = {
    name: "" if CURATED.field(name).type == pa.string() else False if name == "kept" else 0
    for name in COLUMNS
    if name != "crop"
}


def _filled(name: str, values: pa.ChunkedArray) -> pa.Array:
    """A column without nulls as one array."""
    column = values.combine_chunks()
    if column.null_count:
        column = column.fill_null(_EMPTY[name]) if name in _EMPTY else _without_nulls(column)
    return column.dictionary_encode() if name in _REPEATED else column


def _without_nulls(crops: pa.Array) -> pa.Array:
    """Crops with four zeros for a null."""
    corners = np.zeros((len(crops), 4), dtype=np.int32)
    valid = crops.is_valid().to_numpy(zero_copy_only=False)
    corners[valid] = crops.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    return pa.FixedSizeListArray.from_arrays(pa.array(corners.ravel()), 4)
