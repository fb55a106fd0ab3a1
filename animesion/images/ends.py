"""Where an image ends in its file; what follows is not part of it: an archive, a page, or anything else."""

from __future__ import annotations

import re

#: A marker in a JPEG that is neither a stuffed byte nor a restart, after fill bytes; and one in compressed data.
_MARKER = re.compile(rb"\xff++([^\x00\xd0-\xd7])")
_NEXT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def end_of(content: bytes, extension: str) -> int:
    """Length of the image at the start of a file, in bytes.

    Args:
        content: the file; hostile bytes are handled in linear time.
        extension: its format: `jpg`, `png` or `webp`.

    Returns:
        The length; 0 if the end is not found, as in a file that is cut off.
    """
    if extension == "jpg":
        return _end_of_jpeg(content)
    if extension == "png":
        return _end_of_png(content)
    end = 8 + int.from_bytes(content[4:8], "little")
    return end if extension == "webp" and end <= len(content) else 0


def _end_of_jpeg(content: bytes) -> int:
    at = 2
    while match := _MARKER.match(content, at):
        marker = match[1][0]
        at = match.end()
        if marker == 0xD9:
            return at
        size = int.from_bytes(content[at : at + 2], "big")
        if size < 2:
            return 0
        at += size
        if marker == 0xDA:  # the compressed data of a scan, up to the next marker
            found = _NEXT.search(content, at)
            if found is None:
                return 0
            at = found.start()
    return 0


def _end_of_png(content: bytes) -> int:
    at = 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        at += 12 + size
        if kind == b"IEND":
            return at if at <= len(content) else 0
    return 0
