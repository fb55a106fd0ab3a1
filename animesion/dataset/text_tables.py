"""Small tables as people write them: encodings, separators, headers and quotes are recognised, not demanded."""

from __future__ import annotations

import csv
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import Field

from animesion.errors import UsageError

#: Option of a source that reads tables.
Encoding = Annotated[
    str, Field(description="legacy encoding of the tables, such as cp949; empty to recognise it (not needed for UTF-8)")
]

#: Separators that are recognised, the likeliest first.
SEPARATORS = (",", "\t", ";", "|")

#: What programs write where a value is missing, in lower case.
MISSING = frozenset(
    {"nan", "nat", "none", "null", "n/a", "na", "<na>", "#n/a", "unknown", "undefined", "unlabeled", "unlabelled"}
)

#: Longest cell in characters.
_LONGEST_CELL = 1 << 20


#: What a spreadsheet program takes for a formula that calls something: a function, another program, another file. Plain
#: names such as `=1+1` and `- dash` harm nobody, and readers of the file find them as they are.
_FORMULA = re.compile(r"'*\s*[=+\-@\t\r].*[|(!\[]", re.DOTALL)


def cell_of(text: str) -> str:
    """A text as a cell of a CSV that people open in a spreadsheet program: with `'` before what is a formula there.

    Source: https://owasp.org/www-community/attacks/CSV_Injection. `text_of_cell` is the inverse.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def text_of_cell(cell: str) -> str:
    """The text of a cell that `cell_of` returned."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def decoded(content: bytes, where: str, encoding: str = "") -> str:
    """Text of a file as `text_of` reads it, with composed characters (NFC).

    Raises:
        UsageError: it is no text, such as a workbook of a spreadsheet program.
    """
    return unicodedata.normalize("NFC", text_of(content, where, encoding))


def text_of(content: bytes, where: str, encoding: str = "") -> str:
    """Text of a file in UTF-8 or UTF-16, with or without byte order mark, or in a legacy encoding.

    Args:
        content: of the file.
        where: its place, for messages.
        encoding: legacy encoding of text that is not UTF-16; empty to recognise it.

    Raises:
        UsageError: it is no text, such as a workbook of a spreadsheet program, or its encoding is unclear.
    """
    from animesion_scrapers.url_tables import encodings

    if fault := encodings.not_text(content[:4096]):
        raise UsageError(f"{where} is {fault}")
    if utf16 := encodings.utf16_of(content[:4096]):
        return content.decode(utf16, "replace").removeprefix("\ufeff")
    try:
        text = content.decode(encoding or legacy_encoding(content, where) or "utf-8-sig")
    except LookupError:
        raise UsageError(f"source.encoding: there is no encoding {encoding[:40]!r}") from None
    except UnicodeDecodeError as error:
        if encoding:
            line = content.count(b"\n", 0, error.start) + 1
            raise UsageError(f"{where}, line {line}: the text is not {encoding}: correct source.encoding") from None
        raise UsageError(f"{where} is not text: give a table in UTF-8") from None
    if "\0" in text[:4096]:
        raise UsageError(f"{where} is not text: give a table in UTF-8")
    return text


def legacy_encoding(content: bytes, where: str) -> str:
    """The legacy encoding of a text; empty if it is UTF-8 or UTF-16, or not recognised.

    Raises:
        UsageError: two encodings are about equally likely.
    """
    from animesion_scrapers.url_tables import encodings, legacy

    if encodings.utf16_of(content[:4096]) or encodings.decodes(content, "utf-8"):
        return ""
    # one damaged row must not change the encoding of the others
    if encodings.is_mostly_utf8(content.split(b"\n")):
        return ""
    found = legacy.guess(content)
    if found.rival:
        line = next(number for number, text in enumerate(content.split(b"\n"), 1) if not text.isascii())
        raise UsageError(
            f"{where}, line {line}: the text may be {found.encoding} or {found.rival}: save the file as UTF-8, or set "
            "source.encoding"
        )
    return found.encoding


def encoding_note(content: bytes, where: str, encoding: str = "") -> str:
    """A sentence on the legacy encoding that was recognised in a table; empty if there is none, or it was given."""
    found = "" if encoding else legacy_encoding(content, where)
    return f"{where} is read as {found}, not UTF-8; source.encoding sets another encoding" if found else ""


def separator(line: str) -> str:
    """The separator that a header line is cut by: the one that occurs most, commas first."""
    return max(SEPARATORS, key=lambda each: (line.count(each), -SEPARATORS.index(each)))


def rows(text: str, where: str) -> Iterator[list[str]]:
    """The rows of a table, cells without the blanks around them; empty rows left out.

    Raises:
        UsageError: a quoted cell does not end, or a cell is too long.
    """
    first = text.lstrip("\n\r").partition("\n")[0]
    # the line by which a spreadsheet program knows the separator
    stated = re.fullmatch(r'"?sep=(.)"?\r?', first, re.IGNORECASE)
    if stated:
        text = text.replace(first, "", 1)
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = stated[1] if stated else separator(first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
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


def class_ids(cells: Iterable[str]) -> dict[str, str]:
    """The class that each cell of the columns of classes stands for, all tables together; empty for none.

    Where all cells are whole numbers, they are class ids: `1.0` is `1`, as pandas writes ids in a column with gaps, and
    words for a missing value are no class. Neither is -1 beside three ids or more; with fewer it may be one of them, as
    in -1, 0 and 1. Other cells stand for themselves.
    """
    known = set(cells)
    numbers = {cell for cell in known if cell.lower() not in MISSING and cell}
    if not numbers or not all(re.fullmatch(r"-?\d+(?:\.0*)?", cell) for cell in numbers):
        return {cell: cell for cell in known}
    ids = {cell: cell.partition(".")[0] for cell in numbers}
    if len(set(ids.values()) - {"-1"}) > 2:
        ids = {cell: "" if name == "-1" else name for cell, name in ids.items()}
    return {cell: ids.get(cell, "") for cell in known}


def as_class_ids(labels: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """What `class_ids` makes of the labels of images, each the cells of an image."""
    known = set(labels)
    ids = class_ids(cell for cells in known for cell in cells)
    return {cells: tuple(dict.fromkeys(ids[cell] for cell in cells if ids[cell])) for cells in known}


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
