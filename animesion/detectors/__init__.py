"""Detectors of faces (or leaves): the interface, the registry, and the two detectors that read no pixels.

A detector takes a batch of upright RGB images and returns the boxes of each, relative to the image. Detectors are
entry points of the group `animesion.detectors`. Recipes decide which boxes count and how they are cropped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from animesion.config import settings
from animesion.errors import UsageError
from animesion.schemas import Box
from animesion_scrapers import plugins

#: Least intersection over union of boxes on which several detectors agree, unless it is set: boxes around a face with
#: its hair and without share a third of their area (docs/detectors.md).
AGREEMENT = 0.3


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
    return sorted({point.name for point in plugins.points("animesion.detectors")})


def listed(detector: str | Sequence[str]) -> list[str]:
    """The detectors that `crop.detector` names, as it names them: `lbp`, or `onnx:FILE` for one with a file."""
    return [detector] if isinstance(detector, str) else list(detector)


def name_of(spec: str) -> str:
    """The detector's name in `NAME` or `NAME:FILE`."""
    return spec.partition(":")[0]


def summary(name: str) -> str:
    """One-line summary of a detector, from its class.

    Raises:
        UsageError: there is no detector of that name.
    """
    return str(_class(name).summary)


def load(
    detector: str | Sequence[str], options: Mapping[str, Any] | None = None, *, agreement: float = AGREEMENT
) -> Detector:
    """Create a detector.

    Args:
        detector: name of its entry point, or `NAME:FILE` for the option `file`; several are one detector, see
            `animesion.detectors.agreement`.
        options: its options, as in `crop.detector_options`; for several detectors, options by name.
        agreement: least intersection over union of boxes of several detectors that are the same.

    Raises:
        UsageError: there is no detector of that name, an option is wrong, or a package or file is missing.
    """
    if not isinstance(detector, str):
        from animesion.detectors.agreement import Agreement

        options_of = options_by_detector(detector, options)
        return Agreement([load(spec, options_of[spec]) for spec in detector], agreement)
    found = _class(detector)
    made: Detector = found(*_arguments(detector, found, options))
    return made


def identity(detector: str | Sequence[str], options: Mapping[str, Any] | None = None) -> str:
    """What a detector's boxes depend on: SHA-256 of its file, and the library that runs it; empty if there is none.

    Does not create the detector. For several detectors, theirs one after the other.

    Raises:
        UsageError: as for `load`.
    """
    from animesion import model_files

    if not isinstance(detector, str):
        options_of = options_by_detector(detector, options)
        return ",".join(identity(spec, options_of[spec]) for spec in detector)
    found = _class(detector)
    arguments = _arguments(detector, found, options)
    parts = [model_files.digest(found.file(*arguments))] if hasattr(found, "file") else []
    return "/".join([*parts, found.runtime()] if hasattr(found, "runtime") else parts)


def options_by_detector(
    detectors: Sequence[str], options: Mapping[str, Any] | None = None
) -> dict[str, Mapping[str, Any]]:
    """The options of each of several detectors.

    Args:
        detectors: as in `crop.detector`.
        options: tables of options by the name of a detector, or by its entry in the list.

    Raises:
        UsageError: an option belongs to none of the detectors, or the list has fewer than two or repeats one.
    """
    if len(set(detectors)) != len(detectors) or len(detectors) < 2:
        raise UsageError(f"a list of detectors needs two or more different ones, not {', '.join(detectors) or 'none'}")
    for spec in detectors:
        if name_of(spec) == "none":
            raise UsageError("the detector 'none' finds nothing that others could agree on: remove it from the list")
    given = dict(options or {})
    allowed = {*detectors, *map(name_of, detectors)}
    for key, value in given.items():
        if key not in allowed or not isinstance(value, Mapping):
            raise UsageError(
                f"options of several detectors are tables by their names ({', '.join(sorted(allowed))}), such as "
                f"{detectors[0]}.score=0.4, which '{key}' is not"
            )
    return {spec: {**given.get(name_of(spec), {}), **given.get(spec, {})} for spec in detectors}


@functools.cache  # finding entry points reads the files of all installed packages
def _class(spec: str) -> Any:
    name = name_of(spec)
    for point in plugins.points("animesion.detectors", name):
        return point.load()
    near = settings.nearest(name, names())
    raise UsageError(f"crop.detector: there is no detector '{name}'{near}; installed are {', '.join(names())}")


def _arguments(spec: str, found: Any, options: Mapping[str, Any] | None) -> list[settings.Section]:
    """The constructor's arguments: the validated options, or nothing for a class without options."""
    name, colon, file = spec.partition(":")
    model = getattr(found, "Options", None)
    if colon:
        if model is None or "file" not in model.model_fields or not file:
            raise UsageError(f"'{spec}': the detector '{name}' takes no file" if file else f"'{spec}' names no file")
        if (options or {}).get("file", file) != file:
            raise UsageError(f"'{spec}' and the option 'file' of the detector '{name}' differ: remove one of them")
        options = {**(options or {}), "file": file}
    if model:
        return [settings.check(model, options or {}, f"options of the detector '{name}'")]
    if options:
        raise UsageError(f"the detector '{name}' takes no options, so not '{next(iter(options))}' either")
    return []
