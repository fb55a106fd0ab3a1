"""URL tables in Parquet, read in batches of bounded memory.

What the columns mean is decided in `columns`.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from animesion_scrapers.url_tables.columns import BATCH_ROWS, ColumnMapping, UnreadableError, UrlRow
from animesion_scrapers.url_tables.parquet_pages import DELTA_BYTE_ARRAY, DICTIONARY, Page, pages

_LONGEST_LIST = 1000

_BATCH_BYTES = 1 << 24

_LARGEST_PAGE = 1 << 26
"""Bytes of the largest page after decompression; writers make pages of one MiB."""

_BYTES = "BYTE_ARRAY"

_ZEROS = re.compile(r"\.0+(?=Z?$)")
_MIDNIGHT = re.compile(r" 00:00:00Z?$")

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
            schema, metadata = file.schema_arrow, file.metadata
            found = _columns(schema, mapping)
            names = _class_names(schema)
            columns = list(dict.fromkeys(found.values()))
            texts = _text_paths(metadata, columns)
            # the footer grows with the number of row groups, so it is read once for both readers
            with pq.ParquetFile(path, metadata=metadata, read_dictionary=texts, **_STREAMED) as dictionaries:
                # group by group, as each has its own dictionaries and safe batch size
                for group in range(file.num_row_groups):
                    limit, repeating = _page_rows(path, metadata, group, columns)
                    repeated = [text for text in texts if text in repeating]
                    size = min(limit, _batch_rows(dictionaries, metadata, group, columns, repeated))
                    for batch in file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                        values = [_values(batch.column(name), names.get(name, ())) for name in found.values()]
                        yield [
                            mapping.row(line + i, dict(zip(found, cells, strict=True)))
                            for i, cells in enumerate(zip(*values, strict=True), 1)
                        ]
                        line += len(batch)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        first = str(error).partition("\n")[0][:160] or type(error).__name__
        raise UnreadableError(f"cannot be read to its end ({first})", line + 1 if line else 0) from None


def _columns(schema: Any, mapping: ColumnMapping) -> dict[str, str]:
    """Column name by meaning.

    Raises:
        UnreadableError: There is no column of URLs, or a column has an unsuitable type.
    """
    try:
        found = mapping.columns(schema.names)
    except UnreadableError:
        images = [field.name for field in schema if _is_image(field.type)]
        if images and not mapping.requested.get("url"):
            raise UnreadableError(
                f"the column {images[0]!r} contains the images themselves, not URLs: "
                "use `animesion build folder --set source.kind=parquet`"
            ) from None
        raise
    for meaning, name in found.items():
        kind = _stored_type(schema.field(name).type)
        if not _is_plain(kind) and not (meaning == "label" and _is_list(kind)):
            raise UnreadableError(f"the column {name!r} for {meaning} has type {str(kind)[:60]}")
    return found


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Class names of integer columns, from the features that Hugging Face's `datasets` describes in the metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: tuple(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
            if isinstance(feature.get("names"), list) and all(isinstance(each, str) for each in feature["names"])
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _text_paths(metadata: Any, columns: Sequence[str]) -> list[str]:
    """Paths of the text in these columns, which may be stored as dictionaries."""
    described = (metadata.schema.column(i) for i in range(metadata.num_columns))
    return [each.path for each in described if each.path.partition(".")[0] in columns and each.physical_type == _BYTES]


def _batch_rows(dictionaries: Any, metadata: Any, group: int, columns: Sequence[str], texts: Sequence[str]) -> int:
    """Number of rows of a row group that fit into memory at once.

    A dictionary value is stored once and decoded for every row that refers to it, so a file of a few kilobytes can
    expand to gigabytes. The longest value of each dictionary therefore bounds the batch.
    """
    import pyarrow.compute as pc

    described = metadata.row_group(group)
    most = BATCH_ROWS
    for i in range(described.num_columns):
        chunk = described.column(i)
        if chunk.path_in_schema.partition(".")[0] not in columns:
            continue
        repeated = chunk.num_values / max(described.num_rows, 1)  # mean length of the lists
        if repeated > _LONGEST_LIST:
            raise UnreadableError(f"row group {group + 1} has lists of {repeated:,.0f} values on average")
        most = min(most, max(1, int(BATCH_ROWS / max(repeated, 1))))
    if not texts or not described.num_rows:
        return most
    # one row, decoded as dictionary indices, loads the dictionary without expanding it
    first = next(dictionaries.iter_batches(1, row_groups=[group], columns=texts, use_threads=False), None)
    for column in first.columns if first is not None else ():
        values = column.flatten() if _is_list(column.type) else column
        lengths = pc.binary_length(values.dictionary) if hasattr(values, "dictionary") else None
        longest = (pc.max(lengths).as_py() or 0) if lengths is not None else 0
        most = min(most, max(1, _BATCH_BYTES // max(longest, 1)))
    return most


def _page_rows(path: Path, metadata: Any, group: int, columns: Sequence[str]) -> tuple[int, set[str]]:
    """Number of rows of a row group whose pages fit into memory at once, and the columns that have a dictionary.

    Raises:
        UnreadableError: A page does not fit.
        ValueError: The header of a page is damaged.
    """
    most = BATCH_ROWS
    repeating: set[str] = set()
    described = metadata.row_group(group)
    with path.open("rb") as file:
        for i in range(described.num_columns):
            chunk = described.column(i)
            if chunk.path_in_schema.partition(".")[0] not in columns:
                continue
            offsets = [offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset]
            start = min(offsets, default=0)
            rows = described.num_rows / max(chunk.num_values, 1)  # of each value; lists have several
            window: deque[Page] = deque()
            encodings: set[int] = set()
            size = values = largest = 0
            for page in pages(file, start, start + chunk.total_compressed_size):
                if page.size > _LARGEST_PAGE:
                    raise UnreadableError(
                        f"the column {chunk.path_in_schema[:60]!r} has a page of {page.size:,} bytes in row group "
                        f"{group + 1}; at most {_LARGEST_PAGE:,} are read"
                    )
                largest = max(largest, page.size)
                encodings.add(page.encoding)
                window.append(page)
                size, values = size + page.size, values + page.values
                while size > _LARGEST_PAGE and len(window) > 1:
                    # as many rows as lie between the first and the last page touch no more than these
                    most = min(most, max(1, int((values - window[0].values - page.values) * rows)))
                    first = window.popleft()
                    size, values = size - first.size, values - first.values
            if DELTA_BYTE_ARRAY in encodings:  # a value may repeat all of the one before it
                most = min(most, max(1, _BATCH_BYTES // max(largest, 1)))
            elif DICTIONARY in encodings:
                repeating.add(chunk.path_in_schema)
    return most, repeating


def _stored_type(kind: Any) -> Any:
    """The type without the name of an extension."""
    return kind.storage_type if hasattr(kind, "storage_type") else kind


def _is_image(kind: Any) -> bool:
    """Whether a column holds files: bytes, or the struct of bytes and path that `datasets` writes."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_plain(kind: Any) -> bool:
    """Whether cells of a type are text, numbers, booleans or dates."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not (pa.types.is_nested(kind) or pa.types.is_duration(kind) or pa.types.is_interval(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in lists) and _is_plain(kind.value_type)


def _values(column: Any, names: Sequence[str]) -> list[Any]:
    """The cells of a column as Python values; text is bytes when a cell is not UTF-8.

    Args:
        column: An Arrow array.
        names: Class names, if the cells are their numbers; -1 is no class.
    """
    import pyarrow as pa

    if hasattr(column, "storage"):
        if getattr(column.type, "extension_name", "") == "arrow.uuid":
            return _mapped(column.to_pylist(), str)
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type.value_type if _is_list(column.type) else column.type
    if pa.types.is_temporal(kind):
        return _dates(column)
    try:
        cells = cast("list[Any]", column.to_pylist())
    except UnicodeDecodeError:
        if _is_list(column.type):
            binary = pa.list_(pa.binary()) if pa.types.is_list(column.type) else pa.large_list(pa.large_binary())
        else:
            binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return cast("list[Any]", column.cast(binary).to_pylist())
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        # the shortest text that gives the same number: 0.1, not 0.10000000149011612
        number = kind.to_pandas_dtype()
        return _mapped(cells, lambda cell: float(str(number(cell))))
    if names and pa.types.is_integer(kind):
        return _mapped(cells, lambda cell: names[cell] if 0 <= cell < len(names) else None)
    return cells


def _dates(column: Any) -> list[Any]:
    """Dates and times in ISO 8601; a time of midnight is left out, as are the digits of zero seconds' fractions."""
    import pyarrow as pa

    is_list = _is_list(column.type)
    kind = column.type.value_type if is_list else column.type
    if pa.types.is_timestamp(kind) and kind.tz:
        kind = pa.timestamp(kind.unit, "UTC")
        column = column.cast(pa.list_(kind) if is_list else kind)
    texts = column.cast(pa.list_(pa.string()) if is_list else pa.string()).to_pylist()
    return _mapped(texts, lambda text: _MIDNIGHT.sub("", _ZEROS.sub("", text)).replace(" ", "T"))


def _mapped(cells: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Cells, or members of cells that are lists, after a change; None stays."""
    return [
        _mapped(cell, change) if isinstance(cell, list) else None if cell is None else change(cell) for cell in cells
    ]
