"""The tags of a built dataset: the vocabulary `tags.csv`, and the tags of each sample in `sample_tags.parquet`.

`animesion.pipeline.tags` decides which tags there are. Files may be a stranger's, so everything read is checked.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.dataset import text_tables
from animesion.errors import UsageError
from animesion.schemas import SAMPLE_TAGS, TAG_CATEGORIES, TAG_MEANINGS
from animesion.storage import names, parquet

VOCABULARY, ASSIGNED, DROPPED = "tags.csv", "sample_tags.parquet", "dropped_tags.csv"
#: The files of a dataset whose samples carry tags.
FILES = (DROPPED, ASSIGNED, VOCABULARY)

_MOST_BYTES = 256 << 20
_AGAIN = "build the dataset again"

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """The tags of a dataset, whose ids are their positions; those of a category are next to each other.

    Attributes:
        names: unique names, T of them.
        categories: category of each.
        counts: number of samples with each tag by split, (T,) each.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    counts: Mapping[str, IntArray]

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def ranges(self) -> dict[str, range]:
        """The ids of each category that has tags, in their order."""
        found: dict[str, range] = {}
        for i, category in enumerate(self.categories):
            found[category] = range(found[category].start if category in found else i, i + 1)
        return found

    def grouped(self, ids: Sequence[int]) -> dict[str, list[str]]:
        """Names of some tags by category, with an entry for each category of the vocabulary."""
        found: dict[str, list[str]] = {category: [] for category in self.ranges}
        for i in ids:
            found[self.categories[i]].append(self.names[i])
        return found


def render(vocabulary: Vocabulary) -> str:
    """The text of `tags.csv`: `tag_id`, `name`, `category`, samples by split, `total`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["tag_id", "name", "category", *vocabulary.counts, "total"])
    columns = [counts.tolist() for counts in vocabulary.counts.values()]
    rows = zip(vocabulary.names, vocabulary.categories, zip(*columns, strict=True), strict=True)
    for i, (name, category, counts) in enumerate(rows):
        writer.writerow([i, text_tables.cell_of(name), category, *counts, sum(counts)])
    return out.getvalue()


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read `tags.csv` in the folder of a dataset.

    Raises:
        UsageError: the file is missing, or is not one that a build writes.
    """
    path = folder / VOCABULARY
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes: {_AGAIN}")
        rows = list(csv.reader(io.StringIO(content.decode()), strict=True))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} has no tags: build it with tags.categories, from a source that lists tags"
        ) from None
    except (OSError, ValueError, csv.Error):
        raise UsageError(f"{path} cannot be read as a table of tags: {_AGAIN}") from None
    header = rows[0] if rows else []
    splits = header[3:-1]
    if [*header[:3], *header[-1:]] != ["tag_id", "name", "category", "total"] or len(set(splits)) != len(splits):
        raise UsageError(f"{path} does not have the columns of a table of tags: {_AGAIN}")
    listed, categories = [], []
    counts = np.zeros((len(splits), len(rows) - 1), dtype=np.int64)
    for i, row in enumerate(rows[1:]):
        numbers = [int(cell) if cell.isascii() and cell.isdecimal() and len(cell) < 16 else -1 for cell in row[3:]]
        name = text_tables.text_of_cell(row[1]) if len(row) == len(header) else ""
        if not name or not names.is_text(name) or row[0] != str(i) or row[2] not in TAG_CATEGORIES or min(numbers) < 0:
            raise UsageError(f"{path}: line {i + 2} is not a tag with its counts: {_AGAIN}")
        listed.append(name)
        categories.append(row[2])
        counts[:, i] = numbers[:-1]
    order = [TAG_CATEGORIES.index(category) for category in categories]
    if len(set(listed)) != len(listed) or order != sorted(order):
        raise UsageError(f"{path} lists a tag twice, or categories out of order: {_AGAIN}")
    return Vocabulary(tuple(listed), tuple(categories), dict(zip(splits, counts, strict=True)))


def digest(tags: object) -> bytes:
    """A digest of the tags of a sample by category, as in its JSON member; 16 bytes."""
    return hashlib.blake2b(json.dumps(tags).encode(), digest_size=16).digest()


def of_facts(facts: object) -> list[str]:
    """Sentences on the `tags` of a `dataset.json`, which is untrusted; none if it has none."""

    def count(*keys: str) -> int:
        found: object = facts
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, int) and not isinstance(found, bool) else 0

    if not isinstance(facts, dict):
        return []
    listed = [(name, count("categories", name, "tags")) for name in TAG_CATEGORIES]
    sentences = [
        f"{count('tags'):,} tags ({', '.join(f'{n:,} {name}' for name, n in listed if n)}), used "
        f"{count('assignments'):,} times; {count('without'):,} samples have none"
    ]
    dropped = [(reason, count("dropped", reason, "tags")) for reason in TAG_MEANINGS]
    if any(n for _, n in dropped):
        sentences.append(
            "tags dropped: "
            + ", ".join(f"{n:,} {reason} ({TAG_MEANINGS[reason]})" for reason, n in dropped if n)
            + f"; {DROPPED} lists them"
        )
    return sentences


