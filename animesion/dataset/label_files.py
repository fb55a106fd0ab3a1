"""Read label files in the DAF:re style: labels, class names, class counts, tag ids and face boxes.

Readers accept harmless variations: with or without a header, which may name the columns in any order; commas,
semicolons or tabs; UTF-8, UTF-16 or a legacy encoding; CRLF, backslashes, blank lines, blanks after separators. Any
other deviation is an error with the file and line. They return tables only; `animesion.sources` joins paths to a root
folder and checks that they are safe.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from animesion.dataset import text_tables
from animesion.dataset.readings import is_image
from animesion.errors import UsageError
from animesion.schemas import Box

IntArray = npt.NDArray[np.int64]

LABEL_FILES = ("train", "val", "test", "train_val")
NAMES_FILE = "classid_classname.csv"
COUNTS_FILE = "per_class_counts.csv"

_ID_COLUMNS = ("class_id", "label_id", "class_index", "label", "class", "target", "id")
_PATH_COLUMNS = ("dir", "path", "file_name", "file", "image_path", "image", "file_path", "img")
_NAME_COLUMNS = ("class_name", "name", "label_name", "character", "tag", "class", "label")

#: The first one in the first row separates: paths may contain the others.
_FIRST_SEPARATOR = re.compile(r"[,;\t|]")
_BOX_SEPARATOR = re.compile(r"[,\s]+")


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The rows of a label file, in file order (the legacy DAF:re split depends on it).

    Attributes:
        class_ids: shape (rows,).
        paths: relative paths with forward slashes, such as `0291/1796291.jpg`; as long as `class_ids`.
    """

    class_ids: IntArray
    paths: list[str]

    def counts(self) -> dict[int, int]:
        """Number of rows by class id, for each class that occurs."""
        ids, rows = np.unique(self.class_ids, return_counts=True)
        return dict(zip(ids.tolist(), rows.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Images of each class in each split.

    Attributes:
        ids: class ids, shape (classes,).
        names: class names, as long as `ids`.
        splits: images of each class by split name, each of shape (classes,), in the order of the file.
        total: images of each class in all splits, shape (classes,).
    """

    ids: IntArray
    names: tuple[str, ...]
    splits: dict[str, IntArray]
    total: IntArray

    def differing(self, expected: IntArray, found: Mapping[int, int]) -> int:
        """The number of classes whose number of images is not the expected one.

        Args:
            expected: expected images of each class, shape (classes,).
            found: images by class id; may have classes that are not in `ids`.
        """
        expected_by_id = dict(zip(self.ids.tolist(), expected.tolist(), strict=True))
        return sum(expected_by_id.get(c, 0) != found.get(c, 0) for c in expected_by_id.keys() | found.keys())


@dataclass(frozen=True)
class LabelFiles:
    """The label files of a folder.

    Attributes:
        labels: label file by split name (`train`, `val`, `test`, `train_val`), in this order.
        names: `classid_classname.csv`; None if it does not exist.
        counts: `per_class_counts.csv`; None if it does not exist.
        others: every other `.csv` file, sorted by name.
    """

    labels: dict[str, Path]
    names: Path | None
    counts: Path | None
    others: tuple[Path, ...]


class FaceBoxes(NamedTuple):
    """One row of a `faces.tsv`: a post, one of its character tags and a head box.

    `row` is the position in the file, from 0; the legacy DAF:re split keeps this order.
    """

    post_id: int
    tag_id: int
    box: Box
    row: int


def find_label_files(folder: Path) -> LabelFiles:
    """Find the label files of a folder by name, without opening them.

    Raises:
        UsageError: the folder cannot be listed.
    """
    try:
        files = {p.name: p for p in sorted(folder.iterdir()) if p.suffix == ".csv" and p.is_file()}
    except OSError as e:
        raise UsageError(f"{folder} cannot be listed ({e.strerror}); give a readable folder") from e
    # Each file is taken out of `files`; the rest is `others`.
    labels = {split: files.pop(f"{split}.csv") for split in LABEL_FILES if f"{split}.csv" in files}
    return LabelFiles(labels, files.pop(NAMES_FILE, None), files.pop(COUNTS_FILE, None), tuple(files.values()))


def with_class_ids(found: LabelFiles) -> LabelFiles:
    """The same files, but tables of another kind under the names of label files are among the others.

    A `train.csv` of a competition has a header such as `image_id,label`, or class names in place of class ids.
    """
    other = {split: path for split, path in found.labels.items() if not _has_class_ids(path)}
    labels = {split: path for split, path in found.labels.items() if split not in other}
    return LabelFiles(labels, found.names, found.counts, tuple(sorted((*found.others, *other.values()))))


def label_file(name: str) -> tuple[str, str] | None:
    """Split and group from a label file's name in the style of the GLSim family, or None for any other name.

    `train.csv` is (`train`, ``), `train_val_R1.csv` is (`train_val`, `R1`), and so is DSILA's `train_val_R1.csv.csv`.
    The group of few-shot files such as `train_val_4.csv` is the number of images per class.
    """
    match = re.fullmatch(r"(train_val|train|val|test)(?:_(R[1-6]|[1-9]\d?))?(?:\.csv){1,2}", name)
    return (match[1], match[2] or "") if match else None


def read_labels(path: Path, encoding: str = "") -> LabelTable:
    """Read `class_id,path` rows, or those columns of a file with a header such as `class_id,dir` or `path,label`.

    Raises:
        UsageError: the file is unreadable or has a wrong row.
    """
    ids: list[int] = []
    paths: list[str] = []
    for line, row in _pairs(path, "class_id,path", _PATH_COLUMNS, encoding):
        ids.append(_class_id(row[0], path, line))
        if not row[1].strip():
            raise UsageError(f"{path}, line {line}: the path is empty; fill it in or delete the row")
        paths.append(row[1].strip().replace("\\", "/"))
    return LabelTable(np.array(ids, dtype=np.int64), paths)


def read_class_names(path: Path, encoding: str = "") -> dict[int, str]:
    """Read `class_id,name` rows, or those columns of a file with a header such as `class_id,class_name`, in file order.

    Raises:
        UsageError: the file is unreadable, has a wrong row, or lists a class twice.
    """
    names: dict[int, str] = {}
    for line, row in _pairs(path, "class_id,name", _NAME_COLUMNS, encoding):
        class_id = _class_id(row[0], path, line)
        names[class_id] = _new_name(row[1], class_id, names, path, line)
    return names


def read_class_counts(path: Path) -> ClassCounts:
    """Read a table with the header `class_id,class_name,<split>...,total`; the second column may also be `name`.

    Raises:
        UsageError: the file is unreadable, has no header or a wrong row, lists a class twice, or a total is not the
            sum of its splits.
    """
    rows = _rows(path, "class_id,class_name,...,total")
    _, head = next(rows, (1, []))
    head = [cell.strip().lower() for cell in head]
    if not is_counts_header(head):
        raise UsageError(
            f"{path}, line 1: the header is not `class_id,class_name,<split>,...,total`; add one, as it gives the "
            "columns their meaning"
        )
    splits = head[2:-1]
    names: dict[int, str] = {}
    table: list[list[int]] = []
    for line, row in rows:
        if len(row) != len(head):
            raise _wrong_columns(path, line, row, ",".join(head))
        class_id = _class_id(row[0], path, line)
        names[class_id] = _new_name(text_tables.text_of_cell(row[1]), class_id, names, path, line)
        images = [
            _whole_number(cell, f"the {name} count", path, line) for name, cell in zip(head[2:], row[2:], strict=True)
        ]
        if sum(images[:-1]) != images[-1]:
            raise UsageError(
                f"{path}, line {line}: the total {images[-1]} is not the sum of its splits, {sum(images[:-1])}; "
                "correct the row"
            )
        table.append(images)
    columns = np.array(table, dtype=np.int64).reshape(len(table), len(head) - 2).T
    ids = np.array(list(names), dtype=np.int64)
    return ClassCounts(ids, tuple(names.values()), dict(zip(splits, columns[:-1], strict=True)), columns[-1])


def is_counts_header(cells: list[str]) -> bool:
    """Whether cells, in lower case, are the header of a table of class counts."""
    splits = cells[2:-1]
    # Four cells mean at least one split; empty and repeated split names could not be looked up.
    return (
        len(cells) >= 4
        and cells[0] == "class_id"
        and cells[1] in ("class_name", "name")
        and cells[-1] == "total"
        and all(splits)
        and len(set(splits)) == len(splits)
    )


def count_classes(splits: Mapping[str, Mapping[int, int]], names: Mapping[int, str]) -> ClassCounts:
    """Class counts from numbers of images by split and class id.

    The result has every class with a name or an image, by ascending id. A class without a name has its id as name.
    """
    ids = sorted(set(names).union(*splits.values()))
    columns = {name: np.array([sizes.get(i, 0) for i in ids], dtype=np.int64) for name, sizes in splits.items()}
    total = np.zeros(len(ids), dtype=np.int64) + sum(columns.values())
    return ClassCounts(np.array(ids, dtype=np.int64), tuple(names.get(i, str(i)) for i in ids), columns, total)


def read_annotations(content: bytes, name: str) -> list[tuple[str, int]]:
    """Read `filename class` rows separated by blanks (`anno/train.txt` of the Ultra-FGVC sets), in file order.

    Args:
        content: bytes of the file, which may be a member of an archive.
        name: name of the file for error messages.

    Returns:
        File names with forward slashes, and class numbers of the file, which start at 1.

    Raises:
        UsageError: the content is not UTF-8, or has a wrong row.
    """
    rows = []
    for line, data in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            cells = data.decode("utf-8").rsplit(None, 1)  # from the right: file names may contain blanks
        except UnicodeDecodeError as e:
            raise _not_utf8(name, line) from e
        if not cells:
            continue
        if len(cells) != 2:
            raise UsageError(f"{name}, line {line}: 1 column instead of `filename class`; correct the row")
        number = _whole_number(cells[1], "the class", name, line)
        if not 1 <= number <= 999_999_999:
            raise UsageError(f"{name}, line {line}: the class {number} is not from 1 to 999999999; correct the row")
        rows.append((cells[0].strip().replace("\\", "/"), number))
    return rows


def read_tag_ids(path: Path) -> dict[str, int]:
    """Read `tag_name<TAB>id` rows (`tagIds.tsv` of DanbooruAnimeFaces), in file order.

    Raises:
        UsageError: the file is unreadable, has a wrong row, or a tag or an id occurs twice.
    """
    tags: dict[str, int] = {}
    # Not str.splitlines, which also breaks at characters that are allowed in a tag.
    for line, text in enumerate(_text(path).split("\n"), 1):
        text = text.rstrip("\r")
        if not text:
            continue
        cells = text.split("\t")
        if len(cells) != 2:
            raise UsageError(f"{path}, line {line}: {_columns(cells)} instead of `tag<TAB>id`; correct the row")
        if not cells[0].strip():
            raise UsageError(f"{path}, line {line}: the tag is empty; fill it in or delete the row")
        if cells[0] in tags:
            raise UsageError(f"{path}, line {line}: the tag {cells[0]!r} occurs twice; delete one of the rows")
        tags[cells[0]] = _whole_number(cells[1], "the tag id", path, line)
    twice = [tag_id for tag_id, times in Counter(tags.values()).items() if times > 1]
    if twice:
        raise UsageError(f"{path}: several tags have the id {twice[0]}; give each tag its own id")
    return tags


def read_faces(source: Path | Iterable[bytes], name: str = "faces.tsv") -> Iterator[FaceBoxes]:
    """Read `path<TAB>tag id<TAB>l, t, r, b conf` rows (`faces.tsv` of DanbooruAnimeFaces), lazily and in file order.

    Published files separate the five numbers with commas, spaces or both, and folders have three or four digits.

    Args:
        source: the file, or its lines as bytes (a gzip stream, a member of a tar).
        name: name of `source` for error messages, if it is not a path.

    Raises:
        UsageError: the file is unreadable or has a wrong row.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as lines:
                yield from read_faces(lines, str(source))
        except OSError as e:
            raise UsageError(f"{source} cannot be read ({e.strerror}); give a readable file") from e
        return
    row = 0
    for line, data in enumerate(source, 1):
        try:
            text = data.decode("utf-8-sig" if line == 1 else "utf-8").strip()
        except UnicodeDecodeError as e:
            raise _not_utf8(name, line) from e
        if not text:
            continue
        cells = text.split("\t")
        if len(cells) != 3:
            raise UsageError(
                f"{name}, line {line}: {_columns(cells)} instead of 3 (path, tag id, box); correct the row"
            )
        try:
            post = post_id(cells[0])
        except ValueError as e:
            raise UsageError(f"{name}, line {line}: {e}; correct the path or delete the row") from e
        tag = _whole_number(cells[1], "the tag id", name, line)
        yield FaceBoxes(post, tag, _box(cells[2], name, line), row)
        row += 1


def post_id(path: str) -> int:
    """The post id in an image's path: 332446 for `0446/332446.jpg` and `446/332446.jpg`, with slash or backslash.

    Raises:
        ValueError: the file's stem is not a number.
    """
    stem = path.replace("\\", "/").rpartition("/")[2].partition(".")[0]
    if not (stem.isascii() and stem.isdecimal() and len(stem) <= 18):
        raise ValueError(f"no post id in the path {path[:80]!r}")
    return int(stem)


def _box(text: str, name: str, line: int) -> Box:
    try:
        numbers = [float(number) for number in _BOX_SEPARATOR.split(text.strip())]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
        raise UsageError(
            f"{name}, line {line}: the box {text[:80]!r} is not five finite numbers (left, top, right, bottom, "
            "confidence); correct or delete the row"
        )
    return Box(*numbers)


def _text(path: Path, encoding: str = "") -> str:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}); give a readable file") from e
    try:
        text = text_tables.text_of(data, str(path), encoding)
    except UsageError as e:
        return _fault_of(data, path, e)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageError(f"{path}, line {line}: a zero byte; give a text file")
    return text


