"""Which image a cell of a table names: by its path, the end of one, its file name, or one without its suffix."""

from __future__ import annotations

import functools
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from animesion.dataset.path_parts import parts_of, stem_of
from animesion.splits import split_folders

#: Levels of folders that may be named after splits.
_DEEPEST = 3


class ImageNames:
    """Images by what a table may call them: a path, the end of one, a file name, or one without its suffix."""

    def __init__(self, images: Sequence[str]) -> None:
        # tables are composed (NFC), the names of files may be decomposed, as macOS writes them
        self._images = {_composed(path): path for path in images}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in self._images:
            name = path.rpartition("/")[2]
            self._by_name[name].append(path)
            stem = stem_of(name)
            if stem != name:
                self._by_name[stem].append(path)
        self._level, self._splits = split_level(list(self._images))

    def find(self, cell: str, folder: str, split: str) -> str:
        """The image that a cell names, see `find_all`; empty if there is none, or several."""
        found = self.find_all(cell, folder, split)
        return found[0] if len(found) == 1 else ""

    def find_all(self, cell: str, folder: str, split: str, *, exact: bool = False) -> list[str]:
        """The images that a cell names.

        Args:
            cell: of the table.
            folder: of the table.
            split: that the table is named after, which decides between images of one name.
            exact: whether the case of letters counts; else it does where it names an image.
        """
        value = cell.replace("\\", "/").removeprefix("./").strip("/")
        if not value:
            return []
        for path in (f"{folder}/{value}" if folder else value, value):
            if path in self._images:
                return [self._images[path]]
        head, _, name = value.rpartition("/")
        found = self._by_name.get(name, [])
        if not found and not exact:
            # a table that was written on a system where `1.JPG` is `1.jpg`
            found, value, name = self._by_lower_name.get(name.lower(), []), value.lower(), name.lower()
        if head:
            same_case = name in self._by_name
            ends = [_without_suffix(path if same_case else path.lower(), name) for path in found]
            found = [
                path
                for path, end in zip(found, ends, strict=True)
                if end.endswith(f"/{value}") or ("/" in end and value.endswith(f"/{end}"))
            ]
        if len(found) > 1 and split:
            found = [path for path in found if self._split_of(path) == split] or found
        return [self._images[path] for path in found]

    @functools.cached_property
    def _by_lower_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name, paths in self._by_name.items():
            found[name.lower()] += paths
        return found

    def _split_of(self, path: str) -> str:
        parts = parts_of(path)
        return self._splits.get(parts[self._level], "") if len(parts) > self._level + 1 else ""


def _composed(path: str) -> str:
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def split_level(images: Sequence[str]) -> tuple[int, dict[str, str]]:
    """The first level of folders at which several splits are named, from 0, and the folders there with their splits."""
    folders = [parts[:-1] for parts in map(parts_of, images)]
    for level in range(_DEEPEST):
        found = split_folders({parts[level] for parts in folders if len(parts) > level})
        if len(set(found.values())) > 1:
            return level, found
    return 0, {}


def _without_suffix(path: str, name: str) -> str:
    """A path as a table has it that leaves suffixes out, if it does."""
    return path if path.endswith(name) else path[: path.rfind(".")]
