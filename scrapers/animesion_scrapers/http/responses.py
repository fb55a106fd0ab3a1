"""From an HTTP response to checked bytes, or to the fault that it is.

Requests, redirects and retries are in `transfers`; the kinds of fault are in `faults`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from animesion_scrapers.http.codings import CodingError, Decoder
from animesion_scrapers.http.faults import (
    CHECKSUM,
    EMPTY,
    FAILED,
    NOT_FOUND,
    REFUSED,
    TOO_BIG,
    DownloadFault,
    challenge_fault,
    document_fault,
    opt_out_fault,
)
from animesion_scrapers.http.limits import RateLimiter
from animesion_scrapers.http.media import document_kind, is_challenge
from animesion_scrapers.http.opt_outs import PAGE_BYTES, OptOut, header_opt_outs, page_opt_outs
from animesion_scrapers.http.records import Download
from animesion_scrapers.http.retries import BACK_OFF, RETRIED, Retries, asked_pause, is_temporary, status_text
from animesion_scrapers.http.robots import MAX_BYTES as ROBOTS_BYTES

_STATUS_REASONS = {401: REFUSED, 402: REFUSED, 403: REFUSED, 404: NOT_FOUND, 410: NOT_FOUND, 451: NOT_FOUND}
_HTML_BYTES = 1 << 14

NO_RANGES = "the server ignores Range requests and sends the whole file"
"""Detail of the fault when a piece of a file was requested."""


class ResponseReader:
    """Reads and checks the responses to requests for files."""

    def __init__(self, *, limiter: RateLimiter, retries: Retries, max_bytes: int, product: str | None) -> None:
        """Keep the settings.

        Args:
            limiter: Pauses a host that asks for a longer pause than a run waits.
            retries: Defines the longest wait.
            max_bytes: Size of the largest accepted file.
            product: The crawler's product token for opt-outs; None ignores them.
        """
        self._limiter = limiter
        self._retries = retries
        self._max_bytes = max_bytes
        self._product = product

    async def read(self, item: Download, response: aiohttp.ClientResponse) -> bytes:
        """Read and check the body.

        Raises:
            DownloadFault: The response is not the file that was requested.
        """
        if item.span is not None and response.status == 200:
            # Not a byte of the body is read: it is the whole file, of many gigabytes perhaps.
            raise DownloadFault(FAILED, NO_RANGES, final=True)
        if response.status != (200 if item.span is None else 206):
            raise await self._status_fault(response)
        if item.span is not None:
            _check_piece(item.span, response)
        # A page in place of a known file may be a firewall's, whose headers do not speak for the site.
        instead = bool(item.md5 or item.sha1) and "html" in response.headers.get("Content-Type", "")
        refusal = opt_out_fault(self._header_opt_outs(response))
        if refusal and not instead:
            raise refusal
        if (response.content_length or 0) > self._max_bytes:
            raise DownloadFault(TOO_BIG, f"more than {self._max_bytes} bytes", final=True)
        try:
            content = await self._read_body(item, response)
        except CodingError as error:
            raise DownloadFault(FAILED, str(error), final=not instead) from None
        if not content:
            raise DownloadFault(EMPTY, "the body has 0 bytes", wrong=True)
        mismatch = _mismatch(item, content)
        if mismatch and (item.md5 or item.sha1) and (challenge := challenge_fault(content, response)):
            if self._retries.too_long(challenge.pause):
                self._limiter.pause(challenge.back_off, challenge.pause)
                challenge.retry = False
            raise challenge
        if refusal:
            raise refusal
        if mismatch and item.image and document_kind(content):
            raise self._document_fault(content, response)
        if mismatch:
            raise DownloadFault(CHECKSUM, mismatch, wrong=True)
        # A matching digest proves the file, even if its content looks like a document.
        if item.image and not (item.md5 or item.sha1) and document_kind(content):
            raise self._document_fault(content, response)
        return content

    async def read_page(self, response: aiohttp.ClientResponse) -> None:
        """Read the page that shows a file, for its opt-outs; one that does not exist says nothing.

        Raises:
            DownloadFault: The page opts out, or cannot be read.
        """
        assert self._product is not None
        if response.status in (404, 410):
            return
        if response.status != 200:
            raise await self._status_fault(response)
        try:
            page = await _read_up_to(response, PAGE_BYTES)
        except CodingError as error:
            raise DownloadFault(FAILED, str(error)) from None
        if fault := opt_out_fault([*self._header_opt_outs(response), *page_opt_outs(page, self._product)]):
            raise fault

    def _header_opt_outs(self, response: aiohttp.ClientResponse) -> list[OptOut]:
        return [] if self._product is None else header_opt_outs(response.headers, self._product)

    def _document_fault(self, content: bytes, response: aiohttp.ClientResponse) -> DownloadFault:
        """The fault of a document in place of an image, or of the opt-out in a page that no firewall sent."""
        fault = document_fault(content, response)
        if self._product is None or fault.reason == REFUSED:
            return fault
        return opt_out_fault(page_opt_outs(content, self._product)) or fault

    async def _read_body(self, item: Download, response: aiohttp.ClientResponse) -> bytes:
        decoder = Decoder(response.headers.getall("Content-Encoding", ()))
        if decoder and item.span is not None:
            raise CodingError("the body is compressed, so the piece is of another file")
        pieces: list[bytes] = []
        sent = size = 0
        try:
            while piece := await response.content.readany():
                sent += len(piece)
                decoded = decoder.decode(piece, self._max_bytes - size)
                size += len(decoded)
                if max(sent, size) > self._max_bytes:
                    raise DownloadFault(TOO_BIG, f"more than {self._max_bytes} bytes", final=True)
                if item.span is not None and size > item.span[1]:
                    raise DownloadFault(FAILED, "the server sent more bytes than were requested", final=True)
                pieces.append(decoded)
        except (aiohttp.ClientPayloadError, HttpProcessingError):
            # Some servers announce a longer body than they send; a digest shows a whole file.
            if not (item.md5 or item.sha1) or _mismatch(item, b"".join(pieces)):
                raise
        content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if sent and not decoder.is_complete and (_mismatch(item, content) or not (item.md5 or item.sha1)):
            raise DownloadFault(FAILED, "the compressed body ends early", retry=True)
        return content

    async def _status_fault(self, response: aiohttp.ClientResponse) -> DownloadFault:
        status = response.status
        pause = asked_pause(response.headers)
        host = response.url.raw_host or ""
        detail = f"HTTP {status_text(status)}"
        if "html" in response.headers.get("Content-Type", ""):
            page = b""
            with contextlib.suppress(CodingError):
                page = await _read_up_to(response, _HTML_BYTES)
            if is_challenge(page, response.headers.get("cf-mitigated", "")):
                detail += " with an HTML challenge page"
        if status in BACK_OFF and self._retries.too_long(pause):
            self._limiter.pause(host, pause)
            return DownloadFault(FAILED, detail)
        return DownloadFault(
            _STATUS_REASONS.get(status, FAILED),
            detail,
            retry=status in RETRIED,
            final=not is_temporary(status),
            host_failed=is_temporary(status),
            back_off=host if status in BACK_OFF else "",
            pause=pause,
        )


def _check_piece(span: tuple[int, int], response: aiohttp.ClientResponse) -> None:
    """Check that a partial response announces the piece that was requested.

    Raises:
        DownloadFault: It announces another piece, several pieces, or more bytes.
    """
    first, count = span
    announced = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(?:\d{1,19}|\*)", response.headers.get("Content-Range", ""))
    if announced is None or int(announced[1]) != first or int(announced[2]) >= first + count:
        raise DownloadFault(FAILED, "the server sent another piece of the file than was requested", final=True)
    if (response.content_length or 0) > count:
        raise DownloadFault(FAILED, "the server sent more bytes than were requested", final=True)


async def read_robots(response: aiohttp.ClientResponse) -> tuple[int, bytes]:
    """Status and body of a robots.txt; the status is 0 if the body cannot be decoded, as when the host fails."""
    try:
        return response.status, await _read_up_to(response, ROBOTS_BYTES) if response.status == 200 else b""
    except CodingError:
        return 0, b""


async def _read_up_to(response: aiohttp.ClientResponse, count: int) -> bytes:
    """The first `count` bytes of a body.

    Raises:
        CodingError: They cannot be decoded.
    """
    decoder = Decoder(response.headers.getall("Content-Encoding", ()))
    body = bytearray()
    sent = 0
    while max(len(body), sent) < count and (piece := await response.content.readany()):
        sent += len(piece)
        body += decoder.decode(piece, count - len(body))
    return bytes(body[:count])


def _mismatch(item: Download, content: bytes) -> str:
    """How the content differs from the expected digests, or from the size if there are none; empty if it matches."""
    for name, digest, expected in (("MD5", hashlib.md5, item.md5), ("SHA-1", hashlib.sha1, item.sha1)):
        if expected:
            actual = digest(content, usedforsecurity=False).hexdigest()
            if actual != expected.lower():
                return f"the {name} is {actual}"
    if item.bytes and item.bytes != len(content) and not (item.md5 or item.sha1):
        return f"{len(content)} bytes instead of {item.bytes}"
    return ""
