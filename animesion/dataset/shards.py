"""Write and read WebDataset shards: plain USTAR archives whose bytes depend on their samples only.

A sample is a set of members `<key>.<field>`; keys match `[a-z0-9_-]+`, so the first dot ends the key. Reading is strict
and accepts what is written here. `animesion.pipeline.pack` assigns samples to shards.
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

# Constant fields of a header, in the order of the format: name, mode, owner, group, size, time, checksum, type, ...
_MODE, _OWNER, _MTIME = b"0000644\0", b"0000000\0", b"00000000000\0"
_BEFORE_SIZE = _MODE + _OWNER + _OWNER
_AFTER_SUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(32 + 32 + 8 + 8 + 155 + 12)
_FIXED_SUM = sum(_BEFORE_SIZE + _MTIME + b"        " + _AFTER_SUM)  # the checksum itself is counted as spaces
_LARGEST = 8**11 - 1  # bytes; a USTAR header has eleven octal digits for the size


class ShardError(Exception):
    """A shard that is cut short, damaged or of another format; the message has the file and the byte."""


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
    """The USTAR header of a regular file, 512 bytes: mode 0644, no owner, no time.

    Raises:
        ValueError: the name or the size does not fit into a header.
    """
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
    """All members of one sample, sorted by name, as bytes of a shard."""
    if not KEY.fullmatch(key):
        raise ValueError(f"sample key {key!r} does not match [a-z0-9_-]+")
    return b"".join(member(f"{key}.{field}", fields[field]) for field in sorted(fields))


def sample_members(key: str, content: bytes) -> dict[str, bytes]:
    """The members of one sample by field.

    Args:
        key: the sample's key.
        content: the bytes of the sample in its shard: headers, contents and padding.

    Raises:
        ValueError: the bytes are of another sample, or damaged.
    """
    fields: dict[str, bytes] = {}
    stream = io.BytesIO(content)
    while block := stream.read(BLOCK):
        name, size = _name_and_size(block)
        owner, _, field = name.partition(".")
        # A header is determined by name and size, so comparing all of it checks every field.
        if owner != key or block != header(name, size):
            raise ValueError(f"{name!r} is not a member of {key}")
        fields[field] = stream.read(size)
        stream.seek(-size % BLOCK, io.SEEK_CUR)
    return fields


def members(path: Path) -> Iterator[Member]:
    """The members of a shard, in order.

    Raises:
        ShardError: the shard is no plain USTAR archive of regular files, has a damaged header, or has no end marker.
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
        # The checksum is the sum of the header's bytes, with spaces in place of its own eight bytes.
        if _octal(block[148:154]) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            raise ShardError(f"{path} has a damaged header at byte {position}")
        name, length = _name_and_size(block)
        if block[156:157] != b"0" or "/" in name or not KEY.fullmatch(name.partition(".")[0]):
            raise ShardError(f"{path} holds {name!r} at byte {position}, which is not a member of a sample")
        if length < 0:
            raise ShardError(f"{path} has a damaged header at byte {position}")
        if position + BLOCK + length > size:
            raise ShardError(f"{path} ends inside {name}: it was cut short")
        yield Member(name, position + BLOCK, length)
        position += BLOCK + length + -length % BLOCK


def _name_and_size(block: bytes) -> tuple[str, int]:
    """Name and size in bytes from a header of 512 bytes; a size that is no number is -1."""
    return block[:100].rstrip(b"\0").decode("ascii", "replace"), _octal(block[124:135])


def _octal(digits: bytes) -> int:
    """The value of a header field of octal digits; -1 for any other content."""
    return int(digits, 8) if digits and not digits.strip(b"01234567") else -1


def read(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file, or fewer if the file ends before."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
