"""Side files that carry labels: tables beside the images (the imagefolder convention), and one file per image.

The files per image are those that gallery-dl, waifuc and booru downloaders write: `x.jpg.json`, `x.json`,
`.x_meta.json` with a post's metadata, `x.txt` with a caption. Only labels and origin are read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from animesion.dataset import text_tables
from animesion.errors import UsageError
from animesion.splits import SPLIT_NAMES

#: Names of tables that describe the images beside and below them.
TABLES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet", "_classes.csv"})

_SUFFIXES = (".json", ".txt", ".caption")
_MOST_JSON = 1 << 20  # bytes; a post's metadata is some thousand

FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_path", "image_file")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "character", "species", "cultivar", "labels")
#: Those of them that leave no doubt.
_SURE = ("label", "labels", "class", "class_name")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
GROUP_COLUMNS = ("group", "post", "post_id", "work", "family")
#: Columns that hold no class, though they may be the only one beside the file names.
_OTHER_COLUMNS = frozenset(
    {
        *("text", "caption", "captions", "prompt", "description", "license", "licence", "url"),
        *("objects", "bbox", "bboxes", "boxes", "width", "height", "md5", "sha1", "sha256"),
    }
)
#: Ranks of a taxonomy: beside two of them, `class` and `family` are ranks, too.
_RANKS = ("kingdom", "phylum", "order", "genus", "species")

#: Keys of a post's character tags, the surest first.
_CHARACTERS = ("tag_string_character", "tags_character", "characters", "character", "label", "class")

#: Field of ours -> keys that name it in a post's metadata.
_FIELDS = {
    "rating": ("rating",),
    "author": ("tag_string_artist", "tags_artist", "artist", "author"),
    "page_url": ("page_url", "post_url"),
    "file_url": ("file_url", "url"),
    "md5": ("md5",),
    "licence": ("licence", "license"),
}


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Labels and fields from the sidecar of an image."""

    labels: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table: the file's path relative to the table's folder, its labels and fields."""

    file_name: str
    labels: tuple[str, ...]
    split: str
    group: str
    fields: Mapping[str, str]


class NoLabelColumnError(UsageError):
    """A table names images, and has no column of their classes.

    Attributes:
        table: its path.
    """

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


def without_ranks(header: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names of columns that are looked for, without those that are ranks of a taxonomy in this header."""
    is_taxonomy = sum(text_tables.column(header, [rank]) is not None for rank in _RANKS) > 1
    return [name for name in names if not (is_taxonomy and name in ("class", "family"))]


