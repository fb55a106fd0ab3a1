"""Content codings: bodies that a server compresses although no coding was requested, decoded piece by piece.

Some servers and proxies compress every file, and name the coding in `Content-Encoding`. gzip and deflate are decoded,
as in browsers; the caller caps the result.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

_PLAIN = frozenset({"", "identity", "aws-chunked"})
"""Codings that change nothing. `aws-chunked` is of uploads to object stores; some of them repeat it in answers."""

_MOST_MEMBERS = 256
"""Members of a gzip file; each costs time, even an empty one."""

_GZIP = 16 + zlib.MAX_WBITS
_DECODED = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": zlib.MAX_WBITS}


class CodingError(ValueError):
    """A coding is not known, or a body is not in the coding that its header names."""


class Decoder:
    """Decodes one body.

    Args:
        headers: Values of the response's `Content-Encoding` headers.

    Raises:
        CodingError: There are several codings, or one that is not known.
    """

    def __init__(self, headers: Iterable[str]) -> None:
        names = [name.strip().lower() for value in headers for name in value.split(",")]
        self._codings = [name for name in names if name not in _PLAIN]
        if len(self._codings) > 1 or not _DECODED.keys() >= set(self._codings):
            shown = ", ".join(self._codings)[:40]
            raise CodingError(f"the body is compressed with {shown}, against the request")
        self._state = zlib.decompressobj(_DECODED[self._codings[0]]) if self._codings else None
        self._started = False
        self._members = 1

    def __bool__(self) -> bool:
        """Whether the body is compressed."""
        return self._state is not None

    @property
    def is_complete(self) -> bool:
        """Whether the compressed data have ended."""
        return self._state is None or self._state.eof

    def decode(self, piece: bytes, most: int) -> bytes:
        """The decoded bytes of a piece of the body.

        Args:
            piece: Not empty.
            most: Bytes above which decoding stops; the result is at most one byte longer.

        Raises:
            CodingError: The piece is damaged, or not in this coding.
        """
        if self._state is None:
            return piece
        if not self._started and self._codings == ["deflate"] and not _is_zlib(piece):
            self._state = zlib.decompressobj(-zlib.MAX_WBITS)  # many servers send it without the zlib header
        self._started = True
        decoded = bytearray()
        try:
            while piece and len(decoded) <= most:
                if self._state.eof:  # a gzip file may have several members
                    self._members += 1
                    if self._members > _MOST_MEMBERS:
                        raise CodingError(f"the compressed body has more than {_MOST_MEMBERS} members")
                    self._state = zlib.decompressobj(_DECODED[self._codings[0]])
                decoded += self._state.decompress(piece, most + 1 - len(decoded))
                piece = self._state.unused_data
        except zlib.error:
            raise CodingError(f"the body is not {self._codings[0]}, as its header states, or is damaged") from None
        return bytes(decoded)


def _is_zlib(head: bytes) -> bool:
    """Whether data begin like a zlib stream; a single byte is taken for one."""
    return head[0] & 0x0F == 8 and (len(head) < 2 or int.from_bytes(head[:2], "big") % 31 == 0)
