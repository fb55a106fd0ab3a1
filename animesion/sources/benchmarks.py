"""The source for fine-grained benchmarks as released: CUB-200-2011, Stanford Cars, FGVC-Aircraft, Food-101 and others.

The layouts are in `animesion.sources.benchmark_layouts`, the published counts in `animesion.sources.published_facts`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item
from animesion.sources import benchmark_layouts, clean_text, file_key
from animesion.sources.benchmark_layouts import Files, Row
from animesion.sources.file_tree import FileTree
from animesion.sources.published_facts import PUBLISHED, PublishedSet
from animesion.sources.published_sets import DownloadOptions, PublishedFiles, check_complete, hold_out_validation
from animesion.wording import amount

#: Largest label file in bytes: the JSON of iNaturalist 2017 describes 579,184 images.
_LARGEST_LABELS = 512 << 20
_IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
_ALIASES = {alias: each.name for each in PUBLISHED.values() for alias in each.aliases if each.source == "benchmark"}
_SPLITS = ("train", "val", "test", "")


class BenchmarkOptions(DownloadOptions):
    """Options of the `benchmark` source."""

    set: Literal[
        "cub-200-2011",
        "stanford-cars",
        "fgvc-aircraft",
        "stanford-dogs",
        "flowers-102",
        "oxford-pets",
        "food-101",
        "nabirds",
        "vegfru",
        "inaturalist-2017",
        "icartoonface",
    ] = Field(description="the set; names of the FGIR label files (cub, cars, aircraft, ...) work too")
    val: Literal["published", "train", "held-out"] = Field(
        "published",
        description="a published val is kept, or joins train; `held-out` then holds out the last fifth of each class's "
        "training images as val, as the GLSim tools do",
    )

    @field_validator("set", mode="before")
    @classmethod
    def _resolve_alias(cls, value: Any) -> Any:
        return _ALIASES.get(value, value) if isinstance(value, str) else value


class BenchmarkSource(PublishedFiles):
    """Images of a benchmark with the published split."""

    Options: ClassVar[type[Section]] = BenchmarkOptions
    summary: ClassVar[str] = "CUB, Cars, Aircraft, Dogs, Flowers, Pets, Food-101 and others as downloaded; splits kept"
    remote: ClassVar[bool] = False

    def __init__(self, options: BenchmarkOptions, published: PublishedSet | None = None) -> None:
        """Keep the options; nothing is read yet.

        Args:
            options: options of the source.
            published: expected counts, by default those of `animesion.sources.published_facts`.
        """
        super().__init__(options)
        self.options = options
        self._due = published or PUBLISHED[options.set]

    def items(self) -> Iterator[Item]:
        """One item per listed image: train, val, test, each in the published order.

        Raises:
            UsageError: the layout is not this set's, a label file is malformed, or counts differ from the published
                ones.
        """
        due = self._due
        listed = self._paths()
        files = Files(list(listed), lambda path: self._content(path, listed[path]), str(self.options.path))
        rows, places = self._rows(files)
        labels = self._labels(rows)
        items = []
        for row, place in zip(rows, places, strict=True):
            file = listed.get(place) or Item("", "", place, "{}", 0, failure=DropReason.MISSING_FILE)
            items.append(self._item(file, row, labels[row.number]))
        items.sort(key=lambda item: _SPLITS.index(item.split))
        self._check_unique(items)
        used = set(places)
        others = sum(path not in used and path.lower().endswith(_IMAGES) for path in listed)
        if others:
            self.notes.append(f"{amount(others, 'image')} that no list names skipped")
        self.notes += check_complete(items, due, self.options.incomplete)
        if self.options.val != "published":
            items = [replace(item, split="train") if item.split == "val" else item for item in items]
        if self.options.val == "held-out":
            items = hold_out_validation(items)
        yield from (replace(item, order=order) for order, item in enumerate(items))

    def _paths(self) -> dict[str, Item]:
        """Files by path below the set's own folder, which may be next to those of other sets."""
        paths = self.files()
        for folder in self._due.folders:
            inside = {path.partition("/")[2]: item for path, item in paths.items() if path.startswith(f"{folder}/")}
            if inside:
                return inside
        return paths

    def _content(self, path: str, item: Item) -> bytes:
        """A label file, which may be larger than an image."""
        [payload] = FileTree(str(self.options.path), _LARGEST_LABELS).read([json.loads(item.locator)])
        if payload.reason:
            raise UsageError(
                f"source.path: {self.options.path}/{clean_text(path, 200)} cannot be read "
                f"({payload.detail or payload.reason})"
            )
        return payload.content

    def _rows(self, files: Files) -> tuple[list[Row], list[str]]:
        """The rows of the first layout of which there are images, else of the first; and the path of each image."""
        found: list[tuple[list[Row], list[str]]] = []
        for layout in benchmark_layouts.complete(self._due.name, files):
            rows = layout.rows(files)
            places = _places(rows, files.paths)
            if rows:
                found.append((rows, places))
            if any(places):
                break
        if not found:
            raise self._wrong_layout(files)
        rows, places = found[-1] if any(found[-1][1]) else found[0]
        return rows, [place or f"{row.folder}/{row.name}" for row, place in zip(rows, places, strict=True)]

    def _wrong_layout(self, files: Files) -> UsageError:
        path, due = self.options.path, self._due
        lacking = benchmark_layouts.lacking(due.name, files)
        if lacking:
            return UsageError(
                f"source.path: {path} has no {lacking}, which {due.title} has; get the rest of the label files"
            )
        some = ", ".join(clean_text(each, 60) for each in files.paths[:3])
        return UsageError(
            f"source.path: {path} is not laid out as {due.title}: expected {', '.join(due.layout)}; found {some}; set "
            "source.path to the folder that the authors' archive unpacks to"
        )

    def _labels(self, rows: Sequence[Row]) -> dict[int, str]:
        """Class names by number; classes of one name have their number added."""
        names: dict[int, str] = {}
        for row in rows:
            name = names.setdefault(row.number, clean_text(row.label))
            if name != clean_text(row.label):
                raise UsageError(
                    f"source.path: class {row.number} of {self._due.title} is called {clean_text(name, 60)!r} and "
                    f"{clean_text(row.label, 60)!r}; the label files do not belong together"
                )
        times = Counter(names.values())
        same = sum(times[name] > 1 for name in names.values())
        if same:
            self.notes.append(f"{same:,} classes share their name with another: their numbers were added")
        return {number: name if times[name] == 1 else f"{name} ({number})" for number, name in names.items()}

    def _check_unique(self, items: Sequence[Item]) -> None:
        first: dict[str, Item] = {}
        for item in items:
            other = first.setdefault(item.key, item)
            if other is not item:
                splits = " and ".join(dict.fromkeys((other.split, item.split)))
                raise UsageError(
                    f"source.path: {clean_text(item.source_id, 80)!r} is listed twice"
                    f"{f' ({splits})' if splits else ''}; the label files are not as published"
                )

    def _item(self, file: Item, row: Row, label: str) -> Item:
        name = f"{row.folder}/{row.name}"
        return replace(
            file,
            key=file_key(self._due.name, name.encode("utf-8", "surrogateescape"), PurePosixPath(row.name).stem),
            source="benchmark",
            source_id=f"{self._due.name}/{clean_text(name, 900)}",
            labels=(label,),
            families=(),
            split=row.split,
            class_order=row.number,
            author=clean_text(row.author, 300),
            licence=clean_text(row.licence, 100),
        )


def _places(rows: Sequence[Row], paths: Sequence[str]) -> list[str]:
    """The file of each image, below the outermost folder of its name that has it; empty for none."""
    known = set(paths)
    bases: dict[str, list[str]] = {}
    for folder in dict.fromkeys(row.folder for row in rows):
        found: Counter[str] = Counter()
        for path in paths:
            at = f"/{path}".find(f"/{folder}/")
            if at >= 0:
                found[path[:at]] += 1
        bases[folder] = sorted(found, key=lambda base: (base.count("/"), base))
    return [
        next((path for base in bases[row.folder] if (path := f"{base}{name}") in known), "")
        for row in rows
        for name in [clean_text(f"{row.folder}/{row.name}", 1000)]  # as the files were listed
    ]
