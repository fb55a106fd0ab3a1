"""A crawl that survives: fetches what its ledger lacks, spools what comes, says how it goes and what went wrong.

How a single file is fetched is in `transfers`, what is remembered in `ledger`. `downloads` is the simpler door for
those who need no memory.
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
from animesion_scrapers.http.robots import RobotsCache, product_token
from animesion_scrapers.http.transfers import Transfers

_TICK = 0.5
"""Seconds between two reports of progress."""

_COMMIT = 0.1
"""Seconds after which what has come is written down at the latest."""

_RATE_SECONDS = 30.0
"""Seconds over which the pace of a crawl is measured."""


@dataclass(frozen=True)
class CrawlStatus:
    """How a crawl goes, as far as the present call of `Crawler.fetch` and those before it are concerned.

    Attributes:
        finished: Items that came, failed or were refused.
        left: Items of the present call that are still to come.
        bytes: Bytes that came.
        rate: Items a second over the last half minute.
        failures: How many items failed, by kind and detail.
        hosts: What is out of the ordinary, by host: `paused`, `open`, `half-open` or `given up`.
        circuits_opened: How often each host's circuit breaker has opened.
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
        connect_to: Mapping[str, tuple[str, int]] | None = None,
        allow_private: bool = False,
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
            ledger: What is known and what has come; the crawler does not close it.
            user_agent: What is asking and whom to contact, such as `my-crawler/1.0 (me@example.org)`.
            limiter: Pacing by host, shared with other clients that ask the same hosts.
            breakers: Circuit breakers by host, shared likewise.
            robots: Whether robots.txt and `X-Robots-Tag` are obeyed; a path keeps what was read in that file.
            connect_to: Host names to reach at another address and port, as curl's `--connect-to`.
            allow_private: Whether hosts may be on loopback, private or link-local addresses.
            concurrency: Items in flight at once.
            per_host: Items in flight at once on one host.
            host_connections: Other numbers for single hosts, by host name.
            deadline: Seconds that one item may take, but for its waits for a turn on a busy host.
            stall: Seconds of silence after which a connection is given up for a new one.
            max_bytes: The longest file accepted.
            retries: How often and how patiently to ask again in one run.
            watch: Told twice a second, on the caller's thread, how the crawl goes.

        Raises:
            ScraperError: The User-Agent names no contact.
        """
        self._ledger = ledger
        self._limiter = limiter
        self._breakers = breakers or Breakers()
        self._watch = watch
        self._concurrency = concurrency
        self._robots: RobotsCache | None = None
        if robots is not False:
            product = product_token(check_user_agent(user_agent))
            self._robots = RobotsCache(product, robots if isinstance(robots, Path) else None)
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
        if self._robots is not None:
            self._robots.close()

    def fetch(self, spool: str, requests: Sequence[Download], *, retry_refused: bool = False) -> dict[str, LedgerEntry]:
        """Fetch what the ledger does not have; the order in which files come is their servers' business.

        Args:
            spool: Name of the spool file for what comes, `[a-z0-9_-]+`.
            requests: What is wanted; no key twice.
            retry_refused: Ask again for what was refused permanently in an earlier run.

        Returns:
            The entry of each request, in their order: done and here, failed or refused.

        Raises:
            OSError: The disk is full. What has come is kept.
        """
        entries = self._ledger.plan({request.key: _describe(request) for request in requests})
        missing = [request for request in requests if self._wanted(entries[request.key], retry_refused)]
        if missing:
            self._run(self._fetch_all(spool, missing, entries))
            entries = self._ledger.entries(request.key for request in requests)
        return {request.key: entries[request.key] for request in requests}

    def status(self) -> CrawlStatus:
        """How it goes."""
        now = time.monotonic()
        self._pace.append((now, self._finished))
        while len(self._pace) > 2 and now - self._pace[0][0] > _RATE_SECONDS:
            self._pace.popleft()
        began, had = self._pace[0]
        hosts = {host: self._host_state(host) for host in sorted(self._hosts)}
        return CrawlStatus(
            finished=self._finished,
            left=self._left,
            bytes=self._bytes,
            rate=(self._finished - had) / (now - began) if now > began else 0.0,
            failures=dict(self._failures),
            hosts={host: state for host, state in hosts.items() if state},
            circuits_opened=self._breakers.opened(),
        )

    def _wanted(self, entry: LedgerEntry, retry_refused: bool) -> bool:
        """Whether an item must be asked for; what is here but damaged must."""
        if entry.state == DONE:
            return not entry.here or self._ledger.content(entry) is None
        return entry.state != REFUSED or retry_refused

    def _host_state(self, host: str) -> str:
        state = self._breakers.state(host)
        if state != "closed":
            return state
        return "paused" if self._limiter.held(host) > 0 else ""

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run on the background loop, reporting from this thread; an interrupt here ends the work there."""
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
                self._background.settle()  # until then the ledger is the other thread's
            self._ledger.commit()
            self._watch(self.status())

    async def _fetch_all(self, spool: str, requests: Iterable[Download], entries: Mapping[str, LedgerEntry]) -> None:
        queue = _HostQueue(self._transfers)
        for request in requests:
            queue.add(request)
        self._hosts |= set(queue.hosts())
        self._left = len(queue)

        async def work() -> None:
            while (handed := await queue.next()) is not None:
                host, request = handed
                try:
                    entry = entries[request.key]
                    self._ledger.begin(entry)
                    self._note(spool, entry, await self._transfers.fetch(request))
                finally:
                    queue.finished(host)

        async def commit() -> None:
            while True:  # what came before a quiet time must not wait for its end
                await asyncio.sleep(_COMMIT)
                self._ledger.commit()

        try:
            async with asyncio.TaskGroup() as group:
                committing = group.create_task(commit())
                await asyncio.wait([group.create_task(work()) for _ in range(min(self._concurrency, len(queue)))])
                committing.cancel()
        except BaseExceptionGroup as faults:  # such as a full disk, which several tasks may have met
            raise faults.exceptions[0] from None

    def _note(self, spool: str, entry: LedgerEntry, got: Downloaded) -> None:
        if got.status == OK:
            self._ledger.keep(entry, spool, got.content, got.digest, attempts=got.attempts)
            self._bytes += len(got.content)
        else:
            self._ledger.fail(entry, got.status, got.detail, final=got.final, attempts=got.attempts)
            self._failures[got.status, got.detail if got.status == FAILED else ""] += 1
        self._finished += 1
        self._left -= 1


class _HostQueue:
    """Requests by host, handed out in turn to hosts that have a connection free; lives on one event loop."""

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
        """A host and the next request for it, once one can take it; None when all have been handed out."""
        while self._waiting:
            for host, queue in self._waiting.items():
                if self._active[host] < self._transfers.connections_to(host):
                    self._active[host] += 1
                    request = queue.popleft()
                    del self._waiting[host]
                    if queue:  # behind the other hosts
                        self._waiting[host] = queue
                    return host, request
            self._changed.clear()
            await self._changed.wait()
        return None

    def finished(self, host: str) -> None:
        self._active[host] -= 1
        self._changed.set()


def _describe(request: Download) -> str:
    """What a request asks for, in one line."""
    return json.dumps([request.url, request.md5, request.sha1, request.bytes])
