"""Sets of large files, such as shards and Parquet files: found by folder, pattern or name, on disk or in a bucket.

What the files contain is decided in the sources that use them.
"""

from __future__ import annotations

import fnmatch
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from animesion.errors import AnimesionError, UsageError
from animesion.sources import stamps
from animesion.sources.stored import Listed, StoredPlace, not_found, place
from animesion.splits import SPLIT_NAMES

#: Most files that a pattern in braces may name.
_MOST_FILES = 100_000

_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


class FileSet:
    """Files with one suffix: a single file, those below a folder at any depth, or those that a pattern names.

    A pattern is `*`, `?` and `[...]` within a folder, or braces: `train-{00000..00003}.tar`, `{train,test}.tar`.

    Args:
        path: of this machine, or the URL of a bucket.
        option: name of the option that sets it, for messages.
        suffix: of the files, such as `.tar`.

    Raises:
        UsageError: nothing exists at the path, or the pattern names too many files.
    """

    def __init__(self, path: str, option: str, suffix: str) -> None:
        self._path, self._option, self._suffix = path, option, suffix
        self._patterns: list[str] | None = None
        self._single = ""
        special = re.search(r"[*?\[{]", path)
        if special and ("://" in path or not Path(path).expanduser().exists()):
            head, slash, _ = path[: special.start()].rpartition("/")
            self.base = head or slash or "."
            self._patterns = expand_braces(path[len(head) + len(slash) :], option)
        else:
            root = place(path, option)
            if not root.exists():
                raise not_found(root, option)
            if root.is_file():
                self.base, _, name = str(root).rpartition("/")
                self.base = self.base or ("/" if str(root).startswith("/") else ".")
                self._single = name
            else:
                self.base = str(root)

    @property
    def is_folder(self) -> bool:
        """Whether all files below a folder or prefix count."""
        return self._patterns is None and not self._single

    def __str__(self) -> str:
        return self._path

    def files(self) -> list[Listed]:
        """The files in the order of their names, each with its path below the base.

        Raises:
            UsageError: there are none, one that a pattern in braces names is missing, or a folder cannot be listed.
        """
        if self._single:
            return [self._facts(self._single)]
        listed = self._below_base()
        if self._patterns is None:
            found = [each for each in listed if each.name.lower().endswith(self._suffix) and not _is_hidden(each.name)]
        else:
            found = self._matching(listed, self._patterns)
        if not found:
            raise UsageError(f"{self._option}: {self._path} contains no {self._suffix} files")
        return sorted(found, key=lambda each: os.fsencode(each.name))

    def stamp(self, sides: Sequence[str] = ()) -> str:
        """A digest that differs if one of the files was added, removed, renamed or written, or this package changed.

        Args:
            sides: files of which `side_file` returns the first that exists.

        Returns:
            The digest as hex; empty if there are no files, or their store does not tell when they were written.
        """
        try:
            found = [tuple(each) for each in self.files()]
            for path in self._side_paths(sides):
                there = place(path, self._option)
                if not there.is_file():
                    continue
                if isinstance(there, Path):
                    status = there.stat()
                    found.append((path, status.st_size, str(status.st_mtime_ns)))
                else:
                    found.append((path, 0, there.stamp()))
        except (AnimesionError, OSError):  # the listing says what is wrong
            return ""
        if not all(stamp for *_, stamp in found):
            return ""
        return stamps.of_values(self.base, found)

    def path_of(self, name: str) -> str:
        """The full path or URL of a file."""
        return f"{self.base.rstrip('/')}/{name}"

    def open(self, name: str, block: int) -> IO[bytes]:
        """Open a file for random access; `block` bytes are read ahead from a bucket.

        Raises:
            FileNotFoundError: it does not exist.
        """
        found = place(self.path_of(name), self._option)
        if isinstance(found, StoredPlace) and not found.is_file():
            raise FileNotFoundError(name)
        return found.open("rb") if isinstance(found, Path) else found.open(block)

    def pieces(self, name: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of pieces of a file, given by offset and size; fewer at the end of the file.

        Raises:
            FileNotFoundError: it does not exist.
        """
        found = place(self.path_of(name), self._option)
        if isinstance(found, StoredPlace):
            yield from found.pieces(places)
            return
        with found.open("rb") as file:
            for offset, size in places:
                file.seek(offset)
                yield file.read(size)

    def side_file(self, names: Sequence[str], most: int) -> tuple[str, bytes]:
        """Path and content of the first of some files that exists, at the base or one folder above it.

        Args:
            names: of the files.
            most: size in bytes above which a file is refused.

        Returns:
            Two empty values if there is none.

        Raises:
            UsageError: the file is too large.
        """
        for path in self._side_paths(names):
            found = place(path, self._option)
            if not found.is_file():
                continue
            with found.open("rb") if isinstance(found, Path) else found.open(1 << 20) as file:
                content = file.read(most + 1)
            if len(content) > most:
                raise UsageError(f"{path} has more than {most:,} bytes, too many for a file of names: check it")
            return path, content
        return "", b""

    def _side_paths(self, names: Sequence[str]) -> Iterator[str]:
        """Where files of some names would be: at the base, and one folder above it."""
        above = (
            self.base.rpartition("/")[0] if "://" in self.base else str(Path(self.base).expanduser().absolute().parent)
        )
        for folder, name in itertools.product((self.base, above), names):
            path = f"{folder.rstrip('/')}/{name}"
            if "://" in path and path.partition("://")[2].count("/") < (3 if path.startswith("hf://") else 1):
                continue  # above the bucket or the repository
            yield path

    def _facts(self, name: str) -> Listed:
        """Size and stamp of one file, without listing the folder around it."""
        found = place(self.path_of(name), self._option)
        if isinstance(found, Path):
            status = found.stat()
            return Listed(name, status.st_size, str(status.st_mtime_ns))
        with found.open(1) as file:
            return Listed(name, file.seek(0, io.SEEK_END), found.stamp())

    def _matching(self, listed: Sequence[Listed], patterns: Sequence[str]) -> list[Listed]:
        by_name = {each.name: each for each in listed}
        found = {}
        for pattern in patterns:
            if not re.search(r"[*?\[]", pattern):
                if pattern not in by_name:
                    raise UsageError(f"{self._option}: {self.path_of(pattern)} not found, which {self._path} names")
                found[pattern] = by_name[pattern]
                continue
            parts = pattern.split("/")
            for name in by_name:
                names = name.split("/")
                if len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts)):
                    found[name] = by_name[name]
        return list(found.values())

    def _below_base(self) -> list[Listed]:
        base = place(self.base + ("/" if "://" in self.base else ""), self._option)
        if isinstance(base, StoredPlace):
            return list(base.files())
        if not base.is_dir():
            raise not_found(base, self._option)

        def refuse(error: OSError) -> None:
            raise UsageError(f"{self._option}: the folder {error.filename} cannot be listed ({error.strerror})")

        listed = []
        for folder, folders, names in os.walk(base, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if self._patterns is not None and not any("/" in pattern for pattern in self._patterns):
                folders.clear()
            for name in names:
                path = Path(folder, name)
                if path.is_file():  # not a broken link or a pipe
                    status = path.stat()
                    listed.append(Listed(path.relative_to(base).as_posix(), status.st_size, str(status.st_mtime_ns)))
        return listed


def expand_braces(pattern: str, option: str) -> list[str]:
    """The names that a pattern with braces stands for; `{a,b}` is a list, `{00000..00003}` a range with its zeros.

    Raises:
        UsageError: they are too many, or a range runs backwards.
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Sequence[str]] = []
    count = 1
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            choices.append([piece])
            continue
        bounds = _RANGE.fullmatch(piece)
        if bounds is None:
            choices.append(piece.split(","))
        else:
            first, last = int(bounds[1]), int(bounds[2])
            if last < first or last - first >= _MOST_FILES:
                raise UsageError(
                    f"{option}: the range {{{piece}}} is backwards or names more than {_MOST_FILES:,} files"
                )
            choices.append([str(number).zfill(len(bounds[1])) for number in range(first, last + 1)])
        count *= len(choices[-1])
        if count > _MOST_FILES:
            raise UsageError(f"{option}: {pattern} names more than {_MOST_FILES:,} files")
    return ["".join(parts) for parts in itertools.product(*choices)]


def split_of(name: str) -> str:
    """The split that a file's name or the folders above it state; the file's name counts first, then the inner folder.

    `data/train-00000-of-00002.parquet` and `valid/0000.parquet` are named after a split; `train_test.tar` is not.
    """
    parts = PurePosixPath(name)
    for text in (parts.name, *reversed(parts.parts[:-1])):
        found = {SPLIT_NAMES[word] for word in re.split(r"[\W_]+", text.lower()) if word in SPLIT_NAMES}
        if len(found) == 1:
            return found.pop()
    return ""


def ordered_splits(found: set[str]) -> list[str]:
    """Splits in the order train, val, test; an empty one is left out."""
    return [split for split in ("train", "val", "test") if split in found]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
