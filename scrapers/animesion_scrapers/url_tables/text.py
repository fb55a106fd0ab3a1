"""URL tables as text: CSV, TSV and JSON lines, plain or gzipped, read line by line.

What the columns mean is decided in `columns`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from animesion_scrapers.url_tables.columns import MOST_MAPPINGS, ColumnMapping, UnreadableError, UrlRow

_LONGEST_LINE = 1 << 18

_LONGEST_RECORD = 64
"""Lines that a quoted row may span; an unclosed quote costs only its own line."""


class _Lines:
    """The numbered lines of a text file, with push-back."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._number = 0
        self._back: list[tuple[int, str]] = []

    def take(self) -> tuple[int, str] | None:
        """Number and text of the next line, or `None` at the end; bytes that are not UTF-8 become lone surrogates.

        A line of more than `_LONGEST_LINE` bytes is returned as a single NUL.
        """
        if self._back:
            return self._back.pop()
        data = next(self._lines, None)
        if data is None:
            return None
        self._number += 1
        if len(data) >= _LONGEST_LINE:
            return self._number, "\0"
        try:
            return self._number, data.decode()
        except UnicodeDecodeError:
            return self._number, data.decode("utf-8", "surrogateescape")

    def put_back(self, lines: Sequence[tuple[int, str]]) -> None:
        self._back += reversed(lines)

    @property
    def number(self) -> int:
        return self._number


@contextlib.contextmanager
def _text_lines(path: Path) -> Iterator[_Lines]:
    """Open a file, plain or gzipped.

    Raises:
        UnreadableError: The file cannot be opened or read to its end.
    """
    lines: _Lines | None = None
    try:
        with cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            lines = _Lines(_raw_lines(file))
            yield lines
    except (OSError, EOFError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableError(
            f"cannot be read to its end ({why})", lines.number + 1 if lines and lines.number else 0
        ) from None


def _raw_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most `_LONGEST_LINE` bytes without a byte order mark; the rest of a longer line is skipped."""
    first = True
    while line := file.readline(_LONGEST_LINE):
        if first:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UnreadableError("UTF-16 text: save the file as UTF-8", 1)
            line = line.removeprefix(b"\xef\xbb\xbf")
            first = False
        yield line
        if len(line) >= _LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass


def read_separated(delimiter: str, path: Path, mapping: ColumnMapping) -> Iterator[list[UrlRow]]:
    """Yield the rows of a CSV or TSV file; a first row that contains a URL is data, not a header.

    Raises:
        UnreadableError: The file has a bad header, or cannot be read to its end.
    """
    with _text_lines(path) as lines:
        rows = _records(lines, delimiter)
        first = next(rows, None)
        if first is None:
            return
        line, names, fault = first
        if fault:
            raise UnreadableError(f"the header is {fault}", line)
        names = [name.strip() for name in names]
        url_columns = [i for i, name in enumerate(names, 1) if name.lower().startswith(("http://", "https://"))]
        if url_columns:  # no header
            rows = itertools.chain([first], rows)
            names = [str(i) for i in range(1, len(names) + 1)]
            requested = {**mapping.requested, "url": mapping.requested["url"] or str(url_columns[0])}
            mapping = ColumnMapping(mapping.file, requested, mapping.report)
        found = mapping.columns(names)
        places = {meaning: names.index(name) for meaning, name in found.items()}
        for number, cells, fault in rows:
            if fault:
                yield [UrlRow(mapping.file, number, fault)]
            elif len(cells) != len(names):
                yield [UrlRow(mapping.file, number, f"{len(cells)} cells instead of {len(names)}")]
            else:
                yield [mapping.row(number, {meaning: cells[place] for meaning, place in places.items()})]


def _records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield line number, cells and fault of each row that is not blank."""
    while taken := lines.take():
        number, text = taken
        if text == "\0":
            yield number, [], f"a line of more than {_LONGEST_LINE:,} bytes"
        elif '"' not in text:  # without quotes, splitting is enough
            text = text.rstrip("\r\n")
            if text.strip():
                yield number, text.split(delimiter), ""
        else:
            continued: list[tuple[int, str]] = []
            try:
                row_lines = _record_lines(text, continued, lines)
                yield number, next(csv.reader(row_lines, delimiter=delimiter, strict=True)), ""
            except (csv.Error, StopIteration):
                lines.put_back(continued)
                yield number, [], "not a row: its quotes do not match"


def _record_lines(text: str, continued: list[tuple[int, str]], lines: _Lines) -> Iterator[str]:
    """Yield the lines of one row; those after the first are added to `continued`, so that they can be put back."""
    yield text
    while len(continued) < _LONGEST_RECORD and (taken := lines.take()):
        continued.append(taken)
        yield taken[1]


def read_json_lines(path: Path, mapping: ColumnMapping) -> Iterator[list[UrlRow]]:
    """Yield the rows of a file with one JSON object per line, whose keys may differ from line to line.

    Raises:
        UnreadableError: The file cannot be read to its end.
    """
    known: dict[tuple[str, ...], dict[str, str]] = {}
    with _text_lines(path) as lines:
        while taken := lines.take():
            number, text = taken
            if text == "\0":
                yield [UrlRow(mapping.file, number, f"a line of more than {_LONGEST_LINE:,} bytes")]
                continue
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                yield [UrlRow(mapping.file, number, "not a JSON object")]
                continue
            names = tuple(record)
            found = known.get(names)
            if found is None:
                try:
                    found = _columns_of_record(mapping, names)
                except UnreadableError as error:
                    yield [UrlRow(mapping.file, number, str(error))]
                    continue
                if len(known) < MOST_MAPPINGS:
                    known[names] = found
            yield [mapping.row(number, {meaning: record[name] for meaning, name in found.items()})]


def _columns_of_record(mapping: ColumnMapping, names: tuple[str, ...]) -> dict[str, str]:
    """The columns of one JSON object, in which all but the URL are optional."""
    requested = {
        meaning: name if name in names or meaning == "url" else "" for meaning, name in mapping.requested.items()
    }
    # a requested name that is missing must not fall back to a recognised one
    absent = [meaning for meaning, name in mapping.requested.items() if name and not requested[meaning]]
    found = ColumnMapping(mapping.file, requested, mapping.report, mapping.reported).columns(names)
    return {meaning: name for meaning, name in found.items() if meaning not in absent}
