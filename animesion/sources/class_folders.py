"""The labelled images of a folder, by split and class, for those who count or read them in place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from animesion.dataset import layouts, readings
from animesion.sources.file_tree import FileTree

#: Larger files are no images; they are counted all the same.
_MAX_BYTES = 1 << 40


@dataclass(frozen=True)
class ClassFolders:
    """What a folder holds.

    Attributes:
        splits: split -> class -> paths of its images below the folder, sorted; the split is `all` where the layout
            has none.
        summary: one sentence with what was understood.
    """

    splits: dict[str, dict[str, list[str]]]
    summary: str


def read(root: Path) -> ClassFolders:
    """Read a folder in any layout that `animesion.dataset.layouts` knows.

    Raises:
        UsageError: a folder cannot be listed, there are no images, or the layout is unclear.
    """
    tree = FileTree(str(root), _MAX_BYTES)
    listing = tree.listing()
    layout = layouts.understand(
        [entry.name for entry in listing.entries if not entry.failure],
        lambda paths: tree.contents(listing, paths),
        str(root),
        hidden=[entry.name for entry in listing.hidden],
    )
    splits: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    named = any(readings.is_image(path) for path in layout.readings)  # else images have no suffix
    for path, reading in layout.readings.items():
        if reading.labels and (readings.is_image(path) or not named):
            splits[reading.split or "all"][reading.labels[0]].append(path)
    order = [split for split in ("train", "val", "test", "all") if split in splits]
    return ClassFolders(
        {split: {name: sorted(splits[split][name]) for name in splits[split]} for split in order}, layout.summary
    )
