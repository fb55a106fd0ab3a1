"""Look at a folder or an archive before there is a recipe for it, for `animesion init`.

The layout is understood by the source `folder`, as in a build; a few images are decoded for their sizes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from animesion import sources
from animesion.config import recipe as recipes
from animesion.images import codec
from animesion.images.formats import RejectedImageError

#: Side of the packed images that is suggested where images are larger.
_SIDE = 512


@dataclass(frozen=True)
class Survey:
    """What a folder or an archive holds.

    Attributes:
        images: number of images that a build would list.
        classes: images of each class; those with several labels do not count.
        unlabelled: images without a label.
        several: images with several labels.
        splits: the splits that the layout publishes, in order of first occurrence.
        notes: what the source understood and passed over, in sentences.
        sides: shorter and longer side of the decoded images, in pixels.
        unread: decoded images that cannot be used, by reason.
    """

    images: int
    classes: dict[str, int]
    unlabelled: int
    several: int
    splits: tuple[str, ...]
    notes: tuple[str, ...]
    sides: tuple[tuple[int, int], ...]
    unread: dict[str, int]

    @property
    def size(self) -> int:
        """Suggested `pack.size`: 0 where the images are small, so that their bytes are kept."""
        longer = sorted(longer for _, longer in self.sides)
        return _SIDE if longer and longer[len(longer) // 2] > 1.25 * _SIDE else 0


def survey(path: Path, *, decoded: int = 200) -> Survey:
    """List a folder or an archive, and decode some of its images, evenly spread.

    Args:
        path: folder, tar or zip.
        decoded: number of images to decode, at most.

    Raises:
        UsageError: there is nothing at the path, or its layout is not understood.
    """
    recipe = recipes.load("folder", [f"source.path={json.dumps(str(path), ensure_ascii=False)}"])
    source = sources.make(recipe)
    with source.session():
        items = list(source.items())
        chosen = [item for item in items[:: max(1, len(items) // decoded)] if not item.failure][:decoded]
        sides, unread = [], Counter[str]()
        limits = codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
        for payload in source.read(chosen):
            if payload.reason:
                unread[payload.reason] += 1
                continue
            try:
                width, height = codec.decode(payload.content, limits).image.size
            except RejectedImageError as error:
                unread[error.reason] += 1
                continue
            sides.append((min(width, height), max(width, height)))
    labels = Counter(item.labels[0] for item in items if len(item.labels) == 1)
    return Survey(
        images=len(items),
        classes=dict(sorted(labels.items(), key=lambda pair: (-pair[1], pair[0]))),
        unlabelled=sum(not item.labels for item in items),
        several=sum(len(item.labels) > 1 for item in items),
        splits=tuple(dict.fromkeys(item.split for item in items if item.split)),
        notes=tuple(source.notes),
        sides=tuple(sides),
        unread=dict(unread.most_common()),
    )


def draft(
    found: Survey, path: Path, *, name: str, size: int, detector: str, minimum: int, licence: str
) -> dict[str, Any]:
    """The values of a recipe for what was found, as TOML's tables.

    Args:
        found: see `survey`.
        path: folder or archive.
        name: of the dataset.
        size: see `pack.size`.
        detector: see `crop.detector`.
        minimum: see `classes.minimum`.
        licence: see `card.licence`; empty leaves it open.
    """
    values: dict[str, Any] = {
        "name": name,
        # without counts, which the build changes
        "summary": f"images from {path.resolve().name}",
        "source": {"kind": "folder", "path": str(path)},
        "split": {"strategy": "auto" if found.splits else "grouped"},
    }
    if detector != "none":
        values["crop"] = {"detector": detector}
    if minimum > 1:
        values["classes"] = {"minimum": minimum}
    if size:
        values["pack"] = {"size": size, "fit": "short-side"}
    if licence:
        values["card"] = {"licence": licence}
    return values
