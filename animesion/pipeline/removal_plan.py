"""What a removal changes: the images that are asked for, their copies, and the shards that have to be written again.

An image goes with its copies: equal bytes, equal pixels and verified duplicates, which a later build would otherwise
keep in its place. Only shards that have a removed sample, or one whose group is named after it, are written again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from animesion.dataset import tags
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.pipeline import versions
from animesion.schemas import DropReason
from animesion.storage import checksums, removed
from animesion.storage.removed import REMOVED
from animesion.storage.workspace import sha256_file

#: The hidden folder of a removal in progress.
STAGE = ".removal"

#: Sources whose authors are tags with a space between them.
_TAGGED = frozenset({"danbooru", "dump", "gelbooru", "moebooru", "safebooru", "sample"})
#: What a build or a removal writes into a dataset's folder; anything else may have more about an image.
_KNOWN = frozenset(
    {"README.md", "SHA256SUMS", "_info.json", "classes.csv", "croissant.json", "curated.parquet", "data",
     "dataset.json", "features", "index.parquet", "pack", "plots", "raw", "recipe.toml", REMOVED,
     "report.html", ".receipts", STAGE, versions.FOLDER, *tags.FILES}
)  # fmt: skip


@dataclass(frozen=True)
class Image:
    """A row of `curated.parquet` that goes.

    Attributes:
        key: its key.
        asked: whether it was asked for, not a copy of such an image.
        split: its split; empty if it is not in the shards.
        label: its class, or candidate labels.
        reason: why it was not kept.
    """

    key: str
    asked: bool
    split: str
    label: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a removal changes.

    Attributes:
        images: the images, by key.
        samples: number of samples by split.
        rewritten: shards that are written again.
        emptied: shards that are deleted, as nothing is left in them.
        untouched: number of the other shards.
        notes: sentences on what the removal does not reach.
    """

    images: list[Image]
    samples: dict[str, int]
    rewritten: list[str]
    emptied: list[str]
    untouched: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return asdict(self)


