"""Downloads of published sets: their files, and checks against what is published.

Readers of sets build on this: `animesion.sources.ultra_fgvc`, `animesion.sources.moeimouto` and
`animesion.sources.benchmarks`. The published numbers are in `animesion.sources.published_facts`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, file_key
from animesion.sources.file_tree import Entry, FileTree
from animesion.sources.published_facts import PUBLISHED, PublishedSet
from animesion.sources.stored import PathOrUrl
from animesion.wording import amount

#: Percentage of a class's training images that stay in train when val is held out: the first ones, in file order.
TRAIN_PERCENT = 80


#: Option of a source with published counts.
Incomplete = Annotated[
    Literal["refuse", "accept"],
    Field(description="treatment of a download whose counts differ from the published ones"),
]


class DownloadOptions(Section):
    """Options of every reader of a published set."""

    path: PathOrUrl = Field(description="folder of the download, or a .tar or .zip of it; may be s3:// or gs://")
    incomplete: Incomplete = "refuse"
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


class PublishedOptions(DownloadOptions):
    """Options of readers that also take label files."""

    labels: str = Field(
        "", description="folder of train.csv, val.csv, train_val.csv, test.csv with splits and class ids"
    )


class PublishedFiles:
    """The files of a download, in a folder or an archive; readers of sets build on it."""

    def __init__(self, options: DownloadOptions) -> None:
        self._options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The bytes of each item."""
        return self._tree().read([json.loads(item.locator) for item in items])

    def files(self) -> dict[str, Item]:
        """Every file by its path below the folders that all files share, sorted."""
        listing = self._tree().listing()
        if not listing.entries:
            raise UsageError(f"source.path: {self._options.path} contains no files")
        prefix = _wrapper(listing.entries) if self._tree().is_archive else ""
        found: dict[str, Item] = {}
        repeated = 0
        for order, entry in enumerate(listing.entries):
            path = clean_text(entry.name.removeprefix(prefix), 1000)
            repeated += path in found
            item = Item(
                key=file_key("folder", os.fsencode(entry.name), PurePosixPath(path).stem),
                source="folder",
                source_id=path,
                locator=json.dumps(entry.locator),
                order=order,
                failure=entry.failure,
                detail=entry.detail,
            )
            found.setdefault(path, item)
        if repeated:
            paths = amount(repeated, "path occurs", "paths occur")
            self.notes.append(f"{paths} in the archive more than once: the first of each was taken")
        # a folder without images is no empty class here
        self.notes += [note for note in listing.notes if not note.startswith("class folder")]
        self.notes += listing.passed_over()
        return found

    def _tree(self) -> FileTree:
        return FileTree(self._options.path, self._options.max_bytes)


def _wrapper(entries: Sequence[Entry]) -> str:
    """`name/` when everything in an archive is below one folder that holds only folders, else an empty string."""
    paths = [PurePosixPath(entry.name).parts for entry in entries if not entry.failure]
    tops = {parts[0] for parts in paths if parts}  # a member named "." has none
    return f"{tops.pop()}/" if len(tops) == 1 and all(len(parts) > 2 for parts in paths) else ""


def hold_out_validation(items: Sequence[Item]) -> list[Item]:
    """Move the last training images of each class to val, all but `int(0.8 n)`, as the GLSim tools do."""
    sizes = Counter(item.class_order for item in items if item.split == "train")
    seen: Counter[int] = Counter()
    result = []
    for item in items:
        if item.split == "train":
            seen[item.class_order] += 1
            head = sizes[item.class_order] * TRAIN_PERCENT // 100
            item = replace(item, split="train" if seen[item.class_order] <= head else "val")
        result.append(item)
    return result


def differences(items: Iterable[Item], due: PublishedSet, group_of: Mapping[str, str] | None = None) -> list[str]:
    """Differences from the published set, as parts of a message; empty for a complete download.

    Val counts as train where no val split is published.

    Args:
        items: the listing; items with a failure have no file.
        due: the published set.
        group_of: group of each item by key, for a set with groups.
    """
    present = [item for item in items if not item.failure]
    sizes: Counter[tuple[int, str]] = Counter()
    groups: Counter[tuple[str, str]] = Counter()
    for item in present:
        split = _part(item, due)
        sizes[item.class_order, split] += 1
        groups[(group_of or {}).get(item.key, ""), split] += 1
    found_differences = []
    classes = {number for number, _ in sizes}
    if len(classes) != due.classes:
        found_differences.append(f"{len(classes):,} of {due.classes:,} classes")
    for split, counts in due.splits.items():
        found = sum(count for (_, name), count in sizes.items() if name == split)
        if found not in counts:
            found_differences.append(f"{found:,} of {counts[0]:,} {split} images".replace("  ", " "))
        for group in due.groups if len(due.groups) > 1 else ():
            share = counts[0] // len(due.groups)
            if groups[group, split] != share:
                found_differences.append(f"{group}: {groups[group, split]:,} of {share:,} {split}")
        if split in due.per_class:
            off = sorted(number for number in classes if sizes[number, split] != due.per_class[split])
            if off:
                found_differences.append(
                    f"{amount(len(off), 'class', 'classes')} without {due.per_class[split]} {split} images each, the "
                    f"first {off[0] + 1} with {sizes[off[0], split]}"
                )
    return found_differences


def check_complete(
    items: Sequence[Item],
    due: PublishedSet,
    incomplete: str,
    group_of: Mapping[str, str] | None = None,
    *,
    option: str = "source.path",
) -> list[str]:
    """Compare a download with the published set and return notes.

    Args:
        items: the listing.
        due: the published set.
        incomplete: what to do where they differ: `refuse` or `accept`.
        group_of: as `differences` takes it.
        option: name of the option that sets the place, for messages.

    Raises:
        UsageError: the counts differ and `incomplete` does not accept that.
    """
    found_differences = differences(items, due, group_of)
    if not found_differences:
        return []
    missing = sum(item.failure == DropReason.MISSING_FILE for item in items)
    if missing:
        found_differences.append(amount(missing, "listed file is missing", "listed files are missing"))
    text = f"{due.title} is not as published: {'; '.join(found_differences)}"
    looks = _looks_like(items, due)
    if incomplete == "accept":
        return [text]
    raise UsageError(
        f"{option}: {text}{looks}; get the rest, or set source.incomplete=accept to build from these files"
    )


def _part(item: Item, due: PublishedSet) -> str:
    if "" in due.splits:
        return ""
    return "train" if item.split == "val" and "val" not in due.splits else item.split


def _looks_like(items: Sequence[Item], due: PublishedSet) -> str:
    """The other set with these counts, as part of a message."""
    names = [
        other.name
        for other in PUBLISHED.values()
        if other.source == due.source and other.name != due.name and not differences(items, replace(other, groups=()))
    ]
    return f" (these are the counts of {names[0]})" if names else ""
