"""Read and write `SHA256SUMS`, the digests of a dataset's files in the format of `sha256sum -c`.

A build writes it last and removes it before anything changes, so a folder with this file is a complete dataset.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from animesion.errors import UsageError
from animesion.storage import names

CHECKSUMS = "SHA256SUMS"

#: Files that mark a dataset as complete; readers check for them.
SEALS = ("dataset.json", CHECKSUMS)

_LINE = re.compile(rf"({names.SHA256})  ({names.PATH})")


def render(digests: Mapping[str, str]) -> str:
    """The text of the file, from SHA-256 digests by path."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def parse(folder: Path) -> tuple[dict[str, str], list[int]]:
    """Digests by path inside the folder, and the numbers of malformed lines.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: the file is not UTF-8.
    """
    digests: dict[str, str] = {}
    malformed = []
    for number, line in enumerate((folder / CHECKSUMS).read_text(encoding="utf-8").splitlines(), 1):
        if match := _LINE.fullmatch(line):
            digests[match[2]] = match[1]
        else:
            malformed.append(number)
    return digests, malformed


def read(folder: Path) -> dict[str, str]:
    """SHA-256 of each listed file, by its path inside the folder; malformed lines are ignored.

    Raises:
        UsageError: the file is missing or unreadable.
    """
    try:
        return parse(folder)[0]
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{folder / CHECKSUMS} is missing or unreadable: run `animesion build` again") from None


def digest(folder: Path, key: str) -> str:
    """SHA-256 of the file itself, as hex, which identifies the dataset's content.

    Args:
        folder: a finished dataset.
        key: recipe key of the folder, for the message.

    Raises:
        UsageError: the file is missing or unreadable.
    """
    try:
        return hashlib.sha256((folder / CHECKSUMS).read_bytes()).hexdigest()
    except (OSError, ValueError):
        raise UsageError(
            f"{key}: {folder} is not a finished dataset, as its {CHECKSUMS} cannot be read: "
            "give the output folder of `animesion build`"
        ) from None


def unseal(folder: Path) -> None:
    """Remove the files that mark a dataset as complete, before other files change."""
    for name in SEALS:
        (folder / name).unlink(missing_ok=True)
