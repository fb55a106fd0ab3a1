"""Files in a bucket: listed page by page, read many at once, never copied as a whole.

A `StoredPlace` has the few methods of `pathlib.Path` that readers of folders and archives need. A missing file drops an
image; an unreachable store stops the build, which can be resumed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, cast

from pydantic import AfterValidator

from animesion.errors import UsageError
from animesion.schemas import DropReason, Payload
from animesion.storage import stores

#: Most files in flight at once, and their most bytes together; a larger file is fetched alone.
_AT_ONCE = 32
_BYTES_AT_ONCE = 64 << 20


class Listed(NamedTuple):
    """A file below a place: its relative path, its size, and a stamp that changes when it is overwritten."""

    name: str
    bytes: int
    stamp: str


class StoredPlace:
    """A file, or the files below a prefix, in a bucket.

    Args:
        url: URL such as `s3://bucket/prefix`; with a trailing slash it is never a file.

    Raises:
        UsageError: the URL is not that of a bucket, or the store's package is not installed.
        AnimesionError: the store cannot be reached, or denies access.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = self.url.rpartition("/")[2]
        self._fs, self._root = stores.connect(url, stores.READABLE)
        with stores.clear_errors(self.url):
            try:
                self._kind = "directory" if url.endswith("/") else str(self._fs.info(self._root)["type"])
            except FileNotFoundError:
                self._kind = ""

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Whether the file or a file below the prefix exists."""
        return bool(self._kind)

    def is_file(self) -> bool:
        """Whether it is one file."""
        return self._kind == "file"

    def is_dir(self) -> bool:
        """Whether it is a prefix."""
        return self._kind == "directory"

    def stamp(self) -> str:
        """A stamp that changes when the file is overwritten."""
        with stores.clear_errors(self.url):
            return _stamp(self._fs.info(self._root))

    def open(self, block: int) -> IO[bytes]:
        """Open the file for random access.

        Args:
            block: read-ahead in bytes.
        """
        with stores.clear_errors(self.url):
            return cast("IO[bytes]", _StoredFile(self.url, self._fs.open(self._root, "rb", block_size=block)))

    def files(self) -> Iterator[Listed]:
        """Files below the prefix, sorted by path, without the empty objects that represent folders."""
        with stores.clear_errors(self.url):
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                found = {}
        for path, facts in sorted(found.items()):
            if facts["type"] == "file" and not path.endswith("/"):
                yield Listed(path.removeprefix(f"{self._root}/"), int(facts["size"]), _stamp(facts))

    def contents(self, files: Sequence[tuple[str, int]], most: int) -> Iterator[Payload]:
        """The bytes of files below the prefix, in their order.

        Args:
            files: path and size of each, as listed.
            most: size of the largest accepted file, in bytes.
        """
        spans = [(f"{self._root}/{name}", 0, most + 1 if size else 0) for name, size in files]
        for content in self._spans(spans, [size for _, size in files]):
            if content is None:
                yield Payload(reason=DropReason.MISSING_FILE)
            else:
                yield Payload(content) if len(content) <= most else Payload(reason=DropReason.TOO_MANY_BYTES)

    def pieces(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of pieces of the file, given by offset and size; fewer at the end of the file."""
        spans = [(self._root, offset, offset + size) for offset, size in places]
        for content in self._spans(spans, [size for _, size in places]):
            yield content or b""

    def _spans(self, spans: Sequence[tuple[str, int, int]], sizes: Sequence[int]) -> Iterator[bytes | None]:
        """The bytes of each path in [start, end); None for a missing file."""
        begin = 0
        while begin < len(spans):
            end = begin + 1
            while end < min(len(spans), begin + _AT_ONCE) and sum(sizes[begin : end + 1]) <= _BYTES_AT_ONCE:
                end += 1
            batch = [span for span in spans[begin:end] if span[2] > span[1]]  # stores reject empty ranges
            with stores.clear_errors(self.url):
                ranges = self._fs.cat_ranges(*map(list, zip(*batch, strict=True)), on_error="return") if batch else []
            results = iter(ranges)
            for path, start, stop in spans[begin:end]:
                content = next(results) if stop > start else b""
                if isinstance(content, FileNotFoundError):
                    yield None
                elif isinstance(content, BaseException):
                    with stores.clear_errors(f"{self.url.partition('://')[0]}://{path}"):
                        raise content
                else:
                    yield bytes(content)
            begin = end


def _refuse_secrets(path: str) -> str:
    if stores.is_url(path):
        stores.refuse_secrets(path)  # before the recipe is written to disk
    return path


#: Type of an option for a path or the URL of a bucket.
PathOrUrl = Annotated[str, AfterValidator(_refuse_secrets)]


def not_found(place: Path | StoredPlace, option: str) -> UsageError:
    """The error for a path of a recipe that leads nowhere; says from where a relative one is looked up."""
    where = "" if isinstance(place, StoredPlace) or place.is_absolute() else f" in {Path.cwd()}"
    return UsageError(f"{option}: {place} not found{where}")


def place(path: str, option: str) -> Path | StoredPlace:
    """Resolve a path or URL of a recipe to a local folder or file, or to a place in a bucket.

    Args:
        path: the path or URL.
        option: name of the option that sets it, for messages.

    Raises:
        UsageError: the URL is not of a supported store.
    """
    if not stores.is_url(path):
        return Path(path).expanduser()
    if path.startswith("file://"):
        return Path(stores.connect(path)[1])
    if path.partition("://")[0] not in stores.READABLE:
        raise UsageError(
            f"{option}: {stores.shown(path)} is not a supported store: use a folder, s3://bucket/prefix, gs://... or "
            "hf://datasets/owner/name"
        )
    return StoredPlace(path)


class _StoredFile(io.RawIOBase):
    """An open file of a store, whose errors stop the build instead of dropping an image."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with stores.clear_errors(self._url):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _stamp(facts: dict[str, Any]) -> str:
    known = (facts.get(name) for name in ("ETag", "etag", "generation", "LastModified", "updated", "mtime", "created"))
    return str(next((value for value in known if value), ""))
