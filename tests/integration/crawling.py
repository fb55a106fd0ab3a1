"""A server of files, and crawls of it, for tests of the crawler over real sockets."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from aiohttp import web

from animesion_sample.faults import LocalServer
from animesion_scrapers import Crawler, Download, Ledger, LedgerEntry, RateLimiter, Retries
from animesion_scrapers.crawl.ledger import DONE

AGENT = "animesion-tests/1.0 (tests@example.org)"
HOST = "cdn.sample-booru.invalid"
QUICK = Retries(attempts=3, base=0.02, cap=3.0)
FREE = float("inf")


def body(number: int) -> bytes:
    """A file with the first bytes of a JPEG, 1 to 9 KB."""
    rng = random.Random(number)
    return b"\xff\xd8\xff\xe0" + rng.randbytes(rng.randrange(1000, 9000))


def application() -> web.Application:
    async def file(request: web.Request) -> web.Response:
        return web.Response(body=body(int(request.match_info["number"])), content_type="image/jpeg")

    app = web.Application()
    app.router.add_get(r"/data/{number:\d+}.jpg", file)
    app.router.add_get(r"/slow/{number:\d+}.jpg", file)
    return app


def wanted(count: int, *, scheme: str = "http", host: str = HOST, folder: str = "data") -> list[Download]:
    return [
        Download(
            f"post-{number}",
            f"{scheme}://{host}/{folder}/{number}.jpg",
            hashlib.md5(body(number)).hexdigest(),
            image=True,
        )
        for number in range(count)
    ]


def crawl(
    server: LocalServer, folder: Path, requests: Sequence[Download], retry_refused: bool = False, **settings: Any
) -> dict[str, LedgerEntry]:
    defaults: dict[str, Any] = {
        "user_agent": AGENT,
        "limiter": RateLimiter(FREE),
        "connect_to": {HOST: server.address},
        "retries": QUICK,
        "deadline": 1.5,
        "stall": 0.4,
        "max_bytes": 200_000,
    }
    with Ledger(folder) as ledger, Crawler(ledger, **(defaults | settings)) as crawler:
        entries = crawler.fetch("part", requests, retry_refused=retry_refused)
        for key, entry in entries.items():
            if entry.state == DONE:
                assert ledger.content(entry) == body(int(key.removeprefix("post-")))
        return entries


def raw(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of the raw tables by key."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("raw/part-?????.parquet")):
        found |= {row["key"]: row for row in pq.read_table(path).to_pylist()}
    return found
