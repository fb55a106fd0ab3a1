"""Join the raw and feature tables of all parts into the columns that curate decides on.

Columns are NumPy and Arrow arrays of all rows; only rows that a rule has something to say about become Python objects.
Columns that no rule reads stay compressed until `curated.parquet` is written, and thumbnails stay on disk.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.dedup.digests import Digests
from animesion.images import quality
from animesion.schemas import FEATURES, RAW, THUMBNAIL_SIDE, sample_key
from animesion.storage import parquet
from animesion.storage.workspace import Workspace

IntArray = npt.NDArray[np.int64]

#: Features of an image that was not fetched or does not decode.
_NO_FEATURES: dict[str, Any] = {
    "reason": "",
    "detail": "",
    "width": 0,
    "height": 0,
    "plain": False,
    "pixels_blake3": "",
    "phash": 0,
    "phash_flip": 0,
    "faces": -1,
    "face": 0,
    "face_score": 0.0,
}

#: Columns of `CURATED` that no rule reads.
PASSED = ("page_url", "file_url", "licence", "author", "rating", "md5", "plain", "offset")
_NOT_LOADED = {"boxes", "flags", "format", "mode"}
_ON_REQUEST = {
    *("points", "windows", "whole_phash", "whole_phash_flip", "whole_thumbnail", "thumbnail"),
    *("hash_kind", "hash", "hash_flip", "whole_hash", "whole_hash_flip"),
    *quality.COLUMNS,
}
#: Features with the name of a raw column.
_RENAMED = {"reason": "seen_reason", "detail": "seen_detail"}

#: Texts with few different values.
_CODED = {"reason", "seen_reason", "source", "split", "extension"}

#: Texts that are digests.
_DIGESTS = {"sha256", "pixels_blake3"}

#: Rows that are converted at once, about.
BATCH = 65_536

#: Parts whose rows are joined before they are converted.
_PARTS = 128

#: Thumbnails beyond this size in bytes are kept in a temporary file.
_IN_MEMORY = 1 << 28

_THUMBNAIL = 3 * THUMBNAIL_SIDE**2

#: The C library, if it is glibc.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim") else None


class Coded:
    """Texts of n rows with few different values.

    Attributes:
        codes: shape (n,); equal texts have equal codes.
        names: the text of each code.
    """

    def __init__(self, codes: npt.NDArray[np.int32], names: Sequence[str]) -> None:
        self.codes = codes
        self.names = list(names)
        self._code_of = {name: code for code, name in enumerate(self.names)}

    @classmethod
    def empty(cls, n: int) -> Coded:
        """Empty texts."""
        return cls(np.zeros(n, dtype=np.int32), [""])

    @classmethod
    def of(cls, texts: pa.ChunkedArray) -> Coded:
        """A column of texts."""
        encoded = texts.combine_chunks().fill_null("").dictionary_encode()
        return cls(encoded.indices.to_numpy().astype(np.int32), encoded.dictionary.to_pylist())

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> str:
        name: str = self.names[self.codes[row]]
        return name

    def __setitem__(self, rows: int | IntArray | npt.NDArray[np.bool_], text: str) -> None:
        self.codes[rows] = self.code(text)

    def code(self, text: str) -> int:
        """The code of a text, which is new if no row has the text."""
        code = self._code_of.setdefault(text, len(self.names))
        if code == len(self.names):
            self.names.append(text)
        return code

    def has(self, text: str) -> npt.NDArray[np.bool_]:
        """Which rows have a text, shape (n,)."""
        found: npt.NDArray[np.bool_] = self.codes == self._code_of.get(text, -1)
        return found

    def counts(self) -> dict[str, int]:
        """Number of rows by text."""
        return dict(zip(self.names, np.bincount(self.codes, minlength=len(self.names)).tolist(), strict=True))

    def texts(self, rows: slice | IntArray = slice(None)) -> pa.Array:
        """The texts of some rows as an Arrow array."""
        return pa.array(self.names, pa.string()).take(pa.array(self.codes[rows]))


@dataclass(frozen=True)
class CodedLists:
    """Lists of texts of n rows, with few different texts.

    Attributes:
        codes: codes of all lists, one after another.
        ends: shape (n,), where the list of each row ends.
        names: the text of each code.
    """

    codes: npt.NDArray[np.int32]
    ends: IntArray
    names: list[str]

    def __len__(self) -> int:
        return len(self.ends)

    def counts(self) -> IntArray:
        """Length of each list, shape (n,)."""
        return np.diff(self.ends, prepend=0)

    def of(self, row: int) -> tuple[int, ...]:
        """The codes of a row."""
        return tuple(self.codes[self.ends[row - 1] if row else 0 : self.ends[row]].tolist())

    def take(self, rows: IntArray) -> CodedLists:
        """The lists of some rows, in that order."""
        counts = self.counts()[rows]
        ends = np.cumsum(counts)
        at = np.repeat(self.ends[rows] - ends, counts) + np.arange(ends[-1] if len(ends) else 0)
        return CodedLists(self.codes[at], ends, self.names)


class Texts:
    """Texts of n rows, of which few change.

    Args:
        base: an Arrow array of n texts, or n for empty ones.
    """

    def __init__(self, base: pa.Array | int) -> None:
        self._base = base
        self._changed: dict[int, str] = {}

    def __setitem__(self, row: int, text: str) -> None:
        self._changed[row] = text

    def __getitem__(self, row: int) -> str:
        if (changed := self._changed.get(row)) is not None:
            return changed
        text: str = "" if isinstance(self._base, int) else self._base[row].as_py()
        return text

    def changed(self) -> list[int]:
        """Rows whose text was set."""
        return list(self._changed)

    def texts(self, start: int, stop: int) -> pa.Array:
        """The texts of a range of rows as an Arrow array."""
        if isinstance(self._base, int):
            base = pa.repeat(pa.scalar("", pa.string()), stop - start)
        else:
            base = self._base.slice(start, stop - start).cast(pa.string())
        rows = np.fromiter(self._changed, dtype=np.int64, count=len(self._changed))
        rows = np.sort(rows[(rows >= start) & (rows < stop)])
        if not len(rows):
            return base
        mask = np.zeros(stop - start, dtype=np.bool_)
        mask[rows - start] = True
        return pc.replace_with_mask(base, mask, pa.array([self._changed[i] for i in rows.tolist()], pa.string()))


class Passed:
    """Columns that are only copied, compressed in a temporary file.

    Args:
        folder: for the file; None for that of the system.

    Attributes:
        order: shape (n,), the place of each row among the rows in the order in which they were added.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.order: IntArray = np.empty(0, dtype=np.int64)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, it lives as long as the columns
        weakref.finalize(self, self._file.close)
        self._ends = [0]  # of the blocks, in bytes
        self._starts = [0]  # of the blocks, in rows

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        block = sink.getvalue()
        self._file.write(block)
        self._ends.append(self._ends[-1] + block.size)
        self._starts.append(self._starts[-1] + len(table))

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        """A range of rows, by name of the column."""
        places = self.order[start:stop]
        by_place = np.argsort(places, kind="stable")
        places = places[by_place]
        edges = np.searchsorted(places, self._starts)
        options = pa.ipc.IpcReadOptions(use_threads=False)
        pieces = []
        for i in np.flatnonzero(edges[1:] > edges[:-1]).tolist():
            self._file.seek(self._ends[i])
            block = self._file.read(self._ends[i + 1] - self._ends[i])
            chosen = pa.array(places[edges[i] : edges[i + 1]] - self._starts[i])
            pieces.append(pa.ipc.open_file(pa.py_buffer(block), options=options).read_all().take(chosen))
        back = np.empty(len(places), dtype=np.int64)
        back[by_place] = np.arange(len(places))
        table = pa.concat_tables(pieces)
        chunks = dict(zip(table.column_names, table.columns, strict=True))
        del pieces, table  # each column goes as soon as it is ordered
        return {name: chunks.pop(name).combine_chunks().take(pa.array(back)) for name in list(chunks)}


