"""Labels of WebDataset samples: from `.cls`, `.json` and `.txt` members, with the class names next to the shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from animesion.dataset import readings, sidecars, text_tables
from animesion.errors import UsageError
from animesion.sources import clean_text
from animesion.sources.file_sets import FileSet

#: Size in bytes above which a member is no label.
LARGEST_MEMBER = 1 << 20

_LARGEST_NAMES = 64 << 20
#: Files with the names of classes, next to the shards or one folder above.
SIDE_FILES = ("dataset.json", "classes.csv", "classnames.txt", "classes.txt", "class_names.txt", "labels.txt")

#: Keys of a label in a `.json` member, names before numbers.
_KEYS = (
    *("class_name", "label_name", "class_text", "label_text", "label", "class", "cls", "category", "character"),
    *("species", "cultivar", "class_id", "category_id", "label_id", "name"),
)

_ID, _NAME = ("class_id", "id", "label", "index", "cls"), ("name", "class_name", "classname", "class")


@dataclass(frozen=True, slots=True)
class SampleLabel:
    """Facts from the side members of a sample.

    Attributes:
        labels: class names.
        class_id: number of the class, or -1.
        by: member that the label is from; empty for none.
        group: images of one group belong together; empty for none.
        fields: provenance, as in `sidecars.Sidecar`.
        fault: why the label cannot be used; empty if it can.
        unnamed: number of a class that has no name although others have, or -1.
    """

    labels: tuple[str, ...] = ()
    class_id: int = -1
    by: str = ""
    group: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    unnamed: int = -1


@dataclass(frozen=True)
class ClassNames:
    """Names of classes by number.

    Attributes:
        names: class id -> name.
        where: the file, for messages; empty for none.
        is_ours: whether it is the `dataset.json` of a build.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    where: str = ""
    is_ours: bool = False

    @classmethod
    def find(cls, files: FileSet, given: str) -> ClassNames:
        """The names in a file that is given, or in a known one next to the shards or one folder above.

        Raises:
            UsageError: the file cannot be read, or two classes have one name.
        """
        if given:
            path, content = given, _local(Path(given).expanduser())
        else:
            path, content = files.side_file(SIDE_FILES, _LARGEST_NAMES)
        if not path:
            return cls()
        name = path.rpartition("/")[2]
        ours = name == "dataset.json"
        names = _of_dataset(content, path) if ours else _of_table(content, path)
        first: dict[str, int] = {}
        for class_id, text in names.items():
            if first.setdefault(text, class_id) != class_id:
                raise UsageError(
                    f"{path}: classes {first[text]} and {class_id} have the same name '{clean_text(text, 80)}': "
                    "rename one"
                )
        return cls(names, name, ours)

    def check_first(self, labels: Sequence[SampleLabel]) -> None:
        """Check that the numbers of classes start where their names do.

        Raises:
            UsageError: the only number without a name is the one after the last or before the first, and no label has
                the name at the other end.
        """
        first, last = min(self.names, default=0), max(self.names, default=0)
        if last - first + 1 != len(self.names) or len(self.names) < 2:
            return
        seen = {name for label in labels for name in label.labels}
        used = {number for number, name in self.names.items() if name in seen}
        unnamed = {label.unnamed for label in labels if label.unnamed >= 0}
        for start, beyond, unused in ((first + 1, last + 1, first), (first - 1, first - 1, last)):
            if unnamed == {beyond} and used and unused not in used:
                raise UsageError(
                    f"source.classes: the labels count from {start}, but {self.where} counts from {first}, so each "
                    f"class would get the name of the {'next' if start > first else 'previous'} one: set it to a CSV "
                    "with the columns class_id and name"
                )


