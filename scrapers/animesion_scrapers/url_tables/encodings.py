"""Encodings of text tables: byte order marks, UTF-16, and a guess at the legacy encodings that spreadsheets write.

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


def _gb2312_rows(first: int, last: int) -> list[str]:
    """The characters of GB 2312 whose first byte is in [first, last)."""
    pairs = (bytes([lead, trail]) for lead in range(first, last) for trail in range(0xA1, 0xFF))
    return [pair.decode("gb2312", "ignore") for pair in pairs]


_RUN = re.compile(rb"[\x80-\xff]+")
_WESTERN = re.compile(rb"[\x91-\x94\x96\x97\xa0-\xff]")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")
_UNASSIGNED = re.compile("[\x80-\x9f\ue000-\uf8ff]")
_RARE_CHINESE = re.compile("[" + "".join(_gb2312_rows(0xE0, 0xF8)) + "]")
_KANA = re.compile("[\u3041-\u30fe]")


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


def guess_legacy(sample: bytes) -> str:
    """The likeliest encoding of text that is neither UTF-8 nor UTF-16.

    Args:
        sample: Whole lines.

    Returns:
        `cp932`, `euc_jp`, `gb18030` or `cp1252`; empty if none is likely.
    """
    runs = _RUN.findall(sample)
    high = sum(map(len, runs))
    isolated = sum(len(run) == 1 for run in runs)
    # accented letters are single bytes among ASCII letters; kana and kanji are runs, or start below 0xa0
    if isolated >= 0.8 * high and len(_WESTERN.findall(sample)) >= 0.9 * high and decodes(sample, "cp1252"):
        return "cp1252"
    if _share(sample, "euc_jp", _KANA) >= 0.2:
        return "euc_jp"
    # Chinese text often decodes as cp932 too, mostly to half-width katakana, which few files contain
    # words of small Cyrillic letters with an even length are rare Chinese characters
    chinese = _is_text(sample, "gb18030") and _share(sample, "gb18030", _RARE_CHINESE) <= 0.5
    if _is_text(sample, "cp932") and (not chinese or _share(sample, "cp932", _HALF_WIDTH) < 0.3):
        return "cp932"
    # not cp1252 as the last resort: it decodes almost anything, to nonsense
    return "gb18030" if chinese else ""


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


def _is_text(data: bytes, encoding: str) -> bool:
    """Whether bytes are text without control characters and characters of private use."""
    return decodes(data, encoding) and not _UNASSIGNED.search(data.decode(encoding))


def _share(data: bytes, encoding: str, pattern: re.Pattern[str]) -> float:
    """Share of the characters outside ASCII that match, in [0, 1]; 0 if the bytes cannot be decoded."""
    if not decodes(data, encoding):
        return 0.0
    others = [letter for letter in data.decode(encoding) if not letter.isascii()]
    return sum(bool(pattern.match(letter)) for letter in others) / max(len(others), 1)