@dataclass(frozen=True)
class Stored:
    """Features of n rows, which are read when they are needed.

    Attributes:
        folder: of the feature tables.
        part: shape (n,), the part of each row.
        place: shape (n,), the place of each row in the feature table of its part, -1 for none.
    """

    folder: Path
    part: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]

    def take(self, rows: IntArray) -> Stored:
        """Those of some rows, in that order."""
        return Stored(self.folder, self.part[rows], self.place[rows])

    def read(self, name: str, rows: IntArray) -> Iterator[tuple[IntArray, pa.Array]]:
        """A column of some rows, a part at a time.

        Args:
            name: of the column.
            rows: shape (m,).

        Yields:
            Positions in `rows`, and the value of each.
        """
        by_part = np.argsort(self.part[rows], kind="stable")
        parts = self.part[rows[by_part]]
        firsts = np.flatnonzero(np.diff(parts, prepend=-1))
        for first, last in itertools.pairwise([*firsts.tolist(), len(parts)]):
            column = parquet.read(self.path(parts[first]), FEATURES, (name,))[name]
            chosen = by_part[first:last]
            if self.place[rows[chosen]].min() < 0:
                raise parquet.damaged(self.path(parts[first]), "key")
            yield chosen, column.take(pa.array(self.place[rows[chosen]])).combine_chunks()

    def path(self, part: int) -> Path:
        """The feature table of a part."""
        return self.folder / f"part-{part:05d}.parquet"


