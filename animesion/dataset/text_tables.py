"""Small tables as people write them: encodings, separators, headers and quotes are recognised, not demanded."""

from __future__ import annotations

import csv
import io
import itertools
import unicodedata
from collections.abc import Iterator, Sequence

from animesion.errors import UsageError

#: Separators that are recognised, the likeliest first.
SEPARATORS = (",", "\t", ";", "|")

#: Longest cell in characters.
_LONGEST_CELL = 1 << 20


def decoded(content: bytes, where: str) -> str:
    """Text of a file as `text_of` reads it, with composed characters (NFC).

    Raises:
        UsageError: it is no text, such as a workbook of a spreadsheet program.
    """
    return unicodedata.normalize("NFC", text_of(content, where))


def text_of(content: bytes, where: str) -> str:
    """Text of a file in UTF-8 or UTF-16, with or without byte order mark, or in a legacy encoding.

    Raises:
        UsageError: it is no text, such as a workbook of a spreadsheet program.
    """
    from animesion_scrapers.url_tables import encodings

    if fault := encodings.not_text(content[:4096]):
        raise UsageError(f"{where} is {fault}")
    if utf16 := encodings.utf16_of(content[:4096]):
        return content.decode(utf16, "replace").removeprefix("\ufeff")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        lines = content.split(b"\n")
        # one damaged row must not change the encoding of the others
        legacy = "" if encodings.is_mostly_utf8(lines) else encodings.guess_legacy(content)
        if not legacy:
            raise UsageError(f"{where} is not text: give a table in UTF-8") from None
        text = content.decode(legacy)
    if "\0" in text[:4096]:
        raise UsageError(f"{where} is not text: give a table in UTF-8")
    return text


def separator(line: str) -> str:
    """The separator that a header line is cut by: the one that occurs most, commas first."""
    return max(SEPARATORS, key=lambda each: (line.count(each), -SEPARATORS.index(each)))


def rows(text: str, where: str) -> Iterator[list[str]]:
    """The rows of a table, cells without the blanks around them; empty rows left out.

    Raises:
        UsageError: a quoted cell does not end, or a cell is too long.
    """
    first = text.lstrip("\n\r").partition("\n")[0]
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator(first), skipinitialspace=True, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{where}, line {reader.line_num}: {error}; correct the row") from None
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield cells


def column(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Position of the first of these names in a header; case, blanks, `_` and `-` do not count."""
    plain = [_plain(cell) for cell in header]
    wanted = (plain.index(_plain(name)) for name in names if _plain(name) in plain)
    return next(itertools.chain(wanted), None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
