"""Built datasets behind a URL: whole shards are fetched into a bounded local folder and read from there.

Any fsspec address works. A shard is kept under its SHA-256, so it is the right one or it is not there; several
processes may share a folder. The window of the schedule bounds how many shards are needed at a time: the folder should
have room for two windows, or shards are fetched more than once. In training every process reads all shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import animesion
from animesion.dataset.dataset import Dataset, ShardInfo
from animesion.errors import UsageError
from animesion.storage import stores
from animesion_training.data.files import Descriptor
from animesion_training.data.seeds import IntArray

_CHUNK = 2**20
_TABLES = ("dataset.json", "index.parquet")


def open_remote(url: str, cache: Path | str | None, cache_bytes: int) -> tuple[Dataset, RemoteFiles]:
    """Fetch a dataset's tables and prepare to fetch its shards.

    Args:
        url: of the dataset's folder.
        cache: folder for tables and shards; None for one of this URL under the user's cache folder.
        cache_bytes: most bytes of shards kept there.

    Raises:
        UsageError: there is no built dataset at the address, or it cannot be read.
    """
    import fsspec

    folder = stores.cache_folder(url) if cache is None else Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        system, root = fsspec.core.url_to_fs(url.rstrip("/"))
        for name in _TABLES:
            _put(folder / name, system.cat_file(f"{root}/{name}"))
    except Exception as error:  # each protocol raises its own
        raise UsageError(
            f"{url} cannot be read as a built dataset ({_reason(error)}); check the address and the credentials"
        ) from None
    dataset = animesion.open_dataset(folder)
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    return dataset, RemoteFiles(system, root, shards, folder, cache_bytes)


class RemoteFiles:
    """The shards of a remote dataset, read through a local folder; implements `files.Files`.

    Args:
        system: the fsspec file system.
        root: of the dataset in it.
        shards: every shard.
        folder: where shards are kept.
        most_bytes: most bytes kept; at least one shard is kept whatever its size.
    """

    def __init__(self, system: Any, root: str, shards: Sequence[ShardInfo], folder: Path, most_bytes: int) -> None:
        self.system = system
        self.root = root
        self.shards = shards
        self.folder = folder
        self.most_bytes = most_bytes
        self.fetched = 0
        self._open: dict[int, Descriptor] = {}
        self._locks = [threading.Lock() for _ in shards]
        self._making_room = threading.Lock()
        self._coming = 0  # bytes being fetched
        self._ahead: ThreadPoolExecutor | None = None

    def name(self, file: int) -> str:
        """See `Files.name`."""
        return f"{self.root}/{self.shards[file].path}"

    def read(self, file: int, offset: int, size: int) -> bytes:
        """See `Files.read`."""
        return (self._open.get(file) or self._fetched(file)).read(offset, size)

    def view(self, file: int, offset: int, size: int) -> bytes | memoryview:
        """See `Files.view`."""
        return (self._open.get(file) or self._fetched(file)).view(offset, size)

    def check(self, files: IntArray) -> None:
        """See `Files.check`: a shard is checked to the last byte when it is fetched."""

    def ahead(self, files: Sequence[int]) -> None:
        """See `Files.ahead`: fetch in the background; what goes wrong is told when a sample is read."""
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(2, "animesion-fetch")
            weakref.finalize(self, self._ahead.shutdown, wait=False, cancel_futures=True)
        for file in files:
            if file not in self._open:
                self._ahead.submit(self._fetched, file)

    def _fetched(self, file: int) -> Descriptor:
        with self._locks[file]:  # one thread fetches, the others that need the shard wait
            descriptor = self._open.get(file)
            if descriptor is not None:
                return descriptor
            shard = self.shards[file]
            path = self.folder / f"{shard.sha256}.tar"
            try:
                descriptor = Descriptor(path)
                os.utime(path)
            except FileNotFoundError:
                with self._making_room:
                    self._coming += shard.bytes
                    self._make_room()
                try:
                    self._fetch(shard, path)
                    descriptor = Descriptor(path)
                finally:
                    with self._making_room:
                        self._coming -= shard.bytes
                        self._make_room(path)  # shards that came at the same time may be too many
            self._open[file] = descriptor
            return descriptor

    def _fetch(self, shard: ShardInfo, path: Path) -> None:
        source, digest, size = f"{self.root}/{shard.path}", hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as part:
            try:
                with self.system.open(source, "rb", cache_type="none") as remote:
                    while chunk := remote.read(_CHUNK):
                        digest.update(chunk)
                        size += len(chunk)
                        part.write(chunk)
                part.flush()
                if size != shard.bytes or digest.hexdigest() != shard.sha256:
                    raise UsageError(
                        f"{source} is not the shard that dataset.json lists ({size:,} of {shard.bytes:,} bytes); "
                        "upload the dataset again"
                    )
                os.replace(part.name, path)
                self.fetched += 1
            except BaseException as error:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part.name)
                if isinstance(error, Exception) and not isinstance(error, UsageError):
                    raise UsageError(f"{source} cannot be fetched ({_reason(error)}); try again") from None
                raise

    def _make_room(self, fresh: Path | None = None) -> None:
        """Delete the shards fetched longest ago; threads that read them keep their descriptor until they are done.

        Called with `_making_room` held.

        Args:
            fresh: one that is kept, as it is about to be read.
        """
        kept = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                facts = path.stat()
                kept.append((facts.st_mtime, facts.st_size, path))
        total = self._coming + sum(size for _, size, _ in kept)
        by_name = {f"{shard.sha256}.tar": file for file, shard in enumerate(self.shards)}
        for _, size, path in sorted(kept):
            if total <= self.most_bytes:
                return
            if path != fresh:
                path.unlink(missing_ok=True)
                self._open.pop(by_name.get(path.name, -1), None)
                total -= size


def _put(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
