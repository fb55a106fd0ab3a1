"""Recognise datasets for detection: boxes in YOLO, COCO, Pascal VOC or LabelMe form beside the images.

Their classes are those of boxes. Read as classes of images, their folders `images` or `train2017` would be the classes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from animesion.splits import split_in_name

#: Reads files by their paths.
Contents = Callable[[Sequence[str]], Iterable[bytes]]

#: Files of each kind that are looked into.
_LOOKED_INTO = 5
_HEAD = 4096

_NAMES = {
    "_annotations.coco.json": "COCO",
    "_annotations.createml.json": "CreateML",
    "_annotations.csv": "a table of boxes",
    "_annotations.txt": "a list of boxes",
}
_COCO_NAME = re.compile(
    r"(?:.*[-_.])?(?:instances|annotations?|coco|train|val|valid|test|labels?|result)s?\d*(?:[-_.].*)?\.json"
)
_COCO_KEY = re.compile(rb'\s*\{\s*"(?:info|licenses|images|annotations|categories|type)"\s*:')

_SUFFIXES = (".json", ".txt", ".xml", ".csv")

#: Folder of images -> folders with a file for each of them, in its place.
_TWINS = {
    "images": ("labels", "annotations", "annotations/xmls"),
    "jpegimages": ("labels", "Annotations"),
}
#: What the name of a mask adds to that of its image, as in `benign (1)_mask.png`.
_MASK_NAME = re.compile(r"[-_. ](?:mask|seg|segmentation|segmented|gt)(?:[-_]?\d+)?", re.IGNORECASE)
_BOX = re.compile(rb"\s*\d+(?:\s+-?\d*\.?\d+(?:[eE][-+]?\d+)?){4,}\s*")

#: Folders of segmentation masks, which are image files.
_MASKS = frozenset({"masks", "mask", "labels", "annotations", "trimaps", "segmentation"})

#: Names of folders that hold images of all classes.
_CONTAINER = re.compile(
    r"(?:images?|imgs?|jpe?gimages|pictures|photos|frames?|data|default|obj_\w+_data|labels|annotations|masks"
    r"|(?:train|training|val|valid|validation|trainval|test|testing|unlabeled)[-_]?\d*)",
    re.IGNORECASE,
)

#: Share of the images from which those named as masks are some; a few are a coincidence.
_SHARE_OF_MASKS = 0.1
#: Words in the names of folders that hold a part of the images.
_PART_WORDS = frozenset(
    {
        *("part", "fold", "batch", "chunk", "shard", "subset", "volume", "archive"),
        *("image", "images", "img", "imgs", "photos", "pictures"),
    }
)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class BoxFiles:
    """Files of boxes.

    Attributes:
        kind: what they are, such as `YOLO`.
        example: path of one of them.
    """

    kind: str
    example: str

    @property
    def refusal(self) -> str:
        """What the dataset is and what to do, to follow the place."""
        return (
            f"is a dataset for detection ({self.kind}, such as {self.example}): its boxes have classes, and its images "
            "have none. Crop each box into a folder of its class, or add a metadata.csv with the columns file_name and "
            "label, or set source.label_level if the folders are the classes"
        )

    @property
    def note(self) -> str:
        """That the boxes are not read."""
        return f"the boxes in {self.example} and others ({self.kind}) are not read"


def find(images: Sequence[str], paths: Iterable[str], contents: Contents) -> BoxFiles | None:
    """Find files of boxes beside images or in a folder of their own; None if there are none."""
    side = {path for path in paths if path.lower().endswith(_SUFFIXES)}
    if not side:
        return None
    for path in sorted(side):
        if kind := _NAMES.get(PurePosixPath(path).name.lower()):
            return BoxFiles(kind, path)
    stems = dict.fromkeys(path.rpartition(".")[0] or path for path in images)
    named = [path for path in side if _COCO_NAME.fullmatch(path.rpartition("/")[2].lower())]
    sidecars = {*stems, *images}
    for path, content in _read(sorted(path for path in named if path[: -len(".json")] not in sidecars), contents):
        if _COCO_KEY.match(content):
            return BoxFiles("COCO", path)
    for suffix, is_kind, kind in _KINDS:
        if not any(path.endswith(suffix) for path in side):
            continue
        there = (f"{place}{suffix}" for stem in stems for place in (stem, *_twins(stem)) if f"{place}{suffix}" in side)
        for path, content in _read(there, contents):
            if is_kind(content):
                return BoxFiles(kind, path)
    return None


def find_mask(images: Sequence[str]) -> str:
    """Path of the mask of an image, such as `masks/1.png` of `images/1.jpg` or `1_mask.png`; empty if there is none."""
    stems = {path.rpartition(".")[0] for path in images}
    masks = []
    for path in images:
        stem = path.rpartition(".")[0]
        ending = _MASK_NAME.search(stem, stem.rfind("/") + 1)
        if ending and ending.end() == len(stem) and stem[: ending.start()] in stems:
            masks.append(path)
    if masks and len(masks) >= _SHARE_OF_MASKS * len(images):
        return masks[0]
    folders = {path.rpartition("/")[0] for path in images}
    # folder of masks -> folders that may hold its images
    twins = {
        folder: [
            "/".join([*parts[:at], other, *parts[at + 1 :]])
            for parts in [folder.split("/")]
            for at, part in enumerate(parts)
            if part.lower() in _MASKS
            for other in ("images", "image", "imgs", "img")
        ]
        for folder in folders
    }
    if not any(twins.values()):
        return ""
    for path in images:
        folder, _, name = path.rpartition(".")[0].rpartition("/")
        if any(f"{twin}/{name}" in stems for twin in twins.get(folder, ())):
            return path
    return ""


def are_containers(classes: Sequence[str]) -> bool:
    """Whether folders hold images of all classes, as far as their names tell: there is one, or any is named so."""
    return len(classes) < 2 or any(map(is_container, classes))


def are_parts(names: Collection[str]) -> bool:
    """Whether folders are parts of one set of images by their names, as `fold1`, `fold2` or `batch_a`, `batch_b`."""
    if all(map(is_container, names)):
        return True
    kinds = {re.sub(r"(?:[\W_]*\d+|[\W_]+[a-z])$", "", name.lower()) for name in names}
    return len(kinds) == 1 and bool(_PART_WORDS & set(_WORD.findall(kinds.pop())))


def is_container(name: str) -> bool:
    """Whether a folder holds images of all classes, as far as its name tells: `images`, `train2017`, `test_images`."""
    split, others = split_in_name(name)
    return bool(_CONTAINER.fullmatch(name)) or bool(split and not others)


def _read(paths: Iterable[str], contents: Contents) -> Iterator[tuple[str, bytes]]:
    """The first paths with their contents."""
    chosen = list(itertools.islice(paths, _LOOKED_INTO))
    yield from zip(chosen, (content[:_HEAD] for content in contents(chosen)), strict=True)


def _twins(stem: str) -> Iterator[str]:
    """The same place below the folders of annotations: `labels/train/1` for `images/train/1`."""
    parts = stem.split("/")
    for at, part in enumerate(parts[:-1]):
        for twin in _TWINS.get(part.lower(), ()):
            yield "/".join([*parts[:at], twin, *parts[at + 1 :]])


def _is_yolo(content: bytes) -> bool:
    """Whether lines are a class and four or more numbers."""
    lines = [line for line in content.splitlines()[:20] if line.strip()]
    lines = lines[:-1] if len(content) == _HEAD else lines
    return bool(lines) and all(_BOX.fullmatch(line) for line in lines)


def _is_voc(content: bytes) -> bool:
    return b"<annotation" in content


def _is_labelme(content: bytes) -> bool:
    return b'"shapes"' in content and (b'"imagePath"' in content or b'"flags"' in content)


_KINDS = ((".txt", _is_yolo, "YOLO"), (".xml", _is_voc, "Pascal VOC"), (".json", _is_labelme, "LabelMe"))
