"""WebDataset shards: plain USTAR archives whose bytes depend on nothing but their samples, written and read strictly.

Samples are sets of members `<key>.<field>`; keys are `[a-z0-9_-]+` so that the first dot ends the key. Which samples go
where is decided in `animesion.pipeline.pack`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BLOCK = 512
END = bytes(2 * BLOCK)
KEY = re.compile(r"[a-z0-9_-]{1,90}")

_MODE, _OWNER, _MTIME = b"0000644\0", b"0000000\0", b"00000000000\0"
_BEFORE_SIZE = _MODE + _OWNER + _OWNER
_AFTER_SUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(32 + 32 + 8 + 8 + 155 + 12)
_FIXED_SUM = sum(_BEFORE_SIZE + _MTIME + b"        " + _AFTER_SUM)  # the checksum itself is counted as spaces
_LARGEST = 8**11 - 1  # bytes, the most that eleven octal digits can say


class ShardError(Exception):
    """A shard that is short, damaged or not written by us; the message names file and place."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a shard: `size` bytes at `offset`."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """The sample's key: the name up to the first dot."""
        return self.name.partition(".")[0]

    @property
    def field(self) -> str:
        """The name after the first dot, such as `jpg`."""
        return self.name.partition(".")[2]


def header(name: str, size: int) -> bytes:
    """The USTAR header of a regular file: mode 0644, no owner, no time."""
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= 100:
        raise ValueError(f"member name of {len(encoded)} bytes: {name!r}")
    if not 0 <= size <= _LARGEST:
        raise ValueError(f"member of {size} bytes: {name!r}")
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(100, b"\0"), _BEFORE_SIZE, digits, _MTIME, checksum, _AFTER_SUM))


def member(name: str, content: bytes) -> bytes:
    """Header, content and padding of one member."""
    return header(name, len(content)) + content + bytes(-len(content) % BLOCK)


def sample(key: str, fields: Mapping[str, bytes]) -> bytes:
    """All members of one sample, sorted by name."""
    if not KEY.fullmatch(key):
        raise ValueError(f"sample key {key!r} is not of [a-z0-9_-]")
    return b"".join(member(f"{key}.{field}", fields[field]) for field in sorted(fields))


def sample_members(key: str, content: bytes) -> dict[str, bytes]:
    """The members of one sample, from its headers, contents and padding.

    Args:
        key: the sample's key.
        content: the sample as stored in its shard.

    Raises:
        ValueError: another sample, or a damaged one.
    """
    fields: dict[str, bytes] = {}
    stream = io.BytesIO(content)
    while block := stream.read(BLOCK):
        name, size = _name_and_size(block)
        owner, _, field = name.partition(".")
        # a header of ours is known to the last byte, so comparing is checking
        if owner != key or block != header(name, size):
            raise ValueError(f"{name!r} is no member of {key}")
        fields[field] = stream.read(size)
        stream.seek(-size % BLOCK, io.SEEK_CUR)
    return fields


def members(path: Path) -> Iterator[Member]:
    """Walk the members of a shard.

    Raises:
        ShardError: not a plain USTAR archive of regular files, damaged header, or cut before its end marker.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        yield from _walk(file, size, path)


def _walk(file: IO[bytes], size: int, path: Path) -> Iterator[Member]:
    position = 0
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ShardError(f"{path} ends at byte {size} without an end marker: it was cut short")
        if block == bytes(BLOCK):
            if file.read(BLOCK) != bytes(BLOCK):
                raise ShardError(f"{path} has half an end marker at byte {position}: it was cut short")
            return
        if _octal(block[148:154]) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            raise ShardError(f"{path} has a damaged header at byte {position}")
        name, length = _name_and_size(block)
        if block[156:157] != b"0" or "/" in name or not KEY.fullmatch(name.partition(".")[0]):
            raise ShardError(f"{path} holds {name!r} at byte {position}, which is no member of a sample")
        if length < 0:
            raise ShardError(f"{path} has a damaged header at byte {position}")
        if position + BLOCK + length > size:
            raise ShardError(f"{path} ends inside {name}: it was cut short")
        yield Member(name, position + BLOCK, length)
        position += BLOCK + length + -length % BLOCK


def _name_and_size(block: bytes) -> tuple[str, int]:
    """The member's name and its size in bytes, -1 when that is no number, from a header of 512 bytes."""
    return block[:100].rstrip(b"\0").decode("ascii", "replace"), _octal(block[124:135])


def _octal(digits: bytes) -> int:
    """The number that a header field says; -1 for anything but octal digits."""
    return int(digits, 8) if digits and not digits.strip(b"01234567") else -1


def read(path: Path, offset: int, size: int) -> bytes:
    """The bytes at a place of a file; shorter when the file is."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
