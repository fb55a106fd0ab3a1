"""Why a download brought no file: the kinds of fault, and what is to be done about each.

Reasons and details name the fault and hold no times, ports or object ids, so that two runs against the same faults say
the same.
"""

from __future__ import annotations

import ssl

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from animesion_scrapers.http.media import document_kind, is_challenge

NOT_FOUND = "not found"
REFUSED = "refused"
CHECKSUM = "checksum mismatch"
EMPTY = "empty file"
NOT_AN_IMAGE = "not an image"
TOO_BIG = "too many bytes"
TIMED_OUT = "timed out"
UNSAFE = "unsafe address"
FAILED = "fetch failed"

REASONS = (NOT_FOUND, REFUSED, CHECKSUM, TOO_BIG, TIMED_OUT, UNSAFE, FAILED, EMPTY, NOT_AN_IMAGE)
"""Every status of a `Downloaded` but `ok`."""


class DownloadFault(Exception):  # noqa: N818 (carries a result, never leaves this package)
    """Why an attempt brought no file.

    Attributes:
        reason: One of `REASONS`.
        detail: For people.
        retry: Another attempt in this run may help.
        final: A later run need not ask again.
        wrong: The server sent the wrong bytes: believed when it does so twice.
        host_failed: The host failed, not the item: its circuit breaker counts it.
        back_off: Host that said it has too much to do; empty when none did.
        retry_after: What the server asked for.
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
        retry_after: str = "",
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry = retry or wrong
        self.final = final
        self.wrong = wrong
        self.host_failed = host_failed
        self.back_off = back_off
        self.retry_after = retry_after


def document_fault(content: bytes, response: aiohttp.ClientResponse) -> DownloadFault:
    """Name what came in place of an image: a challenge of a firewall, or some document."""
    kind = document_kind(content)
    if kind == "HTML page" and is_challenge(content, response.headers.get("cf-mitigated", "")):
        return DownloadFault(REFUSED, "an HTML challenge page instead of an image", wrong=True)
    return DownloadFault(NOT_AN_IMAGE, f"an {kind}" if kind[0] in "HX" else f"a {kind}", wrong=True)


def transport_fault(error: Exception) -> DownloadFault:
    """Name a fault by its kind: the libraries' messages hold ports, addresses and object ids."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return DownloadFault(FAILED, "the host name was not found", retry=True)
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return DownloadFault(FAILED, "the TLS connection was not accepted")
    if isinstance(error, aiohttp.ClientConnectorError):
        return DownloadFault(FAILED, "no connection could be made", retry=True)
    if isinstance(error, (aiohttp.InvalidURL, ValueError)):
        return DownloadFault(UNSAFE, "the URL is malformed", final=True)
    if isinstance(error, (aiohttp.ClientResponseError, HttpProcessingError)):
        # Stray bytes after an earlier answer on the same connection look like this too; a new connection has none.
        return DownloadFault(FAILED, "the answer is not proper HTTP", retry=True)
    return DownloadFault(FAILED, "the connection broke off", retry=True)
