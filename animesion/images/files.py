"""Image files on disk that a command is given: found below folders, and read within a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from animesion.errors import UsageError

_LARGEST = 256 * 1024 * 1024


def files(paths: Sequence[Path]) -> Iterator[Path]:
    """Find the images of paths: files as given, files in folders sorted and without hidden ones.

    Raises:
        UsageError: a path that does not exist.
    """
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        elif path.exists():
            yield path
        else:
            raise UsageError(f"image or folder {path} not found")


def read(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, and why it cannot be read; one of the two is empty (both for an empty file)."""
    try:
        if path.stat().st_size > _LARGEST:
            return b"", "too many bytes"
        return path.read_bytes(), ""
    except OSError as error:
        return b"", (error.strerror or "cannot be read").lower()
