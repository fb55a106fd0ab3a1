"""Tables of images and their classes that lie beside folders of images under any name, as competitions have them.

`train.csv` with the columns `image_id` and `label` names the classes of `train_images/`. A reader of folders that
passes over it takes `train_images` for a class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from animesion.dataset import sidecars, text_tables
from animesion.dataset.box_files import Contents
from animesion.dataset.image_names import ImageNames
from animesion.dataset.path_parts import parts_of, stem_of
from animesion.errors import UsageError
from animesion.splits import SPLIT_NAMES, split_in_name

_SUFFIXES = (".csv", ".tsv", ".txt")
#: Tables that are looked into, and how deep below the place.
_MOST_TABLES, _DEEPEST = 12, 3
_MOST_COLUMNS = 1000
#: Rows by which the column of images is found, and the share of them that must name one.
_SAMPLE, _SHARE = 200, 0.5

#: Names of tables that may be forms to be filled in, such as `test.csv` and `sample_sub.csv`.
_FORM = re.compile(r"(?<![a-z])(?:test|sub|subm|submission|submit|sample|example|predictions?)(?![a-z])", re.IGNORECASE)
#: Share of the lines of a list that must name an image each.
_NEARLY = 0.9
#: Images from which a table that has another class for each is none of classes.
_FEW = 3

#: Columns of classes, besides those of `metadata.csv`, the surest first.
_LABEL = (*sidecars.LABEL_COLUMNS, "breed", "variety", "target", "class_id", "label_id", "individual_id")
#: Columns that say whether an image is of a split, and the split of those that are and are not.
_IS_SPLIT = {"is_train": ("train", "test"), "is_training": ("train", "test"), "is_test": ("test", "train")}
_SPLITS = (*sidecars.SPLIT_COLUMNS, *_IS_SPLIT)
_YES, _NO = frozenset({"1", "1.0", "true", "yes"}), frozenset({"0", "0.0", "false", "no"})
#: Columns of the names of files, the surest first.
_FILE_NAMES = (
    (*sidecars.FILE_COLUMNS, "filepath", "image_name", "img", "img_name", "img_path"),
    ("image_id", "file_id", "name"),
    ("id",),
)
_BOX = ("xmin", "x1", "bbox", "bboxes", "bbox_x", "bbox_x1")


@dataclass(frozen=True)
class ImageTable:
    """A table that names images and classes.

    Attributes:
        path: of the table.
        labels: image -> its classes; several where rows differ, none in a table of splits.
        splits: image -> split, for the images of which the table or its name states one.
        file_column: where the images are; empty without a header.
        label_column: where the classes are; empty without a header, or where each class has a column.
        missing: rows whose image is not there.
        ambiguous: rows that several images are called by.
        contradicting: images of which rows have different classes.
        is_one_hot: whether each class has a column.
        note: on its encoding; empty for none.
        in_several: images of which rows have several splits; the splits of such a table do not count.
    """

    path: str
    labels: dict[str, tuple[str, ...]]
    splits: dict[str, str]
    file_column: str
    label_column: str
    missing: int
    ambiguous: int
    contradicting: int
    is_one_hot: bool
    note: str
    in_several: int = 0

    @property
    def has_classes(self) -> bool:
        """Whether it has classes; others have splits."""
        return any(self.labels.values())

    @property
    def columns(self) -> str:
        """Where images and classes are, in words."""
        if not self.file_column:
            return f"{self.path} has no header"
        classes = f"classes in column {self.label_column}" if self.label_column else "a column for each class"
        return f"images in column {self.file_column} of {self.path}, {classes}"

    @property
    def notes(self) -> list[str]:
        """Sentences on its rows and its encoding."""
        counts = {
            "rows of missing files": self.missing,
            "rows whose name several files have": self.ambiguous,
            "images whose rows have different classes": self.contradicting,
            "splits that do not count, as rows of an image have several": self.in_several,
        }
        return [*filter(None, [self.note]), *(f"{what}: {count:,}" for what, count in counts.items() if count)]


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
        and path.rpartition("/")[2].lower() not in sidecars.TABLES
        # a form to be filled in, whose classes are not those of the images
        and "submission" not in path.rpartition("/")[2].lower()
        and len(parts_of(path)) <= _DEEPEST
    ]
    candidates.sort(key=lambda path: (path.lower().endswith(".txt"), path.count("/"), path))
    chosen = candidates[:_MOST_TABLES]
    if not chosen:
        return []
    names = ImageNames(images)
    found = []
    for path, content in zip(chosen, contents(chosen), strict=True):
        table = _read(path, content, names, f"{where}/{path}", encoding, label_column, demanded=demanded)
        if table:
            found.append(table)
    _read_ids(found)
    return _without_dummies(found)


def read(
    path: str, content: bytes, images: Sequence[str], where: str, encoding: str = "", label_column: str = ""
) -> ImageTable:
    """Read one table that the user has named.

    Raises:
        UsageError: it names no images, or no classes, or cannot be read.
    """
    table = _read(path, content, ImageNames(images), where, encoding, label_column, demanded=True, given=True)
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


def _read(
    path: str,
    content: bytes,
    names: ImageNames,
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
    if split and not given and (listed := _split_list(content, names, folder)):
        return ImageTable(path, dict.fromkeys(listed, ()), dict.fromkeys(listed, split), "", "", 0, 0, 0, False, "")
    try:
        rows = list(_rows(text_tables.decoded(content, where, encoding), where, names, folder, split))
    except UsageError:
        # what is no table of images may be unreadable, but a table of images must not be passed over for it
        if not given and not _file_columns(_rough_rows(content), names, folder, split):
            return None
        raise
    files_at = _file_columns(rows[:_SAMPLE], names, folder, split)
    if not files_at:
        return None
    at = files_at[0]
    has_header = not names.find_all(_cell(rows[0], at), folder, split, exact=True)
    header, body = (rows[0], rows[1:]) if has_header else ([], rows)
    labels_at = _label_columns(header, body, at, label_column, where, demanded=demanded)
    if labels_at is None:
        return None
    if len(files_at) > 1 and not label_column:
        if not demanded:
            return None  # such as pairs of images
        two = " and in ".join(repr(_cell(header, each) or f"column {each + 1}") for each in files_at[:2])
        raise UsageError(
            f"{where} names different images in {two}: remove one, or give it a header that calls one filename"
        )
    labels: dict[str, tuple[str, ...]] = {}
    splits: dict[str, str] = {}
    twice = False
    missing = ambiguous = 0
    example = ""
    contradicting: set[str] = set()
    in_several: set[str] = set()
    split_of = _split_column(header, body, where)
    for row in body:
        named = names.find_all(_cell(row, at), folder, split)
        if len(named) != 1:
            ambiguous += len(named) > 1
            missing += not named
            example = example or (_cell(row, at) if named else "")
            continue
        [image] = named
        if len(labels_at) == 1:
            found = tuple(filter(None, [_cell(row, labels_at[0])]))
        else:
            found = tuple(header[i] for i in labels_at if _cell(row, i) in {"1", "1.0"})
        if image in labels:
            twice = True
            if found != labels[image]:
                contradicting.add(image)
            found = tuple(sorted({*labels[image], *found}))
        labels[image] = found
        stated = split_of(row) if split_of else split
        if stated and splits.setdefault(image, stated) != stated:
            in_several.add(image)
    if in_several:
        splits = {}
    if not labels:
        if demanded and ambiguous:
            raise UsageError(
                f"{where} names images by {example[:60]!r} and the like, and several files have each name: write paths "
                "into it, or move the others away"
            )
        return None
    if not labels_at and not splits and not in_several:
        return None
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
        ambiguous,
        len(contradicting),
        len(labels_at) > 1,
        text_tables.encoding_note(content, path, encoding),
        len(in_several),
    )


def _split_column(
    header: Sequence[str], body: Sequence[Sequence[str]], where: str
) -> Callable[[Sequence[str]], str] | None:
    """The split of a row by its column of splits, or by one such as `is_train`; None without such a column.

    Raises:
        UsageError: some splits are known and others not, which would be lost.
    """
    for name, (yes, no) in _IS_SPLIT.items():
        flag_at = text_tables.column(header, [name])
        if flag_at is not None and {_cell(row, flag_at).lower() for row in body} <= _YES | _NO:
            return lambda row: yes if _cell(row, flag_at).lower() in _YES else no
    at = text_tables.column(header, sidecars.SPLIT_COLUMNS)
    if at is None:
        return None
    values = {_cell(row, at) for row in body} - {""}
    unknown = sorted(value for value in values if value.lower() not in SPLIT_NAMES)
    if unknown and len(unknown) < len(values):
        raise UsageError(
            f"{where} has the split {unknown[0][:40]!r}, which is no name of train, val or test: correct it, or remove "
            "the column"
        )
    return None if unknown else lambda row: SPLIT_NAMES.get(_cell(row, at).lower(), "")


def _split_list(content: bytes, names: ImageNames, folder: str) -> list[str]:
    """The images of a list without classes, as `train.txt` with a path in each line; none if it is something else.

    Names without a suffix, as `apple_pie/1005649`, are paths in a folder of images.
    """
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        return []
    if sum(bool(names.find_all(line, folder, "")) for line in lines[:_SAMPLE]) < _NEARLY * len(lines[:_SAMPLE]):
        return []
    found = [names.find_all(line, folder, "") for line in lines]
    unique = [each[0] for each in found if len(each) == 1]
    return unique if lines and len(unique) >= _NEARLY * len(lines) else []


def _without_dummies(tables: list[ImageTable]) -> list[ImageTable]:
    """Leave out forms to be filled in: tables of a test by their names, with one class for all that no other has."""
    result = []
    for table in tables:
        others = [other for other in tables if other is not table and not other.labels.keys() & table.labels.keys()]
        elsewhere = {name for other in others for found in other.labels.values() for name in found}
        own = {name for found in table.labels.values() for name in found}
        is_constant = len(own) == 1 < len(table.labels) and len(elsewhere) > 1 and not own & elsewhere
        name = stem_of(table.path.rpartition("/")[2])
        if not (is_constant and _FORM.search(name) and next(iter(own)).lower() not in name.lower()):
            result.append(table)
    return result


def _rows(text: str, where: str, names: ImageNames, folder: str, split: str) -> Iterator[list[str]]:
    """Rows of a table, or of a list whose cells are parted by blanks; names of images or classes may have blanks."""
    first = text.lstrip("\n\r").partition("\n")[0]
    if any(separator in first for separator in text_tables.SEPARATORS) or first.lower().startswith("sep="):
        yield from text_tables.rows(text, where)
        return
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    at_first, at_last = ([cut(line) for line in lines] for cut in (_at_first_blank, _at_last_blank))
    hits = [
        sum(any(names.find_all(cell, folder, split) for cell in row) for row in rows[:_SAMPLE])
        for rows in (at_first, at_last)
    ]
    yield from at_last if hits[1] > hits[0] else at_first


def _at_first_blank(line: str) -> list[str]:
    return line.split(maxsplit=1)


def _at_last_blank(line: str) -> list[str]:
    return line.rsplit(maxsplit=1)


def _rough_rows(content: bytes) -> list[list[str]]:
    """The first rows of what does not decode."""
    lines = content[: 1 << 20].decode("latin-1").splitlines()[:_SAMPLE]
    return [[cell.strip(' "\0') for cell in re.split(r"[,;\t|]", line)] for line in lines]


def _file_columns(rows: Sequence[Sequence[str]], names: ImageNames, folder: str, split: str) -> list[int]:
    """The column whose cells name images, where most do; more if others name different ones and none is surer.

    Running numbers and class ids name images that are numbered, too. So a column of many images comes before one of
    few, file names before numbers, and a header that says that it is of files before one that does not.
    """
    widest = min(max((len(row) for row in rows), default=0), _MOST_COLUMNS)
    if widest < 2:
        return []
    named = [[names.find_all(_cell(row, at), folder, split) for row in rows] for at in range(widest)]
    # the header names none
    least = max(_SHARE * max(len(rows) - 1, 1), 1)
    found = [at for at in range(widest) if sum(map(bool, named[at])) >= least]
    different = {at: len({images[0] for images in named[at] if images}) for at in found}
    unique = {at: sum(len(images) == 1 for images in named[at]) for at in found}
    for counts in (different, unique):
        found = [at for at in found if 2 * counts[at] >= max(counts[each] for each in found)]
    if not found:
        return []
    header = rows[0]

    def sureness(at: int) -> tuple[bool, int]:
        is_number = all(_is_number(_cell(row, at)) for row, images in zip(rows, named[at], strict=True) if images)
        name = _cell(header, at)
        ranks = [text_tables.column([name], each) is not None for each in _FILE_NAMES]
        if any(ranks):
            return not is_number, len(ranks) - ranks.index(True)
        return not is_number, -1 if _is_no_class(name) or text_tables.column([name], _LABEL) is not None else 0

    best = max(map(sureness, found))
    equal = sorted((at for at in found if sureness(at) == best), key=lambda at: (-unique[at], at))
    first = named[equal[0]]
    others = [
        at for at in equal[1:] if any(len(a) == len(b) == 1 and a != b for a, b in zip(first, named[at], strict=True))
    ]
    return [equal[0], *others]


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
    label_names = sidecars.without_ranks(header, _LABEL)
    known = text_tables.column([*header[:at], "", *header[at + 1 :]], label_names) if header else None
    if known is not None:
        differing = sidecars.differing_columns([*header[:at], "", *header[at + 1 :]], body, label_names)
        if differing and demanded:
            raise UsageError(
                f"{where} has several columns of classes ({', '.join(differing)}), which differ: set "
                "source.label_column to one"
            )
        return None if differing else [known]
    width = min(len(header) or max(len(row) for row in body), _MOST_COLUMNS)
    rest = [column for column in range(width) if column != at]
    if header:
        rest = [column for column in rest if not _is_no_class(header[column])]
    else:
        rest = [column for column in rest if not all(_is_number(_cell(row, column)) for row in body)] or rest
    if len(rest) == 1:
        return rest
    if not rest and any(text_tables.column(header, [name]) is not None for name in _SPLITS):
        return []
    if header and rest and all(_cell(row, column) in {"0", "1", "0.0", "1.0"} for row in body for column in rest):
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
    known = (*_SPLITS, *sidecars.GROUP_COLUMNS, "fold", "url", "width", "height", "md5", "sha256")
    return _is_index(name) or text_tables.column([name], known) is not None


def _is_index(name: str) -> bool:
    """Whether a column is the index that pandas writes, or says that it is one."""
    return not name or name.lower().startswith("unnamed:") or name.lower() in {"no", "no.", "nr", "#", "index"}


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-?\d+(?:\.\d*)?", cell))


def _cell(row: Sequence[str], at: int) -> str:
    return row[at] if at < len(row) else ""
