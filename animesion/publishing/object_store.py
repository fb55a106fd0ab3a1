"""Publishing to folders and object stores through fsspec: `file://`, `s3://`, `gs://`.

Files are verified by reading them back: first the size, then the SHA-256 of the bytes. Digests that a store keeps are
not trusted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from animesion.errors import AnimesionError, UsageError
from animesion.progress import Progress
from animesion.publishing import lease
from animesion.publishing.base import SHARD, File
from animesion.storage import stores
from animesion.storage.checksums import SEALS

_CHUNK = 8 << 20
#: Bytes per part of a multipart upload (several parts are in memory at a time), and S3's limit of parts per file.
_PIECE, _PIECES = 16 << 20, 10_000
_PART = ".sending"


class ObjectStore:
    """A folder or a prefix of a bucket.

    Attributes:
        url: the address.
        lease: the lease that keeps other writers out; whoever changes files takes it first.

    Args:
        url: `file:///folder`, `s3://bucket/prefix` or `gs://bucket/prefix`.
        replace: whether to remove shards of another dataset instead of refusing.

    Raises:
        UsageError: the URL names no bucket, or the store's package is not installed.
    """

    def __init__(self, url: str, *, replace: bool = False) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = stores.connect(url)
        self._local = url.startswith("file://")
        self.lease = lease.Lease(self._fs, self._root, self.url)
        self._replace = replace

    def refusal(self, tag: str, changes: bool) -> str:
        """Refuses tags: an object store has no revisions."""
        if tag:
            return f"--tag names a revision of a Hub repository: put {tag} into the prefix of {self.url} instead"
        return ""

    def prepare(self) -> None:
        """Does nothing: folders are created with their files, and buckets must exist."""

    def present(self, files: Sequence[File]) -> set[str]:
        """Files of equal size and SHA-256; the files of `SEALS` count only if all files are present."""
        found = {file.name for file in files if not self.fault(file)}
        return found if len(found) == len(files) else found.difference(SEALS)

    def stale(self, files: Sequence[File]) -> list[str]:
        """Shards of another dataset. Nothing is removed without `replace`, as a store keeps no history.

        Shards that `animesion remove` emptied are removed in any case.

        Raises:
            UsageError: there are such shards, and `replace` is not set.
        """
        names = {file.name for file in files}
        others = [name for name in self._shards() if name not in names]
        emptied = _emptied(files)
        unknown = [name for name in others if name not in emptied]
        if unknown and not self._replace:
            raise UsageError(
                f"{self.url} holds {unknown[0]}{f' and {len(unknown) - 1:,} more shards' * (len(unknown) > 1)} of "
                "another dataset, which readers would load: choose an empty destination, or remove them"
            )
        return others

    def send(self, files: Sequence[File], stale: Sequence[str], message: str, progress: Progress) -> None:
        """Send files one by one; the files of `SEALS` are removed first.

        Raises:
            BusyError: another process writes to the same place.
        """
        with self.lease:
            self.unseal()
            self.remove(stale)
            for file in files:
                progress.status(file.name)
                self.put(file)

    def faults(self, files: Sequence[File]) -> list[str]:
        """Reads every file back."""
        return [fault for file in files if (fault := self.fault(file))]

    def tag(self, name: str) -> None:
        """Not supported.

        Raises:
            UsageError: always.
        """
        raise UsageError(self.refusal(name, changes=False))

    # -- single files ------------------------------------------------------------------------------------------------

    def unseal(self) -> None:
        """Remove the files of `SEALS`, so that the copy does not count as complete while it changes."""
        self.remove(SEALS)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; missing ones are ignored."""
        for name in names:
            with stores.clear_errors(self.url), suppress(FileNotFoundError):
                if self._fs.exists(self._at(name)):  # some stores raise no FileNotFoundError
                    self._fs.rm_file(self._at(name))

    def put(self, file: File) -> None:
        """Send one file; it appears under its name only when it is complete.

        Raises:
            AnimesionError: the bucket does not exist, denies access or cannot be reached.
            BusyError: another process has taken the lease.
        """
        self.lease.check()
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
            raise AnimesionError(f"{self.url}: the bucket does not exist; create it, or check its name") from None

    def fault(self, file: File) -> str:
        """What is wrong with the copy of a file, one sentence; empty if its size and SHA-256 are right."""
        digest = hashlib.sha256()
        with stores.clear_errors(self.url):
            try:
                size = self._fs.info(self._at(file.name))["size"]
                if size != file.bytes:
                    return f"{file.name} has {size:,} bytes instead of {file.bytes:,}"
                with self._fs.open(self._at(file.name), "rb", block_size=_CHUNK) as remote:
                    while block := remote.read(_CHUNK):
                        digest.update(block)
            except FileNotFoundError:
                return f"{file.name} is missing"
        if digest.hexdigest() != file.sha256:
            return f"{file.name} has another SHA-256 than the local file"
        return ""

    def version(self, name: str) -> str:
        """Digest of the store's metadata of a file (size, time, ETag); changes with every write. Empty for no file."""
        with stores.clear_errors(self.url):
            try:
                return str(self._fs.ukey(self._at(name)))
            except FileNotFoundError:
                return ""

    def content(self, name: str, most: int) -> bytes | None:
        """The first `most` bytes of a file; None if it does not exist."""
        with stores.clear_errors(self.url):
            try:
                with self._fs.open(self._at(name), "rb", block_size=_CHUNK) as remote:
                    return bytes(remote.read(most))
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> list[str]:
        """Names of the entries of a folder, without partial files of killed runs and the lease."""
        with stores.clear_errors(self.url):
            try:
                listed: list[Any] = self._fs.ls(self._at(folder) if folder else self._root, detail=False)
            except FileNotFoundError:
                return []
        found = [str(path).rstrip("/").rpartition("/")[2] for path in listed]
        return sorted(name for name in found if not name.endswith(_PART) and (folder or name != lease.NAME))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _shards(self) -> list[str]:
        return [name for each in self.names("data") if SHARD.fullmatch(name := f"data/{each}")]


def _emptied(files: Sequence[File]) -> set[str]:
    """The shards that removals have emptied, as the `dataset.json` among the files says."""
    for file in files:
        if file.name == "dataset.json":
            try:
                return {str(name) for name in json.loads(file.path.read_bytes()).get("emptied_shards", ())}
            except (OSError, ValueError, AttributeError, TypeError, RecursionError):
                return set()
    return set()
