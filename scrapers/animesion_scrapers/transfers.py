"""One download from its URL to checked bytes, or to the reason why there are none.

Order, read-ahead and threads are left to `downloads`. Reasons and details name the fault and hold no times, ports or
object ids, so that two runs against the same faults say the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections import defaultdict
from dataclasses import dataclass
from socket import AddressFamily

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from animesion_scrapers.addresses import Routes
from animesion_scrapers.clients import checked_user_agent, tls_context
from animesion_scrapers.errors import UnsafeAddressError
from animesion_scrapers.limits import RateLimiter
from animesion_scrapers.retries import BACK_OFF, MAX_REDIRECTS, REDIRECTS, RETRIED, Retries, status_text

OK = "ok"
NOT_FOUND = "not found"
REFUSED = "refused"
CHECKSUM = "checksum mismatch"
EMPTY = "empty file"
TOO_BIG = "too many bytes"
TIMED_OUT = "timed out"
UNSAFE = "unsafe address"
FAILED = "fetch failed"

REASONS = (NOT_FOUND, REFUSED, CHECKSUM, EMPTY, TOO_BIG, TIMED_OUT, UNSAFE, FAILED)
"""Every status of a `Downloaded` but `ok`."""

_STATUS_REASONS = {401: REFUSED, 403: REFUSED, 404: NOT_FOUND, 410: NOT_FOUND, 451: NOT_FOUND}
_CHUNK = 1 << 17
_STALL = 20.0
"""Seconds of silence after which a connection is given up for a new one, if the deadline leaves time for it."""


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch.

    Attributes:
        key: The caller's name for it, handed back with the result.
        url: Where it is.
        md5: Its MD5 in hexadecimal, checked unless empty.
        bytes: Its size, checked unless 0 or unless there is an `md5`.
    """

    key: str
    url: str
    md5: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What came of a `Download`.

    Attributes:
        key: As in the request.
        url: As in the request.
        status: `ok`, or one of `REASONS`.
        detail: More about a failure, for people.
        content: The file; empty unless `ok`.
    """

    key: str
    url: str
    status: str
    detail: str
    content: bytes


class _Fault(Exception):  # noqa: N818 (carries a result, never leaves this module)
    """Why an attempt brought no file; `delay` is what the server asked for."""

    def __init__(self, reason: str, detail: str, *, retry: bool = False, host: str = "", retry_after: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.host = host
        self.retry_after = retry_after


class Transfers:
    """Fetches single files over one shared session; lives on one event loop."""

    def __init__(
        self,
        *,
        user_agent: str,
        limiter: RateLimiter,
        routes: Routes,
        connections: int,
        per_host: int,
        deadline: float,
        max_bytes: int,
        retries: Retries,
    ) -> None:
        """Check and keep the settings, which `downloads.download` explains; connections open with the first fetch."""
        if min(connections, per_host, max_bytes, retries.attempts) < 1 or not deadline > 0:
            raise ValueError("Concurrency, connections per host, deadline, byte cap and attempts must be above zero.")
        self._user_agent = checked_user_agent(user_agent)
        self._limiter = limiter
        self._routes = routes
        self._connections = connections
        self._per_host = per_host
        self._deadline = deadline
        self._max_bytes = max_bytes
        self._retries = retries
        self._session: aiohttp.ClientSession | None = None
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(per_host))

    async def fetch(self, item: Download) -> Downloaded:
        """Fetch one file; whatever goes wrong with it is in the result."""
        try:
            url = self._checked(item.url)
            async with self._hosts[url.raw_host or ""]:
                content = await self._within_deadline(item, url)
        except _Fault as fault:
            return Downloaded(item.key, item.url, fault.reason, fault.detail, b"")
        return Downloaded(item.key, item.url, OK, "", content)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _within_deadline(self, item: Download, url: URL) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._deadline) as scope:
                for attempt in range(self._retries.attempts):
                    try:
                        return await self._attempt(item, url, scope)
                    except _Fault as fault:
                        delay = self._retries.delay(attempt, fault.retry_after)
                        if fault.host:
                            self._limiter.pause(fault.host, delay)
                        left = (scope.when() or 0.0) - loop.time()
                        if not fault.retry or attempt + 1 == self._retries.attempts or delay >= left:
                            raise
                        await asyncio.sleep(delay)
        except TimeoutError:
            pass
        raise _Fault(TIMED_OUT, "no complete answer within the deadline")

    async def _attempt(self, item: Download, url: URL, scope: asyncio.Timeout) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            await self._turn(url, scope)
            try:
                async with self._opened().get(url, allow_redirects=False) as response:
                    location = response.headers.get("Location") if response.status in REDIRECTS else None
                    if location is None:
                        return await self._received(item, response)
            except UnsafeAddressError as error:
                raise _Fault(UNSAFE, str(error)) from None
            except TimeoutError:
                raise _Fault(TIMED_OUT, "no complete answer within the deadline", retry=True) from None
            except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
                raise _transport_fault(error) from None
            url = self._checked(location, url)
        raise _Fault(FAILED, f"redirected more than {MAX_REDIRECTS} times")

    async def _turn(self, url: URL, scope: asyncio.Timeout) -> None:
        """Wait for this host's turn with the item's clock stopped: a long queue is no fault of the item."""
        loop = asyncio.get_running_loop()
        left = (scope.when() or 0.0) - loop.time()
        scope.reschedule(None)
        await self._limiter.wait_async(url.raw_host or "")
        scope.reschedule(loop.time() + left)

    async def _received(self, item: Download, response: aiohttp.ClientResponse) -> bytes:
        status = response.status
        if status != 200:
            raise _Fault(
                _STATUS_REASONS.get(status, FAILED),
                f"HTTP {status_text(status)}",
                retry=status in RETRIED,
                host=(response.url.raw_host or "") if status in BACK_OFF else "",
                retry_after=response.headers.get("Retry-After", ""),
            )
        digest = hashlib.md5(usedforsecurity=False)
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in response.content.iter_chunked(_CHUNK):
                size += len(piece)
                if size > self._max_bytes:
                    raise _Fault(TOO_BIG, f"more than {self._max_bytes} bytes")
                digest.update(piece)
                pieces.append(piece)
        except (aiohttp.ClientPayloadError, HttpProcessingError):
            # Some servers announce a longer body than they have; the checksum tells a whole file from a torn one.
            if not item.md5 or digest.hexdigest() != item.md5.lower():
                raise
        if not size:
            raise _Fault(EMPTY, "the body has 0 bytes")
        if item.md5:
            if digest.hexdigest() != item.md5.lower():
                raise _Fault(CHECKSUM, f"the MD5 is {digest.hexdigest()}")
        elif item.bytes and item.bytes != size:
            raise _Fault(CHECKSUM, f"{size} bytes instead of {item.bytes}")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _checked(self, text: str, base: URL | None = None) -> URL:
        """Parse a URL, or a redirect's target relative to `base`, and refuse what must not be fetched."""
        try:
            url = base.join(URL(text)) if base else URL(text)
            self._routes.check(url.scheme, url.raw_host)
        except UnsafeAddressError as error:
            raise _Fault(UNSAFE, str(error)) from None
        except ValueError:
            raise _Fault(UNSAFE, "the URL is malformed") from None
        return url

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                ssl=tls_context(),
                resolver=_RoutedResolver(self._routes),
                ttl_dns_cache=60,
                limit=self._connections,
                limit_per_host=self._per_host,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                # Pictures do not compress, and a plain body is as long as its header says.
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_STALL, sock_read=_STALL),
                trust_env=False,
            )
        return self._session


