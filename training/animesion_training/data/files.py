"""Numbered files that many threads read at once: the interface, and files below a local folder.

Shards are read by place. That replaces webdataset's tar stage, which reads a shard from its start, takes 30 to 40
times the processor time a sample before decoding, and notices neither a shard cut between two members nor a changed
byte. A sample is first read with `pread` and compared with its digest; once sound, it is decoded out of the mapped
shard: the copy alone is 6% to 10% of the time that a 5 kB JPEG takes.

Remote files are left to `remote`; which bytes are which sample is known to `samples`.
"""

from __future__ import annotations

import functools
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from animesion.errors import UsageError
from animesion_training.data.seeds import IntArray


class Files(Protocol):
    """Where bytes come from: numbered files; every method may be called from any thread."""

    def name(self, file: int) -> str:
        """Path or address, for messages."""

    def read(self, file: int, offset: int, size: int) -> bytes:
        """The bytes at a place; fewer when the file ends there; the whole file for a negative size.

        Raises:
            OSError: the file cannot be read.
        """

    def view(self, file: int, offset: int, size: int) -> bytes | memoryview:
        """The same bytes, not copied where that is possible; only of a file that `check` was just content with.

        Raises:
            OSError: the file cannot be read.
        """

    def check(self, files: IntArray) -> None:
        """Compare files with what is known of them without reading them.

        Raises:
            UsageError: one is missing or has another length.
        """

    def ahead(self, files: Sequence[int]) -> None:
        """These files are needed next."""


class Descriptor:
    """An open shard, closed when the last thread that reads it lets go."""

    def __init__(self, path: Path | str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number).atexit = False

    @functools.cached_property
    def mapped(self) -> memoryview:
        """The whole file in the address space."""
        return memoryview(mmap.mmap(self.number, 0, prot=mmap.PROT_READ))

    def read(self, offset: int, size: int) -> bytes:
        """A copy of the bytes at a place; other threads run meanwhile."""
        return os.pread(self.number, size, offset)

    def view(self, offset: int, size: int) -> bytes | memoryview:
        """The bytes at a place in the page cache itself, not copied.

        The system kills who looks beyond the end of a file that was cut after it was mapped: check its size before.
        """
        return self.mapped[offset : offset + size]


class LocalFiles:
    """Files below a folder. Shards stay open, the last `most_open` opened; loose files do not.

    Args:
        root: the folder.
        paths: relative to it.
        sizes: bytes of each, if known: then they are shards.
        most_open: most descriptors held.
    """

    def __init__(
        self, root: Path, paths: Sequence[str], sizes: Sequence[int] | None = None, most_open: int = 128
    ) -> None:
        self.root = root
        self.paths = paths
        self.sizes = sizes
        self.most_open = most_open
        self._open: dict[int, Descriptor] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[LocalFiles], tuple[Path, Sequence[str], Sequence[int] | None, int]]:
        return LocalFiles, (self.root, self.paths, self.sizes, self.most_open)

    def name(self, file: int) -> str:
        """See `Files.name`."""
        return str(self.root / self.paths[file])

    def read(self, file: int, offset: int, size: int) -> bytes:
        """See `Files.read`."""
        if self.sizes is None:
            with open(f"{self.root}/{self.paths[file]}", "rb", buffering=0) as whole:
                return whole.read()
        return self._descriptor(file).read(offset, size)

    def view(self, file: int, offset: int, size: int) -> bytes | memoryview:
        """See `Files.view`."""
        if self.sizes is None:
            return self.read(file, offset, size)
        return self._descriptor(file).view(offset, size)

    def check(self, files: IntArray) -> None:
        """See `Files.check`; loose files are not looked at, as there may be millions."""
        if self.sizes is None:
            return
        for file in files.tolist():
            path = f"{self.root}/{self.paths[file]}"
            try:
                size = os.stat(path).st_size
            except OSError as error:
                why = (error.strerror or "read error").lower()
                raise UsageError(f"cannot read {path} ({why}): copy the shard back or rebuild the dataset") from None
            if size != self.sizes[file]:
                raise UsageError(
                    f"{path} has {size:,} bytes where dataset.json says {self.sizes[file]:,}: it was cut short or "
                    "changed; copy the shard again or rebuild the dataset"
                )

    def ahead(self, files: Sequence[int]) -> None:
        """See `Files.ahead`; local files need nothing."""

    def _descriptor(self, file: int) -> Descriptor:
        descriptor = self._open.get(file)  # no lock on the common path
        if descriptor is None:
            descriptor = Descriptor(self.root / self.paths[file])
            with self._lock:
                self._open[file] = descriptor
                if len(self._open) > self.most_open:
                    del self._open[next(iter(self._open))]
        return descriptor
