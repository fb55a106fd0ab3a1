"""A spool: a file to which bodies are appended, many with one write, and from which they are read again.

Where each body lies, and whether it is any good, is remembered by `ledger`.
"""

from __future__ import annotations

import os
from pathlib import Path

_MOST_PIECES = 512
"""Bodies handed to one system call; Linux takes 1,024."""


class Spool:
    """One spool file, made when missing."""

    def __init__(self, path: Path) -> None:
        """Open it for reading and appending."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[bytes] = []
        self.end = os.lseek(self._file, 0, os.SEEK_END)

    def append(self, content: bytes) -> int:
        """Take bytes in, to be written with the next `flush`; returns where they will lie."""
        offset = self.end
        self._waiting.append(content)
        self.end += len(content)
        return offset

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: The disk is full. `end` says how much there was room for; the rest is dropped.
        """
        waiting, self._waiting = self._waiting, []
        try:
            for start in range(0, len(waiting), _MOST_PIECES):
                pieces = waiting[start : start + _MOST_PIECES]
                written = os.writev(self._file, pieces)
                if written < sum(map(len, pieces)):
                    rest = memoryview(b"".join(pieces))[written:]
                    while rest:
                        rest = rest[os.write(self._file, rest) :]
        except OSError:
            self.end = os.lseek(self._file, 0, os.SEEK_END)
            raise

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at a place, once flushed; fewer when the file ends before.

        Raises:
            OSError: They cannot be read.
        """
        return os.pread(self._file, size, offset)

    def close(self) -> None:
        """Close the file; what was not flushed is dropped."""
        os.close(self._file)