@dataclass(frozen=True)
class Thumbnails:
    """Thumbnails of n rows, which are read when they are needed.

    Attributes:
        stored: the features of the rows.
        column: `thumbnail` or `whole_thumbnail`.
    """

    stored: Stored
    column: str = "thumbnail"

    def read(self, rows: IntArray) -> npt.NDArray[np.uint8]:
        """The thumbnails of some rows, shape (len(rows), 768); from 256 MB on, the array is mapped from a file."""
        shape = (len(rows), _THUMBNAIL)
        found: npt.NDArray[np.uint8]
        if len(rows) * _THUMBNAIL <= _IN_MEMORY:
            found = np.empty(shape, dtype=np.uint8)
        else:
            with tempfile.TemporaryFile(dir=self.stored.folder) as file:
                found = np.memmap(file, np.uint8, "w+", shape=shape)
        for chosen, wanted in self.stored.read(self.column, rows):
            if wanted.null_count:
                raise parquet.damaged(self.stored.path(self.stored.part[rows[chosen[0]]]), self.column)
            content = np.frombuffer(wanted.buffers()[1], dtype=np.uint8)
            found[chosen] = content[_THUMBNAIL * wanted.offset :][: shape[1] * len(chosen)].reshape(-1, _THUMBNAIL)
        return found


class Columns(dict[str, Any]):
    """Columns of n rows by name, as `load_columns` describes them.

    Attributes:
        passed: columns of `CURATED` that no rule reads.
        stored: features that are not loaded.
    """

    def __init__(self, passed: Passed) -> None:
        super().__init__()
        self.passed = passed
        self.stored = Stored(Path(), np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))

    @classmethod
    def of(cls, tables: Iterable[pa.Table], more: Sequence[str] = ()) -> Columns:
        """Columns of rows in the order of some tables, which have the columns of a joined part.

        Args:
            tables: the rows.
            more: columns of `CURATED` that no rule reads, to have as columns too.
        """
        blocks = _Blocks(more)
        for table in tables:
            blocks.add(table)
        return blocks.joined(None)


def load_columns(workspace: Workspace, parts: int, more: Sequence[str] = ()) -> Columns:
    """Raw and feature tables of all parts, joined on the key and sorted by it, as columns by name.

    - Numbers are NumPy arrays. `crop` has shape (n, 4): left, top, right, bottom; where `cropped` is false, it is the
      whole image. `box_count`, `best_score` and `second_score` are about the image's boxes, of the detector or of the
      source's table; `has_table` tells whether the source has one.
    - Texts with few different values are `Coded`, `labels` are `CodedLists`, digests are `Digests`. Other texts,
      `families` and what is loaded on request are Arrow arrays.
    - `thumbnail` is of `Thumbnails`. Other large features, such as points, are in `stored`.

    Args:
        workspace: output folder whose inspect stage is done.
        parts: number of parts.
        more: columns to load in addition, as Arrow arrays: those of local features take 3 KB per image.
    """
    blocks = _Blocks(more, workspace.path("features"))
    waiting: list[pa.Table] = []
    for part in range(parts):
        waiting.append(_part(workspace, part, more))
        if len(waiting) == _PARTS or part == parts - 1:
            blocks.add(pa.concat_tables(waiting).combine_chunks())
            waiting = []
    columns = blocks.joined(_face_keys)
    if "part" in columns:
        columns.stored = Stored(workspace.path("features"), columns["part"], columns.pop("place"))
        columns["thumbnail"] = Thumbnails(columns.stored)
    return columns


