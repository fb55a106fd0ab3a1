"""Checks and normalisation of untrusted URLs, without name resolution or requests."""

from __future__ import annotations

import functools
import re
from urllib.parse import quote, urlsplit

from animesion_scrapers.errors import UnsafeAddressError
from animesion_scrapers.http.addresses import Routes

LONGEST_URL = 8000
"""Characters; servers reject longer ones."""

# the common case, matched without `urlsplit`: lower-case host and printable ASCII only
_PLAIN_URL = re.compile(r"(https?)://([a-z0-9_.-]{1,253})(?::([1-9]\d{0,3}))?(?:[/?][!-~]*)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DEFAULT_ROUTES = Routes()


def refusal_reason(url: str, routes: Routes | None = None) -> str:
    """Why a URL must not be fetched, as far as known before its host is resolved; empty when it may be fetched.

    Args:
        url: The URL.
        routes: Which addresses may be connected to; None for public ones.
    """
    match = _PLAIN_URL.fullmatch(url) if len(url) <= LONGEST_URL else None
    if match:
        return _host_refusal(match[1], match[2], int(match[3] or 0), routes)
    if len(url) > LONGEST_URL:
        return f"the URL is longer than {LONGEST_URL:,} characters"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port
        malformed = bool(_CONTROL.search(url)) or len(host) > 253 or port == 0 or not is_utf8(url)
    except ValueError:
        malformed, host, port, parts = True, "", None, urlsplit("")
    if malformed:
        return "the URL is malformed"
    if parts.username is not None or parts.password is not None:
        return "passwords in a URL are not sent"
    return _host_refusal(parts.scheme, host, port or 0, routes)


def normalise(url: str) -> str:
    """The URL as requested: scheme and host in lower case, without the fragment, which clients do not send."""
    if _PLAIN_URL.fullmatch(url) and "#" not in url:
        return url
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.lower(), fragment="").geturl()
    except ValueError:
        return url


def canonical(url: str) -> str:
    """A form that is equal for URLs of one request: normalised and percent-encoded, as clients send it."""
    if _PLAIN_URL.fullmatch(url) and "#" not in url:
        return url
    return quote(normalise(url), safe="%/:=&?~#+!$,;'@()*[]", errors="surrogatepass")


def host_of(url: str) -> str:
    """The host of a URL in lower case; empty when it has none."""
    match = _PLAIN_URL.fullmatch(url)
    if match:
        return match[2]
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _host_refusal(scheme: str, host: str, port: int, routes: Routes | None) -> str:
    reason = _public_refusal(scheme, host)
    return _refusal(routes, scheme, host, port) if reason and routes else reason


@functools.lru_cache(maxsize=4096)
def _public_refusal(scheme: str, host: str) -> str:
    return _refusal(_DEFAULT_ROUTES, scheme, host, 0)


def _refusal(routes: Routes, scheme: str, host: str, port: int) -> str:
    try:
        routes.check(scheme, host, port or None)
    except UnsafeAddressError as error:
        return str(error)
    return ""


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, that is, has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
