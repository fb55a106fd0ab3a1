"""Which columns of a Parquet file hold the images and the labels, and how values of labels become class names.

Names of classes are in the `huggingface` metadata of the file, or under `dataset_info` in the README.md of the dataset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from animesion.errors import UsageError
from animesion.sources import clean_text
from animesion.sources.file_sets import FileSet

#: Names of columns that hold labels without being marked as such.
LABEL_NAMES = (
    *("label", "labels", "class", "class_name", "classname", "category", "character", "species", "cultivar"),
    *("common_name", "scientific_name", "breed", "variety"),
)
#: Names of columns that hold published splits.
_SPLIT_NAMES = ("split", "subset", "partition")

#: Rows by which a column of floats is known to hold class ids.
_LOOKED_AT = 1000

#: Columns that a message lists.
_NAMED = 12

#: Files that may name the classes, next to the Parquet files or one folder above.
SIDE_FILES = ("README.md",)
_LARGEST_README = 8 << 20


class Choices(Protocol):
    """Options that name columns; empty for those to be found."""

    @property
    def image_column(self) -> str:
        """Column of the images."""

    @property
    def label_column(self) -> str:
        """Column of the labels."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image: column of the images: a struct of `bytes` and `path`, or binary.
        label: column of the labels; empty if the file has none.
        split: column of published splits; empty if the file has none.
        names: class names by id; empty where the column has texts or bare numbers.
        refusal: the sentence for a dataset in which no file has labels.
    """

    image: str
    label: str
    split: str = ""
    names: tuple[str, ...] = ()
    refusal: str = ""

    def path_of(self, parquet: pq.ParquetFile) -> str:
        """The subcolumn with the file names of the images; empty if there is none."""
        kind = parquet.schema_arrow.field(self.image).type
        has_path = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        return f"{self.image}.path" if has_path and _is_text(kind.field("path").type) else ""

    def labels_of(self, value: Any) -> tuple[tuple[str, ...], int, str]:
        """Class names, class id and fault of a value.

        Negative numbers, as in unlabelled test sets of the Hub, and NaN are no label.

        Returns:
            Names; the id, or -1 if there is none or there are several; what is wrong with the value, or an empty text.
        """
        values = value if isinstance(value, list) else [value]
        texts: list[str] = []
        class_id = -1
        for each in values:
            if isinstance(each, (float, Decimal)):  # pandas has no missing integers
                number = float(each)
                if math.isnan(number):
                    continue
                if not number.is_integer() or abs(number) >= 1 << 53:
                    return (), -1, f"label {number:g} is no class id"
                each = int(number)
            if isinstance(each, int) and not isinstance(each, bool):
                if each < 0:
                    continue
                if self.names and each >= len(self.names):
                    return (), -1, f"label {each} of {len(self.names):,} classes"
                texts.append(self.names[each] if self.names else str(each))
                class_id = each
            elif each is not None and (text := clean_text(_as_text(each))):
                texts.append(text)
        return tuple(dict.fromkeys(texts)), class_id if len(texts) == 1 and class_id < 1 << 31 else -1, ""

    def check_same_names(self, parquet: pq.ParquetFile, where: str) -> None:
        """Check that the class names of another file of the dataset are the same.

        Raises:
            UsageError: they differ.
        """
        others = _class_names(_features(parquet).get(self.label))
        if others and tuple(map(clean_text, others)) != self.names:
            raise UsageError(
                f"{where} has other class names for the column {self.label!r} than the files before it: these are two "
                "datasets; give one of them with source.path"
            )


def choose(parquet: pq.ParquetFile, where: str, options: Choices, files: FileSet) -> Columns:
    """Find the columns of images and labels.

    Args:
        parquet: an open file.
        where: its path, for messages.
        options: columns that are given.
        files: the dataset, beside which a README.md may be.

    Raises:
        UsageError: there is no column of images, or several columns are equally good.
    """
    schema = parquet.schema_arrow
    features = _features(parquet)
    if not features:
        features = _readme_features(files, schema.names)
    image = _image_column(schema, features, where, options.image_column)
    label, refusal = _label_column(parquet, features, where, options.label_column, image)
    names = tuple(map(clean_text, _class_names(features.get(label)))) if label else ()
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{where}: two classes of the column {label!r} have the name '{twice}': rename one")
    texts = [field.name for field in schema if _is_text(field.type) and field.name != label]
    split = next((name for name in texts if name.casefold() in _SPLIT_NAMES), "")
    return Columns(image, label, split, names, refusal)


def _image_column(schema: pa.Schema, features: Mapping[str, Any], where: str, given: str) -> str:
    candidates: list[str] = [field.name for field in schema if _holds_images(field.type)]
    if given:
        if given not in candidates:
            raise UsageError(
                f"source.image_column: {where} has no column {given!r} of images; "
                f"columns of images are {_names(candidates)}"
            )
        return given
    marked = [name for name in candidates if _kind(features.get(name)) == "Image"]
    nested = [name for name in candidates if pa.types.is_struct(schema.field(name).type)]
    for choice in (marked, nested, candidates):
        if len(choice) == 1:
            return choice[0]
        if choice:
            raise UsageError(
                f"{where} has several columns of images ({_names(choice)}): set source.image_column to one"
            )
    raise UsageError(
        f"{where} has no column of embedded images, which is a struct of bytes and path or binary; its columns are "
        f"{_names(schema.names)}. A table of URLs is read by source.kind=urls"
    )


def _label_column(
    parquet: pq.ParquetFile, features: Mapping[str, Any], where: str, given: str, image: str
) -> tuple[str, str]:
    """The column of labels, or an empty text and the sentence that refuses a dataset without one."""
    schema = parquet.schema_arrow
    candidates = [field.name for field in schema if field.name != image and _holds_labels(field.type)]
    floats = [field.name for field in schema if pa.types.is_floating(field.type) and _are_whole(parquet, field.name)]
    refusal = f"{where} has no column of labels; columns that can be are {_names(candidates)}: set source.label_column"
    if given:
        candidates += floats
        if given in schema.names and given not in candidates:
            raise UsageError(f"source.label_column: the column {given!r} of {where} holds neither class ids nor texts")
        return (given, "") if given in candidates else ("", f"source.label_column={given}: {refusal}")
    marked = [name for name in candidates if _class_names(features.get(name))]
    named, ids = ([name for name in each if name.casefold() in LABEL_NAMES] for each in (candidates, floats))
    for choice in (marked, named, ids):
        if len(choice) == 1:
            return choice[0], ""
        if choice:
            raise UsageError(
                f"{where} has several columns of labels ({_names(choice)}): set source.label_column to one"
            )
    return "", refusal


def _features(parquet: pq.ParquetFile) -> Mapping[str, Any]:
    """The features of the `huggingface` metadata; empty if there are none."""
    metadata = {**(parquet.metadata.metadata or {}), **(parquet.schema_arrow.metadata or {})}
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _readme_features(files: FileSet, columns: Sequence[str]) -> Mapping[str, Any]:
    """The features under `dataset_info` in a README.md, in the form of the metadata; empty if there are none."""
    import yaml

    path, content = files.side_file(SIDE_FILES, _LARGEST_README)
    parts = content.decode("utf-8", "replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        head = yaml.load(parts[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    configs = head.get("dataset_info") if isinstance(head, dict) else None
    found = []
    for config in configs if isinstance(configs, list) else [configs]:
        features = _from_yaml(config)
        if features and set(features) <= set(columns):
            found.append(features)
    if any(features != found[0] for features in found):
        raise UsageError(f"{path} describes several configurations with these columns: give a folder with one of them")
    return found[0] if found else {}


def _from_yaml(config: Any) -> dict[str, Any]:
    features: dict[str, Any] = {}
    listed = config.get("features") if isinstance(config, dict) else None
    for each in listed if isinstance(listed, list) else []:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            return {}
        kind = each.get("dtype", each.get("sequence", each.get("list")))
        names = kind.get("class_label", {}).get("names") if isinstance(kind, dict) else None
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=lambda key: int(key) if str(key).isdecimal() else -1)]
        if isinstance(names, list):
            features[each["name"]] = {"_type": "ClassLabel", "names": [str(name) for name in names]}
        else:
            features[each["name"]] = {"_type": "Image" if kind == "image" else "Value"}
    return features


def _kind(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _class_names(feature: Any) -> list[str]:
    """The names of a ClassLabel, or of a list of them; empty for anything else."""
    if isinstance(feature, list) and len(feature) == 1:
        return _class_names(feature[0])
    if _kind(feature) in {"Sequence", "List", "LargeList"}:
        return _class_names(feature.get("feature"))
    names = feature.get("names") if _kind(feature) == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_labels(kind.value_type) and not pa.types.is_nested(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)


def _are_whole(parquet: pq.ParquetFile, column: str) -> bool:
    """Whether the first values of a column of floats are ids, as pandas writes them in a column with gaps."""
    try:
        batch = next(parquet.iter_batches(_LOOKED_AT, columns=[column], use_threads=False), None)
    except (pa.ArrowException, OSError, ValueError):  # reading the rows says what is wrong
        return False
    values = [] if batch is None else [each for each in batch.column(0).to_pylist() if each is not None]
    return all(each.is_integer() for each in values if each == each)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(clean_text(name, 60) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED:,} more" if len(names) > _NAMED else shown or "none"