def _fault_of(data: bytes, path: Path, error: UsageError) -> NoReturn:
    """Raise an error that names the line if the file is text but for some bytes."""
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        if "not text:" in str(error):
            raise _not_utf8(path, data.count(b"\n", 0, e.start) + 1) from e
        raise error from e
    if "not text:" in str(error) and b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise UsageError(f"{path}, line {line}: a zero byte; give a text file") from error
    raise error


def _pairs(path: Path, columns: str, second: Sequence[str], encoding: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Line number, class id and another cell of each row.

    The first row is a header if it names both columns and contains no class id. A first row with a mistyped id is an
    error, not a header.

    Args:
        path: the file.
        columns: the two columns, for error messages.
        second: names of the other column, the likeliest first.
        encoding: as in `text_tables.text_of`.
    """
    header: list[str] = []
    first, last = 0, 1
    for place, (line, row) in enumerate(_rows(path, columns, encoding)):
        if place == 0 and not any(cell.strip().isdecimal() for cell in row):
            named = text_tables.column(row, _ID_COLUMNS)
            free = ["" if i == named else cell for i, cell in enumerate(row)]
            other = text_tables.column(free, second)
            if row[0].strip().lower() == "class_id" and len(row) == 2:
                named, other = 0, 1
            if named is not None and other is not None:
                header, first, last = row, named, other
                continue
        if len(row) != (len(header) or 2):
            raise _wrong_columns(path, line, row, ",".join(header) or columns)
        yield line, (row[first], row[last])


def _has_class_ids(path: Path) -> bool:
    """Whether a file may have class ids in its first rows; True for one that cannot be read, which reading reports."""
    try:
        rows = [row for _, row in itertools.islice(_rows(path, "class_id,path"), 2)]
    except UsageError:
        return True
    if not rows or any(cell.strip().isdecimal() for cell in rows[0]):
        return True
    at, file = text_tables.column(rows[0], _ID_COLUMNS), text_tables.column(rows[0], _PATH_COLUMNS)
    if at is None or file is None:
        return any(is_image(cell.strip()) for cell in rows[0])  # no header, and an id that is mistyped
    return len(rows) < 2 or at >= len(rows[1]) or rows[1][at].strip().isdecimal()


def _rows(path: Path, columns: str, encoding: str = "") -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not blank; `columns` is for error messages."""
    text = _text(path, encoding)
    separator = _FIRST_SEPARATOR.search(re.sub(r'"[^"]*"', "", text.lstrip("\r\n").partition("\n")[0]))
    delimiter = separator[0] if separator else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as e:
        raise UsageError(f"{path}, line {reader.line_num}: not a row of `{columns}` ({e}); correct the quotes") from e


def _class_id(text: str, path: Path, line: int) -> int:
    # Nine digits always fit into a 32-bit label.
    text = text.strip()
    if text.isdecimal() and text.isascii() and len(text) <= 9:
        return int(text)
    raise UsageError(
        f"{path}, line {line}: the class id {text[:40]!r} is not a whole number from 0 to 999999999; correct the row"
    )


def _whole_number(text: str, what: str, path: Path | str, line: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise UsageError(f"{path}, line {line}: {what} {text[:40]!r} is not a whole number from 0 up; correct the row")
    return int(text)


def _new_name(name: str, class_id: int, names: dict[int, str], path: Path, line: int) -> str:
    if class_id in names:
        raise UsageError(f"{path}, line {line}: class id {class_id} occurs twice; give each class one row")
    if not name.strip():
        raise UsageError(f"{path}, line {line}: class {class_id} has no name; fill it in")
    return name


def _wrong_columns(path: Path, line: int, row: list[str], expected: str) -> UsageError:
    return UsageError(f"{path}, line {line}: {_columns(row)} instead of `{expected}`; correct the row")


def _columns(cells: list[str]) -> str:
    return "1 column" if len(cells) == 1 else f"{len(cells)} columns"


def _not_utf8(name: Path | str, line: int) -> UsageError:
    return UsageError(f"{name}, line {line}: not UTF-8 text; save the file as UTF-8")
