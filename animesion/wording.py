"""Numbers in sentences for people."""

from __future__ import annotations


def amount(number: int, one: str, several: str = "") -> str:
    """A number with the noun that fits it.

    Args:
        number: how many.
        one: the noun, or what is said of one, such as `row is skipped`.
        several: the same for any other number; the noun and an `s` by default.

    >>> amount(1, "image"), amount(1_234, "image"), amount(0, "class", "classes")
    ('1 image', '1,234 images', '0 classes')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
