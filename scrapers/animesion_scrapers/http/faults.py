"""Kinds of download faults, and how each is handled.

Reasons and details contain no times, ports or object ids, so that two runs with the same faults report the same.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from animesion_scrapers.http.media import document_kind, is_challenge
from animesion_scrapers.http.opt_outs import ROBOTS, TDM, USAGE, OptOut
from animesion_scrapers.http.retries import asked_pause

NOT_FOUND = "not found"
REFUSED = "refused"
CHECKSUM = "checksum mismatch"
EMPTY = "empty file"
NOT_AN_IMAGE = "not an image"
TOO_BIG = "too many bytes"
TIMED_OUT = "timed out"
UNSAFE = "unsafe address"
FAILED = "fetch failed"

REASONS = (NOT_FOUND, REFUSED, CHECKSUM, TOO_BIG, TIMED_OUT, UNSAFE, FAILED, EMPTY, NOT_AN_IMAGE, ROBOTS, USAGE, TDM)
"""All values of `Downloaded.status` except `ok`."""


class DownloadFault(Exception):  # noqa: N818 (carries a result, never leaves this package)
    """A failed attempt.

    Attributes:
        reason: One of `REASONS`.
        detail: Description of the fault.
        retry: Whether another attempt in this run may succeed.
        final: Whether later runs need not retry.
        wrong: Whether the server sent the wrong bytes; final after the second time.
        host_failed: Whether the host failed rather than the item, which its circuit breaker counts.
        back_off: The overloaded host, whose requests pause; empty if none is.
        pause: Seconds that the host asked to wait.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        retry: bool = False,
        final: bool = False,
        wrong: bool = False,
        host_failed: bool = False,
        back_off: str = "",
        pause: float = 0.0,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry = retry or wrong
        self.final = final
        self.wrong = wrong
        self.host_failed = host_failed
        self.back_off = back_off
        self.pause = pause


def opt_out_fault(found: Sequence[OptOut]) -> DownloadFault | None:
    """The fault of a file with reservations: the first one's reason, and the evidence of all; None without any."""
    if not found:
        return None
    return DownloadFault(found[0].reason, "; ".join(each.evidence for each in found), final=True)


def challenge_fault(content: bytes, response: aiohttp.ClientResponse) -> DownloadFault | None:
    """The fault of a firewall's challenge page in place of a file whose digest is known; None for any other body.

    The file exists, so the firewall doubts the client at this moment: the host is given a pause and asked again.
    """
    is_page = document_kind(content) == "HTML page" or "html" in response.headers.get("Content-Type", "")
    if not is_page or not is_challenge(content, response.headers.get("cf-mitigated", "")):
        return None
    return DownloadFault(
        FAILED,
        "an HTML challenge page instead of the file",
        retry=True,
        host_failed=True,
        back_off=response.url.raw_host or "",
        pause=asked_pause(response.headers),
    )


def document_fault(content: bytes, response: aiohttp.ClientResponse) -> DownloadFault:
    """The fault of a body that is not an image: a firewall's challenge page, or some document."""
    kind = document_kind(content)
    if kind == "HTML page" and is_challenge(content, response.headers.get("cf-mitigated", "")):
        return DownloadFault(REFUSED, "an HTML challenge page instead of an image", wrong=True)
    return DownloadFault(NOT_AN_IMAGE, f"an {kind}" if kind[0] in "HX" else f"a {kind}", wrong=True)


def transport_fault(error: Exception) -> DownloadFault:
    """The fault of a broken transfer, by kind: the libraries' own messages contain ports, addresses and object ids."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return DownloadFault(FAILED, "the host name was not found", retry=True)
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return DownloadFault(FAILED, "the TLS connection was not accepted")
    if isinstance(error, aiohttp.ClientConnectorError):
        return DownloadFault(FAILED, "no connection could be made", retry=True)
    if isinstance(error, (aiohttp.InvalidURL, ValueError)):
        return DownloadFault(UNSAFE, "the URL is malformed", final=True)
    if isinstance(error, (aiohttp.ClientResponseError, HttpProcessingError)):
        # Stray bytes after an earlier response on the same connection cause this too, so a new connection may succeed.
        return DownloadFault(FAILED, "the answer is not proper HTTP", retry=True)
    return DownloadFault(FAILED, "the connection broke off", retry=True)
