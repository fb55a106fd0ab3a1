"""The pages of a column in a Parquet file, as their headers describe them: what reading it will cost.

A reader decompresses a page as a whole, and the footer of a hostile file need not tell the truth about sizes. Format:
https://parquet.apache.org/docs/file-format/data-pages/ and Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

DELTA_BYTE_ARRAY = 7
DICTIONARY = -1

_HEADER = 1 << 12
_LONGEST_HEADER = 1 << 20
"""Bytes of the largest header; it has the least and the greatest value of its page."""

_DEEPEST = 8
_SIZE, _STORED, _DATA, _DATA_2 = 2, 3, 5, 8
_BOOLS, _INTEGERS, _BINARY, _LISTS, _STRUCT = (1, 2), (4, 5, 6), 8, (9, 10), 12


class Page(NamedTuple):
    """One page.

    Attributes:
        size: Bytes after decompression.
        values: Number of values; 0 for a dictionary.
        encoding: One of Parquet's encodings, such as `DELTA_BYTE_ARRAY`; `DICTIONARY` for a dictionary itself.
    """

    size: int
    values: int
    encoding: int


def pages(file: IO[bytes], start: int, end: int) -> Iterator[Page]:
    """The pages between two offsets of a file.

    Raises:
        ValueError: A header is damaged or too long.
    """
    at = start
    while at < end:
        header, length = _header(file, at, end)
        size, stored = _number(header.get(_SIZE)), _number(header.get(_STORED))
        if min(size, stored) < 0:
            raise ValueError("a page of a negative size")
        values, encoding = 0, DICTIONARY
        for kind, place in ((_DATA, 2), (_DATA_2, 4)):
            if isinstance(details := header.get(kind), dict):
                values, encoding = max(0, _number(details.get(1))), _number(details.get(place))
        yield Page(size, values, encoding)
        at += length + stored


def _header(file: IO[bytes], at: int, end: int) -> tuple[dict[int, object], int]:
    """The fields of the header at an offset, and its length."""
    size = _HEADER
    while True:
        file.seek(at)
        data = file.read(min(size, end - at))
        reader = _Compact(data)
        try:
            return reader.struct(0), reader.at
        except IndexError:
            if size >= _LONGEST_HEADER or len(data) < size:
                raise ValueError("a page whose header is damaged or too long") from None
            size *= 16


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


class _Compact:
    """Reads Thrift's compact protocol; an `IndexError` is the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int) -> dict[int, object]:
        """The fields of a struct by number: integers, and structs; None for others."""
        if depth > _DEEPEST:
            raise ValueError("a page whose header is too deep")
        found: dict[int, object] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            found[number] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> object:
        if kind in _BOOLS:
            return None
        if kind == 3:
            self._skip(1)
        elif kind in _INTEGERS:
            return self._signed()
        elif kind == 7:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._unsigned())
        elif kind in _LISTS:
            head = self._byte()
            for _ in range(self._unsigned() if head >> 4 == 15 else head >> 4):
                if head & 15 in _BOOLS:  # a byte each, unlike the booleans of a struct
                    self._skip(1)
                else:
                    self._value(head & 15, depth + 1)
        elif kind == _STRUCT:
            return self.struct(depth + 1)
        else:
            raise ValueError("a page whose header is damaged")
        return None

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a page whose header is damaged")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError
