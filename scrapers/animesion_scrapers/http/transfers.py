"""One download from its URL to checked bytes, or to the reason why there are none.

Order, read-ahead and threads are left to `downloads`, what is remembered to `crawls`; the reasons are in `faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from socket import AddressFamily
from typing import TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from animesion_scrapers.errors import HostDownError, UnsafeAddressError
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.breakers import Breakers
from animesion_scrapers.http.clients import checked_user_agent, tls_context
from animesion_scrapers.http.faults import (
    CHECKSUM,
    EMPTY,
    FAILED,
    NOT_FOUND,
    REFUSED,
    TIMED_OUT,
    TOO_BIG,
    UNSAFE,
    DownloadFault,
    document_fault,
    transport_fault,
)
from animesion_scrapers.http.limits import RateLimiter
from animesion_scrapers.http.media import document_kind, is_challenge
from animesion_scrapers.http.retries import (
    BACK_OFF,
    MAX_REDIRECTS,
    REDIRECTS,
    RETRIED,
    Retries,
    may_pass,
    seconds_asked,
    status_text,
)
from animesion_scrapers.http.robots import DISALLOW_ALL, RobotsCache, Rules, opt_out
from animesion_scrapers.http.robots import MAX_BYTES as ROBOTS_BYTES

OK = "ok"

_STATUS_REASONS = {401: REFUSED, 402: REFUSED, 403: REFUSED, 404: NOT_FOUND, 410: NOT_FOUND, 451: NOT_FOUND}
_HTML = 1 << 14

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch.

    Attributes:
        key: The caller's name for it, handed back with the result.
        url: Where it is.
        md5: Its MD5 in hexadecimal, checked unless empty.
        bytes: Its size, checked unless 0 or unless there is a digest.
        sha1: Its SHA-1 in hexadecimal, checked unless empty.
        image: Whether a web page, XML or JSON in its place is a fault, as it is for images.
    """

    key: str
    url: str
    md5: str = ""
    bytes: int = 0
    sha1: str = ""
    image: bool = False


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What came of a `Download`.

    Attributes:
        key: As in the request.
        url: As in the request.
        status: `ok`, or one of `faults.REASONS`.
        detail: More about a failure, for people.
        content: The file; empty unless `ok`.
        final: Whether there is no point in asking again, as after a 404 or the same wrong bytes twice.
        attempts: How often it was asked for; 0 when the URL or its host ruled that out.
        digest: Digest of the content with its kind, such as `md5:0123...`: the announced MD5 when there was one, which
            has then been checked, else `sha256:...`; empty unless `ok`.
    """

    key: str
    url: str
    status: str
    detail: str
    content: bytes
    final: bool = False
    attempts: int = 0
    digest: str = ""


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
        host_connections: Mapping[str, int] | None = None,
        breakers: Breakers | None = None,
        robots: RobotsCache | None = None,
        stall: float = 20.0,
    ) -> None:
        """Check and keep the settings, which `downloads.download` explains; connections open with the first fetch."""
        if min(connections, per_host, max_bytes, retries.attempts) < 1 or not min(deadline, stall) > 0:
            raise ValueError("Concurrency, connections per host, deadline, byte cap and attempts must be above zero.")
        self._user_agent = checked_user_agent(user_agent)
        self._limiter = limiter
        self._routes = routes
        self._connections = connections
        self._per_host = per_host
        self._host_connections = {host.lower(): number for host, number in (host_connections or {}).items()}
        self._deadline = deadline
        self._max_bytes = max_bytes
        self._retries = retries
        self._breakers = breakers or Breakers()
        self._robots = robots
        self._stall = stall
        self._session: aiohttp.ClientSession | None = None
        self._hosts: dict[str, asyncio.Semaphore] = {}
        self._robots_turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def host_of(self, url: str) -> str:
        """The host that a URL leads to first; empty for one that cannot be fetched."""
        try:
            return _parsed(url).raw_host or ""
        except ValueError:
            return ""

    def connections_to(self, host: str) -> int:
        """How many items may be in flight on a host at once."""
        return self._host_connections.get(host, self._per_host)

    async def fetch(self, item: Download) -> Downloaded:
        """Fetch one file; whatever goes wrong with it is in the result."""
        attempts = [0]
        try:
            url = self._checked(item.url)
            host = url.raw_host or ""
            if host not in self._hosts:
                self._hosts[host] = asyncio.Semaphore(self.connections_to(host))
            async with self._hosts[host]:
                content = await self._within_deadline(item, url, attempts)
        except DownloadFault as fault:
            return Downloaded(item.key, item.url, fault.reason, fault.detail, b"", fault.final, attempts[0])
        # One pass over the bytes is enough: hashing is most of what a fast crawl costs.
        digest = f"md5:{item.md5.lower()}" if item.md5 else f"sha256:{hashlib.sha256(content).hexdigest()}"
        return Downloaded(item.key, item.url, OK, "", content, False, attempts[0], digest)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _within_deadline(self, item: Download, url: URL, attempts: list[int]) -> bytes:
        """Attempt until it works, is hopeless, or the item's time is up; `attempts` counts along."""
        receive = functools.partial(self._received, item)
        wrong = 0
        try:
            async with asyncio.timeout(self._deadline) as scope:
                while True:
                    attempts[0] += 1
                    try:
                        return await self._asked(url, scope, receive, with_robots=True)
                    except DownloadFault as fault:
                        wrong += fault.wrong
                        fault.final = fault.final or wrong > 1
                        if not fault.retry or fault.final or attempts[0] >= self._retries.attempts:
                            raise
                        if fault.wrong:  # the host is well: what it sends next time needs no wait
                            continue
                        delay = self._retries.delay(attempts[0] - 1, fault.retry_after)
                        if fault.back_off:
                            # The next turn comes after the pause, and waiting for turns is no fault of the item.
                            self._limiter.pause(fault.back_off, delay)
                            continue
                        if delay >= (scope.when() or 0.0) - asyncio.get_running_loop().time():
                            raise
                        await asyncio.sleep(delay)
        except TimeoutError:
            pass
        raise DownloadFault(TIMED_OUT, "no complete answer within the deadline")

    async def _asked(
        self,
        url: URL,
        scope: asyncio.Timeout,
        receive: Callable[[aiohttp.ClientResponse], Awaitable[_Result]],
        *,
        with_robots: bool,
    ) -> _Result:
        """What `receive` makes of the answer at the end of all redirects.

        Each hop is checked, paced and told to its host's breaker.
        """
        for _ in range(MAX_REDIRECTS + 1):
            if with_robots and self._robots is not None:
                await self._obey_robots(url, scope)
            host = url.raw_host or ""
            await self._turn(host, scope)
            well = False
            try:
                async with self._opened().get(url, allow_redirects=False) as response:
                    location = response.headers.get("Location") if response.status in REDIRECTS else None
                    if location is None:
                        received = await receive(response)
                        well = True
                        return received
                well = True
            except DownloadFault as fault:
                well = not fault.host_failed
                raise
            except UnsafeAddressError as error:
                well = True
                raise DownloadFault(UNSAFE, str(error), final=True) from None
            except TimeoutError:
                raise DownloadFault(TIMED_OUT, "no complete answer within the deadline", retry=True) from None
            except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
                named = transport_fault(error)
                well = named.final
                raise named from None
            finally:
                self._breakers.report(host, well)
            url = self._checked(location, url)
        raise DownloadFault(FAILED, f"redirected more than {MAX_REDIRECTS} times", final=True)

    async def _turn(self, host: str, scope: asyncio.Timeout) -> None:
        """Wait for this host's turn with the item's clock stopped: a long queue is no fault of the item."""
        if self._limiter.held(host) > self._retries.cap:
            raise DownloadFault(FAILED, "the host asked to be left alone for longer than a run waits")
        if self._breakers.state(host) == "closed" and self._limiter.take_now(host):
            return
        with _stopped(scope):
            try:
                while (delay := self._breakers.delay(host)) > 0:
                    await asyncio.sleep(delay)
            except HostDownError as error:
                raise DownloadFault(FAILED, str(error)) from None
            try:
                await self._limiter.wait_async(host)
            except asyncio.CancelledError:
                self._breakers.report(host, False)
                raise

    async def _obey_robots(self, url: URL, scope: asyncio.Timeout) -> None:
        assert self._robots is not None
        origin = f"{url.scheme}://{url.host_port_subcomponent}"
        rules = self._robots.known(origin)
        if rules is None:
            # The item that comes first does not pay for the file with its own time, nor do those that wait for it.
            with _stopped(scope):
                async with self._robots_turns[origin]:
                    rules = self._robots.known(origin) or await self._read_robots(url, origin)
        if rules.delay:
            self._limiter.slow(url.raw_host or "", rules.delay)
        if not rules.allows(url.raw_path_qs):
            if rules is DISALLOW_ALL:
                raise DownloadFault(FAILED, "robots.txt could not be read")
            raise DownloadFault(REFUSED, "robots.txt asks crawlers to leave it", final=True)

    async def _read_robots(self, url: URL, origin: str) -> Rules:
        """Ask a host for its robots.txt, as often as for a file."""
        assert self._robots is not None
        target = url.origin() / "robots.txt"
        for attempt in range(self._retries.attempts):
            status, body = 0, b""
            with contextlib.suppress(DownloadFault, TimeoutError):
                async with asyncio.timeout(self._deadline) as scope:
                    status, body = await self._asked(target, scope, _robots_file, with_robots=False)
            if 0 < status < 500 and status != 429:
                break
            await asyncio.sleep(self._retries.delay(attempt))
        return self._robots.learn(origin, status, body)

    async def _received(self, item: Download, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise await self._status_fault(response)
        if self._robots is not None:
            directive = opt_out(response.headers.getall("X-Robots-Tag", ()), self._robots.product)
            if directive:
                raise DownloadFault(REFUSED, f"X-Robots-Tag says {directive}", final=True)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise DownloadFault(FAILED, "the body is compressed although that was not asked for", final=True)
        if (response.content_length or 0) > self._max_bytes:
            raise DownloadFault(TOO_BIG, f"more than {self._max_bytes} bytes", final=True)
        content = await self._body(item, response)
        if not content:
            raise DownloadFault(EMPTY, "the body has 0 bytes", wrong=True)
        wrong = _wrong_digest(item, content)
        if wrong and item.image and document_kind(content):
            raise document_fault(content, response)
        if wrong:
            raise DownloadFault(CHECKSUM, wrong, wrong=True)
        # Bytes with the right digest are what the site announced, whatever they are.
        if item.image and not (item.md5 or item.sha1) and document_kind(content):
            raise document_fault(content, response)
        return content

    async def _body(self, item: Download, response: aiohttp.ClientResponse) -> bytes:
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := await response.content.readany():
                size += len(piece)
                if size > self._max_bytes:
                    raise DownloadFault(TOO_BIG, f"more than {self._max_bytes} bytes", final=True)
                pieces.append(piece)
        except (aiohttp.ClientPayloadError, HttpProcessingError):
            # Some servers announce a longer body than they have; a digest tells a whole file from a torn one.
            if not (item.md5 or item.sha1) or _wrong_digest(item, b"".join(pieces)):
                raise
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _status_fault(self, response: aiohttp.ClientResponse) -> DownloadFault:
        status = response.status
        retry_after = response.headers.get("Retry-After", "")
        host = response.url.raw_host or ""
        detail = f"HTTP {status_text(status)}"
        if "html" in response.headers.get("Content-Type", "") and is_challenge(
            await _up_to(response, _HTML), response.headers.get("cf-mitigated", "")
        ):
            detail += " with an HTML challenge page"
        if status in BACK_OFF and self._retries.too_long(retry_after):
            self._limiter.pause(host, seconds_asked(retry_after))
            return DownloadFault(FAILED, detail)
        return DownloadFault(
            _STATUS_REASONS.get(status, FAILED),
            detail,
            retry=status in RETRIED,
            final=not may_pass(status),
            host_failed=may_pass(status),
            back_off=host if status in BACK_OFF else "",
            retry_after=retry_after,
        )

    def _checked(self, text: str, base: URL | None = None) -> URL:
        """Parse a URL, or a redirect's target relative to `base`, and refuse what must not be fetched."""
        try:
            url = base.join(_parsed(text)) if base else _parsed(text)
            self._routes.check(url.scheme, url.raw_host)
            if url.user is not None or url.password is not None:
                raise UnsafeAddressError("passwords in a URL are not sent")
        except UnsafeAddressError as error:
            raise DownloadFault(UNSAFE, str(error), final=True) from None
        except ValueError:
            raise DownloadFault(UNSAFE, "the URL is malformed", final=True) from None
        return url

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                ssl=tls_context(),
                resolver=_RoutedResolver(self._routes),
                ttl_dns_cache=60,
                limit=self._connections,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                # Images do not compress, and a plain body is as long as its header says.
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._stall, sock_read=self._stall),
                trust_env=False,
            )
        return self._session


