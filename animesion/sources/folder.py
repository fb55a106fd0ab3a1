"""Folders of images in any layout that people have, a tar or zip of them, on this machine or in a bucket.

Which folder is the label is decided in `animesion.dataset.layouts`, which files there are in `file_tree`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from animesion.config.settings import Section
from animesion.dataset import layouts
from animesion.dataset.path_parts import stem_of
from animesion.dataset.readings import Layout, Reading
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, families, file_key, stamps
from animesion.sources.file_tree import Entry, FileTree
from animesion.sources.stored import PathOrUrl


class FolderOptions(Section):
    """Options of the `folder` source."""

    path: PathOrUrl = Field(description="folder of images, or a .tar or .zip of it; may be s3:// or gs://")
    label_level: int = Field(
        0,
        ge=-16,
        le=16,
        description="which folder is the class: 1 for the first below the path, -1 for the one that holds the image; "
        "0 to find out",
    )
    pattern: str = Field(
        "",
        description="regular expression for paths below the path, with a group named `class`, and maybe `split` and "
        "`group`, such as '(?P<split>[^/]+)/(?P<class>[^/]+)/.*'",
    )
    table: str = Field(
        "",
        description="path below the path of the table (.csv, .tsv or .txt) that lists images and classes; empty to "
        "find it where folders are not of classes",
    )
    label_column: str = Field("", description="its column of classes; empty to find it")
    family: families.Family = "auto"
    encoding: str = Field(
        "",
        description="legacy encoding of the names in a zip that does not state it, and of tables beside the images, "
        "such as cp932; empty to recognise it",
    )
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")

    @model_validator(mode="after")
    def _has_one_reading(self) -> Self:
        given = {"pattern": self.pattern, "label_level": self.label_level, "table": self.table or self.label_column}
        chosen = [name for name, value in given.items() if value]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} read classes in different ways: give one of them")
        return self

    @field_validator("pattern")
    @classmethod
    def _has_a_class(cls, value: str) -> str:
        names = _compiled(value).groupindex.keys()
        if value and "class" not in names:
            raise ValueError("the regular expression needs a group named class, such as '(?P<class>[^/]+)/.*'")
        return value


class FolderSource:
    """Images in folders."""

    Options = FolderOptions
    summary: ClassVar[str] = "class folders, split folders, metadata tables or sidecars; or a tar or zip of them"
    remote: ClassVar[bool] = False

    def __init__(self, options: FolderOptions) -> None:
        self.options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """Nothing needs to be held open."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item per file that the layout counts, sorted by name."""
        tree = self._tree()
        listing = tree.listing()
        if not listing.entries:
            raise UsageError(f"source.path: {tree.root} contains no files")
        if {"dataset.json", "index.parquet"} <= {entry.name for entry in listing.entries}:
            raise UsageError(
                f"source.path: {tree.root} is a built dataset, whose images are in its shards: set "
                f"source.kind=webdataset and source.path={tree.root}/data"
            )
        layout = layouts.understand(
            [entry.name for entry in listing.entries if entry.failure != DropReason.UNSAFE_PATH],
            lambda paths: tree.contents(listing, paths),
            f"source.path: {tree.root}",
            label_level=self.options.label_level,
            pattern=self.options.pattern,
            hidden=[entry.name for entry in listing.hidden],
            encoding=self.options.encoding,
            table=self.options.table,
            label_column=self.options.label_column,
        )
        self.notes += [layout.summary, *listing.notes, *listing.passed_over(layout.sidecars)]
        self._note_merged(layout.classes)
        yield from self._items(layout, listing.entries, f"{layout.root}/" if tree.is_archive and layout.root else "")

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """Read files, or the members of an archive that is opened once."""
        yield from self._tree().read([json.loads(item.locator) for item in items])

    def stamp(self) -> str:
        """A digest of the names, sizes and times of all files."""
        return stamps.of([self.options.path])

    def _tree(self) -> FileTree:
        return FileTree(self.options.path, self.options.max_bytes, self.options.encoding)

    def _items(self, layout: Layout, entries: Iterable[Entry], prefix: str) -> Iterator[Item]:
        """Items of the files that the layout counts, and of those with an unsafe name, which nothing may vanish for."""
        unread = Reading()
        counted = [
            entry for entry in entries if entry.name in layout.readings or entry.failure == DropReason.UNSAFE_PATH
        ]
        readings = [layout.readings.get(entry.name, unread) for entry in counted]
        labels = [tuple(clean_text(label) for label in reading.labels) for reading in readings]
        known = families.tokens(
            [stem_of(entry.name) for entry in counted],
            [each[0] if each else "" for each in labels],
            self.options.family,
        )
        seen: dict[str, int] = {}
        for order, (entry, reading) in enumerate(zip(counted, readings, strict=True)):
            repeat = seen[entry.name] = seen.get(entry.name, -1) + 1  # an archive may hold one name twice
            raw = os.fsencode(entry.name) + (b"\0%d" % repeat if repeat else b"")
            group = (f"group:{clean_text(reading.group)}",) if reading.group else ()
            fields = {name: clean_text(value, 2000) for name, value in reading.fields.items()}
            yield Item(
                key=file_key("folder", raw, stem_of(entry.name)),
                source="folder",
                source_id=clean_text(entry.name.removeprefix(prefix), 1000),
                locator=json.dumps(entry.locator),
                order=order,
                labels=labels[order],
                families=(*group, *known[order]),
                split=reading.split,
                rating=fields.get("rating", "")[:1].lower(),
                author=fields.get("author", ""),
                page_url=fields.get("page_url", ""),
                file_url=fields.get("file_url", ""),
                licence=fields.get("licence", ""),
                failure=entry.failure,
                detail=entry.detail,
            )

    def _note_merged(self, classes: Sequence[str]) -> None:
        """Name the folders that are one class after cleaning."""
        merged = Counter(map(clean_text, classes))
        self.notes += [
            f"several folders are spelt alike but for blanks or accents and are one class: '{label}'"
            for label, folders in merged.items()
            if folders > 1
        ]


def _compiled(value: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
