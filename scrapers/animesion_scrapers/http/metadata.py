"""The client for metadata APIs: one JSON document at a time, with pacing, retries, size limits and readable errors.

It is independent of any site. Images are fetched in `downloads` and `transfers`, many at once.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from urllib3.exceptions import NameResolutionError, NewConnectionError

from animesion_scrapers.errors import HostDownError, ScraperError, StatusError, UnsafeAddressError
from animesion_scrapers.http.adapters import Deadline, RoutedAdapter, Session
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.breakers import Breakers
from animesion_scrapers.http.clients import certificates, check_user_agent
from animesion_scrapers.http.codings import CodingError, Decoder
from animesion_scrapers.http.limits import RateLimiter
from animesion_scrapers.http.media import document_kind
from animesion_scrapers.http.retries import (
    BACK_OFF,
    MAX_REDIRECTS,
    REDIRECTS,
    RETRIED,
    Retries,
    asked_pause,
    is_temporary,
    status_text,
)
from animesion_scrapers.masking import Mask

_CHUNK = 1 << 16
_MESSAGE = 200
_MOST_VALUES = 500_000
"""Values of the largest accepted document: a page of 1,000 posts has some 50,000, and a value takes up to 250 bytes."""

_HEADERS = 1 << 20
"""Bytes of headers, interim responses and chunk sizes that may come with a body."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.host} answered {status_text(self.status)} to {self.path}"

    @property
    def is_html(self) -> bool:
        return "html" in self.headers.get("Content-Type", "") or document_kind(self.body) == "HTML page"


class _TransientError(Exception):
    """No complete response arrived; another attempt may succeed."""


