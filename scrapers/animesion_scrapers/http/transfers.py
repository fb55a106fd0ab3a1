"""One download: attempts, redirects, turns and robots.txt, from a URL to checked bytes or to a fault.

Responses are read in `responses`. Order, read-ahead and threads are left to `downloads`, the ledger to `crawl.ledger`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from animesion_scrapers.errors import HostDownError, UnsafeAddressError
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.breakers import Breakers
from animesion_scrapers.http.clients import check_user_agent
from animesion_scrapers.http.faults import FAILED, TIMED_OUT, UNSAFE, DownloadFault, transport_fault
from animesion_scrapers.http.limits import RateLimiter
from animesion_scrapers.http.opt_outs import ROBOTS, TDM, USAGE
from animesion_scrapers.http.records import OK, Download, Downloaded
from animesion_scrapers.http.responses import ResponseReader, read_robots
from animesion_scrapers.http.retries import MAX_REDIRECTS, REDIRECTS, Retries
from animesion_scrapers.http.robots import DISALLOW_ALL, RobotsCache, Rules, TdmCache
from animesion_scrapers.http.sessions import open_session

_ResultT = TypeVar("_ResultT")


class Transfers:
    """Fetches single files over one shared session, on one event loop."""

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
        tdm: TdmCache | None = None,
        stall: float = 20.0,
    ) -> None:
        """Check and keep the settings, which `crawl.Crawler` documents; connections open with the first fetch.

        Without `tdm` no opt-out is obeyed but what `robots` disallows.
        """
        if min(connections, per_host, max_bytes, retries.attempts) < 1 or not min(deadline, stall) > 0:
            raise ValueError("Concurrency, connections per host, deadline, byte cap and attempts must be above zero.")
        self._user_agent = check_user_agent(user_agent)
        self._limiter = limiter
        self._routes = routes
        self._connections = connections
        self._per_host = per_host
        self._host_connections = {host.lower(): number for host, number in (host_connections or {}).items()}
        self._deadline = deadline
        self._retries = retries
        self._breakers = breakers or Breakers()
        self._robots = robots
        self._tdm = tdm
        self._responses = ResponseReader(
            limiter=limiter, retries=retries, max_bytes=max_bytes, product=tdm.product if tdm else None
        )
        self._stall = stall
        self._session: aiohttp.ClientSession | None = None
        self._hosts: dict[str, asyncio.Semaphore] = {}
        self._rules_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def host_of(self, url: str) -> str:
        """The host of a URL, before redirects; empty for a malformed URL."""
        try:
            return _parse(url).raw_host or ""
        except ValueError:
            return ""

    def connections_to(self, host: str) -> int:
        """Most items in flight at once on a host."""
        return self._host_connections.get(host, self._per_host)

    async def fetch(self, item: Download) -> Downloaded:
        """Fetch one file; a failure is a result, not an exception."""
        attempts = [0]
        try:
            url = self._check_url(item.url)
            host = url.raw_host or ""
            if host not in self._hosts:
                self._hosts[host] = asyncio.Semaphore(self.connections_to(host))
            async with self._hosts[host]:
                content = await self._fetch_within_deadline(item, url, attempts)
        except DownloadFault as fault:
            return Downloaded(item.key, item.url, fault.reason, fault.detail, b"", fault.final, attempts[0])
        # Hashing dominates the cost of a fast crawl, so the checked MD5 also serves as the digest.
        digest = f"md5:{item.md5.lower()}" if item.md5 else f"sha256:{hashlib.sha256(content).hexdigest()}"
        return Downloaded(item.key, item.url, OK, "", content, False, attempts[0], digest)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _fetch_within_deadline(self, item: Download, url: URL, attempts: list[int]) -> bytes:
        """Retry until success, a permanent fault or the deadline; `attempts[0]` counts the requests."""
        read = functools.partial(self._responses.read, item)
        page = self._check_url(item.page) if item.page and self._tdm is not None else None
        wrong_bodies = 0
        try:
            async with asyncio.timeout(self._deadline) as scope:
                while True:
                    attempts[0] += 1
                    try:
                        if page is not None:
                            await self._read_page(page, scope)
                            page = None
                        return await self._request(
                            url,
                            scope,
                            read,
                            with_robots=True,
                            headers=_range(item),
                            # a digest proves the file, whatever way it takes
                            tls_only=not (item.md5 or item.sha1),
                        )
                    except DownloadFault as fault:
                        wrong_bodies += fault.wrong
                        fault.final = fault.final or wrong_bodies > 1
                        if not fault.retry or fault.final or attempts[0] >= self._retries.attempts:
                            raise
                        if fault.wrong:  # the host is healthy, so there is no reason to wait
                            continue
                        delay = self._retries.delay(attempts[0] - 1, fault.pause)
                        if fault.back_off:
                            # `_wait_for_turn` waits out the pause, and waits for turns do not count against the item.
                            self._limiter.pause(fault.back_off, delay)
                            continue
                        if delay >= (scope.when() or 0.0) - asyncio.get_running_loop().time():
                            raise
                        await asyncio.sleep(delay)
        except TimeoutError:
            pass
        raise DownloadFault(TIMED_OUT, "no complete answer within the deadline")

    async def _read_page(self, page: URL, scope: asyncio.Timeout) -> None:
        """Request the page that shows a file, and raise the fault that it is."""
        try:
            await self._request(page, scope, self._responses.read_page, with_robots=True)
        except DownloadFault as fault:
            fault.detail = f"its page: {fault.detail}"
            raise

    async def _request(
        self,
        url: URL,
        scope: asyncio.Timeout,
        read: Callable[[aiohttp.ClientResponse], Awaitable[_ResultT]],
        *,
        with_robots: bool,
        headers: Mapping[str, str] | None = None,
        tls_only: bool = False,
    ) -> _ResultT:
        """Follow redirects and return `read(response)` for the last response.

        Each hop is checked, paced and reported to the circuit breaker of its host. With `tls_only`, no redirect leads
        from https to http, where anybody on the way could send another file.
        """
        for _ in range(MAX_REDIRECTS + 1):
            if with_robots:
                await self._obey_rules(url, scope)
            host = url.raw_host or ""
            await self._wait_for_turn(host, scope)
            healthy = False
            try:
                async with self._open_session().get(url, headers=headers, allow_redirects=False) as response:
                    location = response.headers.get("Location") if response.status in REDIRECTS else None
                    if location is None:
                        result = await read(response)
                        healthy = True
                        return result
                healthy = True
            except DownloadFault as fault:
                healthy = not fault.host_failed
                raise
            except UnsafeAddressError as error:
                healthy = True
                raise DownloadFault(UNSAFE, str(error), final=True) from None
            except TimeoutError:
                raise DownloadFault(TIMED_OUT, "no complete answer within the deadline", retry=True) from None
            except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
                transport = transport_fault(error)
                healthy = transport.final
                raise transport from None
            finally:
                self._breakers.report(host, healthy)
            target = self._check_url(location, url)
            if tls_only and url.scheme == "https" and target.scheme == "http":
                raise DownloadFault(UNSAFE, "redirected from https to http", final=True)
            url = target
        raise DownloadFault(FAILED, f"redirected more than {MAX_REDIRECTS} times", final=True)

    async def _wait_for_turn(self, host: str, scope: asyncio.Timeout) -> None:
        """Wait for a turn of this host; the wait does not count towards the item's deadline."""
        if self._limiter.held(host) > self._retries.cap:
            raise DownloadFault(FAILED, "the host asked for a longer pause than a run waits")
        if self._breakers.state(host) == "closed" and self._limiter.take_now(host):
            return
        with _pause_deadline(scope):
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

    async def _obey_rules(self, url: URL, scope: asyncio.Timeout) -> None:
        """Apply what the host says about its paths: slow its pace or raise a fault."""
        path = url.raw_path_qs
        if self._robots is not None:
            rules = await self._rules(self._robots, url, scope)
            if rules.delay:
                self._limiter.slow(url.raw_host or "", rules.delay)
            if not rules.allows(path):
                if rules is DISALLOW_ALL:
                    raise DownloadFault(FAILED, "robots.txt could not be read")
                raise DownloadFault(ROBOTS, "disallowed by robots.txt", final=True)
            if self._tdm is not None and rules.usage is not None and not rules.usage.allows(path):
                raise DownloadFault(USAGE, rules.usage.evidence(path), final=True)
        if self._tdm is not None:
            reserved = await self._rules(self._tdm, url, scope)
            if reserved is DISALLOW_ALL:
                raise DownloadFault(FAILED, "tdmrep.json could not be read")
            if not reserved.allows(path):
                raise DownloadFault(TDM, reserved.evidence(path), final=True)

    async def _rules(self, cache: RobotsCache, url: URL, scope: asyncio.Timeout) -> Rules:
        """A host's rules, fetched when not known yet, with the verdict on the URL's path at hand."""
        origin = f"{url.scheme}://{url.host_port_subcomponent}"
        rules = cache.at_hand(origin)
        path = url.raw_path_qs
        if rules is None or not rules.is_quick(path):
            # Neither fetching the file nor reading it counts towards the deadline of the items that wait for it. It is
            # read in a thread, as other hosts share the event loop.
            with _pause_deadline(scope):
                if rules is None:
                    async with self._rules_locks[origin + cache.path]:
                        rules = await asyncio.to_thread(cache.known, origin)
                        rules = rules or await self._fetch_rules(cache, url, origin)
                await asyncio.to_thread(_decide, rules, path)
        return rules

    async def _fetch_rules(self, cache: RobotsCache, url: URL, origin: str) -> Rules:
        """Request a host's rules, with as many attempts as for a file."""
        target = url.origin().with_path(cache.path)
        for attempt in range(self._retries.attempts):
            status, body = 0, b""
            with contextlib.suppress(DownloadFault, TimeoutError):
                async with asyncio.timeout(self._deadline) as scope:
                    status, body = await self._request(target, scope, read_robots, with_robots=False)
            if 0 < status < 500 and status != 429:
                break
            await asyncio.sleep(self._retries.delay(attempt))
        return await asyncio.to_thread(cache.learn, origin, status, body)

    def _check_url(self, text: str, base: URL | None = None) -> URL:
        """Parse a URL, or a redirect's target relative to `base`.

        Raises:
            DownloadFault: It is malformed or must not be fetched.
        """
        try:
            url = base.join(_parse(text)) if base else _parse(text)
            self._routes.check(url.scheme, url.raw_host, url.port)
            if url.user is not None or url.password is not None:
                raise UnsafeAddressError("passwords in a URL are not sent")
        except UnsafeAddressError as error:
            raise DownloadFault(UNSAFE, str(error), final=True) from None
        except ValueError:
            raise DownloadFault(UNSAFE, "the URL is malformed", final=True) from None
        return url

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(
                self._user_agent, self._routes, connections=self._connections, stall=self._stall
            )
        return self._session


@contextlib.contextmanager
def _pause_deadline(scope: asyncio.Timeout) -> Iterator[None]:
    """Stop the clock of a deadline while the block runs."""
    loop = asyncio.get_running_loop()
    left = (scope.when() or 0.0) - loop.time()
    scope.reschedule(None)
    try:
        yield
    finally:
        scope.reschedule(loop.time() + left)


def _decide(rules: Rules, path: str) -> None:
    """Compute the verdicts on a path, which the rules keep."""
    rules.allows(path)
    if rules.usage is not None:
        rules.usage.allows(path)


def _range(item: Download) -> dict[str, str]:
    """The header that requests a piece of a file."""
    if item.span is None:
        return {}
    first, count = item.span
    return {"Range": f"bytes={first}-{first + count - 1}"}


@functools.lru_cache(maxsize=4096)
def _parse(url: str) -> URL:
    """Parse a URL; cached, as the queue and the request both need it.

    Raises:
        ValueError: It is malformed.
    """
    return URL(url.strip().replace(" ", "%20"))  # as browsers send it; yarl would send `+` in a query
