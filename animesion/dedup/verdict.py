"""What a comparison of two images may find; `animesion.dedup.residual` finds it, and loads OpenCV."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Verdict(StrEnum):
    """What two images are to each other, the closest first.

    Attributes:
        rank: 0 for the closest.
        meaning: one line for documentation.
    """

    rank: int
    meaning: str

    def __new__(cls, text: str, rank: int, meaning: str) -> Self:
        """Make a member that is the string `text`."""
        member = str.__new__(cls, text)
        member._value_ = text
        member.rank = rank
        member.meaning = meaning
        return member

    COPY = "copy", 0, "the same drawing, whatever was done to its size, tone, frame or encoding"
    OVERLAY = "copy with overlay", 1, "the same drawing, and one has a sticker, bubble, bar or watermark on it"
    PART = "part", 2, "parts of one image that overlap, such as two faces side by side"
    ALTERNATE = "alternate", 3, "a variant of the drawing: other expression, colours, clothes; or of one template"
    DIFFERENT = "different", 4, "two drawings"
