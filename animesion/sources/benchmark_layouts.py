"""Label files of published benchmarks, as declarations: which files a set has, and how a row of them is read.

A layout lists the label files it needs and returns one `Row` per image in published order. `LAYOUTS` has those of each
set; `animesion.sources.benchmarks` makes items of the rows. Contents come from outside: numbers, names and counts are
checked, and a path is only ever looked up among the files that were listed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from animesion.errors import UsageError
from animesion.sources import clean_text, mat_files
from animesion_scrapers.licences import licence_id

_LABEL_FILES = (".txt", ".mat", ".json")
#: Longest line in characters: longer ones are no rows of a list, and would cost the patterns time.
_LONGEST_LINE = 2_000
_MOST_CLASSES = 1_000_000


class Row(NamedTuple):
    """One image of a set.

    Attributes:
        folder: folder of images, such as `images`.
        name: path below the folder.
        split: `train`, `val` or `test`; empty for none.
        number: class id from 0, or a number in the order of the classes.
        label: name of the class.
        author: of the image; empty if unknown.
        licence: of the image; empty if unknown.
    """

    folder: str
    name: str
    split: str
    number: int
    label: str
    author: str = ""
    licence: str = ""


class Files:
    """The files of a download, of which label files are found wherever they are.

    Args:
        paths: all files.
        read: returns the content of one.
        where: place of the download, for messages.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[str], bytes], where: str) -> None:
        self.paths = paths
        self._read = read
        self._where = where

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self.paths:
            if path.endswith(_LABEL_FILES):
                found.setdefault(path.rpartition("/")[2], []).append(path)
        return found

    def find(self, name: str) -> str:
        """Path of a label file by its name or the end of its path: the one in the outermost folder; empty for none.

        Raises:
            UsageError: two are equally far out.
        """
        same = [path for path in self._by_name.get(name.rpartition("/")[2], []) if f"/{path}".endswith(f"/{name}")]
        same.sort(key=lambda path: (path.count("/"), path))
        if len(same) > 1 and same[0].count("/") == same[1].count("/"):
            raise UsageError(
                f"source.path: {self._where} contains {clean_text(same[0], 80)} and {clean_text(same[1], 80)}; set "
                "source.path to the folder of one of them"
            )
        return same[0] if same else ""

    def place(self, name: str) -> str:
        """A label file for messages."""
        return f"{self._where}/{self.find(name) or name}"

    def content(self, name: str) -> bytes:
        """Content of a label file that exists."""
        return self._read(self.find(name))

    def arrays(self, name: str, *names: str) -> dict[str, mat_files.Value]:
        """Arrays of a `.mat` file."""
        return mat_files.read(self.content(name), names, self.place(name))

    def lines(self, name: str, comment: str = "") -> Iterator[tuple[int, str]]:
        """Number and text of each line that is not blank; lines that start with `comment` are left out."""
        content = self.content(name).removeprefix(b"\xef\xbb\xbf")
        for number, data in enumerate(content.split(b"\n"), 1):
            try:
                line = data.decode("utf-8").strip()
            except UnicodeDecodeError:
                try:  # photographers and species have accents, and old lists are not all UTF-8
                    line = data.decode("cp1252").strip()
                except UnicodeDecodeError:
                    raise UsageError(f"{self.place(name)}, line {number}: not text; get the file again") from None
            if len(line) > _LONGEST_LINE or "\0" in line:
                raise UsageError(f"{self.place(name)}, line {number}: not a row of a list; get the file again")
            if line and not (comment and line.startswith(comment)):
                yield number, line

    def table(self, name: str) -> dict[str, str]:
        """Rows of an id, a blank and a value, by id.

        Raises:
            UsageError: a row without a value, or an id that is listed twice.
        """
        found: dict[str, str] = {}
        for line, text in self.lines(name):
            key, _, value = text.partition(" ")
            if "\t" in key:
                key, _, value = text.partition("\t")
            if not value.strip():
                raise UsageError(f"{self.place(name)}, line {line}: no value after {clean_text(key, 60)!r}")
            if key in found:
                raise UsageError(f"{self.place(name)}, line {line}: {clean_text(key, 60)!r} is listed twice")
            found[key] = value.strip()
        return found


