"""Where in an image the face (or leaf) is: one small interface, found through the entry points `animesion.detectors`.

A detector takes a batch of upright RGB images and gives the boxes of each, relative to the image. What a box is
good for (score, number of faces, crop) is the recipe's business. Here are the interface and the two detectors that look
at no pixel; each other one has a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from PIL import Image

from animesion.config import settings
from animesion.errors import UsageError
from animesion.schemas import Box


class Detector(Protocol):
    """Finds boxes; made once for many images, and called by one thread at a time.

    A class with a model `Options` (an `animesion.config.settings.Section`) is made with one, any other without arguments. A
    class whose boxes depend on a file has a class method `file`, which takes the same and gives the path.
    """

    #: one line for `animesion detectors`
    summary: str

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Boxes of each image.

        Args:
            images: upright, mode RGB.
            given: for each image the boxes that the source's table holds, or None without a table.
        """


class GivenBoxes:
    """The boxes of the source's own table, such as DanbooruAnimeFaces' `faces.tsv`."""

    summary = "the boxes of the table that the source gives"

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """The table's boxes; none where it has none."""
        return [list(boxes or ()) for boxes in given]


class WholeImage:
    """No detection: the whole image is the sample."""

    summary = "no detection, the whole image is the sample"

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """One box that covers everything."""
        return [[Box(0.0, 0.0, 1.0, 1.0, 1.0)] for _ in images]


def names() -> list[str]:
    """Names of the installed detectors."""
    return sorted({point.name for point in entry_points(group="animesion.detectors")})


def summary(name: str) -> str:
    """What a detector says of itself in one line; it is not made for that."""
    return str(_class(name).summary)


def load(name: str, options: Mapping[str, Any] | None = None) -> Detector:
    """Make a detector.

    Args:
        name: of its entry point.
        options: its own, as in `crop.detector_options`.

    Raises:
        UsageError: none of that name is installed, an option is wrong, or it lacks something.
    """
    found = _class(name)
    made: Detector = found(*_checked(name, found, options))
    return made


def identity(name: str, options: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of the file that decides a detector's boxes; empty for one without. The detector is not made for that.

    Raises:
        UsageError: as for `load`.
    """
    from animesion.detectors import model_files

    found = _class(name)
    checked = _checked(name, found, options)
    return model_files.digest(found.file(*checked)) if hasattr(found, "file") else ""


def _class(name: str) -> Any:
    for point in entry_points(group="animesion.detectors", name=name):
        return point.load()
    raise UsageError(f"crop.detector: there is no detector '{name}'; installed are {', '.join(names())}")


def _checked(name: str, found: Any, options: Mapping[str, Any] | None) -> list[settings.Section]:
    """The arguments with which a class is made."""
    if model := getattr(found, "Options", None):
        return [settings.check(model, options or {}, f"options of the detector '{name}'")]
    if options:
        raise UsageError(f"the detector '{name}' takes no options, so not '{next(iter(options))}' either")
    return []
