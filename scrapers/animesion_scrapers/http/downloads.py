"""The bulk downloader: many URLs in, checked bytes or a stable failure reason out, in the order of the requests.

Every run ends: each item has a deadline and a byte cap. It keeps no state and does not read robots.txt; `crawl` is for
downloads that must be resumable, or whose URLs the user did not list. Single files are fetched in `transfers`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.background import Background
from animesion_scrapers.http.faults import REASONS
from animesion_scrapers.http.limits import RateLimiter
from animesion_scrapers.http.records import Download, Downloaded
from animesion_scrapers.http.retries import Retries
from animesion_scrapers.http.transfers import Transfers

__all__ = ["REASONS", "Download", "Downloaded", "download", "download_all"]

_HELD_BYTES = 256 << 20
"""Downloaded bytes held behind a slow item; above this, no more items are started."""


async def download(
    requests: Iterable[Download],
    *,
    user_agent: str,
    requests_per_second: float = 1.0,
    limiter: RateLimiter | None = None,
    connect_to: Mapping[str, tuple[str, int]] | None = None,
    allow_private: bool | Sequence[str] = False,
    concurrency: int = 16,
    per_host: int = 8,
    deadline: float = 60.0,
    max_bytes: int = 64 << 20,
    retries: Retries | None = None,
) -> AsyncIterator[Downloaded]:
    """Fetch many files at once, on the running event loop.

    Args:
        requests: The files; read as needed, on the event loop, so the iterable should not block.
        user_agent: Name of the crawler with a contact, such as `my-crawler/1.0 (me@example.org)`.
        requests_per_second: Rate per host; ignored if there is a `limiter`.
        limiter: Pacing by host, shared with other clients of the same hosts.
        connect_to: Address and port to connect to instead of a host, as curl's `--connect-to`.
        allow_private: Whether hosts may be on loopback, private or link-local addresses; or those that may, each as
            `host:port`.
        concurrency: Items in flight at once.
        per_host: Items in flight at once on one host.
        deadline: Most seconds for one item, including retries and the waits between them, but not its waits for a turn
            on a busy host.
        max_bytes: Size of the largest accepted file.
        retries: Number of attempts and the waits between them.

    Yields:
        One result for each request, in the order of the requests. A failure is a result, not an exception.

    Raises:
        ScraperError: The User-Agent names no contact.
    """
    pipeline = _Pipeline(
        Transfers(
            user_agent=user_agent,
            limiter=limiter or RateLimiter(requests_per_second),
            routes=Routes(connect_to or {}, allow_private),
            connections=concurrency,
            per_host=per_host,
            deadline=deadline,
            max_bytes=max_bytes,
            retries=retries or Retries(),
        ),
        concurrency,
    )
    upcoming = iter(requests)
    try:
        while batch := await pipeline.step(list(islice(upcoming, pipeline.room))):
            for result in batch:
                yield result
    finally:
        await pipeline.close()


def download_all(
    requests: Iterable[Download],
    *,
    user_agent: str,
    requests_per_second: float = 1.0,
    limiter: RateLimiter | None = None,
    connect_to: Mapping[str, tuple[str, int]] | None = None,
    allow_private: bool | Sequence[str] = False,
    concurrency: int = 16,
    per_host: int = 8,
    deadline: float = 60.0,
    max_bytes: int = 64 << 20,
    retries: Retries | None = None,
) -> Iterator[Downloaded]:
    """Fetch many files at once, from synchronous code.

    Downloads run ahead on a background thread while the caller processes a result. `requests` is read on the caller's
    thread, so it may itself be a crawler. The arguments are those of `download`.

    Yields:
        One result for each request, in the order of the requests. A failure is a result, not an exception.

    Raises:
        ScraperError: The User-Agent names no contact.
    """
    transfers = Transfers(
        user_agent=user_agent,
        limiter=limiter or RateLimiter(requests_per_second),
        routes=Routes(connect_to or {}, allow_private),
        connections=concurrency,
        per_host=per_host,
        deadline=deadline,
        max_bytes=max_bytes,
        retries=retries or Retries(),
    )
    pipeline = _Pipeline(transfers, concurrency)
    upcoming = iter(requests)
    background = Background()
    try:
        while True:
            batch = background.run(pipeline.step(list(islice(upcoming, pipeline.room))))
            if not batch:
                return
            yield from batch
    finally:
        background.run(pipeline.close())
        background.close()


class _Pipeline:
    """Items in flight and finished, in order; all methods but `room` run on the event loop."""

    def __init__(self, transfers: Transfers, concurrency: int) -> None:
        self._transfers = transfers
        self._concurrency = concurrency
        self._read_ahead = 8 * concurrency
        self._waiting: deque[Download] = deque()
        self._started: deque[asyncio.Task[Downloaded]] = deque()
        self._active = 0
        self._held = 0
        self._outstanding = 0
        self._progress = asyncio.Event()

    @property
    def room(self) -> int:
        """Most requests to pass to the next step; few at a time, as their source may be slow."""
        return min(self._concurrency, self._read_ahead - self._outstanding)

    async def step(self, requests: list[Download]) -> list[Downloaded]:
        """Add requests and return the results that are next in order; empty once all have been returned."""
        self._waiting.extend(requests)
        self._outstanding += len(requests)
        self._start()
        if not self._started:
            return []
        # results are returned in order, so only the first item is waited for
        while not self._started[0].done():
            self._progress.clear()
            await self._progress.wait()
        ready: list[Downloaded] = []
        while self._started and self._started[0].done():
            result = self._started.popleft().result()
            self._held -= len(result.content)
            ready.append(result)
        self._outstanding -= len(ready)
        self._start()
        return ready

    async def close(self) -> None:
        """Cancel the items in flight and close the connections."""
        self._waiting.clear()
        for task in self._started:
            task.cancel()
        await asyncio.gather(*self._started, return_exceptions=True)
        await self._transfers.close()

    def _start(self) -> None:
        while self._waiting and self._active < self._concurrency and self._held < _HELD_BYTES:
            task = asyncio.get_running_loop().create_task(self._transfers.fetch(self._waiting.popleft()))
            task.add_done_callback(self._finished)
            self._started.append(task)
            self._active += 1

    def _finished(self, task: asyncio.Task[Downloaded]) -> None:
        self._active -= 1
        if not task.cancelled() and task.exception() is None:
            self._held += len(task.result().content)
        self._progress.set()
        self._start()