class Layout(Protocol):
    """One form in which a set is distributed."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The label files without which this is another layout."""

    def rows(self, files: Files) -> list[Row]:
        """The images in published order.

        Raises:
            UsageError: a label file is malformed, or two of them contradict each other.
        """


@dataclass(frozen=True)
class JoinedTables:
    """Tables of images, classes and splits that are joined by an image's id (CUB-200-2011, NABirds).

    Attributes:
        authors: table of photographers, if it exists.
        first: number of the first class.
        folder: folder of the images.
    """

    authors: str = ""
    first: int = 0
    folder: str = "images"
    needs: tuple[str, ...] = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")

    def rows(self, files: Files) -> list[Row]:
        """One row per image of `images.txt`."""
        images, classes, splits, names = map(files.table, self.needs)
        authors = files.table(self.authors) if self.authors and files.find(self.authors) else {}
        for file, table in zip(self.needs[1:3], (classes, splits), strict=True):
            for one, other, there in ((images, table, file), (table, images, self.needs[0])):
                if lacking := next((key for key in one if key not in other), ""):
                    raise UsageError(f"{files.place(there)} does not list image {clean_text(lacking, 60)!r}")
        numbers = {key: _number(key, files.place("classes.txt"), self.first) for key in names}
        rows = []
        for key, path in images.items():
            if classes[key] not in names:
                raise UsageError(f"{files.place('classes.txt')} does not list class {clean_text(classes[key], 60)!r}")
            if splits[key] not in ("0", "1"):
                raise UsageError(
                    f"{files.place('train_test_split.txt')}: image {clean_text(key, 60)!r} has "
                    f"{clean_text(splits[key], 60)!r}, not 1 (train) or 0 (test)"
                )
            split = "train" if splits[key] == "1" else "test"
            rows.append(Row(self.folder, path, split, numbers[classes[key]], names[classes[key]], authors.get(key, "")))
        return rows


class ListFile(NamedTuple):
    """A list of the images of one split.

    Attributes:
        file: the list.
        split: `train`, `val` or `test`.
        folder: folder of its images.
        offset: added to its class numbers.
    """

    file: str
    split: str
    folder: str = "images"
    offset: int = 0


@dataclass(frozen=True)
class SplitLists:
    """A text list per split, with an image and its class in each row.

    Attributes:
        lists: the lists.
        pattern: of a row, with the groups `image`, `name` and, where the list numbers its classes, `number`.
        form: what a row is, for messages.
        classes: file of the class names in order, for lists without numbers.
        first: number of the first class.
        suffix: what lists leave out of file names.
    """

    lists: tuple[ListFile, ...]
    pattern: str
    form: str
    classes: str = ""
    first: int = 0
    suffix: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """The lists and the class names."""
        return (*(each.file for each in self.lists), *((self.classes,) if self.classes else ()))

    def rows(self, files: Files) -> list[Row]:
        """One row per line."""
        pattern = re.compile(self.pattern)
        order: dict[str, int] = {}
        if self.classes:
            for line, name in files.lines(self.classes):
                if order.setdefault(name, len(order)) != len(order) - 1:
                    raise UsageError(
                        f"{files.place(self.classes)}, line {line}: {clean_text(name, 60)!r} is listed twice"
                    )
        rows = []
        known: dict[int, str] = {}
        for file, split, folder, offset in self.lists:
            for line, text in files.lines(file, "#"):
                where = f"{files.place(file)}, line {line}"
                match = pattern.fullmatch(text)
                if not match:
                    raise UsageError(f"{where}: {clean_text(text, 60)!r} is not `{self.form}`; correct the row")
                name = match["name"]
                if self.classes:
                    if name not in order:
                        raise UsageError(f"{where}: class {clean_text(name, 60)!r} is not in {self.classes}")
                    number = order[name]
                else:
                    number = _number(match["number"], where, self.first) + offset
                    if known.setdefault(number, name) != name:
                        raise UsageError(
                            f"{where}: class {match['number']} is {clean_text(name, 60)} here and "
                            f"{clean_text(known[number], 60)} in an earlier row"
                        )
                rows.append(Row(folder, match["image"] + self.suffix, split, number, name))
        return rows


