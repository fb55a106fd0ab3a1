"""Published facts about the Ultra-FGVC cultivar sets and moeimouto, and checks of downloads against them.

Readers are in `animesion.sources.ultra_fgvc` and `animesion.sources.moeimouto`; `animesion recipes NAME --card` prints
cards from these facts. Sources of the numbers: the papers, and the label files and tools of the GLSim, CLCA and DSILA
repositories.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, file_key
from animesion.sources.file_tree import Entry, FileTree
from animesion.sources.stored import PathOrUrl

#: Percentage of a class's training images that stay in train when val is held out: the first ones, in file order.
TRAIN_PERCENT = 80


@dataclass(frozen=True)
class PublishedSet:
    """One published dataset.

    Attributes:
        name: of the recipe, such as `soy-ageing`.
        title: its authors' name for it.
        what: one sentence about the images.
        classes: number of classes.
        splits: image counts of a complete download by split (`train`, `test`); the name is empty for a set without a
            published split.
        per_class: images per class by split if all classes have as many; empty otherwise.
        groups: folders with an equal share of each split, such as the stages of SoyAgeing.
        validation: images in train and val when val is held out of the published train split; empty if unknown.
        aliases: names of the same set in other repositories.
        folders: possible names of the download's folder.
        layout: layout of a download, one line per path.
        facts: sentences to know before use.
        obtain: where to download it.
        homepage: URL for the card.
        citation: BibTeX.
        tags: tags for the card.
    """

    name: str
    title: str
    what: str
    classes: int
    splits: Mapping[str, tuple[int, ...]]
    layout: tuple[str, ...]
    facts: tuple[str, ...]
    obtain: str
    homepage: str
    citation: str
    per_class: Mapping[str, int] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    validation: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(counts[0] for counts in self.splits.values())

    def with_counts(self, classes: int, splits: Mapping[str, int], per_class: Mapping[str, int]) -> PublishedSet:
        """The same set with other counts, for a drawn sample of it."""
        counts = {name: (count,) for name, count in splits.items()}
        return replace(self, classes=classes, splits=counts, per_class=dict(per_class), validation=())

    def select_group(self, group: str) -> PublishedSet:
        """The part of the set in one of its groups."""
        share = len(self.groups)
        return replace(
            self,
            groups=(group,),
            splits={name: tuple(count // share for count in counts) for name, counts in self.splits.items()},
            per_class={name: count // share for name, count in self.per_class.items()},
            validation=tuple(count // share for count in self.validation),
        )


_UFG = "https://github.com/XiaohanYu-GU/Ultra-FGVC"
_UFG_OBTAIN = (
    "The authors of Ultra-FGVC give it out on a page of Griffith University and as a Baidu Pan share (code ICCV); this "
    "program does not download it. Its terms are the authors'."
)
_UFG_CITATION = """@inproceedings{yu2021benchmark,
  title     = {Benchmark Platform for Ultra-Fine-Grained Visual Categorization Beyond Human Performance},
  author    = {Yu, Xiaohan and Zhao, Yang and Gao, Yongsheng and Yuan, Xiaohui and Xiong, Shengwu},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}"""
_CLASSES = "Classes are numbered from 1 in the files and from 0 in label files; they have no names."
_BY_NAME = "The split is in each file's name."
_ANNOTATED = "The split is in `anno/train.txt` and `anno/test.txt`: a file name, a space, the class."


def _ufg(name: str, title: str, what: str, **values: Any) -> PublishedSet:
    facts = (*values.pop("facts"), _CLASSES)
    return PublishedSet(
        name, title, what, facts=facts, obtain=_UFG_OBTAIN, homepage=_UFG, citation=_UFG_CITATION,
        tags=("plants", "cultivar", "ultra-fine-grained"), **values,
    )  # fmt: skip


_FLAT = ("<class from 1>_<index>_train.png", "<class from 1>_<index>_test.png")
_ANNO = ("anno/train.txt", "anno/test.txt", "images/<name>.png")

PUBLISHED: dict[str, PublishedSet] = {
    each.name: each
    for each in (
        _ufg(
            "cotton80", "Cotton80", "Leaves of 80 cotton cultivars, three for training and three for testing of each.",
            classes=80, splits={"train": (240,), "test": (240,)}, per_class={"train": 3, "test": 3},
            validation=(160, 80), aliases=("cotton",), folders=("cotton_square_new", "cotton80", "cotton"),
            layout=_FLAT, facts=(_BY_NAME,),
        ),
        _ufg(
            "soy-local", "SoyCultivarLocal",
            "Leaves of 200 soybean cultivars, three for training and three for testing of each.",
            classes=200, splits={"train": (600,), "test": (600,)}, per_class={"train": 3, "test": 3},
            validation=(400, 200), aliases=("soy", "soylocal"), folders=("soybean200_square", "soylocal", "soy"),
            layout=_FLAT, facts=(_BY_NAME, "GLSim's label files call this set `soy`."),
        ),
        _ufg(
            "soy-global", "SoyCultivarGlobal",
            "Leaves of 1,938 soybean cultivars, three for training and three for testing of each.",
            classes=1938, splits={"train": (5814,), "test": (5814,)}, per_class={"train": 3, "test": 3},
            validation=(3876, 1938), aliases=("soyglobal",), folders=("soybean2000", "soyglobal"),
            layout=_FLAT, facts=(_BY_NAME, "The folder is called soybean2000 but holds 1,938 classes."),
        ),
        _ufg(
            "soy-gene", "SoyGene", "Leaves of 1,110 soybean cultivars in unequal numbers.",
            classes=1110, splits={"train": (12763,), "test": (11143,)}, validation=(9562, 3201),
            aliases=("soygene",), folders=("soygene",),
            layout=_ANNO, facts=(_ANNOTATED, "A class has 3 to 15 images for training and 3 to 13 for testing."),
        ),
        _ufg(
            "soy-ageing", "SoyAgeing",
            "Leaves of 198 soybean cultivars at five stages of growth: R1, R3, R4, R5 and R6.",
            classes=198, splits={"train": (4950,), "test": (4950,)}, per_class={"train": 25, "test": 25},
            validation=(3960, 990), groups=("R1", "R3", "R4", "R5", "R6"),
            aliases=("soyageing",), folders=("soyageing",),
            layout=tuple(f"<stage>/{line}" for line in _ANNO),
            facts=(
                _ANNOTATED,
                "There is no stage R2. Each stage has 990 training and 990 test images, five of each class.",
                "DSILA's label files of single stages are called `train_R1.csv.csv`.",
            ),
        ),
        PublishedSet(
            "moeimouto", "moeimouto faces", "Faces of 173 anime characters, nearly balanced (32 to 161 images each).",
            classes=173, splits={"": (14397, 14395)}, folders=("moeimouto-faces", "moeimouto", "thumb"),
            layout=("thumb/<NNN>_<character>/face_<A>_<B>_<C>.png",),
            facts=(
                "Beside the images, which are 160x160, a folder has a `color.csv` and may have a file `ignore`.",
                "Folder numbers have gaps and end in 998 and 999, so a number is not a class id; ids here follow them.",
                "14,397 images are published, two of them (144_kotegawa_yui) not RGB; the first label files left "
                "those out and have 14,395.",
                "Label files of the animesion and the GLSim repositories were written in different unsorted orders: "
                "no class id of the 173 agrees, and 2,332 test images of the one are training images of the "
                "other. Labels and checkpoints of the two must not be mixed.",
                "No split is published with the images. Without label files the recipe makes its own, in which no "
                "duplicates straddle.",
            ),
            obtain="nagadomi's animeface-character-dataset, mirrored on Kaggle in "
            "`mylesoneill/tagged-anime-illustrations`. The images are their artists' works.",
            homepage="https://www.kaggle.com/datasets/mylesoneill/tagged-anime-illustrations", citation="",
            tags=("anime", "character-recognition"),
        ),
    )
}  # fmt: skip


class PublishedOptions(Section):
    """Options of every reader of a published set."""

    path: PathOrUrl = Field(description="folder of the download, or a .tar or .zip of it; may be s3:// or gs://")
    labels: str = Field(
        "", description="folder of train.csv, val.csv, train_val.csv, test.csv with splits and class ids"
    )
    incomplete: Literal["refuse", "accept"] = Field(
        "refuse", description="treatment of a download whose counts differ from the published ones"
    )
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


class PublishedFiles:
    """The files of a download, in a folder or an archive; readers of sets build on it."""

    def __init__(self, options: PublishedOptions) -> None:
        self._options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The bytes of each item."""
        return self._tree().read([json.loads(item.locator) for item in items])

    def files(self) -> dict[str, Item]:
        """Every file by its path below the folders that all files share, sorted."""
        listing = self._tree().listing()
        if not listing.entries:
            raise UsageError(f"source.path: {self._options.path} contains no files")
        prefix = _wrapper(listing.entries) if self._tree().is_archive else ""
        found: dict[str, Item] = {}
        repeated = 0
        for order, entry in enumerate(listing.entries):
            path = clean_text(entry.name.removeprefix(prefix), 1000)
            repeated += path in found
            item = Item(
                key=file_key("folder", os.fsencode(entry.name), PurePosixPath(path).stem),
                source="folder",
                source_id=path,
                locator=json.dumps(entry.locator),
                order=order,
                failure=entry.failure,
                detail=entry.detail,
            )
            found.setdefault(path, item)
        if repeated:
            self.notes.append(f"{repeated} path(s) occur in the archive more than once: the first of each was taken")
        # a folder without images is no empty class here
        self.notes += [note for note in listing.notes if not note.startswith("class folder")]
        self.notes += listing.passed_over()
        return found

    def _tree(self) -> FileTree:
        return FileTree(self._options.path, self._options.max_bytes)


