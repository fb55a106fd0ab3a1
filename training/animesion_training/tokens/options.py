"""Checks of the options of methods; their errors name the option and the possible values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from animesion.errors import UsageError


def whole_number(option: str, value: Any, low: int = 1) -> int:
    """Return the value of an option that must be a whole number.

    Raises:
        UsageError: not a whole number, or less than `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{option} is a whole number from {low}, not {value!r}")
    return value


def one_of(option: str, value: Any, known: Collection[Any]) -> None:
    """Check that the value of an option is a known one.

    Raises:
        UsageError: it is not; the message lists the known ones.
    """
    if value not in known:
        raise UsageError(f"{option} is one of {', '.join(map(str, known))}, not {value!r}")
