"""Read and write Parquet tables of a build, with a fixed schema and reproducible bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from animesion.errors import UsageError
from animesion.schemas import PLAN, Box, Item
from animesion.storage import names
from animesion.storage.workspace import atomic_file

#: What columns with these names contain, in every table that stages exchange.
_NAMES = {"key": names.KEY, "shard": names.SHARD, "extension": "[a-z0-9]{0,8}"}
#: Columns of positions and sizes in bytes.
_PLACES = {"part", "offset", "bytes", "size", "sample_offset", "sample_size", "image_offset", "image_size"}
#: Columns that are null for some images, as `animesion.schemas` says; the crop of a kept image is not.
_OPTIONAL = {
    *("boxes", "crop", "points", "windows", "whole_phash", "whole_phash_flip", "whole_thumbnail"),
    *("hash_kind", "hash", "hash_flip", "whole_hash", "whole_hash_flip"),
}
_AGAIN = "build again into another folder"


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of rows; a missing field is null."""
    return pa.Table.from_pylist(rows, schema=schema)


#: Rows of a row group, pyarrow's default.
ROW_GROUP = 1 << 20


def write(path: Path, content: pa.Table) -> str:
    """Write a table atomically; returns the SHA-256 of the file as hex."""
    return write_groups(path, content.schema, [content])


def write_groups(path: Path, schema: pa.Schema, groups: Iterable[pa.Table]) -> str:
    """Write a table that does not exist as a whole, atomically; returns the SHA-256 of the file as hex.

    Args:
        path: the file.
        schema: of the table.
        groups: its rows, `ROW_GROUP` in each table but the last; then the bytes are those that `write` gives.
    """
    # `store_schema` would add Arrow's serialised schema, which differs between versions of pyarrow.
    options = {"compression": "zstd", "version": "2.6", "store_schema": False}
    with (
        atomic_file(path) as file,
        pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, **options) as writer,
    ):
        for group in groups:
            writer.write_table(group, row_group_size=ROW_GROUP)
    return file.sha256


def content(of: pa.Table) -> memoryview:
    """The bytes of the file that `write` writes."""
    out = pa.BufferOutputStream()
    pq.write_table(of, out, compression="zstd", version="2.6", store_schema=False)
    return memoryview(out.getvalue())


class DamagedTableError(UsageError):
    """A table that cannot be read, or whose names and numbers no stage writes."""


def read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table with a known schema, or some of its columns, in the order given.

    Raises:
        DamagedTableError: no Parquet file with these columns, or with a key, a name or a place that no stage writes.
    """
    chosen = list(columns) if columns is not None else schema.names
    try:
        # Not `read_table`, which imports pandas if it is installed, and takes columns from parts of the path such as
        # `a=b`. Threads save no time on a local file, and may wait for each other for ever where memory is too short
        # to start one.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            content = file.read(columns=chosen, use_threads=False)
        content = content.select(chosen).cast(pa.schema([schema.field(name) for name in chosen]))
        faults = [name for name in chosen if not _is_proper(name, content[name]) or _lacks_values(name, content)]
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        cause = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "no such table"
        raise DamagedTableError(f"{path} is damaged ({cause}): {_AGAIN}") from None
    if faults:
        raise damaged(path, faults[0])
    return content


def damaged(path: Path, column: str) -> DamagedTableError:
    """The error for a table with a value that no stage writes."""
    return DamagedTableError(f"{path} is damaged (column {column}): {_AGAIN}")


def _is_proper(name: str, column: pa.ChunkedArray) -> bool:
    """Whether a column has no keys, names or places that lead out of its folder or its files."""
    if name in _PLACES:
        return not len(column) or (pc.min(column).as_py() or 0) >= 0
    pattern = _NAMES.get(name)
    if pattern is None:
        return True
    return bool(pc.all(pc.match_substring_regex(column, f"^(?:{pattern})$"), min_count=0).as_py())


def _lacks_values(name: str, content: pa.Table) -> bool:
    """Whether a column has a null in a row without a drop reason that is not null by design."""
    column = content[name]
    if not column.null_count or (name in _OPTIONAL and "kept" not in content.column_names):
        return False
    if name == "key" or "reason" not in content.column_names:
        return name == "key" or "locator" in content.column_names
    return bool(pc.any(pc.and_(pc.is_null(column), pc.equal(content["reason"], ""))).as_py())


def read_many(paths: Iterable[Path], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read several tables of one schema and concatenate them; no paths give an empty table."""
    chosen = list(columns) if columns is not None else schema.names
    empty = pa.schema([schema.field(name) for name in chosen]).empty_table()
    return pa.concat_tables([empty, *(read(path, schema, columns) for path in paths)])


def plan_table(items: Sequence[Item]) -> pa.Table:
    """A table of schema `PLAN` from items."""
    # by column: rows as dicts take seven times as long, and a listing has millions
    columns = [pa.array([getattr(item, field.name) for item in items], field.type) for field in PLAN]
    return pa.table(columns, schema=PLAN)


def plan_items(plan: pa.Table) -> list[Item]:
    """The items of a plan table."""
    items = []
    for row in plan.to_pylist():
        box_rows = row.pop("boxes")
        boxes = None if box_rows is None else tuple(Box(**box) for box in box_rows)
        row |= {name: tuple(row[name]) for name in ("labels", "families", "flags")}
        items.append(Item(**row, boxes=boxes))
    return items
