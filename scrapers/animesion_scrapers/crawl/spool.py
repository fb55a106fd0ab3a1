"""An append-only file of downloaded bodies, many per write.

Offsets and digests of the bodies are kept in `ledger`.
"""

from __future__ import annotations

import os
from pathlib import Path

_MOST_PIECES = 512
"""Buffers per system call; Linux accepts 1,024."""


class Spool:
    """One spool file, created if missing.

    Attributes:
        end: Size of the file after the next `flush`, in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open it for reading and appending."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[bytes] = []
        self.end = os.lseek(self._file, 0, os.SEEK_END)

    def append(self, content: bytes) -> int:
        """Queue bytes for the next `flush` and return their offset."""
        offset = self.end
        self._waiting.append(content)
        self.end += len(content)
        return offset

    def flush(self) -> None:
        """Write the queued bytes.

        Raises:
            OSError: The disk is full. `end` is the size written; the rest is dropped.
        """
        waiting, self._waiting = self._waiting, []
        try:
            for start in range(0, len(waiting), _MOST_PIECES):
                pieces = waiting[start : start + _MOST_PIECES]
                written = os.writev(self._file, pieces)
                if written < sum(map(len, pieces)):  # a short write, as on a nearly full disk
                    rest = memoryview(b"".join(pieces))[written:]
                    while rest:
                        rest = rest[os.write(self._file, rest) :]
        except OSError:
            self.end = os.lseek(self._file, 0, os.SEEK_END)
            raise

    def read(self, offset: int, size: int) -> bytes:
        """Read flushed bytes; fewer than `size` at the end of the file.

        Raises:
            OSError: They cannot be read.
        """
        return os.pread(self._file, size, offset)

    def close(self) -> None:
        """Close the file; bytes that were not flushed are dropped."""
        os.close(self._file)
