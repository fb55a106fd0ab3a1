"""The classes and splits of files, as a layout reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from animesion.dataset.path_parts import suffix_of
from animesion.wording import amount

#: Suffixes of image files, in lower case; what is not among them inside a class folder is listed all the same.
IMAGE_SUFFIXES = frozenset(
    {
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg"),
        *(".jpg", ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".tga", ".tif", ".tiff", ".webp"),
    }
)

#: Classes and files that a sentence names.
_NAMED = 4


#: What reads class folders otherwise.
FOLDER_HINT = "source.label_level or source.pattern reads them otherwise"


@dataclass(frozen=True, slots=True)
class Reading:
    """The reading of one file.

    Attributes:
        labels: class names; none for an image that is in no class, several where a side file lists several.
        split: `train`, `val` or `test`; empty where the layout has no splits.
        group: images of one group belong together; empty for none.
        fields: further values of a side file: `rating`, `author`, `page_url`, `file_url`, `md5`, `licence`.
    """

    labels: tuple[str, ...] = ()
    split: str = ""
    group: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How a tree of files is read.

    Attributes:
        by: what the classes come from: `folder`, `pattern`, or the name of the side files.
        root: folders that all images lie below, `a/b`; empty for none.
        readings: path -> reading, for every file that counts, images or not.
        left_out: paths of files that belong to no class: stray files, side files, annotations.
        summary: one sentence with what was understood, and the option that changes it.
        sidecars: paths of the files per image that were read, hidden or not.
    """

    by: str
    root: str
    readings: dict[str, Reading]
    left_out: list[str]
    summary: str
    sidecars: frozenset[str] = frozenset()

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""
        return sorted({label for reading in self.readings.values() for label in reading.labels})

    @property
    def splits(self) -> list[str]:
        """Splits in the order train, val, test; empty where the layout has none."""
        found = {reading.split for reading in self.readings.values()}
        return [split for split in ("train", "val", "test") if split in found]


def is_image(path: str) -> bool:
    """Whether a file is an image by the suffix of its name."""
    return suffix_of(path).lower() in IMAGE_SUFFIXES


def layout_of(by: str, readings: dict[str, Reading], left_out: Sequence[str], root: str, hint: str) -> Layout:
    """A layout with its summary, which ends in a hint at what reads the files otherwise."""
    layout = Layout(by, root, readings, sorted(left_out), "")
    classes, splits = layout.classes, layout.splits
    words = [amount(len(classes), "class", "classes")]
    words[0] += f" in splits {'/'.join(splits)}" if splits else ""
    words[0] += f", by {by}"
    words[0] += f" below {root}/" if root else ""
    if left_out:
        named = listed(sorted(map(repr, left_out)))  # an archive among them holds images that are not read
        words.append(f"{amount(len(left_out), 'file')} beside the classes left out, {named}")
    without = sum(not reading.labels for reading in readings.values())
    if without:
        words.append(amount(without, "image has no class", "images have no class"))
    return Layout(by, root, readings, sorted(left_out), f"{'; '.join(words)} ({hint})")


def listed(names: Sequence[str]) -> str:
    """The first names of some, parted by commas."""
    shown = ", ".join(names[:_NAMED])
    return f"{shown}, ..." if len(names) > _NAMED else shown
