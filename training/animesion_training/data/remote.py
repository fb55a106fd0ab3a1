"""Datasets behind a URL: blocks of shards are downloaded into a local cache of limited size and read from there.

Any fsspec URL works. A process downloads the blocks that it reads, see `schedule`, several at a time, ahead of their
use. Blocks are stored under the SHA-256 of their shard, so several processes can share a folder. What is read is
compared with the digest of each sample (`samples`), so a block is not verified as a whole.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import animesion
from animesion.dataset.dataset import Dataset, ShardInfo
from animesion.errors import UsageError
from animesion.storage import stores
from animesion_training.data.blocks import Blocks
from animesion_training.data.ranges import http_ranges
from animesion_training.data.seeds import IntArray
from animesion_training.distributed import local_processes

_TABLES = ("dataset.json", "index.parquet")
#: Downloads at a time: a block of 256 KiB each, with 20 ms to the first byte, are 400 MB/s.
_CONNECTIONS = 32
#: Blocks that stay mapped into memory.
_MOST_MAPPED = 4096


def open_remote(url: str, cache: Path | str | None, more: Sequence[str] = ()) -> tuple[Dataset, Any, str, Path]:
    """Download the tables of a dataset.

    Args:
        url: URL of the dataset's folder.
        cache: folder for tables and blocks; None for a folder of this URL in the user's cache.
        more: further tables that are needed.

    Returns:
        The dataset without its shards, the fsspec file system, the path in it, and the folder.

    Raises:
        UsageError: the URL is not a built dataset, or cannot be read.
    """
    import fsspec

    folder = stores.cache_folder(url) if cache is None else Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        system, root = fsspec.core.url_to_fs(url.rstrip("/"))
        for name in (*_TABLES, *more):
            _put(folder / name, system.cat_file(f"{root}/{name}"))
    except Exception as error:  # each protocol raises its own
        raise UsageError(
            f"{url} cannot be read as a built dataset ({_reason(error)}); check the URL and the credentials"
        ) from None
    return animesion.open_dataset(folder), system, root, folder


class RemoteFiles:
    """The shards of a remote dataset, read through a local cache; implements `files.Files`.

    Args:
        system: the fsspec file system.
        root: path of the dataset in it.
        shards: all shards.
        blocks: of all shards.
        folder: the cache.
        most_bytes: upper limit of the cache; it holds at least one block of any size.

    Attributes:
        fetched: blocks that were downloaded.
        fetched_bytes: their bytes.
    """

    def __init__(
        self, system: Any, root: str, shards: Sequence[ShardInfo], blocks: Blocks, folder: Path, most_bytes: int
    ) -> None:
        self.system = system
        self.root = root
        self.shards = shards
        self.blocks = blocks
        self.folder = folder
        self.most_bytes = most_bytes
        self.fetched = self.fetched_bytes = 0
        self._starts = list(zip(blocks.files.tolist(), blocks.starts.tolist(), strict=True))
        self._mapped: dict[int, memoryview] = {}
        self._coming: dict[int, Future[memoryview]] = {}
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be added to the folder before it is looked at again
        self._incoming = 0  # bytes that are being written
        self._ranges = True
        self._shard_locks = [threading.Lock() for _ in shards]
        self._pool: ThreadPoolExecutor | None = None
        self._direct = http_ranges(system, root)

    def __reduce__(self) -> tuple[type[RemoteFiles], tuple[Any, ...]]:
        return RemoteFiles, (self.system, self.root, self.shards, self.blocks, self.folder, self.most_bytes)

    def name(self, file: int) -> str:
        """See `Files.name`."""
        return f"{self.root}/{self.shards[file].path}"

    def read(self, file: int, offset: int, size: int) -> bytes:
        """See `Files.read`."""
        return bytes(self.view(file, offset, size))

    def view(self, file: int, offset: int, size: int) -> bytes | memoryview:
        """See `Files.view`."""
        block = self._block(file, offset)
        start = offset - self._starts[block][1]
        mapped = self._mapped.get(block)
        if mapped is None:
            mapped = self._request(block).result()
        return mapped[start : start + size]

    def check(self, files: IntArray) -> None:
        """See `Files.check`: samples are compared with their digests when they are read."""

    def prefetch(self, blocks: Sequence[int]) -> None:
        """See `Files.prefetch`: download in the background; reading a sample raises the error of a failed download."""
        for block in blocks:
            if block not in self._mapped:
                self._request(block)

    def discard(self, file: int, offset: int) -> bool:
        """See `Files.discard`."""
        block = self._block(file, offset)
        with self._lock:
            self._mapped.pop(block, None)
        try:
            self._path(block).unlink()
        except FileNotFoundError:
            return False
        return True

    def _block(self, file: int, offset: int) -> int:
        return bisect_right(self._starts, (file, offset)) - 1

    def _path(self, block: int) -> Path:
        file, start = self._starts[block]
        return self.folder / f"{self.shards[file].sha256}-{start}-{self.blocks.ends[block]}.block"

    def _request(self, block: int) -> Future[memoryview]:
        """Start to open or download a block, unless this has begun."""
        with self._lock:
            future = self._coming.get(block)
            if future is None:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_CONNECTIONS, "animesion-fetch")
                    weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
                future = self._coming[block] = self._pool.submit(self._open, block)
            return future

    def _open(self, block: int) -> memoryview:
        try:
            path, size = self._path(block), int(self.blocks.ends[block]) - self._starts[block][1]
            mapped = _map(path, size)
            if mapped is None:
                return self._download(block, size)
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # recently used
            return self._keep(block, mapped)
        finally:
            with self._lock:
                self._coming.pop(block, None)

    def _keep(self, block: int, mapped: memoryview) -> memoryview:
        with self._lock:
            self._mapped[block] = mapped
            if len(self._mapped) > _MOST_MAPPED:
                del self._mapped[next(iter(self._mapped))]
        return mapped

    def _download(self, block: int, size: int) -> memoryview:
        file, start = self._starts[block]
        if self._ranges:
            content = self._fetch(file, start, start + size)
            if len(content) == size:
                return self._store(block, content)
            # some servers answer any request with the whole file
            self._ranges = False
            return self._store_all(block, content)
        with self._shard_locks[file]:
            mapped = _map(self._path(block), size)
            if mapped is not None:
                return self._keep(block, mapped)
            return self._store_all(block, self._fetch(file, 0, self.shards[file].bytes))

    def _fetch(self, file: int, start: int, end: int) -> bytes | memoryview:
        """Download a range of a shard, or the shard if the server knows no ranges; valid until the thread's next."""
        source, whole = f"{self.root}/{self.shards[file].path}", self.shards[file].bytes
        content: bytes | memoryview | None = None
        if self._direct is not None:
            content = self._direct.read(source, whole, start, end)
        if content is None:
            try:
                content = self.system.cat_file(source, start=start, end=end)
            except Exception as error:
                raise UsageError(f"{source} cannot be downloaded ({_reason(error)}); try again") from None
        with self._lock:
            self.fetched += 1
            self.fetched_bytes += len(content)
        if len(content) not in (end - start, whole):
            raise UsageError(
                f"{source} is not the shard that dataset.json lists (bytes {start:,} to {end:,} are {len(content):,}): "
                "upload the dataset again"
            )
        return content

    def _store_all(self, wanted: int, content: bytes | memoryview) -> memoryview:
        """Store all blocks of a shard; return one of them."""
        file = self._starts[wanted][0]
        first, behind = bisect_right(self._starts, (file, -1)), bisect_right(self._starts, (file + 1, -1))
        stored = {
            block: self._store(block, content[self._starts[block][1] : int(self.blocks.ends[block])])
            for block in range(first, behind)
        }
        return stored[wanted]

    def _store(self, block: int, content: bytes | memoryview) -> memoryview:
        with self._lock:
            self._incoming += len(content)
            self._room -= len(content)
            if self._room < 0:
                self._make_room()
        part = None
        try:
            number, part = tempfile.mkstemp(".part", dir=self.folder)
            with open(number, "wb", buffering=0) as file:
                left = memoryview(content)
                while left:
                    left = left[file.write(left) :]
            # mapped before others can see the file and delete it to make room
            mapped = _map(Path(part), len(content))
            os.replace(part, self._path(block))
        except BaseException:
            if part is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
            raise
        finally:
            with self._lock:
                self._incoming -= len(content)
        assert mapped is not None
        return self._keep(block, mapped)

    def _make_room(self) -> None:
        """Delete the least recently used blocks, with `_lock` held; what is mapped stays readable.

        An eighth of the limit becomes free, so that the folder is listed rarely. The room is shared with the other
        processes of this machine.
        """
        kept = []
        for path in self.folder.glob("*.block"):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        total = self._incoming + sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.most_bytes - self.most_bytes // 8:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._room = max(0, self.most_bytes - total) // local_processes()


def _map(path: Path, size: int) -> memoryview | None:
    """Map a file of this size into memory; None if there is none."""
    try:
        if path.stat().st_size != size:
            return None
        # unlike the mappings of mmap, those of torch keep no file descriptor: thousands are mapped at a time
        mapped: Any = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
        return memoryview(mapped)
    except (FileNotFoundError, RuntimeError):
        return None


def _put(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