def _part(workspace: Workspace, part: int, more: Sequence[str]) -> pa.Table:
    """The joined rows of a part, by name of the column, and `place`, the row of the feature table or -1."""
    names = [name for name in FEATURES.names if name not in _ON_REQUEST or name in more]
    names = [name for name in names if name not in _NOT_LOADED or name == "boxes"]
    wanted = [name for name in RAW.names if name not in _NOT_LOADED or name == "boxes"]
    left = parquet.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW, wanted).combine_chunks()
    right = parquet.read(workspace.path(f"features/part-{part:05d}.parquet"), FEATURES, names).combine_chunks()
    places = pa.array(np.arange(len(left), dtype=np.int32))
    if not left["key"].equals(right["key"]):  # else every image was fetched, and is one sample
        rows_of: dict[str, list[int | None]] = {}
        for row, key in enumerate(right["key"].to_pylist()):
            rows_of.setdefault(key, []).append(row)
        nothing: list[int | None] = [None]
        # (row of `left`, row of `right` or None): an image whose faces are samples has one entry per face
        pairs = [(i, j) for i, key in enumerate(left["key"].to_pylist()) for j in rows_of.get(key, nothing)]
        places = pa.array([j for _, j in pairs], pa.int32())
        left = left.take(pa.array([i for i, _ in pairs], pa.int64()))
        # A null row number takes a row of nulls, which `_NO_FEATURES` fills below.
        right = right.take(places)
    columns = {name: left[name] for name in left.column_names if name != "boxes"}
    for name in right.column_names:
        if name not in ("key", "boxes"):
            values = right[name].fill_null(_NO_FEATURES[name]) if name in _NO_FEATURES else right[name]
            columns[_RENAMED.get(name, name)] = values
    columns["part"] = pa.repeat(pa.scalar(part, pa.int32()), len(left))
    columns["place"] = places.fill_null(-1)
    columns["has_table"] = left["boxes"].is_valid()
    # the detector's boxes, or those of the table that decided before the image was fetched
    boxes = pc.if_else(right["boxes"].is_null(), left["boxes"], right["boxes"])
    for name, values in _best_scores(boxes).items():
        columns[name] = pa.array(values)
    return pa.table(columns)


class _Blocks:
    """Columns of the rows that were added so far, in blocks."""

    def __init__(self, more: Sequence[str], folder: Path | None = None) -> None:
        self._more = more
        self._pieces: dict[str, list[Any]] = {}
        self._codes: dict[str, dict[str, int]] = {}
        self._passed = Passed(folder)
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        release()  # the tables that were joined: hundreds of megabytes
        self._rows += len(table)
        self._passed.add(table.select(PASSED))
        for name in table.column_names:
            if name not in PASSED or name in self._more:
                self._pieces.setdefault(name, []).append(self._piece(name, table[name].combine_chunks(), table))

    def _piece(self, name: str, values: pa.Array, table: pa.Table) -> Any:
        if name in _CODED:
            return self._coded(name, values.fill_null(""))
        if name in _DIGESTS:
            return Digests(values.fill_null(""))
        if name == "labels":
            return self._coded(name, values.flatten()), values.value_lengths().to_numpy()
        if name == "crop":
            whole = np.zeros((len(values), 4), dtype=np.int32)
            whole[:, 2], whole[:, 3] = table["width"].to_numpy(), table["height"].to_numpy()
            valid = values.is_valid().to_numpy(zero_copy_only=False)
            whole[valid] = values.drop_null().flatten().to_numpy().reshape(-1, 4)
            return whole, valid
        if pa.types.is_primitive(values.type) and name not in _ON_REQUEST:
            return values.to_numpy(zero_copy_only=False)
        return values

    def _coded(self, name: str, values: pa.Array) -> npt.NDArray[np.int32]:
        known = self._codes.setdefault(name, {})
        encoded = values.dictionary_encode()
        codes = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
        found: npt.NDArray[np.int32] = np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()]
        return found

    def joined(self, rename: Callable[[pa.Array, npt.NDArray[np.int32]], pa.Array] | None) -> Columns:
        """All rows, sorted by the key if keys have to be renamed."""
        columns = Columns(self._passed)
        pieces = self._pieces
        order: IntArray | None = None
        if rename is not None and self._rows:
            keys = concatenated(pieces.pop("key"))
            keys = rename(keys, np.concatenate(pieces["face"]))
            if len(keys) > 1 and not pc.all(pc.less(keys[:-1], keys[1:])).as_py():
                order = pc.sort_indices(keys).to_numpy().astype(np.int64)
                keys = keys.take(pa.array(order))
            columns["key"] = keys
        for name in list(pieces):
            blocks = pieces.pop(name)
            if name == "crop":
                columns["cropped"] = _ordered(np.concatenate([block[1] for block in blocks]), order)
                columns[name] = _ordered(np.concatenate([block[0] for block in blocks]), order)
            elif name == "labels":
                ends = np.cumsum(np.concatenate([block[1] for block in blocks]), dtype=np.int64)
                lists = CodedLists(np.concatenate([block[0] for block in blocks]), ends, list(self._codes[name]))
                columns[name] = lists if order is None else lists.take(order)
            elif name in _DIGESTS:
                digests = Digests.joined(blocks)
                columns[name] = digests if order is None else digests.ordered(order)
            elif name in _CODED:
                columns[name] = Coded(_ordered(np.concatenate(blocks), order), list(self._codes[name]))
            elif isinstance(blocks[0], np.ndarray):
                columns[name] = _ordered(np.concatenate(blocks), order)
            else:
                columns[name] = _ordered(concatenated(blocks), order)
            del blocks
            release()
        self._passed.order = np.arange(self._rows) if order is None else order
        return columns


