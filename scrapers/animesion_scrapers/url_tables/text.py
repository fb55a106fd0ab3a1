"""URL tables as text: CSV, TSV, lists of URLs, JSON lines and JSON arrays, plain or gzipped, read as a stream.

Encodings are recognised in `encodings` and `legacy`; what the columns mean is decided in `columns`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from animesion_scrapers.errors import ScraperError
from animesion_scrapers.url_tables import encodings, json_arrays, legacy
from animesion_scrapers.url_tables.columns import MOST_MAPPINGS, ColumnMapping, UnreadableError, UrlRow

_LONGEST_LINE = 1 << 18

_LONGEST_RECORD = 64
"""Lines that a quoted row may span; an unclosed quote costs only its own line."""

_SEPARATORS = (",", "\t", ";", "|")

_SAMPLE_BYTES = 1 << 20
"""Bytes from which the encoding of a table is guessed, from its first line that is not ASCII."""

_URL_STARTS = ("http://", "https://")


class _Lines:
    """The numbered lines of a text file, with push-back.

    Args:
        lines: Lines as bytes.
        encoding: Encoding of the lines; empty to decide at the first line that is not ASCII.
        name: Name of the file.
    """

    def __init__(self, lines: Iterator[bytes], encoding: str, name: str) -> None:
        self._lines = lines
        self._name = name
        self._encoding = encoding
        self._ahead: deque[bytes] = deque()
        self._number = 0
        self._back: list[tuple[int, str]] = []

    def take(self) -> tuple[int, str] | None:
        """Number and text of the next line, or `None` at the end; bytes that cannot be decoded become lone surrogates.

        A line of more than `_LONGEST_LINE` bytes is returned as a single NUL.
        """
        if self._back:
            return self._back.pop()
        data = self._ahead.popleft() if self._ahead else next(self._lines, None)
        if data is None:
            return None
        self._number += 1
        if len(data) >= _LONGEST_LINE:
            return self._number, "\0"
        if data.isascii():
            return self._number, data.decode("ascii")
        if not self._encoding:
            self._encoding = self._guess(data)
        try:
            return self._number, data.decode(self._encoding)
        except UnicodeDecodeError:
            return self._number, data.decode("utf-8", "surrogateescape")

    def put_back(self, lines: Sequence[tuple[int, str]]) -> None:
        self._back += reversed(lines)

    @property
    def number(self) -> int:
        return self._number

    @property
    def encoding(self) -> str:
        """The encoding in use; empty while all lines were ASCII."""
        return self._encoding

    def _guess(self, line: bytes) -> str:
        """The encoding of the table, from its first line that is not ASCII and those after it.

        Raises:
            ScraperError: Two encodings are about equally likely.
        """
        size = len(line)
        while size < _SAMPLE_BYTES and (data := next(self._lines, None)) is not None:
            self._ahead.append(data)
            size += len(data)
        sample = [line, *self._ahead]
        # one damaged row must not change the encoding of the others
        if encodings.is_mostly_utf8(sample):
            return "utf-8"
        found = legacy.guess(b"".join(sample))
        if found.rival:
            raise ScraperError(
                f"{self._name}, line {self._number}: the text may be {found.encoding} or {found.rival}: save the file "
                "as UTF-8, or set the encoding."
            )
        return found.encoding or "utf-8"


@contextlib.contextmanager
def _text_file(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a file, plain or gzipped, as a stream without a byte order mark, with its encoding as far as it is certain.

    Raises:
        UnreadableError: The file is not text.
    """
    with path.open("rb") as raw:
        zipped = path.suffix.lower() == ".gz" or raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else contextlib.nullcontext(raw) as file:
            head = file.read(1 << 12)
            if fault := encodings.not_text(head):
                raise UnreadableError(f"it is {fault}")
            file.seek(0)
            if utf16 := encodings.utf16_of(head):
                yield io.BufferedReader(encodings.Utf8Stream(file, utf16), 1 << 16), "utf-8"
            elif head.startswith(b"\xef\xbb\xbf"):
                file.read(3)
                yield file, "utf-8"
            else:
                yield file, ""


