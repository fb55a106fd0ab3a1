"""The root of image paths in label files and dumps: a local folder or a prefix of a bucket."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from animesion.errors import UsageError
from animesion.schemas import DropReason, Payload
from animesion.sources.stored import Listed, StoredPlace, place

_PIECE = 1 << 20


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
            raise UsageError(f"{option}: folder {self._root} not found")

    def locate(self, name: str) -> tuple[dict[str, Any], str]:
        """Path, size and time stamp of a file, or an empty dict and the drop reason.

        Folders of three digits (in the archive of crops) and of four (in label files) are equivalent, and so are names
        with composed and decomposed characters.
        """
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in name or re.match(r"[A-Za-z]:", name):
            return {}, DropReason.UNSAFE_PATH
        candidates = [pure]
        bucket = pure.parent.name
        if bucket.isdecimal() and len(bucket) in {3, 4}:
            other = bucket[1:] if len(bucket) == 4 else f"0{bucket}"
            candidates.append(pure.parent.parent / other / pure.name)
        if not name.isascii():  # macOS writes names decomposed, tables are mostly composed
            forms = [
                PurePosixPath(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD") for path in candidates
            ]
            candidates += [path for path in forms if path not in candidates]
        for path in candidates:
            if isinstance(self._root, StoredPlace):
                listed = self._listed.get(str(path))
                if listed:
                    return {"path": listed.name, "size": listed.bytes, "stamp": listed.stamp}, ""
                continue
            try:
                status = (self._root / path).stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:  # a name that the file system cannot hold
                break
            facts = {"path": str(path), "size": status.st_size, "stamp": status.st_mtime_ns}
            return facts, "" if stat.S_ISREG(status.st_mode) else DropReason.NOT_A_REGULAR_FILE
        return {}, DropReason.MISSING_FILE

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
