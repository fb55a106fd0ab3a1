"""Columns of a URL table: recognition by name, and rows from their values.

Files are read in `text` and `parquet`.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from animesion_scrapers import fields
from animesion_scrapers.url_tables.urls import LONGEST_URL, is_utf8

RECOGNISED: Mapping[str, tuple[str, ...]] = {
    "url": (
        "url", "imageurl", "fileurl", "imgurl", "photourl", "pictureurl", "mediaurl", "contenturl", "originalurl",
        "downloadurl", "imagelink", "link", "src", "uri",
    ),
    "label": ("label", "labels", "class", "classname", "category", "character", "species", "cultivar", "tag"),
    "md5": ("md5", "md5hash", "imagemd5"),
    "sha1": ("sha1", "sha1hash", "imagesha1"),
    "bytes": ("bytes", "filesize", "filebytes", "contentlength"),
    "licence": ("licence", "license", "rights", "licenceurl", "licenseurl"),
    "author": ("author", "creator", "artist", "photographer", "attribution", "rightsholder"),
    "group": ("group", "groupid", "postid", "observationid"),
    "split": ("split", "subset", "partition"),
}  # fmt: skip
"""Names by which a column is recognised, in order of preference: lower case, letters and digits only."""

BATCH_ROWS = 4096

MOST_MAPPINGS = 256

_LONGEST_CELL = LONGEST_URL + 1


@dataclass(frozen=True, slots=True)
class UrlColumns:
    """Column names by meaning. An empty one is looked up in `RECOGNISED`, except for `key` and `box`.

    In a text table without a header, columns are named `1`, `2` and so on.
    """

    url: str = ""
    label: str = ""
    key: str = ""
    md5: str = ""
    sha1: str = ""
    bytes: str = ""
    licence: str = ""
    author: str = ""
    group: str = ""
    split: str = ""
    box: str = ""


class UrlRow(NamedTuple):
    """One row of a table. Unknown text is empty.

    Attributes:
        file: Name of the table, without its folder.
        line: First line of the row in a text file, or its number in a Parquet file, from 1; 0 for a fault of the file.
        fault: Why the row, or the rest of its file, cannot be read; the other fields are then empty.
        url: As in the table; `refusal_reason` checks it.
        labels: The label, or the labels of a list.
        key: The table's name for the image.
        md5: 32 hexadecimal digits, or empty.
        sha1: 40 hexadecimal digits, or empty.
        bytes: Announced size; 0 when unknown.
        licence: As in the table.
        author: As in the table.
        group: Rows of one group stay in one split.
        split: As in the table.
        ignored: Meanings whose value is malformed and ignored, such as `md5`.
        box: Left, top, right and bottom as fractions of width and height, in [0, 1]; empty when there is none.
    """

    file: str
    line: int
    fault: str = ""
    url: str = ""
    labels: tuple[str, ...] = ()
    key: str = ""
    md5: str = ""
    sha1: str = ""
    bytes: int = 0
    licence: str = ""
    author: str = ""
    group: str = ""
    split: str = ""
    ignored: tuple[str, ...] = ()
    box: tuple[float, ...] = ()


class UnreadableError(Exception):
    """A file cannot be read, or not beyond a line; `line` is 0 when none can be."""

    def __init__(self, why: str, line: int = 0) -> None:
        super().__init__(why)
        self.line = line


@dataclass
class ColumnMapping:
    """Finds the columns of one file and makes rows from their values.

    Attributes:
        file: Name of the table, without its folder.
        requested: Column name by meaning; empty to look it up in `RECOGNISED`.
        report: Called with the column name of each meaning, once per header.
        reported: Headers reported so far.
        encoding: Encoding of a text table; empty to recognise it.
        report_encoding: Called with the encoding of a text table that is read as neither UTF-8 nor UTF-16.
        only: Meanings to read; empty for all.
    """

    file: str
    requested: Mapping[str, str]
    report: Callable[[Mapping[str, str]], None]
    reported: set[tuple[str, ...]] = field(default_factory=set)
    encoding: str = ""
    report_encoding: Callable[[str], None] = lambda encoding: None
    only: frozenset[str] = frozenset()

    def with_url_column(self, name: str) -> ColumnMapping:
        """This mapping with a column of URLs unless one was requested."""
        return replace(self, requested={**self.requested, "url": self.requested["url"] or name}, reported=set())

    def columns(self, names: Sequence[str]) -> dict[str, str]:
        """Column name by meaning, for the meanings that the table has.

        Raises:
            UnreadableError: A requested column or that of URLs is missing, or a name occurs twice.
        """
        plain: dict[str, str] = {}
        for name in names:
            plain.setdefault(re.sub(r"[\W_]+", "", unicodedata.normalize("NFC", name).lower()), name)
        found: dict[str, str] = {}
        composed = {unicodedata.normalize("NFC", name): name for name in reversed(names)}
        for meaning, requested in self.requested.items():
            if requested:
                name = requested if requested in names else composed.get(unicodedata.normalize("NFC", requested), "")
                if not name:
                    raise UnreadableError(f"there is no column {requested!r} among {_list_names(names)}")
                found[meaning] = name
                continue
            recognised = next((plain[name] for name in RECOGNISED.get(meaning, ()) if name in plain), "")
            if recognised:
                found[meaning] = recognised
        if "url" not in found:
            raise UnreadableError(f"no column of URLs is recognised among {_list_names(names)}: set its name")
        for meaning, name in found.items():
            if list(names).count(name) > 1:
                raise UnreadableError(f"the column {name!r} for {meaning} occurs twice")
        if tuple(names) not in self.reported and len(self.reported) < MOST_MAPPINGS:
            self.reported.add(tuple(names))
            self.report(found)
        return {meaning: name for meaning, name in found.items() if not self.only or meaning in self.only}

    def row(self, line: int, values: Mapping[str, Any]) -> UrlRow:
        """Make a row from the value of each meaning."""
        texts: dict[str, Any] = {}
        malformed = False
        for meaning, value in values.items():
            if meaning == "label" and isinstance(value, (list, tuple)):
                texts[meaning] = tuple(text for each in value[:100] if (text := _text(each)))
                malformed = malformed or any(map(_is_nested, value[:100]))
            elif meaning == "bytes":
                texts[meaning] = _whole(value)
            else:
                text = _text(value)
                if not text.isascii() and not is_utf8(text):
                    return UrlRow(self.file, line, f"not UTF-8 text in the column for {meaning}")
                texts[meaning] = text
                malformed = malformed or (meaning == "label" and _is_nested(value))
        url = texts.get("url", "")
        if not url:
            return UrlRow(self.file, line, "no URL")
        labels = texts.get("label", ())
        if isinstance(labels, str):
            labels = (labels,) if labels else ()
        elif not all(map(is_utf8, labels)):
            return UrlRow(self.file, line, "not UTF-8 text in the column for label")
        get = texts.get
        md5, sha1, size = get("md5", ""), get("sha1", ""), get("bytes", 0)
        # most rows have neither digest nor size: skip their checks
        if md5 or sha1 or "bytes" in texts:
            checked = {
                "md5": fields.match(fields.MD5, md5),
                "sha1": fields.match(fields.SHA1, sha1),
                "bytes": size,
            }
            ignored = tuple(each for each, value in checked.items() if not value and _text(values.get(each)))
            md5, sha1 = str(checked["md5"]), str(checked["sha1"])
        else:
            ignored = ()
        if malformed:
            ignored = (*ignored, "label")
        box: tuple[float, ...] = ()
        if shares := get("box", ""):
            box = _box(shares)
            ignored = ignored if box else (*ignored, "box")
        return UrlRow(
            self.file, line, "", url, labels, get("key", ""), md5, sha1, size,
            get("licence", ""), get("author", ""), get("group", ""), get("split", ""), ignored, box,
        )  # fmt: skip


def _text(value: object) -> str:
    """A cell as text, cut just above the longest URL.

    Numbers are written as short as possible, so that 3, 3.0 and the decimal 3.00 are one class; booleans are `true` and
    `false`, dates are in ISO 8601. Nested values are empty.
    """
    if isinstance(value, str):
        return value.strip()[:_LONGEST_CELL]
    if isinstance(value, bytes):
        return value[: 4 * _LONGEST_CELL].decode("utf-8", "surrogateescape").strip()[:_LONGEST_CELL]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        # pandas writes whole numbers as floats when a column has gaps
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, decimal.Decimal):
        return _shortest(value) if value.is_finite() else ""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    try:
        return str(value)[:_LONGEST_CELL] if isinstance(value, (int, float)) else ""
    except ValueError:  # an integer of more than 4,300 digits
        return ""


def _shortest(value: decimal.Decimal) -> str:
    """A decimal without zeros at its end, in the digits that it has."""
    text = str(value)
    if "E" in text:
        return text if value else "0"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _is_nested(value: object) -> bool:
    return isinstance(value, (dict, list, tuple))


def _whole(value: object) -> int:
    if isinstance(value, float) and value.is_integer() and 0 < value < 2**53:
        value = int(value)
    return fields.parse_positive_int(value.strip() if isinstance(value, str) else value)


def _box(text: str) -> tuple[float, ...]:
    """Left, top, right and bottom in [0, 1], separated by spaces or commas; empty when malformed."""
    try:
        values = tuple(map(float, text.replace(",", " ").split()[:5]))
    except ValueError:
        return ()
    if len(values) != 4:
        return ()
    left, top, right, bottom = values
    return values if 0 <= left < right <= 1 and 0 <= top < bottom <= 1 else ()


def _list_names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown or "none"