@dataclass(frozen=True)
class MatLists:
    """Lists of images in `.mat` files (Stanford Dogs, Stanford Cars).

    Attributes:
        lists: the files; an empty split means that the field `test` has it.
        image: field or array of the file names.
        number: field or array of the class numbers, from 1.
        fields: struct array that has them as fields; empty where they are arrays of their own.
        names: file of the array `class_names`; empty where the folder of an image is its class.
    """

    lists: tuple[ListFile, ...]
    image: str
    number: str
    fields: str = ""
    names: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """The lists and the class names."""
        return tuple(dict.fromkeys((*(each.file for each in self.lists), *((self.names,) if self.names else ()))))

    def rows(self, files: Files) -> list[Row]:
        """One row per element."""
        names: list[str] = []
        if self.names:
            names = _texts(files.arrays(self.names, "class_names")["class_names"], files.place(self.names))
        rows = []
        for file, split, folder, _ in self.lists:
            where = files.place(file)
            columns = self._columns(files, file, split)
            images, numbers = _texts(columns[self.image], where), _whole(columns[self.number], where)
            tests = _whole(columns["test"], where) if not split else [0] * len(images)
            if not len(images) == len(numbers) == len(tests):
                raise UsageError(f"{where} has {len(images):,} images and {len(numbers):,} labels; get it again")
            for image, number, test in zip(images, numbers, tests, strict=True):
                if number < 1 or (names and number > len(names)):
                    raise UsageError(f"{where}: class {number} of {clean_text(image, 60)!r} is not one of the set")
                name = image if not split else f"{folder}/{image}"
                top, _, path = name.partition("/")
                label = names[number - 1] if names else path.partition("/")[0]
                rows.append(Row(top, path, split or ("test" if test else "train"), number - 1, label))
        return rows

    def _columns(self, files: Files, file: str, split: str) -> dict[str, Any]:
        wanted = [self.image, self.number, *(() if split else ("test",))]
        if not self.fields:
            return dict(files.arrays(file, *wanted))
        table = files.arrays(file, self.fields)[self.fields]
        for name in wanted:
            if not isinstance(table, dict) or name not in table:
                # the devkit's file of test images has every field but this
                raise UsageError(f"{files.place(file)} has no field {name!r} in {self.fields}: it has no labels")
        return dict(table) if isinstance(table, dict) else {}


@dataclass(frozen=True)
class NumberedImages:
    """A vector of labels, and vectors of image numbers by split (Oxford Flowers-102).

    Attributes:
        splits: vector of the image numbers of each split.
    """

    splits: tuple[tuple[str, str], ...] = (("trnid", "train"), ("valid", "val"), ("tstid", "test"))
    needs: tuple[str, ...] = ("imagelabels.mat", "setid.mat")

    def rows(self, files: Files) -> list[Row]:
        """One row per image of a split."""
        labels = _whole(files.arrays("imagelabels.mat", "labels")["labels"], files.place("imagelabels.mat"))
        where = files.place("setid.mat")
        sets = files.arrays("setid.mat", *(name for name, _ in self.splits))
        rows = []
        for name, split in self.splits:
            for image in _whole(sets[name], where):
                if not 1 <= image <= len(labels):
                    raise UsageError(f"{where}: image {image} of {name} has no label in imagelabels.mat")
                number = labels[image - 1]
                if number < 1:
                    raise UsageError(f"{files.place('imagelabels.mat')}: class {number} of image {image} is not from 1")
                rows.append(Row("jpg", f"image_{image:05d}.jpg", split, number - 1, f"flower-{number:03d}"))
        return rows


