"""Where in a picture the face (or leaf) is: one small interface, found through the entry points `animesion.detectors`.

A detector takes a batch of upright RGB pictures and gives the boxes of each, relative to the picture. What a box is
good for (score, number of faces, crop) is the recipe's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from PIL import Image

from animesion.errors import UsageError
from animesion.records import Box


class Detector(Protocol):
    """Finds boxes; made once a worker, without arguments."""

    #: one line for `animesion detectors`
    summary: str

    def __call__(self, pictures: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Boxes of each picture.

        Args:
            pictures: upright, mode RGB.
            given: for each picture the boxes that the source's table holds, or None without a table.
        """


class GivenBoxes:
    """The boxes of the source's own table, such as DanbooruAnimeFaces' `faces.tsv`."""

    summary = "the boxes of the table that the source gives"

    def __call__(self, pictures: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """The table's boxes; none where it has none."""
        return [list(boxes or ()) for boxes in given]


class WholePicture:
    """No detection: the whole picture is the sample."""

    summary = "no detection, the whole picture is the sample"

    def __call__(self, pictures: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """One box that covers everything."""
        return [[Box(0.0, 0.0, 1.0, 1.0, 1.0)] for _ in pictures]


def names() -> list[str]:
    """Names of the installed detectors."""
    return sorted({point.name for point in entry_points(group="animesion.detectors")})


def summary(name: str) -> str:
    """What a detector says of itself in one line; it is not made for that."""
    return str(_class(name).summary)


def load(name: str) -> Detector:
    """Make a detector by name.

    Raises:
        UsageError: none of that name is installed, or it lacks something.
    """
    made: Detector = _class(name)()
    return made


def _class(name: str) -> Any:
    for point in entry_points(group="animesion.detectors", name=name):
        return point.load()
    raise UsageError(f"crop.detector: there is no detector '{name}'; installed are {', '.join(names())}")
