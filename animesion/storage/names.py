"""Names in the files of a build folder, which may be a stranger's: keys, paths, and links in place of files.

Receipts, plans, tables, `dataset.json` and `SHA256SUMS` name files. Each is checked here, where it is read, so that no
caller can be led out of the folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from animesion.errors import UsageError

#: A path inside the folder: no absolute path, no `..`, no hidden name, letters of any file system.
PATH = r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*"
#: The key of an image or a sample; a tar header has room for 90 letters beside the field.
KEY = r"[a-z0-9_-]{1,90}"
#: A shard, as `dataset.json` and `index.parquet` name it.
SHARD = r"data/[A-Za-z0-9_-]{1,100}\.tar"
#: SHA-256 in hexadecimal.
SHA256 = r"[0-9a-f]{64}"


#: Control characters, which move the cursor and colour the terminal, and lone surrogates, which no encoding has.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_text(name: str) -> bool:
    """Whether a name, as of a class, can be printed without harm."""
    return not _UNPRINTABLE.search(name)


def is_path(name: str) -> bool:
    """Whether a name is a path inside the folder."""
    return re.fullmatch(PATH, name) is not None


def refuse_links(folder: Path) -> None:
    """Check that nothing in a folder is a link, so that nothing outside it is read, written or removed.

    Raises:
        UsageError: there is a link.
    """
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:  # knows the kinds without asking for each
            for entry in entries:
                if entry.is_symlink():
                    raise UsageError(
                        f"{entry.path} is a link, and links are not followed: put the file or folder itself there"
                    )
                if entry.is_dir():
                    waiting.append(entry.path)
