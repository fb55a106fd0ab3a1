"""The root of image paths in label files and dumps: a local folder or a prefix of a bucket."""

from __future__ import annotations

import array
import bisect
import contextlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from animesion.schemas import DropReason, Payload
from animesion.sources.stored import Listed, StoredPlace, not_found, place

_PIECE = 1 << 20

#: A path that `PurePosixPath` leaves as it is.
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
#: Missing files after which their folder is listed.
_MISSES = 16
#: Folders with missing files that are remembered: a hostile table may name any number.
_MOST_FOLDERS = 10_000


class ImageRoot:
    """Images by their path below a root.

    Args:
        path: folder, or URL such as `s3://bucket/prefix`.
        option: name of the option that sets it, for messages.

    Raises:
        UsageError: the folder does not exist.
    """

    def __init__(self, path: str, option: str) -> None:
        self._root = place(path, option)
        if not self._root.is_dir():
            raise not_found(self._root, option)
        self._folder = os.path.join(self._root, "") if isinstance(self._root, Path) else ""
        # hashes of the names in a folder, in order; used for ASCII names, as others may have several forms
        self._names: dict[str, array.array[int]] = {}
        self._misses: dict[str, int] = {}  # number of missing files by folder

    def locate(self, name: str) -> tuple[dict[str, Any], str]:
        """Path, size and time stamp of a file, or an empty dict and the drop reason.

        Folders of three digits (in the archive of crops) and of four (in label files) are equivalent, and so are names
        with composed and decomposed characters.
        """
        clean = name
        if not _PLAIN.fullmatch(name):  # plain names are safe, and pathlib is slow for millions of them
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts or "\0" in name or re.match(r"[A-Za-z]:", name):
                return {}, DropReason.UNSAFE_PATH
            clean = str(pure)
        folder, _, file = clean.rpartition("/")
        above, slash, bucket = folder.rpartition("/")
        candidates = [(folder, file)]
        if bucket.isdecimal() and len(bucket) in {3, 4}:
            other = bucket[1:] if len(bucket) == 4 else f"0{bucket}"
            candidates.append((f"{above}{slash}{other}", file))
        if not name.isascii():  # macOS writes names decomposed, tables are mostly composed
            forms = [
                (unicodedata.normalize(form, folder), unicodedata.normalize(form, file))
                for form in ("NFC", "NFD")
                for folder, file in candidates
            ]
            candidates += [each for each in forms if each not in candidates]
        for folder, file in candidates:
            if (names := self._names.get(folder)) is not None and file.isascii() and file != ".":
                digest = hash(file.casefold())
                place = bisect.bisect_left(names, digest)
                if place == len(names) or names[place] != digest:
                    continue
            path = f"{folder}/{file}" if folder else file
            if isinstance(self._root, StoredPlace):
                listed = self._listed.get(path)
                if listed:
                    return {"path": listed.name, "size": listed.bytes, "stamp": listed.stamp}, ""
                continue
            try:
                status = os.stat(f"{self._folder}{path}")
            except (FileNotFoundError, NotADirectoryError):
                self._missed(folder)
                continue
            except OSError:  # a name that the file system cannot hold
                break
            facts = {"path": path, "size": status.st_size, "stamp": status.st_mtime_ns}
            return facts, "" if stat.S_ISREG(status.st_mode) else DropReason.NOT_A_REGULAR_FILE
        return {}, DropReason.MISSING_FILE

    def _missed(self, folder: str) -> None:
        """Note a missing file: a folder is listed once many were, as that costs less than asking for each."""
        missing = self._misses.get(folder, 0) + 1
        if missing == 1 and len(self._misses) >= _MOST_FOLDERS:
            return
        self._misses[folder] = missing
        if missing == 1 and not os.path.isdir(f"{self._folder}{folder}"):
            self._names[folder] = array.array("q")
        elif missing == _MISSES:
            # a folder that may not be listed can still have files
            with contextlib.suppress(OSError), os.scandir(f"{self._folder}{folder}") as entries:
                # some file systems take names that differ in case for one
                self._names[folder] = array.array("q", sorted(hash(entry.name.casefold()) for entry in entries))

    def read(self, places: Sequence[dict[str, Any]], max_bytes: int) -> Iterator[Payload]:
        """The bytes of located files, in their order."""
        if isinstance(self._root, StoredPlace):
            yield from self._root.contents([(each["path"], each["size"]) for each in places], max_bytes)
            return
        for each in places:
            yield read_file(self._root / each["path"], max_bytes)

    @cached_property
    def _listed(self) -> dict[str, Listed]:
        """All files of the prefix: one request per thousand files instead of one per file."""
        assert isinstance(self._root, StoredPlace)
        return {file.name: file for file in self._root.files()}


def read_file(path: Path, max_bytes: int) -> Payload:
    """The bytes of a local file, or the drop reason."""
    try:
        with path.open("rb") as file:
            # by its size, as `read` reserves what it is asked for; then what has been added since
            content = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
            while len(content) <= max_bytes and (more := file.read(min(_PIECE, max_bytes + 1 - len(content)))):
                content += more
    except FileNotFoundError:
        return Payload(reason=DropReason.MISSING_FILE)
    except OSError as error:
        return Payload(reason=DropReason.FETCH_FAILED, detail=os.strerror(error.errno or 0))
    return Payload(content) if len(content) <= max_bytes else Payload(reason=DropReason.TOO_MANY_BYTES)
