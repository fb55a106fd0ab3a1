"""Read and write the build's Parquet tables: always with their schema, always the same bytes for the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from animesion.schemas import PLAN, Box, Item
from animesion.storage.workspace import atomic_file


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; a missing field is null."""
    return pa.Table.from_pylist(rows, schema=schema)


def write(path: Path, content: pa.Table) -> str:
    """Write a table atomically; returns the SHA-256 of the file as hex."""
    with atomic_file(path) as file:
        pq.write_table(content, pa.PythonFile(file, mode="w"), compression="zstd", version="2.6", store_schema=False)
    return file.sha256


def read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table of ours, whole or some columns."""
    chosen = list(columns) if columns is not None else schema.names
    found = pq.read_table(path, columns=chosen, partitioning=None)
    return found.select(chosen).cast(pa.schema([schema.field(name) for name in chosen]))


def read_many(paths: Iterable[Path], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Several tables of one schema, one after another."""
    chosen = list(columns) if columns is not None else schema.names
    empty = pa.schema([schema.field(name) for name in chosen]).empty_table()
    return pa.concat_tables([empty, *(read(path, schema, columns) for path in paths)])


def plan_table(items: Sequence[Item]) -> pa.Table:
    """Items as a table."""
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
        boxes = row.pop("boxes")
        given = None if boxes is None else tuple(Box(**box) for box in boxes)
        row |= {name: tuple(row[name]) for name in ("labels", "families", "flags")}
        items.append(Item(**row, boxes=given))
    return items
