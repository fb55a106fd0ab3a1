"""Tables of images and their classes that lie beside folders of images under any name, as competitions have them.

`train.csv` with the columns `image_id` and `label` names the classes of `train_images/`. A reader of folders that
passes over it takes `train_images` for a class.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from animesion.dataset import sidecars, text_tables
from animesion.dataset.box_files import Contents
from animesion.dataset.path_parts import parts_of, stem_of
from animesion.errors import UsageError
from animesion.splits import SPLIT_NAMES, split_folders, split_in_name

_SUFFIXES = (".csv", ".tsv", ".txt")
#: Tables that are looked into, and how deep below the place.
_MOST_TABLES, _DEEPEST = 12, 3
_MOST_COLUMNS = 1000
#: Rows by which the column of images is found, and the share of them that must name one.
_SAMPLE, _SHARE = 200, 0.5

#: Images from which a table that has another class for each is none of classes.
_FEW = 3

#: Columns of classes, besides those of `metadata.csv`, the surest first.
_LABEL = (*sidecars.LABEL_COLUMNS, "breed", "variety", "target", "class_id", "label_id", "individual_id")
_BOX = ("xmin", "x1", "bbox", "bboxes", "bbox_x", "bbox_x1")


@dataclass(frozen=True)
class ImageTable:
    """A table that names images and classes.

    Attributes:
        path: of the table.
        labels: image -> its classes; several where rows differ.
        splits: image -> split, for the images of which the table or its name states one.
        file_column: where the images are; empty without a header.
        label_column: where the classes are; empty without a header, or where each class has a column.
        missing: rows whose image is not there.
        is_one_hot: whether each class has a column.
        note: on its encoding; empty for none.
    """

    path: str
    labels: dict[str, tuple[str, ...]]
    splits: dict[str, str]
    file_column: str
    label_column: str
    missing: int
    is_one_hot: bool
    note: str

    @property
    def columns(self) -> str:
        """Where images and classes are, in words."""
        if not self.file_column:
            return f"{self.path} has no header"
        classes = f"classes in column {self.label_column}" if self.label_column else "a column for each class"
        return f"images in column {self.file_column} of {self.path}, {classes}"


def find(
    paths: Sequence[str],
    images: Sequence[str],
    passed_over: Collection[str],
    contents: Contents,
    where: str,
    encoding: str = "",
    label_column: str = "",
    *,
    demanded: bool = False,
) -> list[ImageTable]:
    """Find the tables that name images and their classes.

    Args:
        paths: of all files.
        images: of them.
        passed_over: files that are something else, such as sidecars.
        contents: reads files by their paths.
        where: the place, for messages.
        encoding: legacy encoding of the tables; empty to recognise it.
        label_column: the column of classes; empty to find it.
        demanded: whether a table of images without a clear column of classes is an error; else it is passed over.

    Raises:
        UsageError: a table that names images cannot be read.
    """
    known = set(images)
    candidates = [
        path
        for path in paths
        if path.lower().endswith(_SUFFIXES)
        and path not in known
        and path not in passed_over
        # a form to be filled in, whose classes are not those of the images
        and "submission" not in path.rpartition("/")[2].lower()
        and len(parts_of(path)) <= _DEEPEST
    ]
    candidates.sort(key=lambda path: (path.lower().endswith(".txt"), path.count("/"), path))
    chosen = candidates[:_MOST_TABLES]
    if not chosen:
        return []
    names = Names(images)
    found = []
    for path, content in zip(chosen, contents(chosen), strict=True):
        table = _read(path, content, names, f"{where}/{path}", encoding, label_column, demanded=demanded)
        if table:
            found.append(table)
    _read_ids(found)
    return _with_splits(found)


def read(
    path: str, content: bytes, images: Sequence[str], where: str, encoding: str = "", label_column: str = ""
) -> ImageTable:
    """Read one table that the user has named.

    Raises:
        UsageError: it names no images, or no classes, or cannot be read.
    """
    table = _read(path, content, Names(images), where, encoding, label_column, demanded=True, given=True)
    if table is None:
        raise UsageError(f"{where} names no images that are there: give a table with a column of file names or paths")
    _read_ids([table])
    return table


def _read_ids(tables: Sequence[ImageTable]) -> None:
    """Read the classes of tables as ids if they are, in place; the names of columns are none."""
    of_cells = [table for table in tables if not table.is_one_hot]
    ids = text_tables.as_class_ids(found for table in of_cells for found in table.labels.values())
    for table in of_cells:
        table.labels.update({image: ids[found] for image, found in table.labels.items()})


class Names:
    """Images by what a table may call them: a path, the end of one, a file name, or one without its suffix."""

    def __init__(self, images: Sequence[str]) -> None:
        # tables are composed (NFC), the names of files may be decomposed, as macOS writes them
        self._images = {_composed(path): path for path in images}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in self._images:
            name = path.rpartition("/")[2]
            self._by_name[name].append(path)
            stem = stem_of(name)
            if stem != name:
                self._by_name[stem].append(path)
        self._level, self._splits = split_level(list(self._images))

    def find(self, cell: str, folder: str, split: str) -> str:
        """The image that a cell names; empty if there is none, or several.

        Args:
            cell: of the table.
            folder: of the table.
            split: that the table is named after, which decides between images of one name.
        """
        value = cell.replace("\\", "/").removeprefix("./").strip("/")
        if not value:
            return ""
        for path in (f"{folder}/{value}" if folder else value, value):
            if path in self._images:
                return self._images[path]
        head, _, name = value.rpartition("/")
        found = self._by_name.get(name, [])
        if head:
            ends = [_without_suffix(path, name) for path in found]
            found = [
                path
                for path, end in zip(found, ends, strict=True)
                if end.endswith(f"/{value}") or ("/" in end and value.endswith(f"/{end}"))
            ]
        if len(found) > 1 and split:
            found = [path for path in found if self._split_of(path) == split]
        return self._images[found[0]] if len(found) == 1 else ""

    def _split_of(self, path: str) -> str:
        parts = parts_of(path)
        return self._splits.get(parts[self._level], "") if len(parts) > self._level + 1 else ""


def _composed(path: str) -> str:
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def split_level(images: Sequence[str]) -> tuple[int, dict[str, str]]:
    """The first level of folders at which several splits are named, from 0, and the folders there with their splits."""
    folders = [parts[:-1] for parts in map(parts_of, images)]
    for level in range(_DEEPEST):
        found = split_folders({parts[level] for parts in folders if len(parts) > level})
        if len(set(found.values())) > 1:
            return level, found
    return 0, {}


def _without_suffix(path: str, name: str) -> str:
    """A path as a table has it that leaves suffixes out, if it does."""
    return path if path.endswith(name) else path[: path.rfind(".")]


def _read(
    path: str,
    content: bytes,
    names: Names,
    where: str,
    encoding: str,
    label_column: str,
    *,
    demanded: bool = False,
    given: bool = False,
) -> ImageTable | None:
    """Read a table; None for a file that names no images, or no classes and is not `demanded`.

    A table of boxes is passed over, too, unless the user has `given` it: its classes are those of boxes.
    """
    folder = path.rpartition("/")[0]
    split, _ = split_in_name(stem_of(path))
    try:
        rows = list(_rows(text_tables.decoded(content, where, encoding), where))
    except UsageError:
        # what is no table of images may be unreadable, but a table of images must not be passed over for it
        if not given and _file_column(_rough_rows(content), names, folder, split) is None:
            return None
        raise
    at = _file_column(rows[:_SAMPLE], names, folder, split)
    if at is None:
        return None
    has_header = not names.find(_cell(rows[0], at), folder, split)
    header, body = (rows[0], rows[1:]) if has_header else ([], rows)
    labels_at = _label_columns(header, body, at, label_column, where, demanded=demanded)
    if labels_at is None:
        return None
    labels: dict[str, tuple[str, ...]] = {}
    splits: dict[str, str] = {}
    twice = False
    missing = 0
    split_at = text_tables.column(header, sidecars.SPLIT_COLUMNS)
    for row in body:
        image = names.find(_cell(row, at), folder, split)
        if not image:
            missing += 1
            continue
        if len(labels_at) == 1:
            found = tuple(filter(None, [_cell(row, labels_at[0])]))
        else:
            found = tuple(header[i] for i in labels_at if _cell(row, i) in {"1", "1.0"})
        if image in labels:
            twice = True
            found = tuple(sorted({*labels[image], *found}))
        labels[image] = found
        stated = SPLIT_NAMES.get(_cell(row, split_at).lower(), "") if split_at is not None else split
        if stated:
            splits[image] = stated
    found_out = not demanded and not label_column and len(labels_at) == 1
    if found_out and len(labels) >= _FEW and len(set(labels.values())) == len(labels):
        return None  # a number or name for each image
    if not given and not label_column and _has_boxes(header, body, twice=twice):
        return None
    return ImageTable(
        path,
        labels,
        splits,
        header[at] if header else "",
        header[labels_at[0]] if header and len(labels_at) == 1 else "",
        missing,
        len(labels_at) > 1,
        text_tables.encoding_note(content, path, encoding),
    )


def _with_splits(tables: list[ImageTable]) -> list[ImageTable]:
    """Drop splits where all tables state one and the same: `train.csv` alone lists all that has a class."""
    stated = {split for table in tables for split in table.splits.values()}
    if len(stated) < 2:
        for table in tables:
            table.splits.clear()
    return tables


def _rows(text: str, where: str) -> Iterator[list[str]]:
    """Rows of a table, or of a list whose cells are parted by blanks."""
    first = text.lstrip("\n\r").partition("\n")[0]
    if not any(separator in first for separator in text_tables.SEPARATORS):
        for line in text.splitlines():
            cells = line.split(maxsplit=1)  # the last cell may be a name with blanks
            if cells:
                yield cells
        return
    yield from text_tables.rows(text, where)


def _rough_rows(content: bytes) -> list[list[str]]:
    """The first rows of what does not decode."""
    lines = content[: 1 << 20].decode("latin-1").splitlines()[:_SAMPLE]
    return [[cell.strip(' "\0') for cell in re.split(r"[,;\t|]", line)] for line in lines]


def _file_column(rows: Sequence[Sequence[str]], names: Names, folder: str, split: str) -> int | None:
    """The column whose cells name images, where most do."""
    widest = min(max((len(row) for row in rows), default=0), _MOST_COLUMNS)
    if widest < 2:
        return None
    hits = [sum(bool(names.find(_cell(row, at), folder, split)) for row in rows) for at in range(widest)]
    best = max(range(widest), key=lambda at: (hits[at], -at))
    # the header names none
    return best if hits[best] and hits[best] >= _SHARE * max(len(rows) - 1, 1) else None


def _label_columns(
    header: Sequence[str], body: Sequence[Sequence[str]], at: int, chosen: str, where: str, *, demanded: bool
) -> list[int] | None:
    """The column of classes, or several of zeros and ones; None if it is not clear and the table is not `demanded`."""
    if chosen:
        found = text_tables.column(header, [chosen])
        if found is None and demanded:
            raise UsageError(
                f"{where} has no column {chosen!r}: its columns are {', '.join(header[:8]) or 'not named'}"
            )
        return None if found is None else [found]
    known = text_tables.column(header, _LABEL)
    if known is not None and known != at:
        return [known]
    width = min(len(header) or max(len(row) for row in body), _MOST_COLUMNS)
    rest = [column for column in range(width) if column != at]
    if header:
        rest = [column for column in rest if not _is_no_class(header[column])]
    else:
        rest = [column for column in rest if not all(_is_number(_cell(row, column)) for row in body)] or rest
    if len(rest) == 1:
        return rest
    if header and all(_cell(row, column) in {"0", "1", "0.0", "1.0"} for row in body for column in rest):
        return rest
    if demanded:
        raise UsageError(
            f"{where} has several columns ({', '.join(header[:8]) or 'not named'}): set source.label_column to that of "
            "the classes"
        )
    return None


def _has_boxes(header: Sequence[str], body: Sequence[Sequence[str]], *, twice: bool) -> bool:
    """Whether rows are boxes: by the names of columns, or by four numbers in rows of which images have several."""
    if header:
        return text_tables.column(header, _BOX) is not None
    return twice and sum(map(_is_number, body[0])) >= 4


def _is_no_class(name: str) -> bool:
    """Whether a column is the index that pandas writes, or known to hold something else."""
    known = (*sidecars.SPLIT_COLUMNS, *sidecars.GROUP_COLUMNS, "fold", "url", "width", "height", "md5", "sha256")
    return not name or name.lower().startswith("unnamed:") or text_tables.column([name], known) is not None


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-?\d+(?:\.\d*)?", cell))


def _cell(row: Sequence[str], at: int) -> str:
    return row[at] if at < len(row) else ""
