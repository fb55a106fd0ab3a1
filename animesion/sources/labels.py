"""The source for label files with an image root: DAF:re's `class_id,BBBB/ID.jpg` CSVs and their published splits."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from animesion.config.settings import Section
from animesion.dataset import label_files, text_tables
from animesion.dataset.path_parts import stem_of
from animesion.errors import UsageError
from animesion.schemas import Box, Item, Payload
from animesion.sources import clean_text, faces, families, file_key, stamps, tag_files
from animesion.sources.image_root import ImageRoot
from animesion.sources.published_facts import DAF_RE, PublishedSet
from animesion.sources.published_sets import Incomplete, check_complete
from animesion.sources.stored import PathOrUrl, not_found
from animesion.sources.tag_tables import TagTables
from animesion.wording import amount

#: Splits by file name; `train_val`, train and val together, is train without a val split.
SPLIT_OF = {"train": "train", "val": "val", "test": "test", "train_val": "train"}


class LabelsOptions(Section):
    """Options of the `labels` source."""

    labels: str = Field(description="folder of train.csv, val.csv, test.csv (those that exist), or one CSV")
    images: PathOrUrl = Field(
        description="folder that the paths in the CSVs are relative to, such as faces/ of DAF:re; may be s3:// or gs://"
    )
    names: str = Field("", description="class_id,name CSV; by default classid_classname.csv next to the label files")
    faces: str = Field("", description="table of head boxes; default: the images are crops already")
    page_url: str = Field(
        "https://danbooru.donmai.us/posts/{id}",
        description="page of an image whose path has DAF:re's form BBBB/ID.jpg; empty for none",
    )
    tags: str = Field(
        "",
        description="folder of train_tags.csv, val_tags.csv, test_tags.csv, which are read if tags.categories is set; "
        "by default that of the label files",
    )
    set: Literal["", "daf-re"] = Field("", description="published set whose counts the label files must have")
    incomplete: Incomplete = "refuse"
    encoding: text_tables.Encoding = ""
    family: families.Family = "auto"
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


class LabelsSource:
    """Images listed in label files."""

    Options: ClassVar[type[Section]] = LabelsOptions
    summary: ClassVar[str] = "label CSVs (class_id,BBBB/ID.jpg) with an image root; published splits kept"
    remote: ClassVar[bool] = False

    def __init__(self, options: LabelsOptions, published: PublishedSet | None = None) -> None:
        """Keep the options; nothing is read yet.

        Args:
            options: options of the source.
            published: expected counts, by default those of the published set in the options.
        """
        self.options = options
        self.notes: list[str] = []
        self.with_tags = False
        self._due = published or (DAF_RE if options.set else None)

    def tag_tables(self) -> TagTables:
        """No tables: published tags are resolved already."""
        return TagTables()

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item per row: train, val, test, each in the order of its rows.

        Raises:
            UsageError: a table cannot be read, or the counts are not those of the published set.
        """
        if self._due is None:
            yield from self._items()
            return
        items = list(self._items())
        self.notes += check_complete(items, self._due, self.options.incomplete, option="source.labels")
        yield from items

    def _items(self) -> Iterator[Item]:
        root = ImageRoot(self.options.images, "source.images")
        files, names = self._files()
        table = faces.load(Path(self.options.faces)) if self.options.faces else None
        self._check_names(names)
        tags = self._tags([path for _, path in files]) if self.with_tags else None
        seen: dict[str, int] = {}
        rows = []
        for split, path in files:
            labels = label_files.read_labels(path, self.options.encoding)
            self._note_encoding(path)
            rows += [(split, *row) for row in zip(labels.class_ids.tolist(), labels.paths, strict=True)]
        stems = [stem_of(name.replace("\\", "/")) for _, _, name in rows]
        known = families.tokens(stems, [str(class_id) for _, class_id, _ in rows], self.options.family)
        for order, (split, class_id, name) in enumerate(rows):
            seen[name] = seen.get(name, 0) + 1
            item = self._item(root, name, class_id, names, split, order, seen[name], table, known[order])
            yield item if tags is None else replace(item, tags=tags.get(name, {}))
        if tags is not None:
            without = sum(name not in tags for name in seen)
            self.notes += [f"{amount(without, 'image is', 'images are')} in no table of tags"] if without else []
        repeated = sum(1 for times in seen.values() if times > 1)
        if repeated:
            self.notes.append(f"{amount(repeated, 'path occurs', 'paths occur')} in the label files more than once")

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """Read files below the image root."""
        places = [json.loads(item.locator) for item in items]
        return ImageRoot(self.options.images, "source.images").read(places, self.options.max_bytes)

    def stamp(self) -> str:
        """A digest of the names, sizes and times of the label files and of all images."""
        options = self.options
        labels = Path(options.labels).expanduser()
        files = [options.labels, options.names, options.faces, options.tags]
        if labels.is_file():
            files.append(str(labels.parent / label_files.NAMES_FILE))
        return stamps.of([options.images], [file for file in files if file and Path(file).expanduser().exists()])

    def _files(self) -> tuple[list[tuple[str, Path]], dict[int, str]]:
        path = Path(self.options.labels).expanduser()
        if path.is_dir():
            found = label_files.find_label_files(path)
            files = [(SPLIT_OF[name], file) for name, file in found.labels.items()]
            names = found.names
        elif path.exists():
            files, names = [(SPLIT_OF.get(path.stem, ""), path)], None
        else:
            raise not_found(path, "source.labels")
        if not files:
            raise UsageError(f"source.labels: {path} contains none of train.csv, val.csv, test.csv, train_val.csv")
        if {"train", "train_val"} <= {file.stem for _, file in files}:
            raise UsageError(
                f"source.labels: {path} contains train.csv and train_val.csv; set source.labels to one of them"
            )
        if path.is_dir() and not {"train", "train_val"} & {file.stem for _, file in files}:
            there = ", ".join(file.name for _, file in files)
            self.notes.append(
                f"source.labels: {path} contains {there} but no train.csv: the dataset will have no training images"
            )
        sibling = path.parent / label_files.NAMES_FILE if path.is_file() else None
        chosen = Path(self.options.names).expanduser() if self.options.names else names or sibling
        known = self._class_names(chosen) if chosen and (self.options.names or chosen.exists()) else {}
        return files, known

    def _tags(self, files: Sequence[Path]) -> dict[str, tag_files.Tags]:
        """The tags of the images in these label files by path."""
        found: dict[str, tag_files.Tags] = {}
        for file in files:
            path = (
                Path(self.options.tags).expanduser() if self.options.tags else file.parent
            ) / f"{file.stem}_tags.csv"
            if not path.exists():
                raise UsageError(
                    f"source.tags: {path} not found; set it to the folder of the tags, or clear tags.categories"
                )
            found |= tag_files.read(path)
        return found

    def _class_names(self, path: Path) -> dict[int, str]:
        names = label_files.read_class_names(path, self.options.encoding)
        self._note_encoding(path)
        return names

    def _note_encoding(self, path: Path) -> None:
        note = text_tables.encoding_note(path.read_bytes(), path.name, self.options.encoding)
        self.notes += [note] if note else []

    def _check_names(self, names: dict[int, str]) -> None:
        """Check that no two published ids become one class."""
        first: dict[str, int] = {}
        for class_id, name in names.items():
            other = first.setdefault(clean_text(name), class_id)
            if other != class_id:
                raise UsageError(
                    f"source.names: classes {other} and {class_id} have the same name '{clean_text(name, 80)}' up to "
                    "spaces and the encoding of accents; rename one"
                )

    def _item(
        self,
        root: ImageRoot,
        name: str,
        class_id: int,
        names: dict[int, str],
        split: str,
        order: int,
        times: int,
        table: faces.FaceTable | None,
        family: tuple[str, ...],
    ) -> Item:
        post = danbooru_id(name)
        key = f"danbooru-{post}" if post else file_key("labels", name.encode(), stem_of(name))
        found, failure = root.locate(name)
        whole = (Box(0.0, 0.0, 1.0, 1.0, 1.0),)
        return Item(
            key=key if times == 1 else f"{key}-{times}",
            source="danbooru" if post else "labels",
            source_id=post or clean_text(name, 1000),
            locator=json.dumps(found or {"path": name}),
            order=order,
            labels=(clean_text(names.get(class_id, f"class-{class_id}")),),
            families=(f"post:{post}",) if post else family,
            boxes=whole if table is None else table.boxes.get(int(post or -1), ()),
            split=split,
            class_order=class_id,
            page_url=self.options.page_url.replace("{id}", post) if post and self.options.page_url else "",
            failure=failure,
        )


def danbooru_id(path: str) -> str:
    """The post id in a path of the form `BBBB/ID.jpg` with BBBB = ID mod 1000 (3 or 4 digits); else empty."""
    match = re.fullmatch(r"(?:.*/)?(\d{3,4})/(\d{1,12})\.\w{2,5}", path)
    return match[2] if match and int(match[1]) == int(match[2]) % 1000 else ""
