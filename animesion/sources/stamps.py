"""Tell cheaply whether the files that a local source lists have changed: by names, sizes and times, unread."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from animesion.storage import stores


def of(trees: Sequence[str], files: Sequence[str] = ()) -> str:
    """A digest that differs if a file was added, removed, renamed or written, or this package is of another version.

    Links are followed. The outputs of builds below a tree are passed over, as sources do.

    Args:
        trees: folders, with all that is below them, or files.
        files: further files, or folders whose own files count, without those in folders below.

    Returns:
        The digest as hex; empty if a place is a URL, or is not there.
    """
    if any(stores.is_url(place) for place in (*trees, *files)):
        return ""
    digest = hashlib.sha256(version("animesion").encode())
    try:
        for place in trees:
            _add(digest, str(Path(place).expanduser()), deep=True)
        for place in files:
            _add(digest, str(Path(place).expanduser()), deep=False)
    except OSError:  # the listing says what is wrong
        return ""
    return digest.hexdigest()


def of_values(*values: object) -> str:
    """A digest of what identifies files, as their names, sizes and times do, and of this package's version, as hex."""
    return hashlib.sha256(repr((version("animesion"), values)).encode("utf-8", "surrogateescape")).hexdigest()


def together(*found: str) -> str:
    """A digest that differs if one of several does; empty if one of them is."""
    return of_values(found) if all(found) else ""


def _add(digest: hashlib._Hash, root: str, *, deep: bool) -> None:
    status = os.stat(root)
    if not stat.S_ISDIR(status.st_mode):
        digest.update(repr((root, status.st_size, status.st_mtime_ns)).encode())
        return
    waiting = [root]
    visited: set[tuple[int, int]] = set()  # a link back up would be a loop
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        found: list[tuple[str, int, int, int]] = []
        below = []
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing
                    found.append((entry.name, 0, 0, 0))
                    continue
                kind = stat.S_IFMT(status.st_mode)
                if kind == stat.S_IFDIR:
                    below.append(entry.path)
                    found.append((entry.name, kind, 0, 0))
                else:
                    found.append((entry.name, kind, status.st_size, status.st_mtime_ns))
        found.sort()
        if folder != root and any(name == ".receipts" for name, *_ in found):
            continue
        digest.update(repr((folder, found)).encode("utf-8", "surrogateescape"))
        if deep:
            waiting += sorted(below, reverse=True)
