"""Detectors of faces (or leaves): the interface, the registry, and the two detectors that read no pixels.

A detector takes a batch of upright RGB images and returns the boxes of each, relative to the image. Detectors are
entry points of the group `animesion.detectors`. Recipes decide which boxes count and how they are cropped.
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
    """Finds boxes; created once per worker, and called by one thread at a time.

    A class that defines a model `Options` (an `animesion.config.settings.Section`) is created with an instance of it,
    any other without arguments. A class whose boxes depend on a file defines a class method `file`, which takes the
    same arguments as the constructor and returns the path.
    """

    #: one line for `animesion detectors`
    summary: str

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Find the boxes of each image.

        Args:
            images: upright, mode RGB.
            given: for each image the boxes in the source's table, or None if the source has no table.

        Returns:
            A list of boxes per image, in the order of the images.
        """


class GivenBoxes:
    """The boxes of the source's own table, such as DanbooruAnimeFaces' `faces.tsv`."""

    summary = "boxes from the source's own table"

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Return the table's boxes; an empty list for an image without any."""
        return [list(boxes or ()) for boxes in given]


class WholeImage:
    """No detection: the whole image is the sample."""

    summary = "no detection, the whole image is the sample"

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Return one box per image, which covers all of it."""
        return [[Box(0.0, 0.0, 1.0, 1.0, 1.0)] for _ in images]


def names() -> list[str]:
    """Names of the installed detectors."""
    return sorted({point.name for point in entry_points(group="animesion.detectors")})


def summary(name: str) -> str:
    """One-line summary of a detector, from its class.

    Raises:
        UsageError: there is no detector of that name.
    """
    return str(_class(name).summary)


def load(name: str, options: Mapping[str, Any] | None = None) -> Detector:
    """Create a detector.

    Args:
        name: name of its entry point.
        options: its options, as in `crop.detector_options`.

    Raises:
        UsageError: there is no detector of that name, an option is wrong, or a package or file is missing.
    """
    found = _class(name)
    detector: Detector = found(*_arguments(name, found, options))
    return detector


def identity(name: str, options: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of the file that a detector's boxes depend on; empty if there is none. Does not create the detector.

    Raises:
        UsageError: as for `load`.
    """
    from animesion.detectors import model_files

    found = _class(name)
    arguments = _arguments(name, found, options)
    return model_files.digest(found.file(*arguments)) if hasattr(found, "file") else ""


def _class(name: str) -> Any:
    for point in entry_points(group="animesion.detectors", name=name):
        return point.load()
    raise UsageError(f"crop.detector: there is no detector '{name}'; installed are {', '.join(names())}")


def _arguments(name: str, found: Any, options: Mapping[str, Any] | None) -> list[settings.Section]:
    """The constructor's arguments: the validated options, or nothing for a class without options."""
    if model := getattr(found, "Options", None):
        return [settings.check(model, options or {}, f"options of the detector '{name}'")]
    if options:
        raise UsageError(f"the detector '{name}' takes no options, so not '{next(iter(options))}' either")
    return []