@dataclass(frozen=True)
class CocoFiles:
    """A JSON file per split in the form of COCO: images, annotations, categories, licenses (iNaturalist 2017).

    Attributes:
        lists: file and split.
    """

    lists: tuple[tuple[str, str], ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The files."""
        return tuple(file for file, _ in self.lists)

    def rows(self, files: Files) -> list[Row]:
        """One row per image."""
        return [row for file, split in self.lists for row in self._split(files, file, split)]

    def _split(self, files: Files, file: str, split: str) -> Iterator[Row]:
        where = files.place(file)
        try:
            data = json.loads(files.content(file))
        except (ValueError, RecursionError):
            raise UsageError(f"{where} is not JSON; get it again") from None
        categories = {_id(each, "id", where): _text(each, "name", where) for each in _list(data, "categories", where)}
        licences = {
            _id(each, "id", where): licence_id(str(each.get("url") or each.get("name") or "")[:500])
            for each in _list(data, "licenses", where, optional=True)
        }
        number_of: dict[int, int] = {}
        for each in _list(data, "annotations", where):
            image, number = _id(each, "image_id", where), _id(each, "category_id", where)
            if number not in categories:
                raise UsageError(f"{where}: annotation of image {image} has category {number}, which is not listed")
            if number_of.setdefault(image, number) != number:
                raise UsageError(f"{where}: image {image} has the categories {number_of[image]} and {number}")
        for each in _list(data, "images", where):
            image = _id(each, "id", where)
            if image not in number_of:
                raise UsageError(f"{where}: image {image} has no annotation")
            top, _, path = _text(each, "file_name", where).partition("/")
            licence = licences.get(each["license"], "") if isinstance(each.get("license"), int) else ""
            author = each.get("rights_holder")
            yield Row(
                top, path, split, number_of[image], categories[number_of[image]],
                author if isinstance(author, str) else "", licence,
            )  # fmt: skip


@dataclass(frozen=True)
class NumberedFolders:
    """Folders whose names end in the number of their class (iCartoonFace).

    Attributes:
        pattern: of a path, with the groups `folder`, `image` and `number`.
        label: name of a class by its number.
    """

    pattern: str
    label: str
    needs: tuple[str, ...] = ()

    def rows(self, files: Files) -> list[Row]:
        """One row per image that matches, by class and name."""
        pattern = re.compile(self.pattern)
        matches = (match for path in files.paths if (match := pattern.fullmatch(path)))
        rows = [
            Row(each["folder"], each["image"], "", int(each["number"]), self.label.format(int(each["number"])))
            for each in matches
        ]
        return sorted(rows, key=lambda row: (row.number, row.name))


def _number(text: str, where: str, first: int) -> int:
    """A class number of a text list, from 0."""
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and first <= int(text) < _MOST_CLASSES):
        raise UsageError(f"{where}: the class {clean_text(text, 40)!r} is not a whole number from {first}")
    return int(text) - first


def _texts(value: object, where: str) -> list[str]:
    """The texts of a cell, or of a field of a struct array, where each may be in a cell of its own."""
    found = []
    for each in value if isinstance(value, list) else [None]:
        inner = each[0] if isinstance(each, list) and len(each) == 1 else each
        if not isinstance(inner, str) or not inner:
            raise UsageError(f"{where} has something else where texts are due; get it again")
        found.append(inner.replace("\\", "/"))
    return found


def _whole(value: object, where: str) -> list[int]:
    """The whole numbers of an array, or of a field of a struct array."""
    if isinstance(value, list):
        parts = [np.asarray(each).ravel() for each in value if isinstance(each, np.ndarray) and each.size == 1]
        value = np.concatenate(parts) if parts and len(parts) == len(value) else None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or not np.isfinite(value).all():
        raise UsageError(f"{where} has something else where numbers are due; get it again")
    if (value != np.floor(value)).any() or (np.abs(value.astype(np.float64)) >= 1 << 31).any():
        raise UsageError(f"{where} has numbers that are not whole; get it again")
    return [int(each) for each in value.tolist()]


def _list(data: Any, name: str, where: str, *, optional: bool = False) -> list[dict[str, Any]]:
    found = data.get(name, [] if optional else None) if isinstance(data, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UsageError(f"{where} has no list {name!r} of objects; get it again")
    return found


def _id(entry: Mapping[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise UsageError(f"{where}: {clean_text(str(value), 40)!r} is not a number for {name!r}")
    return value


def _text(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: {clean_text(str(value), 40)!r} is not a text for {name!r}")
    return value


def _lists(form: str, splits: Sequence[str], folder: str = "images", offset: int = 0) -> tuple[ListFile, ...]:
    return tuple(ListFile(form.format(split), split, folder, offset) for split in splits)


_PARTS = ("train", "val", "test")

#: Layouts by set; a download has the first whose label files it has.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "cub-200-2011": (JoinedTables(first=1),),
    "nabirds": (JoinedTables(authors="photographers.txt"),),
    "fgvc-aircraft": (
        SplitLists(
            _lists("images_variant_{}.txt", _PARTS), r"(?P<image>\w+)\s+(?P<name>\S.*)", "image variant",
            classes="variants.txt", suffix=".jpg",
        ),
    ),
    "oxford-pets": (
        SplitLists(
            (ListFile("annotations/trainval.txt", "train"), ListFile("annotations/test.txt", "test")),
            r"(?P<image>(?P<name>\S+)_\d+)\s+(?P<number>\d+)\s+[12]\s+\d+", "image class species breed",
            first=1, suffix=".jpg",
        ),
    ),
    "food-101": (
        SplitLists(
            _lists("meta/{}.txt", ("train", "test")), r"(?P<image>(?P<name>[^/\s]+)/[^/\s]+)", "class/image",
            classes="meta/classes.txt", suffix=".jpg",
        ),
    ),
    "vegfru": (
        SplitLists(
            tuple(itertools.chain.from_iterable(zip(
                _lists("veg_{}.txt", _PARTS, "veg200_images"), _lists("fru_{}.txt", _PARTS, "fru92_images", 200),
                strict=True,
            ))),
            r"(?P<image>(?P<name>[^/]+)/\S(?:.*\S)?)\s(?P<number>\d+)", "class/image class",
        ),
    ),
    "stanford-dogs": (
        MatLists(_lists("{}_list.mat", ("train", "test"), "Images"), "file_list", "labels"),
    ),
    "stanford-cars": (
        MatLists((ListFile("cars_annos.mat", ""),), "relative_im_path", "class", "annotations", "cars_annos.mat"),
        MatLists(
            (
                ListFile("cars_train_annos.mat", "train", "cars_train"),
                ListFile("cars_test_annos_withlabels.mat", "test", "cars_test"),
            ),
            "fname", "class", "annotations", "cars_meta.mat",
        ),
    ),
    "flowers-102": (NumberedImages(),),
    "inaturalist-2017": (CocoFiles((("train2017.json", "train"), ("val2017.json", "val"))),),
    "icartoonface": (
        NumberedFolders(
            r"(?:.*/)?(?P<folder>icartoonface_rectrain)/"
            r"(?P<image>personai_icartoonface_rectrain_(?P<number>\d{5})/[^/]+\.(?:jpe?g|png))",
            "character-{:05d}",
        ),
    ),
}  # fmt: skip


def complete(name: str, files: Files) -> list[Layout]:
    """The layouts of a set of which a download has all label files."""
    return [layout for layout in LAYOUTS[name] if all(map(files.find, layout.needs))]


def lacking(name: str, files: Files) -> str:
    """A label file that a download lacks while it has others of the same layout; empty for none."""
    for layout in LAYOUTS[name]:
        missing = [file for file in layout.needs if not files.find(file)]
        if 0 < len(missing) < len(layout.needs):
            return missing[0]
    return ""