def label_of(members: Mapping[str, bytes], names: ClassNames, member: str, key: str) -> SampleLabel:
    """The label and provenance of a sample.

    Args:
        members: contents of the side members by suffix.
        names: class names by number.
        member: `auto`, `cls`, `json` or `txt`.
        key: key of the label in `.json`; empty to find it.
    """
    post = _json(members.get("json", b""))
    sidecar = sidecars.read(members["json"]) if "json" in members else None
    fields = {name: clean_text(value, 2000) for name, value in sidecar.fields.items()} if sidecar else {}
    group = post.get("group")
    group = clean_text(group, 300) if isinstance(group, str) else ""
    wanted = ("cls", "json") if member == "auto" else (member,)
    if key and member == "auto":
        wanted = ("json",)
    for each in wanted:
        value: Any = None
        if each == "json":
            # a post of a booru lists its characters among its tags
            value = (
                _value(post, key) if key or _value(post, "") is not None else list(sidecar.labels) if sidecar else None
            )
        elif each in members:
            value = members[each].decode("utf-8", "replace").strip("\0 \r\n\t\ufeff")
            if (
                not names.names
                and str(post.get("label")) == value
                and isinstance(post.get("name"), str)
                and value.isdecimal()
            ):
                names = ClassNames({int(post["label"]): clean_text(post["name"])})  # a shard of ours on its own
        labels, class_id, unnamed = _names_of(value, names, numeric=each == "cls")
        if unnamed >= 0:
            fault = f"class {str(unnamed)[:20]} is not in {names.where}"
            return SampleLabel((), -1, each, group, fields, fault, unnamed)
        if labels:
            return SampleLabel(labels, class_id, each, group, fields)
    return SampleLabel(group=group, fields=fields)


def _names_of(value: Any, names: ClassNames, *, numeric: bool) -> tuple[tuple[str, ...], int, int]:
    """Class names and class id of a value, or the number that has no name; a negative number is no label."""
    texts: list[str] = []
    class_id = -1
    for each in value if isinstance(value, list) else [value]:
        is_number = isinstance(each, int) and not isinstance(each, bool)
        if isinstance(each, float):  # pandas has no missing integers
            if each != each:
                continue
            if each.is_integer() and abs(each) < 1 << 53:
                each, is_number = int(each), True
        elif numeric and isinstance(each, str) and re.fullmatch(r"-?[0-9]{1,11}(?:\.0*)?", each):
            each, is_number = int(each.partition(".")[0]), True
        if is_number:
            if each < 0:
                continue
            if names.names and each not in names.names:
                return (), -1, each
            texts.append(names.names.get(each, str(each)[:40]))
            class_id = each if each < 1 << 31 else -1
        elif isinstance(each, (str, float, bool)):
            texts.append(clean_text(str(each)))
    labels = tuple(dict.fromkeys(text for text in texts if text))
    return labels, class_id if len(labels) == 1 else -1, -1


def _value(post: Mapping[str, Any], key: str) -> Any:
    if key:
        return post.get(key)
    # beside a species, a class is a rank of the taxonomy; a name may be that of the file
    keys = [each for each in _KEYS if not (each == "class" and post.get("species"))]
    return next(
        (post[each] for each in keys if post.get(each) not in (None, "", []) and not _is_file(post, each)), None
    )


def _is_file(post: Mapping[str, Any], key: str) -> bool:
    return key == "name" and readings.is_image(str(post[key]))


def _json(content: bytes) -> dict[str, Any]:
    try:
        post = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return post if isinstance(post, dict) else {}


def _local(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_NAMES + 1)
    except OSError as error:
        raise UsageError(f"source.classes: {path} cannot be read ({os.strerror(error.errno or 0)})") from None
    if len(content) > _LARGEST_NAMES:
        raise UsageError(f"source.classes: {path} is too large for a file of class names")
    return content


def _of_dataset(content: bytes, path: str) -> dict[int, str]:
    names = _json(content).get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path} has no list class_names: it is not of a dataset of `animesion build`; move it away")
    return dict(enumerate(map(clean_text, names)))


def _of_table(content: bytes, path: str) -> dict[int, str]:
    """Names in a CSV of ids and names with or without a header, or one name per line."""
    text = text_tables.decoded(content, path)
    if path.endswith(".txt"):
        return {i: clean_text(line) for i, line in enumerate(text.splitlines()) if line.strip()}
    rows = list(text_tables.rows(text, path))
    if not rows:
        return {}
    id_at, name_at = text_tables.column(rows[0], _ID), text_tables.column(rows[0], _NAME)
    if len(rows[0]) == 1:
        return dict(enumerate(clean_text(row[0]) for row in (rows if name_at is None else rows[1:])))
    if id_at is None or name_at is None:
        id_at, name_at, first = 0, 1, 0 if rows[0][0].isdecimal() else 1
    else:
        first = 1
    names = {}
    for row in rows[first:]:
        if len(row) <= max(id_at, name_at) or not row[id_at].isdecimal() or len(row[id_at]) > 9:
            raise UsageError(f"{path}: the row {','.join(row)[:80]!r} is no class id and name: correct it")
        names[int(row[id_at])] = clean_text(text_tables.text_of_cell(row[name_at]))
    return names
