"""Read and write `removed.csv`, the digests of images that were removed from a dataset on request.

It is all that a dataset keeps of them. A build refuses the images that its folder, `curate.removed` or
`duplicates.against` list. An image is known by the bytes of its file and by its decoded pixels, and one of a site by
its number there too, so that it is not downloaded again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from animesion.errors import UsageError
from animesion.storage import names

REMOVED = "removed.csv"

#: Sources whose ids are paths or rows of a table, which mean nothing elsewhere.
_LOCAL = frozenset(
    {"folder", "labels", "parquet", "webdataset", "indexed-tar", "urls", "moeimouto", "ultra-fgvc", "benchmark"}
)
_MOST_BYTES = 500_000_000
_DIGEST = re.compile(rf"(?:{names.SHA256})?")


class Removal(NamedTuple):
    """One removed image; unknown digests are empty.

    Attributes:
        sha256: of the bytes of its file, as hex.
        pixels_blake3: of its decoded pixels, as hex.
        post_sha256: of the site and its number there, see `post_digest`.
        note: what was stated with the removal, such as the number of the request.
    """

    sha256: str = ""
    pixels_blake3: str = ""
    post_sha256: str = ""
    note: str = ""


@dataclass(frozen=True)
class Removed:
    """The images that must not enter a dataset.

    Attributes:
        bytes_: SHA-256 of files.
        pixels: BLAKE3 of pixels.
        posts: digests of posts.
    """

    bytes_: frozenset[str] = frozenset()
    pixels: frozenset[str] = frozenset()
    posts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, removals: Iterable[Removal]) -> Removed:
        """The digests of some removals."""
        listed = list(removals)
        columns = ([each[i] for each in listed if each[i]] for i in range(3))
        return cls(*map(frozenset, columns))

    def __bool__(self) -> bool:
        return bool(self.bytes_ or self.pixels or self.posts)

    def has(self, sha256: str = "", pixels: str = "", source: str = "", source_id: str = "") -> bool:
        """Whether an image is among them, by what is known of it."""
        post = self.posts and post_digest(source, source_id)
        return sha256 in self.bytes_ or pixels in self.pixels or bool(post and post in self.posts)

    def digest(self) -> str:
        """A digest of all; empty if there are none."""
        if not self:
            return ""
        parts = (sorted(self.bytes_), sorted(self.pixels), sorted(self.posts))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def post_digest(source: str, source_id: str) -> str:
    """SHA-256 of a site and a number there, as hex; empty for sources whose ids are names of files."""
    if not source_id or source in _LOCAL or source.startswith("sample"):
        return ""
    return hashlib.sha256(f"{source}\n{source_id}".encode()).hexdigest()


def render(removals: Iterable[Removal]) -> str:
    """The text of the file, sorted, each image once; of two notes the first in the order of text."""
    known: dict[tuple[str, ...], str] = {}
    for each in sorted(set(removals)):
        known.setdefault(each[:3], each.note)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Removal._fields)
    writer.writerows([*digests, note] for digests, note in known.items())
    return out.getvalue()


def read(place: Path) -> list[Removal]:
    """Read a list.

    Args:
        place: the file, or the folder of a dataset, which need not have one.

    Raises:
        UsageError: the file is missing, unreadable, or no list of digests.
    """
    path = place / REMOVED if place.is_dir() else place
    if place.is_dir() and not path.exists():
        return []
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} is larger than {_MOST_BYTES:,} bytes: give a list of `animesion remove`")
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True))
    except OSError as error:
        raise UsageError(f"cannot read the list of removed images {path} ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error):
        raise UsageError(f"{path} is not a CSV file: give a `{REMOVED}` of `animesion remove`") from None
    if not rows or rows[0] != list(Removal._fields):
        raise UsageError(f"{path} does not begin with {','.join(Removal._fields)}: give a `{REMOVED}`")
    found = []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 4 or not any(row[:3]) or not all(map(_DIGEST.fullmatch, row[:3])):
            raise UsageError(f"{path}, row {number}: not three digests and a note: correct or remove the row")
        found.append(Removal(*row))
    return found


def combined(places: Iterable[Path]) -> Removed:
    """The images that any of several lists or datasets has.

    Raises:
        UsageError: as `read`.
    """
    return Removed.of(each for place in places for each in read(place))