@contextlib.contextmanager
def _stopped(scope: asyncio.Timeout) -> Iterator[None]:
    """Stop a deadline's clock while the block runs."""
    loop = asyncio.get_running_loop()
    left = (scope.when() or 0.0) - loop.time()
    scope.reschedule(None)
    try:
        yield
    finally:
        scope.reschedule(loop.time() + left)


async def _up_to(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The beginning of a body."""
    body = bytearray()
    while len(body) < most and (piece := await response.content.readany()):
        body += piece
    return bytes(body[:most])


async def _robots_file(response: aiohttp.ClientResponse) -> tuple[int, bytes]:
    """Status and body of a robots.txt."""
    # What is compressed although that was not asked for cannot be read, as if the host had failed.
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return 0, b""
    return response.status, await _up_to(response, ROBOTS_BYTES) if response.status == 200 else b""


@functools.lru_cache(maxsize=4096)
def _parsed(url: str) -> URL:
    """Parse a URL; once for the queue and for the request together.

    Raises:
        ValueError: It is malformed.
    """
    return URL(url)


def _wrong_digest(item: Download, content: bytes) -> str:
    """What contradicts the announced digests, or the size where there are none; empty when nothing does."""
    for name, digest, due in (("MD5", hashlib.md5, item.md5), ("SHA-1", hashlib.sha1, item.sha1)):
        if due:
            found = digest(content, usedforsecurity=False).hexdigest()
            if found != due.lower():
                return f"the {name} is {found}"
    if item.bytes and item.bytes != len(content) and not (item.md5 or item.sha1):
        return f"{len(content)} bytes instead of {item.bytes}"
    return ""


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