def differing_columns(header: Sequence[str], rows: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """The columns of these names, where they class rows in different ways, as `category` and `breed` do; else none.

    None either beside a column called `label` or the like, which is meant. Rows with an empty cell do not count.
    """
    if text_tables.column(header, _SURE) is not None:
        return []
    places = [at for name in names if (at := text_tables.column(header, [name])) is not None]
    if len(set(places)) < 2:
        return []
    places = [at for at in dict.fromkeys(places) if any(at < len(row) and row[at] for row in rows)]
    full = [row for row in rows if all(at < len(row) and row[at] for at in places)]
    groupings = set()
    for at in places:
        numbers: dict[str, int] = {}
        groupings.add(tuple(numbers.setdefault(row[at], len(numbers)) for row in full))
    return [header[at] for at in places] if len(groupings) > 1 else []


def tables(paths: Iterable[str]) -> list[str]:
    """Paths of the tables among files, sorted."""
    return sorted(path for path in paths if PurePosixPath(path).name.lower() in TABLES)


def of_images(images: Sequence[str], paths: Iterable[str]) -> dict[str, str]:
    """Sidecar -> its image, for the files that are named after an image in their folder."""
    known = set(images)
    beside = [path for path in paths if path.lower().endswith(_SUFFIXES) and path not in known]
    by_stem = {str(PurePosixPath(path).with_suffix("")): path for path in reversed(images)} if beside else {}
    found = {}
    for path in beside:
        named = path.rpartition(".")[0]
        folder, _, name = named.rpartition("/")
        meta = re.fullmatch(r"\.(.+)_meta", name)  # waifuc's
        if meta:
            named = f"{folder}/{meta[1]}" if folder else meta[1]
        image = named if named in known else by_stem.get(named)
        if image:
            found[path] = image
    return found


@dataclass(frozen=True, slots=True)
class Sidecars:
    """Sidecars that were read.

    Attributes:
        of_image: image -> its sidecar.
        names: paths of the sidecars.
    """

    of_image: dict[str, Sidecar]
    names: list[str]


def read_all(side: Mapping[str, str], contents: Callable[[Sequence[str]], Iterable[bytes]]) -> Sidecars:
    """Read the JSON sidecars of images; text sidecars are captions and contain no class.

    Args:
        side: sidecar -> image.
        contents: reads files by their paths; called once, as an archive is opened for each call.
    """
    found = Sidecars({}, [])
    wanted = sorted(path for path in side if path.lower().endswith(".json"))
    for path, content in zip(wanted, contents(wanted) if wanted else (), strict=True):
        sidecar = read(content)
        if sidecar:
            found.names.append(path)
            found.of_image.setdefault(side[path], sidecar)
    return found


def read(content: bytes) -> Sidecar | None:
    """Read a JSON sidecar; None for what is no JSON object of a reasonable size."""
    try:
        post = json.loads(content) if len(content) <= _MOST_JSON else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(post, dict):
        return None
    # waifuc keeps the post below the name of its site
    layers = [post, *(value for value in post.values() if isinstance(value, dict) and "id" in value)]
    labels: tuple[str, ...] = ()
    for layer in layers:
        labels = labels or next((_tags(layer[key]) for key in _CHARACTERS if key in layer and _tags(layer[key])), ())
    fields = {}
    for name, keys in _FIELDS.items():
        values = (str(layer[key]) for layer in layers for key in keys if isinstance(layer.get(key), (str, int)))
        if value := next(values, ""):
            fields[name] = value
    return Sidecar(labels, fields)


def _tags(value: Any) -> tuple[str, ...]:
    """Tags of a list, or of a text with blanks between them, or commas if it has any."""
    if isinstance(value, str):
        return tuple(tag.strip() for tag in value.split("," if "," in value else None) if tag.strip())
    if isinstance(value, list):
        return tuple(tag for tag in value if isinstance(tag, str) and tag)
    return ()


# -- tables ----------------------------------------------------------------------------------------------------------


def read_table(path: str, content: bytes, place: str, encoding: str = "", label_column: str = "") -> Iterator[TableRow]:
    """The rows of a table beside images; `encoding` as in `text_tables.text_of`, no `label_column` to find it.

    Raises:
        UsageError: it has no column for files or none for labels, or cannot be read.
    """
    where = f"{place}/{path}"
    name = PurePosixPath(path).name.lower()
    if name == "_classes.csv":
        yield from _one_hot(content, where, encoding)
        return
    if name.endswith(".jsonl"):
        records = list(_json_lines(content, where, encoding))
    elif name.endswith(".parquet"):
        records = _parquet(content, where)
    else:
        lines = text_tables.rows(text_tables.decoded(content, where, encoding), where)
        header = next(lines, [])
        records = [dict(zip(header, cells, strict=False)) for cells in lines]
    header = list(dict.fromkeys(key for record in records for key in record))
    label_names = without_ranks(header, LABEL_COLUMNS)
    file_key, label_key = _column(header, FILE_COLUMNS), _column(header, label_names)
    if file_key is None:
        raise UsageError(f"{where} has no column file_name, so its rows belong to no image: name the column so")
    rest = [key for key in header if key != file_key]
    split_key = _column(header, SPLIT_COLUMNS)
    group_key = _column(header, without_ranks(header, GROUP_COLUMNS))
    if label_column:
        label_key = _column(header, [label_column])
        if label_key is None:
            raise UsageError(f"{where} has no column {label_column!r} (its columns are {', '.join(header[:8])})")
    elif label_key:
        several = [key for key in header if text_tables.column([key], label_names) is not None]
        cells = [[_text(record.get(key)) for key in several] for record in records]
        if differing := differing_columns(several, cells, label_names):
            raise UsageError(
                f"{where} has several columns of classes ({', '.join(differing)}), which differ: set "
                "source.label_column to one"
            )
    elif len(rest) == 1 and _may_be_classes(rest[0], [record.get(rest[0]) for record in records]):
        label_key = rest[0]
    if label_key is None:
        columns = ", ".join(header[:8])
        raise NoLabelColumnError(f"{where} has no column label (its columns are {columns}): name one so", path)
    for record in records:
        if not record.get(file_key):
            continue
        split = _text(record.get(split_key)) if split_key else ""
        if split and split.lower() not in SPLIT_NAMES:
            raise UsageError(
                f"{where} has the split {split[:40]!r}, which is no name of train, val or test: correct it"
            )
        yield TableRow(
            _relative(_text(record[file_key])),
            _labels(record.get(label_key)),
            SPLIT_NAMES.get(split.lower(), ""),
            _text(record.get(group_key)) if group_key else "",
            {name: _text(record[key]) for name, keys in _FIELDS.items() for key in keys if record.get(key)},
        )


def _may_be_classes(name: str, values: Sequence[Any]) -> bool:
    """Whether the only column beside the file names may be of classes."""
    return name.casefold() not in _OTHER_COLUMNS and not any(isinstance(value, dict) for value in values)


def _column(header: Sequence[str], names: Sequence[str]) -> str | None:
    at = text_tables.column(header, names)
    return None if at is None else header[at]


def _relative(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _one_hot(content: bytes, where: str, encoding: str) -> Iterator[TableRow]:
    """Roboflow's table: a file name, and a column of zeros and ones for each class."""
    lines = text_tables.rows(text_tables.decoded(content, where, encoding), where)
    header = next(lines, [])
    file_at = text_tables.column(header, FILE_COLUMNS)
    if file_at is None:
        raise UsageError(f"{where} has no column filename: it is no table of classes as Roboflow writes it")
    for cells in lines:
        chosen = [name for i, name in enumerate(header) if i != file_at and i < len(cells) and cells[i] in {"1", "1.0"}]
        if file_at < len(cells):
            yield TableRow(_relative(cells[file_at]), tuple(chosen), "", "", {})


def _json_lines(content: bytes, where: str, encoding: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text_tables.decoded(content, where, encoding).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{where}, line {number} is no JSON: correct the row") from None
        if not isinstance(record, dict):
            raise UsageError(f"{where}, line {number} is no JSON object: correct the row")
        yield record


def _parquet(content: bytes, where: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records: list[dict[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{where} cannot be read as Parquet ({str(error)[:120]}): write it again") from None
    return records


def _labels(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text for each in values if (text := _text(each)))


def _text(value: Any) -> str:
    """A cell as text: whole floats without their point, booleans in lower case, nothing for None and NaN."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
