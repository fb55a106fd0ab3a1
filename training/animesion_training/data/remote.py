"""Datasets behind a URL: whole shards are downloaded into a local cache of limited size and read from there.

Any fsspec URL works. Shards are stored under their SHA-256, so several processes can share a folder. The window of the
schedule limits how many shards are needed at a time: the folder should have room for two windows, or shards are
downloaded more than once. In training, every process reads all shards.
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
    """Download the tables of a dataset and prepare to download its shards.

    Args:
        url: URL of the dataset's folder.
        cache: folder for tables and shards; None for a folder of this URL in the user's cache.
        cache_bytes: upper limit of the size of cached shards.

    Raises:
        UsageError: the URL is not a built dataset, or cannot be read.
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
            f"{url} cannot be read as a built dataset ({_reason(error)}); check the URL and the credentials"
        ) from None
    dataset = animesion.open_dataset(folder)
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    return dataset, RemoteFiles(system, root, shards, folder, cache_bytes)


class RemoteFiles:
    """The shards of a remote dataset, read through a local cache; implements `files.Files`.

    Args:
        system: the fsspec file system.
        root: path of the dataset in it.
        shards: all shards.
        folder: the cache.
        most_bytes: upper limit of the cache; it holds at least one shard of any size.
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
        self._room_lock = threading.Lock()
        self._incoming = 0  # bytes of shards that are being downloaded
        self._prefetcher: ThreadPoolExecutor | None = None

    def name(self, file: int) -> str:
        """See `Files.name`."""
        return f"{self.root}/{self.shards[file].path}"

    def read(self, file: int, offset: int, size: int) -> bytes:
        """See `Files.read`."""
        return (self._open.get(file) or self._open_shard(file)).read(offset, size)

    def view(self, file: int, offset: int, size: int) -> bytes | memoryview:
        """See `Files.view`."""
        return (self._open.get(file) or self._open_shard(file)).view(offset, size)

    def check(self, files: IntArray) -> None:
        """See `Files.check`: a shard is verified when it is downloaded."""

    def prefetch(self, files: Sequence[int]) -> None:
        """See `Files.prefetch`: download in the background; reading a sample raises the error of a failed download."""
        if self._prefetcher is None:
            self._prefetcher = ThreadPoolExecutor(2, "animesion-fetch")
            weakref.finalize(self, self._prefetcher.shutdown, wait=False, cancel_futures=True)
        for file in files:
            if file not in self._open:
                self._prefetcher.submit(self._open_shard, file)

    def _open_shard(self, file: int) -> Descriptor:
        with self._locks[file]:  # one thread downloads, the others that need the shard wait
            descriptor = self._open.get(file)
            if descriptor is not None:
                return descriptor
            shard = self.shards[file]
            path = self.folder / f"{shard.sha256}.tar"
            try:
                descriptor = Descriptor(path)
                os.utime(path)
            except FileNotFoundError:
                with self._room_lock:
                    self._incoming += shard.bytes
                    self._make_room()
                try:
                    descriptor = self._download(shard, path)
                finally:
                    with self._room_lock:
                        self._incoming -= shard.bytes
                        self._make_room(path)  # downloads that ended at the same time may exceed the limit
            self._open[file] = descriptor
            return descriptor

    def _download(self, shard: ShardInfo, path: Path) -> Descriptor:
        """Download a shard, verify it, and open it."""
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
                # opened before others can see the file and delete it to make room
                descriptor = Descriptor(part.name)
                os.replace(part.name, path)
                self.fetched += 1
                return descriptor
            except BaseException as error:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part.name)
                if isinstance(error, Exception) and not isinstance(error, UsageError):
                    raise UsageError(f"{source} cannot be downloaded ({_reason(error)}); try again") from None
                raise

    def _make_room(self, fresh: Path | None = None) -> None:
        """Delete the least recently opened shards; threads that still read them keep their descriptors.

        Call it with `_room_lock` held.

        Args:
            fresh: a shard that is about to be read and must stay.
        """
        kept = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                status = path.stat()
                kept.append((status.st_mtime, status.st_size, path))
        total = self._incoming + sum(size for _, size, _ in kept)
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
