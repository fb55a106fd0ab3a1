"""Compare a built dataset with published label files: classes, images per class and split, and single images.

Only tables are read. An image is known by its post, if its path has DAF:re's form `BBBB/ID.jpg`, else by its path.
`animesion.cli.diff` prints the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from animesion.dataset import label_files
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.sources import clean_text
from animesion.sources.labels import SPLIT_OF, danbooru_id
from animesion.verification.diff import Change

_NOT_LISTED = "not in the dataset"


class _Row(NamedTuple):
    """An image of a label file, or a sample of the dataset."""

    image: str
    label: str
    split: str


@dataclass(frozen=True)
class Published:
    """The contents of label files.

    Attributes:
        rows: images in the order of the files.
        class_ids: class id by name, for classes with images.
        splits: splits of the files; empty if the one file has another name than `train.csv` and the like.
    """

    rows: list[_Row]
    class_ids: dict[str, int]
    splits: frozenset[str]


@dataclass(frozen=True)
class LabelDifference:
    """All differences between label files and a dataset; every list is sorted.

    Attributes:
        classes: names of classes that only one has, or that have another id.
        counts: `class, split` with another number of images.
        missing: images of the files without a sample, with their drop reason.
        extra: images with a sample in one of the compared splits that the files do not list, with class and split.
        relabelled: images with another class.
        moved: images in another split.
        totals: images per split, and `total` for all; equal ones included.
    """

    classes: list[Change]
    counts: list[Change]
    missing: list[Change]
    extra: list[Change]
    relabelled: list[Change]
    moved: list[Change]
    totals: list[Change]

    @property
    def identical(self) -> bool:
        """Whether there are no differences."""
        listed = [value for name, value in vars(self).items() if name != "totals"]
        return not any(listed) and all(total.before == total.after for total in self.totals)

    def to_dict(self) -> dict[str, Any]:
        """The differences as plain dicts and lists, ready for JSON."""
        values = asdict(self)
        return {"identical": self.identical} | {name: [c._asdict() for c in values[name]] for name in values}


def is_label_files(path: Path) -> bool:
    """Whether a path is a CSV, or a folder with label files such as `train.csv` that is not a dataset."""
    if path.is_dir():
        return not (path / "dataset.json").exists() and bool(label_files.find_label_files(path).labels)
    return path.is_file() and path.suffix.lower() == ".csv"


def read(path: Path) -> Published:
    """Read the label files of a folder, or one file; class names are in `classid_classname.csv` next to them.

    Raises:
        UsageError: A file is unreadable or has a wrong row, or the folder contains `train.csv` and `train_val.csv`.
    """
    if path.is_dir():
        found = label_files.find_label_files(path)
        files, names_file = found.labels, found.names
        if {"train", "train_val"} <= files.keys():
            raise UsageError(f"{path} contains train.csv and train_val.csv; give one of them")
    else:
        files, names_file = {path.stem: path}, path.with_name(label_files.NAMES_FILE)
    known = label_files.read_class_names(names_file) if names_file and names_file.exists() else {}
    rows: list[_Row] = []
    class_ids: dict[str, int] = {}
    for stem, file in files.items():
        table = label_files.read_labels(file)
        for class_id, name in zip(table.class_ids.tolist(), table.paths, strict=True):
            label = clean_text(known.get(class_id, f"class-{class_id}"))
            class_ids[label] = class_id
            rows.append(_Row(danbooru_id(name) or clean_text(name, 1000), label, SPLIT_OF.get(stem, "")))
    return Published(rows, class_ids, frozenset(row.split for row in rows if row.split))


def compare(published: Published, dataset: Dataset) -> LabelDifference:
    """Compare label files with a dataset.

    Raises:
        UsageError: A table of the dataset is missing or damaged.
    """
    splits = published.splits
    columns = ("source_id", "label", "split", "kept", "reason")
    samples: list[_Row] = []
    reasons: dict[str, str] = {}
    for image, label, split, kept, reason in zip(*(dataset.curated[c].to_pylist() for c in columns), strict=True):
        if kept:
            # without splits in the files, those of the dataset are not compared
            samples.append(_Row(image, label, split if splits else ""))
        else:
            reasons.setdefault(image, reason)
    compared = [row for row in samples if not splits or row.split in splits]
    before, after = _by_image(published.rows), _by_image(samples)
    ids = {info.name: str(info.id) for info in dataset.classes}
    listed = {row.label for row in compared}
    return LabelDifference(
        classes=list(
            _changes(
                {name: str(class_id) for name, class_id in published.class_ids.items()},
                {name: class_id for name, class_id in ids.items() if name in listed or name in published.class_ids},
            )
        ),
        counts=list(_changes(_counts(published.rows), _counts(compared))),
        missing=[
            Change(image, _described(rows), reasons.get(image, _NOT_LISTED))
            for image, rows in sorted(before.items())
            if image not in after
        ],
        extra=[
            Change(image, "", _described(rows))
            for image, rows in sorted(_by_image(compared).items())
            if image not in before
        ],
        relabelled=_differing(before, after, "label"),
        moved=_differing(before, after, "split"),
        totals=_totals(published.rows, compared),
    )


def _by_image(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    found: dict[str, list[_Row]] = {}
    for row in rows:
        found.setdefault(row.image, []).append(row)
    return found


def _described(rows: Iterable[_Row]) -> str:
    """Class and split of the rows of one image."""
    return "; ".join(sorted({", ".join(filter(None, (row.label, row.split))) for row in rows}))


def _differing(before: Mapping[str, list[_Row]], after: Mapping[str, list[_Row]], field: str) -> list[Change]:
    """Images in both whose sets of values of a field differ."""
    found = []
    for image in sorted(before.keys() & after.keys()):
        values = [", ".join(sorted({getattr(row, field) for row in rows[image]})) for rows in (before, after)]
        if values[0] != values[1]:
            found.append(Change(image, *values))
    return found


def _counts(rows: Iterable[_Row]) -> dict[str, str]:
    """Number of images by class and split."""
    counts = Counter(", ".join(filter(None, (row.label, row.split))) for row in rows)
    return {name: str(count) for name, count in counts.items()}


def _totals(before: list[_Row], after: list[_Row]) -> list[Change]:
    """Images per split, then in total."""
    counts = [Counter(row.split for row in rows if row.split) for rows in (before, after)]
    names = [name for name in ("train", "val", "test") if any(name in count for count in counts)]
    return [
        *(Change(name, *(str(count[name]) for count in counts)) for name in names),
        Change("total", *(str(len(rows)) for rows in (before, after))),
    ]


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    """Values that differ, sorted by name; an absent one is empty."""
    for name in sorted(before.keys() | after.keys()):
        change = Change(name, before.get(name, ""), after.get(name, ""))
        if change.before != change.after:
            yield change
