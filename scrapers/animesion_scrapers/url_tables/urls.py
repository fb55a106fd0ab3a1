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
_PLAIN_URL = re.compile(r"(https?)://([a-z0-9_.-]{1,253})(?::[1-9]\d{0,3})?(?:[/?][!-~]*)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DEFAULT_ROUTES = Routes()


def refusal_reason(url: str) -> str:
    """Why a URL must not be fetched, as far as known before its host is resolved; empty when it may be fetched."""
    match = _PLAIN_URL.fullmatch(url) if len(url) <= LONGEST_URL else None
    if match:
        return _host_refusal(match[1], match[2])
    if len(url) > LONGEST_URL:
        return f"the URL is longer than {LONGEST_URL:,} characters"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        malformed = bool(_CONTROL.search(url)) or len(host) > 253 or parts.port == 0 or not is_utf8(url)
    except ValueError:
        malformed, host, parts = True, "", urlsplit("")
    if malformed:
        return "the URL is malformed"
    if parts.username is not None or parts.password is not None:
        return "passwords in a URL are not sent"
    return _host_refusal(parts.scheme, host)


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


@functools.lru_cache(maxsize=4096)
def _host_refusal(scheme: str, host: str) -> str:
    try:
        _DEFAULT_ROUTES.check(scheme, host)
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
