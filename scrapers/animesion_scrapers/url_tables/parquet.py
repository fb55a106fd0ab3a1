"""URL tables in Parquet, read in batches of bounded memory.

What the columns mean is decided in `columns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from animesion_scrapers.url_tables.columns import BATCH_ROWS, ColumnMapping, UnreadableError, UrlRow

_LONGEST_LIST = 1000

_BATCH_BYTES = 1 << 24

_STREAMED: Mapping[str, Any] = {"buffer_size": 1 << 20, "pre_buffer": False, "memory_map": False}


def read_parquet(path: Path, mapping: ColumnMapping) -> Iterator[list[UrlRow]]:
    """Yield the rows of a Parquet file in batches.

    Raises:
        UnreadableError: A column has an unsuitable type, or the file cannot be read to its end.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(path, **_STREAMED) as file:
            found = mapping.columns(file.schema_arrow.names)
            for meaning, name in found.items():
                kind = file.schema_arrow.field(name).type
                if pa.types.is_nested(kind) and not (meaning == "label" and _is_list(kind)):
                    raise UnreadableError(f"the column {name!r} for {meaning} has type {str(kind)[:60]}")
            columns = list(dict.fromkeys(found.values()))
            # group by group, as each has its own dictionaries and safe batch size
            for group in range(file.num_row_groups):
                size = _batch_rows(path, file.metadata, group, columns)
                for batch in file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                    values = [_values(batch.column(name)) for name in found.values()]
                    yield [
                        mapping.row(line + i, dict(zip(found, cells, strict=True)))
                        for i, cells in enumerate(zip(*values, strict=True), 1)
                    ]
                    line += len(batch)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        first = str(error).partition("\n")[0][:160] or type(error).__name__
        raise UnreadableError(f"cannot be read to its end ({first})", line + 1 if line else 0) from None


def _batch_rows(path: Path, metadata: Any, group: int, columns: Sequence[str]) -> int:
    """Number of rows of a row group that fit into memory at once.

    A dictionary value is stored once and decoded for every row that refers to it, so a file of a few kilobytes can
    expand to gigabytes. The longest value of each dictionary therefore bounds the batch.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    described = metadata.row_group(group)
    texts = []
    most = BATCH_ROWS
    for i in range(described.num_columns):
        chunk = described.column(i)
        if chunk.path_in_schema.partition(".")[0] not in columns:
            continue
        repeated = chunk.num_values / max(described.num_rows, 1)  # mean length of the lists
        if repeated > _LONGEST_LIST:
            raise UnreadableError(f"row group {group + 1} has lists of {repeated:,.0f} values on average")
        most = min(most, max(1, int(BATCH_ROWS / max(repeated, 1))))
        if chunk.physical_type == "BYTE_ARRAY":
            texts.append(chunk.path_in_schema)
    if not texts or not described.num_rows:
        return most
    # one row, decoded as dictionary indices, loads the dictionary without expanding it
    with pq.ParquetFile(path, read_dictionary=texts, **_STREAMED) as file:
        first = next(file.iter_batches(1, row_groups=[group], columns=texts, use_threads=False), None)
    for column in first.columns if first is not None else ():
        values = column.flatten() if _is_list(column.type) else column
        lengths = pc.binary_length(values.dictionary) if hasattr(values, "dictionary") else None
        longest = (pc.max(lengths).as_py() or 0) if lengths is not None else 0
        most = min(most, max(1, _BATCH_BYTES // max(longest, 1)))
    return most


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not pa.types.is_nested(kind.value_type)


def _values(column: Any) -> list[Any]:
    """The cells of a column; all are bytes when one is not UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return cast("list[Any]", column.to_pylist())
    except UnicodeDecodeError:
        if _is_list(column.type):
            binary = pa.list_(pa.binary()) if pa.types.is_list(column.type) else pa.large_list(pa.large_binary())
        else:
            binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return cast("list[Any]", column.cast(binary).to_pylist())