@contextlib.contextmanager
def _text_lines(path: Path, mapping: ColumnMapping) -> Iterator[_Lines]:
    """Open a file and report its encoding to the mapping when it was guessed.

    Raises:
        UnreadableError: The file cannot be opened or read to its end.
    """
    lines: _Lines | None = None
    try:
        with _text_file(path) as (file, encoding):
            lines = _Lines(_raw_lines(file), encoding or mapping.encoding, mapping.file)
            try:
                yield lines
            finally:
                if not encoding and not mapping.encoding and lines.encoding not in ("", "utf-8"):
                    mapping.report_encoding(lines.encoding)
    except (OSError, EOFError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableError(
            f"cannot be read to its end ({why})", lines.number + 1 if lines and lines.number else 0
        ) from None


def _raw_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most `_LONGEST_LINE` bytes; the rest of a longer line is skipped."""
    while line := file.readline(_LONGEST_LINE):
        yield line
        if len(line) >= _LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass


def read_separated(usual: str, path: Path, mapping: ColumnMapping) -> Iterator[list[UrlRow]]:
    """Yield the rows of a CSV or TSV file, or of a list of URLs; a first row that contains a URL is data, not a header.

    Args:
        usual: Separator that the name of the file suggests, the first of equally likely ones; empty for a list of
            URLs, which has one column unless its first line has tabs or is a header.
        path: The file.
        mapping: The columns.

    Raises:
        UnreadableError: The file has a bad header, or cannot be read to its end.
    """
    with _text_lines(path, mapping) as lines:
        rows = _records(lines, _separator(lines, usual, mapping))
        first = next(rows, None)
        if first is None:
            return
        line, names, fault = first
        if fault:
            raise UnreadableError(f"the header is {fault}", line)
        names = [name.strip() for name in names]
        url_columns = [i for i, name in enumerate(names, 1) if name.lower().startswith(_URL_STARTS)]
        if url_columns:  # no header
            rows = itertools.chain([first], rows)
            names = [str(i) for i in range(1, len(names) + 1)]
            mapping = mapping.with_url_column(str(url_columns[0]))
        found = mapping.columns(names)
        places = {meaning: names.index(name) for meaning, name in found.items()}
        for number, cells, fault in rows:
            if fault:
                yield [UrlRow(mapping.file, number, fault)]
            elif len(cells) != len(names):
                yield [UrlRow(mapping.file, number, f"{len(cells)} cells instead of {len(names)}")]
            else:
                yield [mapping.row(number, {meaning: cells[place] for meaning, place in places.items()})]


def _separator(lines: _Lines, usual: str, mapping: ColumnMapping) -> str:
    """The separator of a table, from its first line that is not blank, which stays to be read.

    Excel's first line `sep=;` is removed.
    """
    while (taken := lines.take()) and not taken[1].strip():
        pass
    if taken is None:
        return usual or "\n"
    if match := re.fullmatch(r"\ufeff?sep=(.)\s*", taken[1], re.IGNORECASE | re.DOTALL):
        return match[1]
    lines.put_back([taken])
    text = re.sub(r'"[^"]*"', "", taken[1])
    counts = {each: text.count(each) for each in sorted(_SEPARATORS, key=lambda each: each != usual)}
    several = any(name.isdecimal() and name != "1" for name in mapping.requested.values())
    if text.strip().lower().startswith(_URL_STARTS) and not several:
        # a URL may contain commas and semicolons, so only a usual separator cuts a line without a header
        usual = usual if usual and counts[usual] else "\t"
        return usual if counts[usual] else "\n"
    best = max(counts, key=lambda each: counts[each])
    return best if counts[best] else usual or "\n"


def _records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield line number, cells and fault of each row that is not blank; a line is one cell if it is the delimiter."""
    while taken := lines.take():
        number, text = taken
        if text == "\0":
            yield number, [], f"a line of more than {_LONGEST_LINE:,} bytes"
        elif '"' not in text or delimiter == "\n":  # without quotes, splitting is enough
            text = text.rstrip("\r\n")
            if text.strip():
                yield number, text.split(delimiter), ""
        else:
            continued: list[tuple[int, str]] = []
            try:
                row_lines = _record_lines(text, continued, lines)
                reader = csv.reader(row_lines, delimiter=delimiter, strict=True, skipinitialspace=True)
                yield number, next(reader), ""
            except (csv.Error, StopIteration):
                lines.put_back(continued)
                cells = _loosely_quoted(text, delimiter)
                yield number, cells, "" if cells else "not a row: its quotes do not match"


def _loosely_quoted(text: str, delimiter: str) -> list[str]:
    """The cells of a line with blanks behind closing quotes; empty if it is no row even so."""
    text = re.sub(rf'" +(?={re.escape(delimiter)}|[\r\n]*$)', '"', text)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True, skipinitialspace=True))
    except (csv.Error, StopIteration):
        return []