def release() -> None:
    """Give freed memory back to the system, where the allocators keep it.

    glibc keeps small blocks between large ones that are in use: a third of the memory of a million rows.
    """
    pa.default_memory_pool().release_unused()
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


def _ordered(values: Any, order: IntArray | None) -> Any:
    if order is None:
        return values
    return values[order] if isinstance(values, np.ndarray) else values.take(pa.array(order))


def concatenated(blocks: list[pa.Array]) -> pa.Array:
    """Arrow arrays as one; texts of more than 2 GiB together get offsets of 64 bits."""
    if pa.types.is_string(blocks[0].type) and sum(block.nbytes for block in blocks) >= 2**31:
        blocks = [block.cast(pa.large_string()) for block in blocks]
    if pa.types.is_binary(blocks[0].type) and sum(block.nbytes for block in blocks) >= 2**31:
        blocks = [block.cast(pa.large_binary()) for block in blocks]
    return pa.concat_arrays(blocks)


def _best_scores(boxes: pa.ChunkedArray) -> dict[str, npt.NDArray[Any]]:
    """The number of each row's boxes, and the best and the second-best of their scores; 0 where there is none."""
    column = boxes.combine_chunks()
    scores = column.flatten().field("score").to_numpy(zero_copy_only=False)
    counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    ranked = scores[np.lexsort((scores, np.repeat(np.arange(len(counts)), counts)))].astype(np.float32)
    ends = np.cumsum(counts)
    best, second = np.zeros(len(column), dtype=np.float32), np.zeros(len(column), dtype=np.float32)
    best[counts > 0] = ranked[ends[counts > 0] - 1]
    second[counts > 1] = ranked[ends[counts > 1] - 2]
    return {"box_count": counts, "best_score": best, "second_score": second}


def _face_keys(keys: pa.Array, faces: npt.NDArray[np.int32]) -> pa.Array:
    """The keys of samples: that of the image and, for a face, `-face` and a number, and `_` while an image has it."""
    rows = np.flatnonzero(faces > 0)
    if not len(rows):
        return keys
    of_faces = [sample_key(key, face) for key, face in zip(_texts(keys, rows), faces[rows].tolist(), strict=True)]
    while len(same := np.flatnonzero(pc.is_in(pa.array(of_faces, keys.type), value_set=keys).to_numpy(False))):
        for i in same.tolist():
            of_faces[i] += "_"
    mask = np.zeros(len(keys), dtype=np.bool_)
    mask[rows] = True
    return pc.replace_with_mask(keys, mask, pa.array(of_faces, keys.type))


def _texts(values: pa.Array, rows: IntArray) -> list[str]:
    texts: list[str] = values.take(pa.array(rows)).to_pylist()
    return texts


def batches(n: int) -> Iterator[slice]:
    """Ranges of rows that are few enough to become Python objects together."""
    return (slice(start, min(start + BATCH, n)) for start in range(0, n, BATCH))


def crop_of(rows: Mapping[str, Any], row: int) -> tuple[int, int, int, int] | None:
    """The crop of a row; None for the whole image."""
    left, top, right, bottom = rows["crop"][row].tolist()
    return (left, top, right, bottom) if rows["cropped"][row] else None
