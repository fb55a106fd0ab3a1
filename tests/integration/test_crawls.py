"""Crawls over real sockets: rates and pauses that survive a restart, failing hosts and robots.txt."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from animesion_sample.faults import LocalServer, local_server
from animesion_scrapers import Breakers, Crawler, Download, Ledger, RateLimiter
from animesion_scrapers.crawl.ledger import DONE, FAILED, REFUSED

from .crawling import AGENT, FREE, HOST, application, body, crawl, wanted


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server(application) as running:
        yield running


# -- pace ------------------------------------------------------------------------------------------------------------


def test_the_rate_holds_in_every_second_as_the_server_counts(server: LocalServer, tmp_path: Path) -> None:
    crawl(server, tmp_path, wanted(45), limiter=RateLimiter(20))
    assert server.journal.paths["/robots.txt"] == 1
    assert sum(server.journal.paths.values()) == 47  # with robots.txt and tdmrep.json
    assert 1 < server.journal.busiest_second(HOST) <= 20


def test_connections_are_limited_by_host_and_a_slow_host_delays_no_other(tmp_path: Path) -> None:
    requests = [*wanted(10, host="slow.invalid"), *wanted(40)]
    requests = [Download(f"{i}", each.url, each.md5) for i, each in enumerate(requests)]

    with local_server(application) as server:
        folder = tmp_path / "ledger"
        limiter = RateLimiter(FREE, {"slow.invalid": 8})
        with (
            Ledger(folder) as ledger,
            Crawler(
                ledger,
                user_agent=AGENT,
                limiter=limiter,
                concurrency=6,
                host_connections={"slow.invalid": 1},
                connect_to={HOST: server.address, "slow.invalid": server.address},
            ) as crawler,
        ):
            entries = crawler.fetch("part", requests)
        assert {entry.state for entry in entries.values()} == {DONE}
        times = server.journal.times
    assert max(times[HOST]) < times["slow.invalid"][4]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_the_whole_host_back(tmp_path: Path, form: str) -> None:
    moments: list[float] = []

    def busy() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            if not moments:
                moments.append(time.monotonic())
                after = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
                return web.Response(status=429, headers={"Retry-After": after})
            return web.Response(body=body(int(request.match_info["number"])))

        app = web.Application()
        app.router.add_get(r"/data/{number:\d+}.jpg", file)
        return app

    with local_server(busy) as server:
        limiter = RateLimiter(1000)  # in turn, so that what was in flight at the time is little
        entries = crawl(server, tmp_path, wanted(30), limiter=limiter, per_host=1)
        times = server.journal.times[HOST]
    assert {entry.state for entry in entries.values()} == {DONE}
    assert not [moment for moment in times if moments[0] < moment < moments[0] + 0.95]


def test_a_host_that_wants_a_long_pause_is_left_alone_and_a_restart_knows(tmp_path: Path) -> None:
    def closed() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            return web.Response(status=503, headers={"Retry-After": "3600"})

        app = web.Application()
        app.router.add_get(r"/data/{number:\d+}.jpg", file)
        return app

    with local_server(closed) as server:
        memory = tmp_path / "hosts.sqlite"
        settings: dict[str, Any] = {"limiter": RateLimiter(1000, memory=memory), "per_host": 1, "opt_outs": False}
        first = crawl(server, tmp_path, wanted(50), **settings)
        asked = sum(server.journal.paths.values())
        settings["limiter"] = RateLimiter(1000, memory=memory)
        second = crawl(server, tmp_path, wanted(50), **settings)
        assert sum(server.journal.paths.values()) == asked == 2  # robots.txt and one file
    assert {entry.state for entry in {**first, **second}.values()} == {FAILED}
    details = {entry.detail for entry in first.values()}
    assert details == {
        "HTTP 503 Service Unavailable",
        "the host asked for a longer pause than a run waits",
    }


def test_the_pace_survives_a_restart(server: LocalServer, tmp_path: Path) -> None:
    memory = tmp_path / "hosts.sqlite"
    for run in range(4):
        limiter = RateLimiter(4, memory=memory)
        crawl(server, tmp_path / f"run-{run}", wanted(3), limiter=limiter, robots=False, opt_outs=False)
    assert len(server.journal.times[HOST]) == 12
    assert server.journal.busiest_second(HOST) <= 4


# -- hosts that fail -------------------------------------------------------------------------------------------------


def test_a_failing_host_is_left_alone_then_probed_and_used_again(tmp_path: Path) -> None:
    well_at: list[float] = []

    def recovering() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            if not well_at:
                well_at.append(time.monotonic() + 1.0)
            if time.monotonic() < well_at[0]:
                return web.Response(status=500)
            return web.Response(body=body(int(request.match_info["number"])))

        app = web.Application()
        app.router.add_get(r"/data/{number:\d+}.jpg", file)
        return app

    breakers = Breakers(failures=5, cooldown=0.3, longest_cooldown=0.6)
    with local_server(recovering) as server:
        entries = crawl(server, tmp_path, wanted(60), breakers=breakers, deadline=10.0)
        failing = sum(moment < well_at[0] for moment in server.journal.times[HOST])
    assert breakers.opened() == {HOST: 1}
    assert breakers.state(HOST) == "closed"
    # Without a breaker there would be hundreds in that second.
    assert failing < 25
    assert sum(entry.state == DONE for entry in entries.values()) > 50


def test_a_host_that_stays_down_is_given_up_so_that_the_run_ends(tmp_path: Path) -> None:
    def down() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            return web.Response(status=500)

        app = web.Application()
        app.router.add_get(r"/data/{number:\d+}.jpg", file)
        return app

    seen: list[Any] = []
    with local_server(down) as server:
        breakers = Breakers(failures=5, cooldown=0.05, longest_cooldown=0.1, probes=3)
        entries = crawl(server, tmp_path, wanted(500), breakers=breakers, watch=seen.append)
        assert sum(server.journal.paths.values()) < 60
    assert {entry.state for entry in entries.values()} == {FAILED}
    assert seen[-1].hosts == {HOST: "given up"}
    assert seen[-1].circuits_opened == {HOST: 1}
    assert (seen[-1].finished, seen[-1].left) == (500, 0)


# -- robots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 302, 404, 503])
def test_robots_txt_is_obeyed_read_once_and_remembered(tmp_path: Path, status: int) -> None:
    def picky() -> web.Application:
        async def rules(request: web.Request) -> web.Response:
            if status == 302:
                raise web.HTTPFound("/rules")
            return web.Response(text="User-agent: *\nDisallow: /data/1", status=status)

        async def moved(request: web.Request) -> web.Response:
            return web.Response(text="User-agent: *\nDisallow: /data/1")

        app = application()
        app.router.add_get("/robots.txt", rules)
        app.router.add_get("/rules", moved)
        return app

    with local_server(picky) as server:
        memory = tmp_path / "robots.sqlite"
        first = crawl(server, tmp_path / "a", wanted(20), robots=memory)
        crawl(server, tmp_path / "b", wanted(20), robots=memory)
        asked = server.journal.paths
        ignored = crawl(server, tmp_path / "c", wanted(20), robots=False)
    states = [entry.state for entry in first.values()]
    if status == 503:
        assert {(entry.state, entry.detail) for entry in first.values()} == {(FAILED, "robots.txt could not be read")}
    elif status == 404:
        assert states == [DONE] * 20
    else:
        assert [key for key, entry in first.items() if entry.state == REFUSED] == [
            f"post-{number}" for number in range(20) if str(number).startswith("1")
        ]
        assert first["post-1"].detail == "disallowed by robots.txt"
    assert asked["/robots.txt"] == (6 if status == 503 else 1)
    assert {entry.state for entry in ignored.values()} == {DONE}


# -- what the ledger does for a second run ---------------------------------------------------------------------------


def test_refused_files_are_requested_again_only_on_request(server: LocalServer, tmp_path: Path) -> None:
    [request] = wanted(1)
    gone = [Download("post-0", f"{request.url}?fault=404", request.md5)]
    [first] = crawl(server, tmp_path, gone).values()
    crawl(server, tmp_path, gone)
    assert server.journal.paths["/data/0.jpg"] == 1
    [entry] = crawl(server, tmp_path, gone, retry_refused=True).values()
    assert server.journal.paths["/data/0.jpg"] == 2
    assert (first.attempts, entry.attempts) == (1, 2)
    # Another address for the same image is another request.
    [entry] = crawl(server, tmp_path, [Download("post-0", request.url, request.md5)]).values()
    assert entry.state == DONE


def test_a_spool_that_was_cut_is_noticed_and_fetched_again(server: LocalServer, tmp_path: Path) -> None:
    crawl(server, tmp_path, wanted(5))
    [spool] = tmp_path.glob("*.spool")
    os.truncate(spool, spool.stat().st_size - 10)
    entries = crawl(server, tmp_path, wanted(5))
    assert {entry.state for entry in entries.values()} == {DONE}
    assert sorted(server.journal.paths.values()) == [1, 1, 1, 1, 2, 2, 2]  # robots.txt and tdmrep.json twice: not kept


def test_an_interrupt_keeps_downloaded_files(server: LocalServer, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def enough(status: Any) -> None:
        if status.finished >= 5:
            raise EnoughError

    with pytest.raises(EnoughError):
        crawl(server, tmp_path, wanted(500), limiter=RateLimiter(40), watch=enough)
    with Ledger(tmp_path) as ledger:
        counts = ledger.counts()
    assert counts[DONE] >= 5
    assert counts[DONE] + counts["planned"] == 500


def test_a_full_disk_ends_a_crawl_and_the_next_one_gets_the_rest(server: LocalServer, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            crawl(server, tmp_path, wanted(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with Ledger(tmp_path) as ledger:
        had = ledger.counts()[DONE]
    assert 30 < had < 100
    asked = sum(server.journal.paths.values())
    entries = crawl(server, tmp_path, wanted(100))
    assert {entry.state for entry in entries.values()} == {DONE}
    assert sum(server.journal.paths.values()) - asked == 100 - had + 2  # robots.txt and tdmrep.json were not kept
