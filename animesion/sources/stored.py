"""Files that lie in a bucket: listed page by page, read many at once, never copied as a whole.

A place behaves as the few parts of `pathlib.Path` do that readers of folders and archives need. What is missing is told
apart from what cannot be reached: the first is an image's fate, the second stops the build, which resumes.
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

#: Files on their way at once, and the bytes that they may come to unless a single one has more.
_AT_ONCE = 32
_BYTES_AT_ONCE = 64 << 20


class Listed(NamedTuple):
    """A file below a place: its path there, its size, and what changes when it is written anew."""

    name: str
    bytes: int
    stamp: str


class StoredPlace:
    """A file, or all that begins with a prefix, in a bucket.

    Args:
        url: such as `s3://bucket/prefix`; what ends in a slash is never a file.

    Raises:
        UsageError: not the address of a bucket, or the store's package is not installed.
        AnimesionError: it cannot be reached, or does not let us in.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = self.url.rpartition("/")[2]
        self._fs, self._root = stores.connect(url)
        with stores.clear_errors(self.url):
            try:
                self._kind = "directory" if url.endswith("/") else str(self._fs.info(self._root)["type"])
            except FileNotFoundError:
                self._kind = ""

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Whether something is there."""
        return bool(self._kind)

    def is_file(self) -> bool:
        """Whether it is one file."""
        return self._kind == "file"

    def is_dir(self) -> bool:
        """Whether it is a prefix."""
        return self._kind == "directory"

    def stamp(self) -> str:
        """What changes when the file is written anew."""
        with stores.clear_errors(self.url):
            return _stamp(self._fs.info(self._root))

    def open(self, block: int) -> IO[bytes]:
        """The file, for reading at any place.

        Args:
            block: bytes that are fetched ahead of what is read.
        """
        with stores.clear_errors(self.url):
            return cast("IO[bytes]", _Opened(self.url, self._fs.open(self._root, "rb", block_size=block)))

    def files(self) -> Iterator[Listed]:
        """Every file below the prefix, sorted by path; the empty objects that stand for folders are none."""
        with stores.clear_errors(self.url):
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                found = {}
        for path, facts in sorted(found.items()):
            if facts["type"] == "file" and not path.endswith("/"):
                yield Listed(path.removeprefix(f"{self._root}/"), int(facts["size"]), _stamp(facts))

    def contents(self, files: Sequence[tuple[str, int]], most: int) -> Iterator[Payload]:
        """The bytes of files below the prefix, in the order given.

        Args:
            files: path and size of each, as listed.
            most: bytes of the largest file that is taken.
        """
        spans = [(f"{self._root}/{name}", 0, most + 1 if size else 0) for name, size in files]
        for content in self._spans(spans, [size for _, size in files]):
            if content is None:
                yield Payload(reason=DropReason.MISSING_FILE)
            else:
                yield Payload(content) if len(content) <= most else Payload(reason=DropReason.TOO_MANY_BYTES)

    def pieces(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Offset and size of pieces of the file to their bytes, fewer where the file ends before."""
        spans = [(self._root, offset, offset + size) for offset, size in places]
        for content in self._spans(spans, [size for _, size in places]):
            yield content or b""

    def _spans(self, spans: Sequence[tuple[str, int, int]], sizes: Sequence[int]) -> Iterator[bytes | None]:
        """The bytes of each path from start to end; None where there is no file."""
        begin = 0
        while begin < len(spans):
            end = begin + 1
            while end < min(len(spans), begin + _AT_ONCE) and sum(sizes[begin : end + 1]) <= _BYTES_AT_ONCE:
                end += 1
            batch = [span for span in spans[begin:end] if span[2] > span[1]]  # no store gives zero bytes of a file
            with stores.clear_errors(self.url):
                came = iter(
                    self._fs.cat_ranges(*map(list, zip(*batch, strict=True)), on_error="return") if batch else []
                )
            for path, start, stop in spans[begin:end]:
                content = next(came) if stop > start else b""
                if isinstance(content, FileNotFoundError):
                    yield None
                elif isinstance(content, BaseException):
                    with stores.clear_errors(f"{self.url.partition('://')[0]}://{path}"):
                        raise content
                else:
                    yield bytes(content)
            begin = end


def _without_secrets(path: str) -> str:
    if stores.is_url(path):
        stores.refuse_secrets(path)  # before the recipe is written anywhere
    return path


#: An option that takes a path or the URL of a bucket.
PathOrUrl = Annotated[str, AfterValidator(_without_secrets)]


def place(path: str, option: str) -> Path | StoredPlace:
    """A path or URL of a recipe: a folder or file of this machine, or a place in a bucket.

    Args:
        path: the path or URL.
        option: what sets it, for messages.

    Raises:
        UsageError: a URL of no known store.
    """
    if not stores.is_url(path):
        return Path(path).expanduser()
    if path.startswith("file://"):
        return Path(stores.connect(path)[1])
    if path.partition("://")[0] not in stores.SCHEMES:
        raise UsageError(
            f"{option}: {stores.shown(path)} is of no known store: give a folder, s3://bucket/prefix or gs://..."
        )
    return StoredPlace(path)


class _Opened(io.RawIOBase):
    """A file of a store whose errors are the build's and not the image's."""

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
