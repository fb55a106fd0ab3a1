"""Read and write Parquet tables of a build, with a fixed schema and reproducible bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from animesion.schemas import PLAN, Box, Item
from animesion.storage.workspace import atomic_file


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of rows; a missing field is null."""
    return pa.Table.from_pylist(rows, schema=schema)


def write(path: Path, content: pa.Table) -> str:
    """Write a table atomically; returns the SHA-256 of the file as hex."""
    # `store_schema` would add Arrow's serialised schema, which differs between versions of pyarrow.
    with atomic_file(path) as file:
        pq.write_table(content, pa.PythonFile(file, mode="w"), compression="zstd", version="2.6", store_schema=False)
    return file.sha256


def read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table with a known schema, or some of its columns, in the order given."""
    chosen = list(columns) if columns is not None else schema.names
    # Without `partitioning`, pyarrow takes columns from parts of the path such as `a=b`.
    content = pq.read_table(path, columns=chosen, partitioning=None)
    return content.select(chosen).cast(pa.schema([schema.field(name) for name in chosen]))


def read_many(paths: Iterable[Path], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read several tables of one schema and concatenate them; no paths give an empty table."""
    chosen = list(columns) if columns is not None else schema.names
    empty = pa.schema([schema.field(name) for name in chosen]).empty_table()
    return pa.concat_tables([empty, *(read(path, schema, columns) for path in paths)])


def plan_table(items: Sequence[Item]) -> pa.Table:
    """A table of schema `PLAN` from items."""
    rows = []
    for item in items:
        row = {name: getattr(item, name) for name in PLAN.names}
        row["boxes"] = None if item.boxes is None else [box._asdict() for box in item.boxes]
        rows.append(row)
    return table(rows, PLAN)


def plan_items(plan: pa.Table) -> list[Item]:
    """The items of a plan table."""
    items = []
    for row in plan.to_pylist():
        box_rows = row.pop("boxes")
        boxes = None if box_rows is None else tuple(Box(**box) for box in box_rows)
        row |= {name: tuple(row[name]) for name in ("labels", "families", "flags")}
        items.append(Item(**row, boxes=boxes))
    return items