class Request:
    """The rows of a dataset that are asked for, and what follows from that.

    Args:
        dataset: the dataset.
        what: see `removal.remove`.
        authors: likewise.
    """

    def __init__(self, dataset: Dataset, what: Sequence[str], authors: Sequence[str]) -> None:
        self.dataset = dataset
        self.recipe = dataset.recipe
        listed = checksums.read(dataset.path)
        for name in ("curated.parquet", "index.parquet", "dataset.json", "recipe.toml"):
            if sha256_file(dataset.path / name) != listed.get(name):
                raise UsageError(f"{dataset.path}: {name} does not match its SHA256SUMS: run `animesion verify`")
        self.curated = dataset.curated
        self.index = dataset.index
        columns = ("key", "kept", "reason", "source", "source_id", "page_url", "file_url", "author", "md5", "sha256")
        columns += ("pixels_blake3", "cluster", "keeper", "group", "label", "split")  # type: ignore[assignment]
        self.columns: dict[str, list[Any]] = {name: self.curated[name].to_pylist() for name in columns}
        self._same = _Same(self.columns)
        self.asked = {row for text in what for row in self._named(text)}
        self.asked |= {row for author in authors for row in self._by(author)}
        self.rows = self._same.closure(self.asked)
        self.keys = {self.columns["key"][row] for row in self.rows}
        kept = [row for row, keep in enumerate(self.columns["kept"]) if keep]
        if self.rows.issuperset(kept):
            raise UsageError(f"nothing would be left of {dataset.path}: delete the folder instead")
        self.groups = self._renamed_groups()
        self.concerned = self._concerned()

    def _named(self, text: str) -> set[int]:
        """The rows of the image that a text names.

        Raises:
            UsageError: it names no image, or several.
        """
        columns = self.columns
        wanted, lower = text.strip(), text.strip().lower()
        found: set[int] = set()
        if "://" in wanted:
            url = _url(wanted)
            for name in ("page_url", "file_url"):
                found |= {row for row, value in enumerate(columns[name]) if value and _url(value) == url}
        else:
            if re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", lower):
                packed = self.index["key"].filter(pc.equal(self.index["sha256"], lower)).to_pylist()
                for name in ("md5", "sha256", "pixels_blake3"):
                    found |= {row for row, value in enumerate(columns[name]) if value == lower}
                found |= {row for row, key in enumerate(columns["key"]) if key in packed}
            ids = zip(columns["key"], columns["source"], columns["source_id"], strict=True)
            for row, (key, source, source_id) in enumerate(ids):
                # an image whose faces are samples has several rows: its key, `-face` and a number
                whole = re.sub(r"-face[0-9]+_*$", "", key)
                if wanted and wanted in (key, whole, source_id, f"{source}:{source_id}"):
                    found.add(row)
        found = {row for row in found if columns["reason"][row] != DropReason.REMOVED}
        if not found:
            gone = {digest for each in removed.read(self.dataset.path) for digest in each[:3]}
            there = lower in gone
            raise UsageError(
                f"{wanted!r} was removed from {self.dataset.path} before: its {REMOVED} has it"
                if there
                else f"{self.dataset.path} has no image {wanted!r}: give a key or source_id of its curated.parquet, "
                "the URL of a page or file, or a digest"
            )
        if not found <= self._same.closure({min(found)}):
            keys = sorted(columns["key"][row] for row in found)
            more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
            raise UsageError(f"{wanted!r} names several images: name each by its key, {', '.join(keys[:3])}{more}")
        return found

    def _by(self, author: str) -> set[int]:
        """The rows of an author.

        Raises:
            UsageError: nothing is by this author.
        """
        wanted = author.strip().casefold()
        found = set()
        for row, (value, source) in enumerate(zip(self.columns["author"], self.columns["source"], strict=True)):
            value = (value or "").strip().casefold()
            # a tag has no spaces, and a person's name has
            if wanted and (value == wanted or (source in _TAGGED and wanted in value.split())):
                found.add(row)
        if not found:
            raise UsageError(
                f"{self.dataset.path} has nothing by the author {author!r}: the column `author` of its curated.parquet "
                "has the names"
            )
        return found

    def _renamed_groups(self) -> dict[str, str]:
        """New names of groups that are named after a removed image: the smallest key that is left, as in a build."""
        left: dict[str, str] = {}
        for row, (key, group) in enumerate(zip(self.columns["key"], self.columns["group"], strict=True)):
            if group in self.keys and row not in self.rows:
                left[group] = min(key, left.get(group, key))
        return left

    def _concerned(self) -> set[str]:
        """The shards with a removed sample, or with one whose group has another name now."""
        groups = zip(self.columns["key"], self.columns["group"], strict=True)
        keys = self.keys | {key for key, group in groups if group in self.groups}
        chosen = self.index["shard"].filter(pc.is_in(self.index["key"], value_set=pa.array(sorted(keys), pa.string())))
        return set(chosen.to_pylist())

    def plan(self) -> Plan:
        """What will change."""
        columns = self.columns
        images = [
            Image(
                columns["key"][row],
                row in self.asked,
                columns["split"][row] if columns["kept"][row] else "",
                columns["label"][row],
                columns["reason"][row],
            )
            for row in sorted(self.rows, key=lambda row: columns["key"][row])
        ]
        gone = self.index["key"].to_pylist(), self.index["shard"].to_pylist()
        left = {shard for key, shard in zip(*gone, strict=True) if key not in self.keys}
        emptied = sorted(self.concerned - left)
        count = Counter(image.split for image in images if image.split)
        samples = {split: count[split] for split in self.dataset.splits if count[split]}
        untouched = sum(len(split.shards) for split in self.dataset.splits.values()) - len(self.concerned)
        return Plan(images, samples, sorted(self.concerned & left), emptied, untouched, self._notes())

    def _notes(self) -> list[str]:
        """Sentences on what has to be done by hand."""
        notes = []
        root = self.dataset.path
        columns = self.columns
        others = sorted(path.name for path in root.iterdir() if path.name not in _KNOWN and path.name[:5] != ".tmp-")
        if others:
            notes.append(f"{root} has {', '.join(others[:5])}, which may name or show the images: delete what does")
        if (unknown := self._unread()) and not (root / "raw").is_dir():
            notes.append(f"{unknown:,} images have no digest, so a later build cannot know them")
        elif unknown:
            notes.append(
                f"{unknown:,} images were never read and have no digest, so a later build cannot know them: delete "
                "their files or rows at the source"
            )
        images = {columns["source"][row] for row in self.rows}
        if any(not removed.post_digest(source, "1") and not source.startswith("sample") for source in images):
            notes.append("the files of the source are not changed: delete them there")
        notes.append(
            "copies elsewhere keep the images until they are replaced: published versions, tags and the history of a "
            "Hub repository, caches, and the work folders of other builds"
        )
        return notes

    def _unread(self) -> int:
        columns = ("sha256", "pixels_blake3", "source", "source_id")
        rows = zip(*(self.columns[name] for name in columns), strict=True)
        return sum(
            row in self.rows and not (sha256 or pixels or removed.post_digest(*post))
            for row, (sha256, pixels, *post) in enumerate(rows)
        )


class _Same:
    """Which rows show one image: equal bytes, equal pixels, one entry of the source, or verified copies."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        keys = {key: row for row, key in enumerate(columns["key"])}
        self._tokens: list[list[tuple[str, ...]]] = []
        self._rows: dict[tuple[str, ...], list[int]] = {}
        names_ = ("key", "keeper", "sha256", "pixels_blake3", "cluster", "source", "source_id")
        for row, values in enumerate(zip(*(columns[name] for name in names_), strict=True)):
            key, keeper, sha256, pixels, cluster, source, source_id = values
            tokens: list[tuple[str, ...]] = [("key", key), *([("key", keeper)] if keeper in keys else [])]
            tokens += [(name, value) for name, value in (("b", sha256), ("p", pixels), ("c", cluster)) if value]
            tokens += [("id", source, source_id)] if source_id else []
            self._tokens.append(tokens)
            for token in tokens:
                self._rows.setdefault(token, []).append(row)

    def closure(self, rows: Iterable[int]) -> set[int]:
        """The rows and all that show the same images."""
        found, waiting, done = set(rows), list(rows), set()
        while waiting:
            for token in self._tokens[waiting.pop()]:
                if token not in done:
                    done.add(token)
                    new = [row for row in self._rows[token] if row not in found]
                    found.update(new)
                    waiting += new
        return found


def _url(text: str) -> str:
    """A URL for comparison: without its scheme, a fragment, and a slash at its end."""
    return text.strip().partition("#")[0].partition("://")[2].rstrip("/")
