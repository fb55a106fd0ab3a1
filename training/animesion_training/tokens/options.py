"""Checks of the options of methods; each returns or raises one sentence that names the option."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from animesion.errors import UsageError


def whole_number(option: str, value: Any, low: int = 1) -> int:
    """The value of an option that is a whole number.

    Raises:
        UsageError: no whole number, or less than `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{option} is a whole number from {low}, not {value!r}")
    return value


def one_of(option: str, value: Any, known: Collection[Any]) -> None:
    """Check that an option has one of its values.

    Raises:
        UsageError: it has not; they are named.
    """
    if value not in known:
        raise UsageError(f"{option} is one of {', '.join(map(str, known))}, not {value!r}")