def _record_lines(text: str, continued: list[tuple[int, str]], lines: _Lines) -> Iterator[str]:
    """Yield the lines of one row; those after the first are added to `continued`, so that they can be put back."""
    yield text
    while len(continued) < _LONGEST_RECORD and (taken := lines.take()):
        continued.append(taken)
        yield taken[1]


def read_json(path: Path, mapping: ColumnMapping) -> Iterator[list[UrlRow]]:
    """Yield the rows of a JSON file: one object per line, or one array of objects, whose keys may differ.

    Raises:
        UnreadableError: The file cannot be read to its end.
    """
    try:
        with _text_file(path) as (file, _):
            array = json_arrays.is_array(file.read(1 << 12))
    except (OSError, EOFError, zlib.error):
        array = False  # the error is reported with its line when the lines are read
    if array:
        yield from _json_array(path, mapping)
    else:
        yield from _json_lines(path, mapping)


def _json_lines(path: Path, mapping: ColumnMapping) -> Iterator[list[UrlRow]]:
    rows = _JsonRows(mapping)
    with _text_lines(path, mapping) as lines:
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
            yield [rows.row(number, record)]


def _json_array(path: Path, mapping: ColumnMapping) -> Iterator[list[UrlRow]]:
    """Rows of an array of objects, parsed one by one, so that memory holds one object of bounded size."""
    rows = _JsonRows(mapping)
    number = 1
    try:
        with _text_file(path) as (file, _):
            for number, record in json_arrays.members(file, _LONGEST_LINE):
                yield [rows.row(number, record)]
    except json_arrays.MalformedError as error:
        raise UnreadableError(str(error), error.line) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"cannot be read to its end ({error})", number) from None


class _JsonRows:
    """Rows from JSON objects; the columns of the first `MOST_MAPPINGS` sets of keys are remembered."""

    def __init__(self, mapping: ColumnMapping) -> None:
        self._mapping = mapping
        self._known: dict[tuple[str, ...], dict[str, str]] = {}

    def row(self, number: int, record: Any) -> UrlRow:
        if not isinstance(record, dict):
            return UrlRow(
                self._mapping.file, number, "not a JSON object: a table has one per line, or is one array of them"
            )
        names = tuple(record)
        found = self._known.get(names)
        if found is None:
            try:
                found = _columns_of_record(self._mapping, names)
            except UnreadableError as error:
                return UrlRow(self._mapping.file, number, str(error))
            if len(self._known) < MOST_MAPPINGS:
                self._known[names] = found
        return self._mapping.row(number, {meaning: record[name] for meaning, name in found.items()})


def _columns_of_record(mapping: ColumnMapping, names: tuple[str, ...]) -> dict[str, str]:
    """The columns of one JSON object, in which all but the URL are optional."""
    requested = {
        meaning: name if name in names or meaning == "url" else "" for meaning, name in mapping.requested.items()
    }
    # a requested name that is missing must not fall back to a recognised one
    absent = [meaning for meaning, name in mapping.requested.items() if name and not requested[meaning]]
    found = replace(mapping, requested=requested).columns(names)
    return {meaning: name for meaning, name in found.items() if meaning not in absent}