def _transport_fault(error: Exception) -> _Fault:
    """Name a fault by its kind: the libraries' messages hold ports, addresses and object ids."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return _Fault(FAILED, "the host name was not found", retry=True)
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return _Fault(FAILED, "the TLS connection was not accepted")
    if isinstance(error, aiohttp.ClientConnectorError):
        return _Fault(FAILED, "no connection could be made", retry=True)
    if isinstance(error, (aiohttp.InvalidURL, ValueError)):
        return _Fault(UNSAFE, "the URL is malformed")
    if isinstance(error, (aiohttp.ClientResponseError, HttpProcessingError)):
        # Stray bytes after an earlier answer on the same connection look like this too; a new connection has none.
        return _Fault(FAILED, "the answer is not proper HTTP", retry=True)
    return _Fault(FAILED, "the connection broke off", retry=True)


class _RoutedResolver(AbstractResolver):
    """Looks names up by the routes' rules; aiohttp connects to exactly the addresses it returns."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._plain = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET
    ) -> list[ResolveResult]:
        target = self._routes.target(host)
        if target:
            found = await self._plain.resolve(*target, family=family)
            return [{**result, "hostname": host} for result in found]
        found = await self._plain.resolve(host, port, family=family)
        admitted = set(self._routes.admit(result["host"] for result in found))
        return [result for result in found if result["host"] in admitted]

    async def close(self) -> None:
        """Nothing is kept open."""