def without_rare(path: Path, images: int) -> str:
    """The text of a `dropped_tags.csv` without the tags of at most so many samples, as of those that are removed.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        left = rows[:1] + [row for row in rows[1:] if int(row[2]) > images]
    except (OSError, ValueError, IndexError, csv.Error):
        raise UsageError(f"{path} cannot be read as a table of tags: {_AGAIN}") from None
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(left)
    return out.getvalue()


@dataclass(frozen=True)
class Assigned:
    """The tags of some samples.

    Attributes:
        ids: ids of the tags of all samples, one after another, int32; those of a sample ascend.
        ends: shape (n,), where the ids of each sample end.
    """

    ids: npt.NDArray[np.int32]
    ends: IntArray

    def __len__(self) -> int:
        return len(self.ends)

    def counts(self) -> IntArray:
        """Number of tags of each sample, shape (n,)."""
        return np.diff(self.ends, prepend=0)

    def of(self, row: int) -> list[int]:
        """The ids of a sample."""
        found: list[int] = self.ids[self.ends[row - 1] if row else 0 : self.ends[row]].tolist()
        return found

    def take(self, rows: IntArray) -> Assigned:
        """The tags of some samples, in that order."""
        counts = self.counts()[rows]
        ends = np.cumsum(counts)
        at = np.repeat(self.ends[rows] - ends, counts) + np.arange(ends[-1] if len(ends) else 0)
        return Assigned(self.ids[at], ends)

    def column(self) -> pa.ListArray:
        """The tags as a column of lists of int32."""
        offsets = pa.array(np.concatenate(([0], self.ends)), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(self.ids, pa.int32()))

    def totals(self, tags: int) -> IntArray:
        """Number of samples with each tag, shape (tags,)."""
        return np.bincount(self.ids, minlength=tags).astype(np.int64)


def assigned(table: pa.Table, keys: pa.Array | pa.ChunkedArray, tags: int, where: Path) -> Assigned:
    """The tags of samples by their keys.

    Args:
        table: of schema `SAMPLE_TAGS`.
        keys: keys of the samples.
        tags: number of tags in the vocabulary.
        where: path of the table, for messages.

    Raises:
        UsageError: a sample has no row, or ids that are not in the vocabulary or do not ascend.
    """
    rows = pc.index_in(keys, value_set=table["key"].combine_chunks())
    if rows.null_count:
        raise UsageError(f"{where} does not have every sample of index.parquet: {_AGAIN}")
    column = table["tags"].combine_chunks()
    ids, ends = of_lists(column)
    within = np.ones(max(0, len(ids) - 1), dtype=np.bool_)
    within[ends[(ends > 0) & (ends < len(ids))] - 1] = False  # from the last id of a sample to the first of the next
    if column.null_count or (len(ids) and not 0 <= ids.min() <= ids.max() < tags) or (np.diff(ids) <= 0)[within].any():
        raise UsageError(f"{where} lists tags that {VOCABULARY} does not have: {_AGAIN}")
    found = rows.to_numpy(zero_copy_only=False) if isinstance(rows, pa.Array) else rows.to_numpy()
    return Assigned(ids, ends).take(found.astype(np.int64))


def of_lists(column: pa.ListArray) -> tuple[npt.NDArray[np.int32], IntArray]:
    """The values of a column of lists of int32, with -1 for nulls, and where each list ends."""
    ids = column.flatten().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    return ids, np.cumsum(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))


def read_assigned(folder: Path, keys: pa.Array | pa.ChunkedArray, tags: int) -> Assigned:
    """The tags of samples of the dataset in a folder; arguments and errors are those of `assigned`."""
    path = folder / ASSIGNED
    if not path.is_file():
        raise UsageError(f"{path} does not exist: {_AGAIN}")
    return assigned(parquet.read(path, SAMPLE_TAGS), keys, tags, path)


class Members:
    """The part of a sample's JSON member with its tags, and its length without making it.

    Args:
        vocabulary: of the dataset.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        names_ = [json.dumps(name, ensure_ascii=False) for name in vocabulary.names]
        self._lengths = np.array([len(name.encode()) for name in names_], dtype=np.int64)
        order = list(vocabulary.ranges)
        self._codes = np.array([order.index(category) for category in vocabulary.categories], dtype=np.int64)

    def text(self, ids: Sequence[int]) -> str:
        """The member of the JSON object, with a comma before it."""
        found = json.dumps(self._vocabulary.grouped(ids), ensure_ascii=False, separators=(",", ":"))
        return f',"tags":{found}'

    def sizes(self, tags: Assigned) -> IntArray:
        """Bytes of `text` for each sample, shape (n,)."""
        row = np.repeat(np.arange(len(tags)), tags.counts())
        sizes = np.full(len(tags), len(self.text([]).encode()), dtype=np.int64)
        sizes += np.bincount(row, weights=self._lengths[tags.ids], minlength=len(tags)).astype(np.int64)
        # a comma between two names: one less than names in each list that has any
        lists = np.unique(row * max(1, len(self._vocabulary.ranges)) + self._codes[tags.ids])
        commas = tags.counts() - np.bincount(lists // max(1, len(self._vocabulary.ranges)), minlength=len(tags))
        return sizes + commas