def _wrapper(entries: Sequence[Entry]) -> str:
    """`name/` when everything in an archive is below one folder that holds only folders, else an empty string."""
    paths = [PurePosixPath(entry.name).parts for entry in entries if not entry.failure]
    tops = {parts[0] for parts in paths}
    return f"{tops.pop()}/" if len(tops) == 1 and all(len(parts) > 2 for parts in paths) else ""


def hold_out_validation(items: Sequence[Item]) -> list[Item]:
    """Move the last training images of each class to val, all but `int(0.8 n)`, as the GLSim tools do."""
    sizes = Counter(item.class_order for item in items if item.split == "train")
    seen: Counter[int] = Counter()
    result = []
    for item in items:
        if item.split == "train":
            seen[item.class_order] += 1
            head = sizes[item.class_order] * TRAIN_PERCENT // 100
            item = replace(item, split="train" if seen[item.class_order] <= head else "val")
        result.append(item)
    return result


def differences(items: Iterable[Item], due: PublishedSet, group_of: Mapping[str, str] | None = None) -> list[str]:
    """Differences from the published set, as parts of a message; empty for a complete download. Val counts as train.

    Args:
        items: the listing; items with a failure have no file.
        due: the published set.
        group_of: group of each item by key, for a set with groups.
    """
    present = [item for item in items if not item.failure]
    sizes: Counter[tuple[int, str]] = Counter()
    groups: Counter[tuple[str, str]] = Counter()
    for item in present:
        split = _part(item, due)
        sizes[item.class_order, split] += 1
        groups[(group_of or {}).get(item.key, ""), split] += 1
    found_differences = []
    classes = {number for number, _ in sizes}
    if len(classes) != due.classes:
        found_differences.append(f"{len(classes):,} of {due.classes:,} classes")
    for split, counts in due.splits.items():
        found = sum(count for (_, name), count in sizes.items() if name == split)
        if found not in counts:
            found_differences.append(f"{found:,} of {counts[0]:,} {split} images".replace("  ", " "))
        for group in due.groups if len(due.groups) > 1 else ():
            share = counts[0] // len(due.groups)
            if groups[group, split] != share:
                found_differences.append(f"{group}: {groups[group, split]:,} of {share:,} {split}")
        if split in due.per_class:
            off = sorted(number for number in classes if sizes[number, split] != due.per_class[split])
            if off:
                found_differences.append(
                    f"{len(off):,} class(es) without {due.per_class[split]} {split} images each, the first "
                    f"{off[0] + 1} with {sizes[off[0], split]}"
                )
    return found_differences


