"""Check the values of options, with one wording for every component."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from animesion.errors import UsageError

#: Largest number among the options of a model from a file.
_LARGEST_OPTION = 16384
#: Numbers that only make one tensor longer, and their largest value; BERT's vocabulary has 30,522 entries.
_LENGTHS = {"vocab_size": 1_000_000}


def in_range(
    option: str, value: Any, *, low: float, high: float = math.inf, low_open: bool = False, high_open: bool = False
) -> float:
    """Return the value of an option as a float.

    Args:
        option: name of the option, for the message.
        value: what the user gave.
        low: lower end of the range.
        high: upper end of the range.
        low_open: whether the lower end itself is excluded.
        high_open: whether the upper end itself is excluded.

    Raises:
        UsageError: the value is not a finite number or is outside the range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (low_open and value == low) or (high_open and value == high):
        upper = "" if high == math.inf else f" and {'below' if high_open else 'at most'} {high:g}"
        lower = f"{'above' if low_open else 'of at least'} {low:g}"
        raise UsageError(f"{option} must be a number {lower}{upper}, not {value!r}")
    return float(value)


def whole_number(option: str, value: Any, low: int = 1) -> int:
    """Return the value of an option that must be a whole number.

    Raises:
        UsageError: not a whole number, or less than `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{option} must be a whole number from {low}, not {value!r}")
    return value


def one_of(option: str, value: Any, known: Collection[Any]) -> None:
    """Check that the value of an option is a known one.

    Raises:
        UsageError: it is not; the message lists the known ones.
    """
    if value not in known:
        raise UsageError(f"{option} must be one of {', '.join(map(str, known))}, not {value!r}")


def reasonable(value: Any) -> bool:
    """Whether an option of a model from a file has no depth or width that makes building it very slow."""
    if isinstance(value, Mapping):
        return all(_short(name, each) or reasonable(each) for name, each in value.items())
    if isinstance(value, list | tuple):
        return len(value) <= 1000 and all(map(reasonable, value))
    if value is None or isinstance(value, bool | str):
        return True
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= _LARGEST_OPTION


def _short(name: Any, value: Any) -> bool:
    return name in _LENGTHS and isinstance(value, int) and 0 <= value <= _LENGTHS[name]
