"""What is published about datasets that others have released, and the check of a download against it.

Counts, layouts and pitfalls of the Ultra-FGVC cultivar sets and of moeimouto. Their readers are in
`animesion.sources.ultra_fgvc` and `animesion.sources.moeimouto`, their cards are written from this by
`animesion recipes NAME --card`. Sources of the numbers: the papers, and the label files and tools of the GLSim, CLCA
and DSILA repositories.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources.folder import FolderOptions, FolderSource
from animesion.sources.stored import PathOrUrl

#: Share of a class's training images that stay in train when val is held out: the head, in file order.
TRAIN_PERCENT = 80


@dataclass(frozen=True)
class PublishedSet:
    """One published dataset.

    Attributes:
        name: of the recipe, such as `soy-ageing`.
        title: as its authors call it.
        what: one sentence on the images.
        classes: number of classes.
        splits: images by split (`train`, `test`), each with the counts that count as complete; under an empty name
            for a set that publishes no split.
        per_class: images of every class by split where all classes are alike; empty otherwise.
        groups: folders that hold an equal share of each split each, such as the stages of SoyAgeing.
        validation: images in train and val when val is held out of the published training part; empty if unknown.
        aliases: names of the same set in other repositories.
        folders: names that the download's folder has.
        layout: what a download looks like, one line a path.
        facts: sentences on what to know before use.
        obtain: where it comes from.
        homepage: address for the card.
        citation: BibTeX.
        tags: for the card.
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
        """Images in all."""
        return sum(counts[0] for counts in self.splits.values())

    def scaled(self, classes: int, splits: Mapping[str, int], per_class: Mapping[str, int]) -> PublishedSet:
        """The same set with other counts: what a drawn sample of it must hold."""
        counts = {name: (count,) for name, count in splits.items()}
        return replace(self, classes=classes, splits=counts, per_class=dict(per_class), validation=())

    def of_group(self, group: str) -> PublishedSet:
        """The set when just one of its groups is read."""
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
    """Options that every reader of a published set takes."""

    path: PathOrUrl = Field(description="folder of the download, or a .tar or .zip of it; may be s3:// or gs://")
    labels: str = Field(
        "", description="folder of train.csv, val.csv, train_val.csv, test.csv to take splits and class ids from"
    )
    incomplete: Literal["refuse", "accept"] = Field(
        "refuse", description="what to do with a download whose counts are not the published ones"
    )
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


class PublishedFiles:
    """The files of a download, in a folder or an archive, read by `FolderSource`; readers of sets build on it."""

    def __init__(self, options: PublishedOptions) -> None:
        self._folder = FolderSource(FolderOptions(path=options.path, family="", max_bytes=options.max_bytes))
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """Nothing needs to be held open."""
        return contextlib.nullcontext()

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The bytes of each item."""
        return self._folder.read(items)

    def files(self) -> dict[str, Item]:
        """Every file by its path, sorted."""
        found: dict[str, Item] = {}
        repeated = 0
        for item in self._folder.items():
            repeated += item.source_id in found
            found.setdefault(item.source_id, item)
        if repeated:
            self.notes.append(f"{repeated} path(s) stand in the archive more than once: the first of each was taken")
        # a folder without images is no empty class here
        self.notes += [note for note in self._folder.notes if not note.startswith("class folder")]
        return found


def validation_of(items: Sequence[Item]) -> list[Item]:
    """The items with the tail of each class's training images in val, as the GLSim tools cut it (`int(0.8 n)`)."""
    sizes = Counter(item.class_order for item in items if item.split == "train")
    seen: Counter[int] = Counter()
    cut = []
    for item in items:
        if item.split == "train":
            seen[item.class_order] += 1
            head = sizes[item.class_order] * TRAIN_PERCENT // 100
            item = replace(item, split="train" if seen[item.class_order] <= head else "val")
        cut.append(item)
    return cut


def differences(items: Iterable[Item], due: PublishedSet, group_of: Mapping[str, str] | None = None) -> list[str]:
    """What is not as published, in words; empty for a complete download. Val counts as train.

    Args:
        items: the listing; items with a failure have no file.
        due: what is published.
        group_of: group of each item by key, for a set that has groups.
    """
    there = [item for item in items if not item.failure]
    sizes: Counter[tuple[int, str]] = Counter()
    groups: Counter[tuple[str, str]] = Counter()
    for item in there:
        split = _part(item, due)
        sizes[item.class_order, split] += 1
        groups[(group_of or {}).get(item.key, ""), split] += 1
    said = []
    classes = {number for number, _ in sizes}
    if len(classes) != due.classes:
        said.append(f"{len(classes):,} of {due.classes:,} classes")
    for split, counts in due.splits.items():
        found = sum(count for (_, name), count in sizes.items() if name == split)
        if found not in counts:
            said.append(f"{found:,} of {counts[0]:,} {split} images".replace("  ", " "))
        for group in due.groups if len(due.groups) > 1 else ():
            share = counts[0] // len(due.groups)
            if groups[group, split] != share:
                said.append(f"{group}: {groups[group, split]:,} of {share:,} {split}")
        if split in due.per_class:
            off = sorted(number for number in classes if sizes[number, split] != due.per_class[split])
            if off:
                said.append(
                    f"{len(off):,} class(es) without {due.per_class[split]} {split} images each, the first "
                    f"{off[0] + 1} with {sizes[off[0], split]}"
                )
    return said


def check_complete(
    items: Sequence[Item],
    due: PublishedSet,
    options: PublishedOptions,
    group_of: Mapping[str, str] | None = None,
) -> list[str]:
    """Refuse a download that is not what was published; returns notes.

    Raises:
        UsageError: the counts differ and `options.incomplete` does not accept that.
    """
    said = differences(items, due, group_of)
    if not said:
        return []
    missing = sum(item.failure == DropReason.MISSING_FILE for item in items)
    if missing:
        said.append(f"{missing:,} listed file(s) are not there")
    text = f"{due.title} is not as published: {'; '.join(said)}"
    looks = _looks_like(items, due)
    if options.incomplete == "accept":
        return [text]
    raise UsageError(
        f"source.path: {text}{looks}; get the rest, or set source.incomplete=accept to build what is there"
    )


def _part(item: Item, due: PublishedSet) -> str:
    return "" if "" in due.splits else "train" if item.split == "val" else item.split


def _looks_like(items: Sequence[Item], due: PublishedSet) -> str:
    """Which other set has these counts."""
    names = [
        other.name
        for other in PUBLISHED.values()
        if other.name != due.name and "" not in other.splits and not differences(items, replace(other, groups=()))
    ]
    return f" (these are the counts of {names[0]})" if names else ""
