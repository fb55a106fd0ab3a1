"""How often a host may be asked: one token bucket a host, shared by every client that is given the limiter.

It spaces requests out and can hold a host back for a while. What counts as a reason for that is the clients' business.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from weakref import WeakKeyDictionary

# Requests leave evenly spaced but arrive with jitter; aiming a little low keeps the host's own count under the rate.
HEADROOM = 1.05


@dataclass(slots=True)
class _Bucket:
    """A bucket that holds a single token: requests never leave in a burst."""

    interval: float
    due: float = 0.0
    threads: threading.Lock = field(default_factory=threading.Lock)
    tasks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = field(default_factory=WeakKeyDictionary)


class RateLimiter:
    """Hands out turns per host, first come first served, to threads and to asyncio tasks alike.

    Turns are counted when they are really granted, so a late wake-up never lets two requests leave close together.
    """

    def __init__(self, requests_per_second: float = 1.0, per_host: Mapping[str, float] | None = None) -> None:
        """Start with every host free.

        Args:
            requests_per_second: The rate of any host that is not named in `per_host`; `math.inf` for no limit.
            per_host: Rates of single hosts, by host name.

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

    def wait(self, host: str) -> None:
        """Block until it is this caller's turn to ask `host`."""
        bucket = self._bucket(host)
        with bucket.threads:
            while (delay := self._take(bucket)) > 0:
                time.sleep(delay)

    async def wait_async(self, host: str) -> None:
        """Wait, without blocking the event loop, until it is this caller's turn to ask `host`."""
        bucket = self._bucket(host)
        with self._lock:
            turns = bucket.tasks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with turns:
            while (delay := self._take(bucket)) > 0:
                await asyncio.sleep(delay)

    def pause(self, host: str, seconds: float) -> None:
        """Grant no turn for `host` for this long, to anyone."""
        bucket = self._bucket(host)
        with self._lock:
            bucket.due = max(bucket.due, time.monotonic() + seconds)

    def _bucket(self, host: str) -> _Bucket:
        host = host.lower()
        with self._lock:
            bucket = self._buckets.get(host)
            if bucket is None:
                rate = self._rates.get(host, self._default)
                bucket = self._buckets[host] = _Bucket(0.0 if rate == inf else HEADROOM / rate)
            return bucket

    def _take(self, bucket: _Bucket) -> float:
        """Take the token and return 0, or return how long to wait before asking again."""
        with self._lock:
            now = time.monotonic()
            if now < bucket.due:
                return bucket.due - now
            bucket.due = now + bucket.interval
            return 0.0
