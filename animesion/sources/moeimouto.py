"""The source for moeimouto (nagadomi's animeface-character-dataset): folders `NNN_name` of `face_*.png` as released.

The published counts, and why its label files cannot be mixed, are in `animesion.sources.published_sets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pydantic import Field

from animesion.config.settings import Section
from animesion.dataset import label_files
from animesion.errors import UsageError
from animesion.schemas import Item
from animesion.sources import clean_text, file_key
from animesion.sources.published_facts import PUBLISHED, PublishedSet
from animesion.sources.published_sets import PublishedFiles, PublishedOptions, check_complete
from animesion.sources.ultra_fgvc import select_label_files

_IMAGE = re.compile(r"(?:.*/)?((\d{3})_([^/]+))/(face_[^/]*\.(?:png|jpe?g))", re.IGNORECASE)
#: Offset of the colour type in a PNG, and the one that means RGB.
_PNG_COLOUR, _RGB = 25, 2


class MoeimoutoOptions(PublishedOptions):
    """Options of the `moeimouto` source."""

    rgb_only: bool = Field(
        False, description="skip PNG files that are not RGB, as the first label files did (two of them)"
    )
    val: bool = Field(False, description="with source.labels: use val.csv as val if it exists")


class MoeimoutoSource(PublishedFiles):
    """Faces of 173 anime characters."""

    Options: ClassVar[type[Section]] = MoeimoutoOptions
    summary: ClassVar[str] = "moeimouto faces as released (folders NNN_name of face_*.png), or with label files"
    remote: ClassVar[bool] = False

    def __init__(self, options: MoeimoutoOptions, published: PublishedSet | None = None) -> None:
        """Keep the options; nothing is read yet.

        Args:
            options: options of the source.
            published: expected counts, by default those of `animesion.sources.published_facts`.
        """
        super().__init__(options)
        self.options = options
        self._due = published or PUBLISHED["moeimouto"]

    def items(self) -> Iterator[Item]:
        """One item per face, by folder and name; class ids are the folders' numbers, or those of label files.

        Raises:
            UsageError: the folders are missing, counts differ from the published ones, or label files do not match.
        """
        files = self.files()
        images = {path: match for path in files if (match := _IMAGE.fullmatch(path))}
        if not images:
            some = ", ".join(clean_text(path, 60) for path in list(files)[:3])
            raise UsageError(
                f"source.path: {self.options.path} is not laid out as moeimouto: expected {self._due.layout[0]}; "
                f"found {some}; set source.path to the folder of 000_hatsune_miku and the others"
            )
        others = len(files) - len(images)
        if others:
            self.notes.append(f"files that are no faces, such as color.csv and ignore, skipped: {others:,}")
        names = self._names(images)
        found = [path for path in images if not self.options.rgb_only or self._is_rgb(files[path])]
        if len(found) < len(images):
            self.notes.append(f"images that are not RGB skipped: {len(images) - len(found):,}")
        found.sort(key=lambda path: (images[path][1], path))
        items = []
        for order, path in enumerate(found):
            match = images[path]
            short = f"{match[1]}/{match[4]}"
            item = replace(
                files[path],
                key=file_key("moeimouto", short.encode("utf-8", "surrogateescape"), PurePosixPath(short).stem),
                source="moeimouto",
                source_id=clean_text(short, 900),
                order=order,
                labels=(names[match[1]],),
                families=(),
                class_order=int(match[2]),
            )
            items.append(item)
        self.notes += check_complete(items, self._due, self.options.incomplete)
        yield from self._labelled(items) if self.options.labels else items

    def _names(self, images: Mapping[str, re.Match[str]]) -> dict[str, str]:
        """Class name by folder: the folder's name without its number, which must be unique."""
        names: dict[str, str] = {}
        first: dict[str, str] = {}
        for match in images.values():
            name = names[match[1]] = clean_text(match[3])
            other = first.setdefault(name, match[1])
            if other != match[1]:
                raise UsageError(
                    f"source.path: folders {clean_text(other, 80)} and {clean_text(match[1], 80)} are both called "
                    f"'{clean_text(name, 80)}'; rename one"
                )
        return names

    def _is_rgb(self, item: Item) -> bool:
        [payload] = self.read([item])
        head = payload.content[: _PNG_COLOUR + 1]
        return not head.startswith(b"\x89PNG") or head[-1] == _RGB

    def _labelled(self, items: list[Item]) -> list[Item]:
        """Add splits and class ids from label files; class ids and folders must correspond one to one."""
        by_name = {item.source_id: item for item in items}
        folder_of: dict[int, str] = {}
        id_of: dict[str, int] = {}
        rows: dict[str, Item] = {}
        for split, file in select_label_files(Path(self.options.labels), "", val=self.options.val):
            table = label_files.read_labels(file)
            for number, name in zip(table.class_ids.tolist(), table.paths, strict=True):
                short = "/".join(PurePosixPath(name).parts[-2:])
                if short not in by_name:
                    raise UsageError(
                        f"{file}: {clean_text(name, 80)!r} is not in {self.options.path}; use the label files that "
                        "were written for these images"
                    )
                folder = short.partition("/")[0]
                if folder_of.setdefault(number, folder) != folder or id_of.setdefault(folder, number) != number:
                    raise UsageError(
                        f"{file}: class {number} stands for {clean_text(folder, 80)} and class "
                        f"{id_of.get(folder, number)} for {clean_text(folder_of[number], 80)} elsewhere: these label "
                        "files were not written together; the animesion and the GLSim ones cannot be mixed"
                    )
                if short in rows:
                    raise UsageError(f"{file}: {clean_text(name, 80)!r} is listed twice; delete one of the rows")
                rows[short] = replace(by_name[short], split=split, class_order=number, order=len(rows))
        left = len(items) - len(rows)
        if left:
            self.notes.append(f"images in no label file, which have no split: {left:,}")
        # images without a split follow the others in their own order; curate decides about them
        rest = [item for name, item in by_name.items() if name not in rows]
        extra = [
            replace(item, class_order=id_of.get(item.source_id.partition("/")[0], -1), order=len(rows) + i)
            for i, item in enumerate(rest)
        ]
        return [*rows.values(), *extra]
