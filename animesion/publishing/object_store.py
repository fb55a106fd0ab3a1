"""Publishing into folders and object stores through fsspec: `file://`, `s3://`, `gs://`.

What is there is known by reading it: sizes first, then SHA-256 of the bytes. No store is trusted to have kept a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from animesion.errors import AnimesionError, UsageError
from animesion.progress import Progress
from animesion.publishing import SHARD, File
from animesion.storage import stores
from animesion.storage.checksums import SEALS

_CHUNK = 8 << 20
#: Bytes of a piece of a large file: several are on their way at a time, each in memory. A file has 10,000 at the most.
_PIECE, _PIECES = 16 << 20, 10_000
_PART = ".sending"


class ObjectStore:
    """A folder or a prefix of a bucket.

    Args:
        url: `file:///folder`, `s3://bucket/prefix` or `gs://bucket/prefix`.
        replace: take away shards of another dataset that lie there, where else they are refused.

    Raises:
        UsageError: no bucket, or the store's package is not installed.
    """

    def __init__(self, url: str, *, replace: bool = False) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = stores.connect(url)
        self._local = url.startswith("file://")
        self._replace = replace

    def refusal(self, tag: str, changes: bool) -> str:
        """Tags and old shards are refused: nothing here keeps what a reader would lose."""
        if tag:
            return f"--tag names a revision of a Hub repository: put {tag} into the prefix of {self.url} instead"
        return ""

    def prepare(self) -> None:
        """Folders are made as files are written; a bucket is not ours to make."""

    def present(self, files: Sequence[File]) -> set[str]:
        """Files of equal size and SHA-256; what seals the dataset counts only when all are there: it goes first."""
        found = {file.name for file in files if not self.fault(file)}
        return found if len(found) == len(files) else found.difference(SEALS)

    def stale(self, files: Sequence[File]) -> list[str]:
        """Shards of something else; nothing is taken away unasked where no history keeps it.

        Raises:
            UsageError: there are some, and they are not to be replaced.
        """
        names = {file.name for file in files}
        others = [name for name in self._shards() if name not in names]
        if others and not self._replace:
            raise UsageError(
                f"{self.url} holds {others[0]}{f' and {len(others) - 1:,} more shards' * (len(others) > 1)} of another "
                "dataset, which readers would load: give an empty place, or remove it there"
            )
        return others

    def send(self, files: Sequence[File], stale: Sequence[str], message: str, progress: Progress) -> None:
        """One after the other; what seals an older dataset goes first."""
        self.unseal()
        self.remove(stale)
        for file in files:
            progress.status(file.name)
            self.put(file)

    def faults(self, files: Sequence[File]) -> list[str]:
        """Read every file back."""
        return [fault for file in files if (fault := self.fault(file))]

    def tag(self, name: str) -> None:
        """There are none.

        Raises:
            UsageError: always.
        """
        raise UsageError(self.refusal(name, changes=False))

    # -- single files ------------------------------------------------------------------------------------------------

    def unseal(self) -> None:
        """Take away what says that a whole dataset lies there: it does not describe what is about to lie there."""
        self.remove(SEALS)

    def remove(self, names: Sequence[str]) -> None:
        """Take files away; those that are not there are none."""
        for name in names:
            with stores.clear_errors(self.url), suppress(FileNotFoundError):
                if self._fs.exists(self._at(name)):  # a store that finds nothing to delete may not say so
                    self._fs.rm_file(self._at(name))

    def put(self, file: File) -> None:
        """Send one file; it has its name only when it is whole.

        Raises:
            AnimesionError: there is no such bucket, it does not let us in, or it cannot be reached.
        """
        try:
            with stores.clear_errors(self.url):
                if self._local:
                    self._fs.makedirs(self._at(file.name).rpartition("/")[0], exist_ok=True)
                    self._fs.put_file(str(file.path), self._at(file.name) + _PART)
                    self._fs.mv(self._at(file.name) + _PART, self._at(file.name))
                else:
                    pieces = {"chunksize": _PIECE} if file.bytes <= _PIECE * _PIECES else {}
                    self._fs.put_file(str(file.path), self._at(file.name), **pieces)
        except FileNotFoundError:
            if not file.path.is_file():
                raise
            raise AnimesionError(
                f"{self.url} is in no bucket that exists: make the bucket, or check its name"
            ) from None

    def fault(self, file: File) -> str:
        """What is wrong with the copy of a file, one sentence; empty when it has its size and SHA-256."""
        digest = hashlib.sha256()
        with stores.clear_errors(self.url):
            try:
                size = self._fs.info(self._at(file.name))["size"]
                if size != file.bytes:
                    return f"{file.name} has {size:,} bytes there and {file.bytes:,} here"
                with self._fs.open(self._at(file.name), "rb", block_size=_CHUNK) as remote:
                    while block := remote.read(_CHUNK):
                        digest.update(block)
            except FileNotFoundError:
                return f"{file.name} is not there"
        if digest.hexdigest() != file.sha256:
            return f"{file.name} has another SHA-256 there than here"
        return ""

    def version(self, name: str) -> str:
        """What the store says of a file (size, time, ETag), digested: equal while nobody wrote it. Empty for none."""
        with stores.clear_errors(self.url):
            try:
                return str(self._fs.ukey(self._at(name)))
            except FileNotFoundError:
                return ""

    def content(self, name: str, most: int) -> bytes | None:
        """The bytes of a small file, or its first ones; None when it is not there."""
        with stores.clear_errors(self.url):
            try:
                with self._fs.open(self._at(name), "rb", block_size=_CHUNK) as remote:
                    return bytes(remote.read(most))
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> list[str]:
        """Names of what lies directly in the folder; what a killed run left half sent is not counted."""
        with stores.clear_errors(self.url):
            try:
                listed: list[Any] = self._fs.ls(self._at(folder) if folder else self._root, detail=False)
            except FileNotFoundError:
                return []
        found = [str(path).rstrip("/").rpartition("/")[2] for path in listed]
        return sorted(name for name in found if not name.endswith(_PART))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _shards(self) -> list[str]:
        return [name for each in self.names("data") if SHARD.fullmatch(name := f"data/{each}")]
