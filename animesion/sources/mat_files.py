"""Arrays of MATLAB's `.mat` files of versions 5 to 7, in which some published sets have their labels.

Read here and not with SciPy, because such a file comes from outside: nothing is allocated by a size that the file only
states, compressed data are bounded, nesting is limited, and only the arrays that are asked for are decoded. Source of
the format: MathWorks, *MAT-File Format* (R2023a), chapter "MAT-File Level 5 Format".
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from animesion.errors import UsageError

#: Most bytes of all data elements together, once decompressed.
_MOST_BYTES = 256 << 20
#: Arrays within arrays: a struct of a cell of texts has three levels.
_DEEPEST = 4
#: Most elements of cells and structs, which cost an object each.
_MOST_OBJECTS = 5_000_000

#: NumPy types by number of the data type.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _COMPRESSED = 14, 15
#: Classes of arrays.
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)

#: A numeric array as one row, a text, the elements of a cell, or the elements of each field of a struct array.
Value = npt.NDArray[np.generic] | str | list["Value"] | dict[str, list["Value"]]


class _FaultError(ValueError):
    """What is wrong with a file, as part of a sentence."""


class _Element(NamedTuple):
    """A data element: its type, and where its bytes are."""

    kind: int
    start: int
    end: int
    after: int


def read(content: bytes, names: Collection[str], where: str) -> dict[str, Value]:
    """The named arrays of a file; columns follow each other, as MATLAB stores them.

    Args:
        content: of the file.
        names: of the arrays.
        where: the file, for messages.

    Raises:
        UsageError: the file is no such file, is damaged or too large, or lacks one of the arrays.
    """
    try:
        found = _arrays(content, names)
    except _FaultError as fault:
        raise UsageError(f"{where} {fault}; get it again") from None
    except (struct.error, IndexError, UnicodeDecodeError, ValueError, OverflowError):
        raise UsageError(f"{where} is a damaged .mat file; get it again") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{where} has no array {missing[0]!r}: it is not the file of this set; get it again")
    return found


def _arrays(content: bytes, names: Collection[str]) -> dict[str, Value]:
    if content.startswith(b"\x89HDF") or content[:19] == b"MATLAB 7.3 MAT-file":
        raise _FaultError("is a .mat file of version 7.3, not of 5 to 7 as published")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128], "")
    if not order or struct.unpack(f"{order}H", content[124:126])[0] != 0x0100:
        raise _FaultError("is not a .mat file of version 5 to 7")
    found: dict[str, Value] = {}
    budget = _MOST_BYTES
    position = 128
    while position < len(content):
        reader = _Reader(content, order)
        element = reader.element(position, len(content), padded=False)
        position = element.after
        if element.kind == _COMPRESSED:
            data = _decompressed(content[element.start : element.end], budget)
            budget -= len(data)
            reader = _Reader(data, order)
            element = reader.element(0, len(data))
        if element.kind == _MATRIX:
            name = reader.name(element)
            if name in names and name not in found:
                found[name] = reader.array(element)
    return found


def _decompressed(data: bytes, most: int) -> bytes:
    inflate = zlib.decompressobj()
    try:
        out = inflate.decompress(data, most)
    except zlib.error:
        raise _FaultError("is a damaged .mat file") from None
    if inflate.unconsumed_tail:
        raise _FaultError(f"holds more than {_MOST_BYTES >> 20} MiB of data")
    if not inflate.eof:
        raise _FaultError("is a damaged .mat file")
    return out


class _Reader:
    """Data elements in a piece of a file."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data = data
        self._order = order
        self._left = _MOST_OBJECTS

    def element(self, position: int, limit: int, *, padded: bool = True) -> _Element:
        """The element at a position."""
        if position + 8 > limit:
            raise _FaultError("is a damaged .mat file")
        kind, size = struct.unpack_from(f"{self._order}II", self._data, position)
        if kind >> 16:  # a small element has its bytes in the tag
            size, kind, start = kind >> 16, kind & 0xFFFF, position + 4
            if size > 4:
                raise _FaultError("is a damaged .mat file")
            return _Element(kind, start, start + size, position + 8)
        start = position + 8
        end = start + size
        # compressed elements are not padded; the last element of a file may lack its padding
        after = end if kind == _COMPRESSED else min(start + (size + 7) // 8 * 8, max(limit, end))
        if end > limit or (padded and after > limit):
            raise _FaultError("is a damaged .mat file")
        return _Element(kind, start, end, after)

    def name(self, matrix: _Element) -> str:
        """The name of an array."""
        parts = list(self._parts(matrix, 3))
        return self._bytes(parts[2]).decode("ascii", "replace") if len(parts) == 3 else ""

    def array(self, matrix: _Element, depth: int = 1) -> Value:
        """The value of an array."""
        if matrix.kind != _MATRIX:
            raise _FaultError("is a damaged .mat file")
        if matrix.start == matrix.end:
            return np.empty(0)
        if depth > _DEEPEST:
            raise _FaultError("nests arrays too deeply for a file of labels")
        flags, dimensions, _, *_ = parts = list(self._parts(matrix, 3))
        kind = struct.unpack_from(f"{self._order}I", self._bytes(flags))[0] & 0xFF
        count = math.prod(max(0, int(each)) for each in self._numbers(dimensions))
        position = parts[2].after
        if kind == _CHAR:
            return self._text(self.element(position, matrix.end))[:count]
        if kind in _NUMERIC:
            numbers = self._numbers(self.element(position, matrix.end))
            if len(numbers) != count:
                raise _FaultError("is a damaged .mat file")
            return numbers
        if kind == _CELL:
            return list(self._elements(position, matrix.end, count, depth))
        if kind == _STRUCT:
            longest = self.element(position, matrix.end)
            width = int(self._numbers(longest)[0])
            table = self.element(longest.after, matrix.end)
            raw = self._bytes(table)
            if width < 1 or len(raw) % width:
                raise _FaultError("is a damaged .mat file")
            fields = [raw[i : i + width].split(b"\0")[0].decode("ascii") for i in range(0, len(raw), width)]
            values = list(self._elements(table.after, matrix.end, count * len(fields), depth))
            return {field: values[i :: len(fields)] for i, field in enumerate(fields)}
        raise _FaultError("has an array of a class that files of labels do not have")

    def _elements(self, position: int, limit: int, count: int, depth: int) -> Iterator[Value]:
        self._left -= count
        if self._left < 0:
            raise _FaultError(f"has more than {_MOST_OBJECTS:,} cells")
        for _ in range(count):
            element = self.element(position, limit)
            position = element.after
            yield self.array(element, depth + 1)

    def _parts(self, matrix: _Element, count: int) -> Iterator[_Element]:
        position = matrix.start
        for _ in range(count):
            element = self.element(position, matrix.end)
            position = element.after
            yield element

    def _bytes(self, element: _Element) -> bytes:
        return self._data[element.start : element.end]

    def _numbers(self, element: _Element) -> npt.NDArray[np.generic]:
        if element.kind not in _NUMBERS:
            raise _FaultError("is a damaged .mat file")
        return np.frombuffer(self._bytes(element), np.dtype(f"{self._order}{_NUMBERS[element.kind]}"))

    def _text(self, element: _Element) -> str:
        if element.kind not in _TEXTS:
            raise _FaultError("is a damaged .mat file")
        coding = _TEXTS[element.kind]
        if coding in ("utf-16", "utf-32"):
            coding += "-le" if self._order == "<" else "-be"
        return self._bytes(element).decode(coding)