class MetadataClient:
    """Fetches JSON from an API over one `requests.Session`.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        *,
        user_agent: str,
        limiter: RateLimiter,
        routes: Routes,
        credentials: tuple[str, str] | None = None,
        credentials_for: str = "",
        credential_parameters: tuple[str, str] | None = None,
        timeout: float = 30.0,
        max_bytes: int = 16 << 20,
        retries: Retries | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        """Open a session; nothing is sent yet.

        Args:
            user_agent: Name of the crawler with a contact, such as `my-crawler/1.0 (me@example.org)`.
            limiter: Pacing by host.
            routes: Which addresses may be connected to.
            credentials: User and password for HTTP Basic.
            credentials_for: A URL; the credentials are sent only to its scheme, host and port.
            credential_parameters: Names of the query parameters that carry the credentials instead of HTTP Basic.
            timeout: Seconds to wait for a connection and for each piece of a response; a whole exchange, from the
                connection to the last byte, may take four times as long.
            max_bytes: Size of the largest accepted body, after decompression.
            retries: Number of attempts and the waits between them.
            breakers: Circuit breakers by host, shared with other clients of the same hosts.

        Raises:
            ScraperError: The User-Agent names no contact.
        """
        self._limiter = limiter
        self._routes = routes
        self._mask = Mask(*(credentials or ()))
        basic = base64.b64encode(":".join(credentials).encode()).decode() if credentials else ""
        in_query = credentials is not None and credential_parameters is not None
        self._query = dict(zip(credential_parameters or (), credentials or (), strict=False)) if in_query else {}
        self._authorization = {"Authorization": f"Basic {basic}"} if basic and not in_query else {}
        self._credentials_for = _origin(credentials_for)
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._retries = retries or Retries()
        self._breakers = breakers or Breakers()
        self._deadline = Deadline(4 * timeout, timeout, max_bytes + _HEADERS)
        self._session = Session()
        # The environment could otherwise add proxies and passwords from .netrc.
        self._session.trust_env = False
        self._session.verify = certificates()
        self._session.headers.update(
            {
                "User-Agent": check_user_agent(user_agent),
                "Accept": "application/json",
                "Accept-Encoding": "gzip, deflate",  # what `codings` decodes
            }
        )
        adapter = RoutedAdapter(routes, self._deadline)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def __enter__(self) -> MetadataClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def get_json(
        self,
        url: str,
        params: Mapping[str, str] | None = None,
        *,
        is_busy: Callable[[object], bool] = lambda document: False,
    ) -> object:
        """Fetch one JSON document.

        Args:
            url: URL of the document.
            params: Query parameters.
            is_busy: Whether a document reports an overloaded site, as MediaWiki does with status 200.

        Returns:
            The parsed JSON, not validated.

        Raises:
            StatusError: The site refused, or kept failing.
            UnsafeAddressError: The URL, or one it redirects to, must not be fetched.
            HostDownError: The host failed too often, or asked for a longer pause than a run waits.
            ScraperError: No response, or one that is not JSON or too large.
        """
        try:
            return self._get_json(url, params, is_busy)
        except ScraperError as error:
            error.args = (self._mask(str(error)),)  # the one way out for what a site sent
            raise

    def _get_json(self, url: str, params: Mapping[str, str] | None, is_busy: Callable[[object], bool]) -> object:
        for attempt in range(self._retries.attempts):
            last = attempt + 1 == self._retries.attempts
            try:
                answer = self._follow(url, params)
                if answer.status == 200:
                    document = self._parse(answer)
                    if not is_busy(document):
                        return document
            except _TransientError as fault:
                if last:
                    raise ScraperError(f"{fault}.") from None
                time.sleep(self._retries.delay(attempt))
                continue
            asked = asked_pause(answer.headers)
            permanent = answer.status != 200 and answer.status not in RETRIED
            delay = self._retries.delay(attempt, asked)
            if answer.status == 200 or answer.status in BACK_OFF:
                self._limiter.pause(answer.host, max(delay, asked))
            elif not (permanent or last):
                time.sleep(delay)
            if permanent or last or self._retries.too_long(asked):
                raise self._status_error(answer)
        raise ScraperError("No attempt was allowed.")

    def _follow(self, url: str, params: Mapping[str, str] | None) -> _Answer:
        """Make one attempt and follow its redirects; each hop is checked, paced and stripped of credentials."""
        for _ in range(MAX_REDIRECTS + 1):
            answer, location = self._ask(url, params)
            if not location:
                return answer
            try:
                target = urljoin(url, location)
                elsewhere = _origin(target) != self._credentials_for
            except ValueError:
                raise UnsafeAddressError(
                    f"Refused to follow a redirect from {answer.host} to a malformed URL."
                ) from None
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
                raise UnsafeAddressError(f"Refused to follow a redirect from {answer.host} from https to http.")
            if self._query and elsewhere:
                raise UnsafeAddressError(
                    f"Refused to follow a redirect from {answer.host} to another site with an API key."
                )
            url, params = target, None
        raise ScraperError(f"{answer.host} redirected {answer.path} more than {MAX_REDIRECTS} times.")

    def _ask(self, url: str, params: Mapping[str, str] | None) -> tuple[_Answer, str]:
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            self._routes.check(parts.scheme, host, parts.port)
            if parts.username is not None:
                raise UnsafeAddressError("passwords in a URL are not sent")
            own = _origin(url) == self._credentials_for
        except UnsafeAddressError as error:
            raise UnsafeAddressError(f"Refused to fetch from {_host_name(url)}: {error}.") from None
        except ValueError:
            raise UnsafeAddressError("Refused to fetch a malformed URL.") from None
        self._wait_for_turn(host)
        healthy = False
        self._deadline.start()
        try:
            response = self._session.get(
                url,
                params={**params, **self._query} if own and params is not None else params,
                headers=self._authorization if own else {},
                timeout=self._timeout,
                allow_redirects=False,
                stream=True,
            )
            with response:
                location = response.headers.get("Location", "") if response.status_code in REDIRECTS else ""
                body = b"" if location else self._body(response, host)
            healthy = not is_temporary(response.status_code)
            return _Answer(response.status_code, response.headers, body, host, _printable(parts.path or "/")), location
        except UnsafeAddressError as error:
            healthy = True
            raise UnsafeAddressError(f"Refused to fetch from {host}: {error}.") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, ValueError):
                raise UnsafeAddressError("Refused to fetch a malformed URL.") from None
            if self._deadline.passed:
                raise _TransientError(f"{host} could not be read: the response took too long") from None
            raise _TransientError(f"{host} could not be read: {_fault(error)}") from None
        finally:
            self._breakers.report(host, healthy)

    def _wait_for_turn(self, host: str) -> None:
        """Wait for a turn of this host."""
        if (held := self._limiter.held(host)) > self._retries.cap:
            raise HostDownError(
                f"{host} asked for a pause of {math.ceil(held / 60)} more min: run the command again after that."
            )
        try:
            while (delay := self._breakers.delay(host)) > 0:
                time.sleep(delay)
        except HostDownError:
            raise HostDownError(f"{host} failed too often in a row: try again later.") from None
        self._limiter.wait(host)

    def _body(self, response: requests.Response, host: str) -> bytes:
        """Read the decoded body piece by piece, within the limit of size; its socket keeps that of time.

        urllib3 would decode as much as a piece holds, which is gigabytes in some codings, and the codings that it knows
        depend on what else is installed.
        """
        pieces: list[bytes] = []
        size = 0
        try:
            decoder = Decoder(response.raw.headers.getlist("Content-Encoding"))
            while piece := response.raw.read1(_CHUNK, decode_content=False):
                pieces.append(decoder.decode(piece, self._max_bytes - size))
                size += len(pieces[-1])
                if size > self._max_bytes:
                    raise ScraperError(f"{host} sent a response of more than {self._max_bytes} bytes.")
        except CodingError as error:
            raise _TransientError(f"{host} could not be read: {error}") from None
        if pieces and not decoder.is_complete:
            raise _TransientError(f"{host} could not be read: the compressed body ends early")
        return b"".join(pieces)

    def _parse(self, answer: _Answer) -> object:
        if answer.is_html:
            raise StatusError(_html_message(answer), answer.status)
        # An upper bound, as texts have commas too; counted before, as `[]` takes 30 times as much memory as bytes.
        if sum(map(answer.body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
            raise ScraperError(f"{answer.host} answered {answer.path} with more than {_MOST_VALUES:,} values.")
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError):
            # Some sites truncate a response once and send it whole the next time.
            raise _TransientError(f"{answer.host} answered {answer.path} with something that is not JSON") from None

    def _status_error(self, answer: _Answer) -> StatusError:
        if answer.is_html:
            return StatusError(_html_message(answer), answer.status)
        message = _error_message(answer.body, self._mask)
        return StatusError(f"{answer}: {message}" if message else f"{answer}.", answer.status)


def _html_message(answer: _Answer) -> str:
    if answer.headers.get("cf-mitigated") == "challenge" or answer.status == 403:
        return (
            f"{answer} with an HTML challenge page instead of JSON: wait, slow down, or ask "
            "the site's operators to allow your User-Agent."
        )
    if answer.status == 200:
        return f"{answer} with an HTML page instead of JSON."
    return f"{answer}."


def _error_message(body: bytes, mask: Mask) -> str:
    """The message of a JSON error document, as one short sentence without secrets; empty if there is none."""
    if len(body) > _CHUNK:
        return ""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(document, dict):
        return ""
    error = document.get("error")
    nested = error if isinstance(error, dict) else {}
    message = document.get("message") or nested.get("info") or nested.get("message") or error
    if not isinstance(message, str):
        return ""
    words = " ".join(_printable(mask(message)).split())  # masked before it is cut
    words = words[:_MESSAGE] + "..." if len(words) > _MESSAGE else words
    return words if not words or words.endswith((".", "!", "?")) else f"{words}."


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _fault(error: Exception) -> str:
    """Describe a broken transfer, without the addresses and object ids of the libraries' own messages."""
    reason: Any = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(reason, NameResolutionError):
        return "its name was not found"
    if isinstance(error, requests.ConnectTimeout) or isinstance(reason, NewConnectionError):
        return "no connection could be made"
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
        return "it stopped responding"
    if isinstance(error, requests.exceptions.SSLError):
        return "its TLS certificate was not accepted"
    return "the connection broke off"


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or "a URL without a host"
    except ValueError:
        return "a malformed URL"


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
