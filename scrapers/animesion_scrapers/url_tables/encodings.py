"""Encodings of text tables: byte order marks, UTF-16, and what is no text. Legacy encodings are recognised in `legacy`.

Standard library only, so that readers of other tables can use it.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Sequence
from typing import IO

WORKBOOKS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
"""Suffixes of spreadsheet files, which are not text."""


def utf16_of(head: bytes) -> str:
    """The UTF-16 encoding of a file that begins with these bytes, with or without a byte order mark; else empty."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    pairs = len(head) // 2
    even, odd = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    # ASCII text is zero in every other byte; text of other scripts has ASCII separators and line ends
    if pairs >= 4 and odd * 4 >= pairs and not even:
        return "utf-16-le"
    return "utf-16-be" if pairs >= 4 and even * 4 >= pairs and not odd else ""


def not_text(head: bytes) -> str:
    """What a file that begins with these bytes is, if it is not a text table, with the way out; else empty."""
    if head.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        return "a workbook or zip, not a text table: save the sheet as CSV (UTF-8) and give that"
    if head.startswith(b"PAR1"):
        return "a Parquet file: rename it to end in .parquet"
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32 text: save it as UTF-8"
    if b"\n" not in head and re.search(rb"\r[^\r\n]+\r", head):
        return "a text whose lines end in carriage returns alone: save it with line feeds"
    return ""


def is_mostly_utf8(lines: Sequence[bytes]) -> bool:
    """Whether at least half of the lines with bytes outside ASCII are UTF-8; True if there are none."""
    others = [line for line in lines if not line.isascii()]
    return sum(decodes(line, "utf-8") for line in others) * 2 >= len(others)


class Utf8Stream(io.RawIOBase):
    """A binary stream of UTF-16 text, recoded as UTF-8; damaged characters become bytes that are not UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        """Recode from the current position of the file."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._left = b""
        self._ended = False

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: object) -> int:
        """Fill a buffer with recoded bytes."""
        view = memoryview(buffer)  # type: ignore[arg-type]
        while not self._left and not self._ended:
            data = self._file.read(1 << 16)
            self._ended = not data
            text = self._decoder.decode(data, final=self._ended).removeprefix("\ufeff")
            self._left = text.replace("\ufffd", "\udcff").encode("utf-8", "surrogateescape")
        size = min(len(view), len(self._left))
        view[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def decodes(data: bytes, encoding: str) -> bool:
    """Whether bytes are text in an encoding."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