def check_complete(
    items: Sequence[Item],
    due: PublishedSet,
    options: PublishedOptions,
    group_of: Mapping[str, str] | None = None,
) -> list[str]:
    """Compare a download with the published set and return notes.

    Raises:
        UsageError: the counts differ and `options.incomplete` does not accept that.
    """
    found_differences = differences(items, due, group_of)
    if not found_differences:
        return []
    missing = sum(item.failure == DropReason.MISSING_FILE for item in items)
    if missing:
        found_differences.append(f"{missing:,} listed file(s) are missing")
    text = f"{due.title} is not as published: {'; '.join(found_differences)}"
    looks = _looks_like(items, due)
    if options.incomplete == "accept":
        return [text]
    raise UsageError(
        f"source.path: {text}{looks}; get the rest, or set source.incomplete=accept to build from these files"
    )


def _part(item: Item, due: PublishedSet) -> str:
    return "" if "" in due.splits else "train" if item.split == "val" else item.split


def _looks_like(items: Sequence[Item], due: PublishedSet) -> str:
    """The other set with these counts, as part of a message."""
    names = [
        other.name
        for other in PUBLISHED.values()
        if other.name != due.name and "" not in other.splits and not differences(items, replace(other, groups=()))
    ]
    return f" (these are the counts of {names[0]})" if names else ""
