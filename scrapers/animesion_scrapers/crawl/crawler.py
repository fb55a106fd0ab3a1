"""A resumable crawl: fetches the files that its ledger lacks, spools them and reports progress and failures.

Single files are fetched in `http.transfers`; the state is kept in `ledger`. `http.downloads` is the simpler interface
for downloads that need not be resumed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from animesion_scrapers.crawl.ledger import DONE, REFUSED, Ledger, LedgerEntry
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.background import Background
from animesion_scrapers.http.breakers import Breakers
from animesion_scrapers.http.clients import check_user_agent
from animesion_scrapers.http.faults import FAILED
from animesion_scrapers.http.limits import RateLimiter
from animesion_scrapers.http.records import OK, Download, Downloaded
from animesion_scrapers.http.retries import Retries
from animesion_scrapers.http.robots import RobotsCache, TdmCache, product_token
from animesion_scrapers.http.transfers import Transfers

_TICK = 0.5
"""Seconds between progress reports."""

_COMMIT = 0.1
"""Most seconds between a download and its commit to the ledger."""

_RATE_SECONDS = 30.0
"""Seconds over which the rate of a crawl is averaged."""


@dataclass(frozen=True)
class CrawlStatus:
    """Progress of a crawl, over all calls of `Crawler.fetch` so far.

    Attributes:
        finished: Items that were downloaded, failed or were refused.
        left: Items of the current call that are not finished.
        bytes: Bytes downloaded.
        rate: Items per second over the last 30 seconds.
        failures: Number of failed items by kind and detail.
        hosts: State of the hosts that are not as usual: `paused`, `open`, `half-open` or `given up`.
        circuits_opened: How often the circuit breaker of each host has opened.
    """

    finished: int = 0
    left: int = 0
    bytes: int = 0
    rate: float = 0.0
    failures: Mapping[tuple[str, str], int] = field(default_factory=dict)
    hosts: Mapping[str, str] = field(default_factory=dict)
    circuits_opened: Mapping[str, int] = field(default_factory=dict)


class Crawler:
    """Fetches files into a ledger; use it as a context manager, or call `close`."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        user_agent: str,
        limiter: RateLimiter,
        breakers: Breakers | None = None,
        robots: Path | bool = True,
        opt_outs: Path | bool = True,
        connect_to: Mapping[str, tuple[str, int]] | None = None,
        allow_private: bool | Sequence[str] = False,
        concurrency: int = 16,
        per_host: int = 8,
        host_connections: Mapping[str, int] | None = None,
        deadline: float = 60.0,
        stall: float = 20.0,
        max_bytes: int = 64 << 20,
        retries: Retries | None = None,
        watch: Callable[[CrawlStatus], None] = lambda status: None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            ledger: The state of the crawl; the crawler does not close it.
            user_agent: Name of the crawler with a contact, such as `my-crawler/1.0 (me@example.org)`.
            limiter: Pacing by host, shared with other clients of the same hosts.
            breakers: Circuit breakers by host, shared likewise.
            robots: Whether robots.txt is obeyed; a path caches it in that file.
            opt_outs: Whether the opt-outs of `http.opt_outs` are obeyed, those in robots.txt if it is read; a path
                caches `/.well-known/tdmrep.json` in that file, which may be that of robots.txt.
            connect_to: Address and port to connect to instead of a host, as curl's `--connect-to`.
            allow_private: Whether hosts may be on loopback, private or link-local addresses; or those that may, each as
                `host:port`.
            concurrency: Items in flight at once.
            per_host: Items in flight at once on one host.
            host_connections: Exceptions from `per_host`, by host name.
            deadline: Most seconds for one item, without its waits for a turn on a busy host.
            stall: Seconds without progress after which a connection is replaced.
            max_bytes: Size of the largest accepted file.
            retries: Number of attempts in one run and the waits between them.
            watch: Called twice per second, on the caller's thread, with the progress.

        Raises:
            ScraperError: The User-Agent names no contact.
        """
        self._ledger = ledger
        self._limiter = limiter
        self._breakers = breakers or Breakers()
        self._watch = watch
        self._concurrency = concurrency
        self._robots: RobotsCache | None = None
        self._tdm: TdmCache | None = None
        product = product_token(check_user_agent(user_agent))
        if robots is not False:
            self._robots = RobotsCache(product, robots if isinstance(robots, Path) else None)
        if opt_outs is not False:
            self._tdm = TdmCache(product, opt_outs if isinstance(opt_outs, Path) else None)
        self._transfers = Transfers(
            user_agent=user_agent,
            limiter=limiter,
            routes=Routes(connect_to or {}, allow_private),
            connections=concurrency,
            per_host=per_host,
            host_connections=host_connections,
            deadline=deadline,
            stall=stall,
            max_bytes=max_bytes,
            retries=retries or Retries(),
            breakers=self._breakers,
            robots=self._robots,
            tdm=self._tdm,
        )
        self._background: Background | None = None
        self._finished = self._bytes = self._left = 0
        self._failures: Counter[tuple[str, str]] = Counter()
        self._hosts: set[str] = set()
        self._pace: deque[tuple[float, int]] = deque()

    def __enter__(self) -> Crawler:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._background is not None:
            self._background.run(self._transfers.close())
            self._background.close()
            self._background = None
        for cache in (self._robots, self._tdm):
            if cache is not None:
                cache.close()

    def fetch(self, spool: str, requests: Sequence[Download], *, retry_refused: bool = False) -> dict[str, LedgerEntry]:
        """Fetch the files that the ledger lacks, in any order.

        Args:
            spool: Name of the spool file, `[a-z0-9_-]+`.
            requests: The files; keys must be unique.
            retry_refused: Whether to request again what was refused permanently in an earlier run.

        Returns:
            The entry of each request, in their order: done and in a spool, failed or refused.

        Raises:
            OSError: The disk is full. Files downloaded so far are kept.
        """
        entries = self._ledger.plan({request.key: self._describe(request) for request in requests})
        missing = [request for request in requests if self._wanted(entries[request.key], retry_refused)]
        if missing:
            self._run(self._fetch_all(spool, missing, entries))
            entries = self._ledger.entries(request.key for request in requests)
        return {request.key: entries[request.key] for request in requests}

    def status(self) -> CrawlStatus:
        """The progress so far."""
        now = time.monotonic()
        self._pace.append((now, self._finished))
        while len(self._pace) > 2 and now - self._pace[0][0] > _RATE_SECONDS:
            self._pace.popleft()
        started, finished = self._pace[0]
        hosts = {host: self._host_state(host) for host in sorted(self._hosts)}
        return CrawlStatus(
            finished=self._finished,
            left=self._left,
            bytes=self._bytes,
            rate=(self._finished - finished) / (now - started) if now > started else 0.0,
            failures=dict(self._failures),
            hosts={host: state for host, state in hosts.items() if state},
            circuits_opened=self._breakers.opened(),
        )

    def _describe(self, request: Download) -> str:
        """The request as one line of JSON, by which the ledger notices changes: of the file, or of what is obeyed."""
        file = [request.url, request.md5, request.sha1, request.bytes]
        if self._tdm is None:
            return json.dumps([*file, "without opt-outs"])
        return json.dumps([*file, request.page] if request.page else file)

    def _wanted(self, entry: LedgerEntry, retry_refused: bool) -> bool:
        """Whether an item must be requested; one whose spooled bytes are damaged must."""
        if entry.state == DONE:
            return not entry.here or self._ledger.content(entry) is None
        return entry.state != REFUSED or retry_refused

    def _host_state(self, host: str) -> str:
        state = self._breakers.state(host)
        if state != "closed":
            return state
        return "paused" if self._limiter.held(host) > 0 else ""

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run on the background loop and report from this thread; an interrupt here cancels the work there."""
        if self._background is None:
            self._background = Background()
        running = self._background.start(work)
        try:
            while True:
                try:
                    running.result(timeout=_TICK)
                    return
                except concurrent.futures.TimeoutError:
                    if running.done():
                        raise
                    self._watch(self.status())
        finally:
            if not running.done():
                running.cancel()
                self._background.settle()  # the other thread may still write to the ledger
            self._ledger.commit()
            self._watch(self.status())

    async def _fetch_all(self, spool: str, requests: Iterable[Download], entries: Mapping[str, LedgerEntry]) -> None:
        queue = _HostQueue(self._transfers)
        for request in requests:
            queue.add(request)
        self._hosts |= set(queue.hosts())
        self._left = len(queue)

        async def work() -> None:
            while (taken := await queue.next()) is not None:
                host, request = taken
                try:
                    entry = entries[request.key]
                    self._ledger.begin(entry)
                    self._record(spool, entry, await self._transfers.fetch(request))
                finally:
                    queue.finished(host)

        async def commit() -> None:
            while True:  # without this, files would stay uncommitted while the next ones are slow
                await asyncio.sleep(_COMMIT)
                self._ledger.commit()

        try:
            async with asyncio.TaskGroup() as group:
                committing = group.create_task(commit())
                await asyncio.wait([group.create_task(work()) for _ in range(min(self._concurrency, len(queue)))])
                committing.cancel()
        except BaseExceptionGroup as faults:  # a full disk, for example, fails several tasks
            raise faults.exceptions[0] from None

    def _record(self, spool: str, entry: LedgerEntry, result: Downloaded) -> None:
        if result.status == OK:
            self._ledger.keep(entry, spool, result.content, result.digest, attempts=result.attempts)
            self._bytes += len(result.content)
        else:
            self._ledger.fail(entry, result.status, result.detail, final=result.final, attempts=result.attempts)
            self._failures[result.status, result.detail if result.status == FAILED else ""] += 1
        self._finished += 1
        self._left -= 1


class _HostQueue:
    """Requests by host, taken round-robin from the hosts with a free connection; for one event loop."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._waiting: dict[str, deque[Download]] = {}
        self._active: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def hosts(self) -> list[str]:
        return list(self._waiting)

    def add(self, request: Download) -> None:
        self._waiting.setdefault(self._transfers.host_of(request.url), deque()).append(request)
        self._length += 1

    async def next(self) -> tuple[str, Download] | None:
        """Wait for a host with a free connection and return it with its next request; None when the queue is empty."""
        while self._waiting:
            for host, queue in self._waiting.items():
                if self._active[host] < self._transfers.connections_to(host):
                    self._active[host] += 1
                    request = queue.popleft()
                    del self._waiting[host]
                    if queue:  # re-insert behind the other hosts
                        self._waiting[host] = queue
                    return host, request
            self._changed.clear()
            await self._changed.wait()
        return None

    def finished(self, host: str) -> None:
        self._active[host] -= 1
        self._changed.set()
