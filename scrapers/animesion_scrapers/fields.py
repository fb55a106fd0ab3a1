"""Validation of values in a site's JSON: each function returns the value, or the empty value of its type.

Sites send numbers as text, null, lone surrogates and worse. The meaning of a field is in the module of its site.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urljoin, urlsplit

MD5 = re.compile(r"[0-9a-f]{32}")
SHA1 = re.compile(r"[0-9a-f]{40}")
EXTENSION = re.compile(r"[a-z0-9]{1,8}")


def positive_int(value: object) -> int:
    """A positive 64-bit integer; else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else 0


def parse_positive_int(value: object) -> int:
    """As `positive_int`, also for decimal digits in a text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return positive_int(int(value))
    return positive_int(value)


def number_text(value: object) -> str:
    """A positive integer as text; else empty."""
    number = parse_positive_int(value)
    return str(number) if number else ""


def text(value: object) -> str:
    """The text without surrounding whitespace; empty if it has lone surrogates, which JSON allows but not UTF-8."""
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return ""
    return value.strip()


def words(value: object) -> tuple[str, ...]:
    """The distinct words of a text, in order of first occurrence."""
    return tuple(dict.fromkeys(text(value).split()))


def match(pattern: re.Pattern[str], value: object) -> str:
    """The text in lower case if the whole of it matches; else empty."""
    found = text(value).lower()
    return found if pattern.fullmatch(found) else ""


def absolute_url(base: str, url: object) -> str:
    """Resolve a URL against `base`; empty for no URL."""
    found = text(url)
    try:
        return urljoin(f"{base}/", found) if found else ""
    except ValueError:
        return found


def extension(address: object) -> str:
    """The extension of a file name or URL, in lower case without the dot; empty if there is none."""
    try:
        suffix = PurePosixPath(urlsplit(text(address)).path).suffix
    except ValueError:
        return ""
    return match(EXTENSION, suffix[1:])


def iso_date(value: object) -> str:
    """An ISO 8601 date, unchanged; else empty."""
    found = text(value)
    try:
        datetime.fromisoformat(found)
    except ValueError:
        return ""
    return found


def unix_date(value: object) -> str:
    """Seconds since 1970 as an ISO 8601 date in UTC; else empty."""
    seconds = parse_positive_int(value)
    return datetime.fromtimestamp(seconds, UTC).isoformat() if 0 < seconds < 253_402_300_800 else ""


def mapping(value: object) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}
