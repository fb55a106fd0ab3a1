"""JSON arrays read as a stream: memory holds one member of bounded size, and one chunk of the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

_CHUNK = 1 << 16

_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|\]\s*$|$)")

_AFTER_MEMBER = re.compile(r"\s*(?:,\s*|(?=\]))")


class MalformedError(Exception):
    """A file is not a JSON array beyond a line.

    Attributes:
        line: The line, from 1.
    """

    def __init__(self, why: str, line: int) -> None:
        """Keep the line."""
        super().__init__(why)
        self.line = line


def is_array(head: bytes) -> bool:
    """Whether a file that begins with these bytes is an array of objects, not one JSON value per line."""
    return _ARRAY.match(head) is not None


def members(file: IO[bytes], longest: int) -> Iterator[tuple[int, Any]]:
    """Line and value of each member of a JSON array.

    Args:
        file: UTF-8 text without a byte order mark; other bytes become lone surrogates.
        longest: Most characters of a member.

    Raises:
        MalformedError: The file is not a JSON array beyond a line, or a member is too long.
    """
    json_decoder = json.JSONDecoder()
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, line, ended = "", 1, False
    at = -1  # start of the next member in `text`; -1 before the opening bracket
    while True:
        if at < 0 and (opening := re.match(r"\s*\[\s*", text)) and (opening.end() < len(text) or ended):
            at = opening.end()
            line += text.count("\n", 0, at)
        if at >= 0 and text.startswith("]", at):
            return
        found = _member(json_decoder, text, at) if at >= 0 else None
        # the blanks after a comma may go on in the next chunk
        if found and (found[1] < len(text) or ended):
            yield line, found[0]
            line += text.count("\n", at, found[1])
            at = found[1]
            continue
        if len(text) - at > longest:
            raise MalformedError(f"a member of the array has more than {longest:,} bytes", line)
        if ended:
            raise MalformedError("not a JSON array beyond this line", line)
        data = file.read(_CHUNK)
        ended = not data
        if at > 0:
            text, at = text[at:], 0
        text += utf8.decode(data, final=ended)


def _member(decoder: json.JSONDecoder, text: str, start: int) -> tuple[Any, int] | None:
    """The value at a position and the position of the next one; None if the text ends before, or is malformed."""
    try:
        value, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    after = _AFTER_MEMBER.match(text, end)
    return (value, after.end()) if after else None
