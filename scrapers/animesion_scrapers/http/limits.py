"""Rate limits: one token bucket per host, shared by all clients of a limiter.

A limiter spaces requests, can pause a host, and stores both on disk, so that a restart does not cause a burst. Clients
decide when to pause a host; `breakers` counts failures.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from weakref import WeakKeyDictionary

from animesion_scrapers.http.host_memory import HostMemory

HEADROOM = 1.05
"""Factor of the interval: requests arrive with jitter, so a slightly lower rate stays below the limit of the host."""

_LEASE = 1.0
"""Seconds of turns stored in advance, so that a fast host costs one write per second rather than one per turn."""

_MOST_HOSTS = 10_000
"""Hosts in memory above which idle ones are dropped; their rows on disk stay."""

_IDLE = 60.0
_LONGEST_HOLD = 86_400.0
"""Longest stored pause in seconds."""


@dataclass(frozen=True, slots=True)
class HostLimit:
    """The limits of a host.

    Attributes:
        requests_per_second: Highest rate.
        connections: Most requests in flight at once.
    """

    requests_per_second: float = 1.0
    connections: int = 1


@dataclass(slots=True)
class _Bucket:
    """A bucket of one token, so that requests never burst. Times are monotonic."""

    interval: float
    due: float = 0.0
    kept_until: float = 0.0
    slowed: bool = False
    held_until: float = 0.0
    threads: threading.Lock = field(default_factory=threading.Lock)
    tasks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = field(default_factory=WeakKeyDictionary)


class RateLimiter:
    """Grants turns per host, first come first served, to threads and asyncio tasks.

    The next turn is timed from when the last one was taken, so a late wake-up never lets two requests follow closely.
    """

    def __init__(
        self,
        requests_per_second: float = 1.0,
        per_host: Mapping[str, float] | None = None,
        memory: Path | None = None,
    ) -> None:
        """Start with all hosts free, except for pauses stored in `memory`.

        Args:
            requests_per_second: Rate of hosts without an entry in `per_host`; `math.inf` for no limit.
            per_host: Rates by host name.
            memory: An SQLite file with the time of each host's next turn. A process started after a kill waits as the
                killed one would have, up to a second longer.

        Raises:
            ValueError: A rate is not above zero.
        """
        self._default = requests_per_second
        self._rates = {host.lower(): rate for host, rate in (per_host or {}).items()}
        for rate in (self._default, *self._rates.values()):
            if not rate > 0:
                raise ValueError(f"A rate must be above zero requests per second, not {rate}.")
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()
        self._memory = HostMemory(memory)
        self._crowd = _MOST_HOSTS

    def close(self) -> None:
        """Close the file; it opens again when needed."""
        self._memory.close()

    def wait(self, host: str) -> None:
        """Block until this caller has a turn on `host`."""
        bucket = self._bucket(host)
        with bucket.threads:
            while (delay := self._take(host, bucket)) > 0:
                time.sleep(delay)

    async def wait_async(self, host: str) -> None:
        """Wait until this task has a turn on `host`, without blocking the event loop."""
        bucket = self._bucket(host)
        with self._lock:
            turns = bucket.tasks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with turns:
            while (delay := self._take(host, bucket)) > 0:
                await asyncio.sleep(delay)

    def take_now(self, host: str) -> bool:
        """Take a turn if one is free and no task of the running event loop waits for it."""
        bucket = self._bucket(host)
        turns = bucket.tasks.get(asyncio.get_running_loop())
        return not (turns and turns.locked()) and self._take(host, bucket) <= 0

    def pause(self, host: str, seconds: float) -> None:
        """Grant no turns on `host` for `seconds`, not even after a restart."""
        bucket = self._bucket(host)
        with self._lock:
            until = time.monotonic() + seconds
            bucket.held_until = max(bucket.held_until, until)
            bucket.due = max(bucket.due, until)
            self._keep(host, bucket, seconds)

    def slow(self, host: str, seconds: float) -> None:
        """Keep turns on `host` at least `seconds` apart; a longer interval stays."""
        bucket = self._bucket(host)
        with self._lock:
            bucket.slowed = bucket.slowed or seconds > bucket.interval
            bucket.interval = max(bucket.interval, seconds)

    def held(self, host: str) -> float:
        """Remaining seconds of a `pause` of `host`, here or in an earlier process; 0 without one."""
        bucket = self._bucket(host)
        with self._lock:
            return max(0.0, bucket.held_until - time.monotonic())

    def interval(self, host: str) -> float:
        """Seconds between two turns of `host`."""
        return self._bucket(host).interval

    def _bucket(self, host: str) -> _Bucket:
        host = host.lower()
        with self._lock:
            bucket = self._buckets.get(host)
            if bucket is None:
                if len(self._buckets) >= self._crowd:
                    self._forget()
                rate = self._rates.get(host, self._default)
                bucket = self._buckets[host] = _Bucket(0.0 if rate == inf else HEADROOM / rate)
                if stored := self._memory.recall(host):
                    left = min(stored[0], _LONGEST_HOLD)
                    # a stored time further ahead than one turn and its lease was a pause
                    bucket.due = bucket.kept_until = time.monotonic() + left
                    bucket.held_until = bucket.due if left > bucket.interval + _LEASE else 0.0
            return bucket

    def _take(self, host: str, bucket: _Bucket) -> float:
        """Take the token and return 0, or return the seconds until the next attempt."""
        with self._lock:
            now = time.monotonic()
            if now < bucket.due:
                return bucket.due - now
            bucket.due = now + bucket.interval
            if bucket.interval:
                # slow hosts are stored per turn, fast ones in advance
                self._keep(host, bucket, bucket.interval, 0.0 if bucket.interval > _LEASE else _LEASE)
            return 0.0

    def _keep(self, host: str, bucket: _Bucket, seconds: float, ahead: float = 0.0) -> None:
        """Store that `host` has no turn for `seconds`, unless a later time is stored already."""
        until = time.monotonic() + seconds
        if self._memory.lasting and until > bucket.kept_until:
            bucket.kept_until = until + ahead
            self._memory.keep(host.lower(), seconds + ahead)

    def _forget(self) -> None:
        """Drop idle hosts from memory."""
        before = time.monotonic() - _IDLE
        self._buckets = {host: each for host, each in self._buckets.items() if each.due > before or each.slowed}
        self._crowd = max(_MOST_HOSTS, 2 * len(self._buckets))
