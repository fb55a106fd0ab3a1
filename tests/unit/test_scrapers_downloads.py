"""The bulk downloader against a faulty HTTP server on loopback."""

import asyncio
import hashlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from animesion_scrapers import (
    REASONS,
    Download,
    Downloaded,
    RateLimiter,
    Retries,
    ScraperError,
    UnsafeAddressError,
    download,
    download_all,
)
from animesion_scrapers.http.addresses import Routes, is_public
from animesion_scrapers.http.sessions import open_session

AGENT = "animesion-tests/1.0 (tests@example.org)"
HOST = "cdn.sample-booru.invalid"
QUICK = Retries(attempts=3, base=0.02, cap=1.5)
BODY = bytes(range(256)) * 40
MD5 = hashlib.md5(BODY).hexdigest()


class Server:
    """`aiohttp.web` on a thread of its own; counts requests and remembers when they came and for which host."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.times: list[float] = []
        self.hosts: set[str] = set()
        self.agents: set[str] = set()
        self.now = self.most = 0
        self.stop = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(self.serve(ready)), daemon=True)
        self.thread.start()
        assert ready.wait(10)

    async def serve(self, ready: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/{name:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address: tuple[str, int] = ("127.0.0.1", runner.addresses[0][1])
        ready.set()
        await self.stop.wait()
        await runner.cleanup()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)
        self.loop.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.times.append(time.monotonic())
        self.counts[request.path] += 1
        self.hosts.add(request.host)
        self.agents.add(request.headers["User-Agent"])
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self.answer(request)
        finally:
            self.now -= 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        kind, _, rest = request.path[1:].partition("/")
        first = self.counts[request.path] == 1
        match kind:
            case "ok":
                return web.Response(body=BODY)
            case "later":
                await asyncio.sleep(float(rest.partition("-")[2]))
                return web.Response(body=rest.partition("-")[0].encode())
            case "status":
                return web.Response(status=int(rest), body=b"no")
            case "flaky" if first:
                return web.Response(status=503)
            case "busy" if first:
                return web.Response(status=429, headers={"Retry-After": "1"})
            case "busy-for-long":
                return web.Response(status=429, headers={"Retry-After": "3600"})
            case "flaky" | "busy":
                return web.Response(body=BODY)
            case "challenge" | "challenge-gzip" | "challenge-noindex":
                page = b"<html><title>Checking your browser</title></html>"
                headers = {
                    "challenge-gzip": {"Content-Encoding": "gzip"},
                    "challenge-noindex": {"X-Robots-Tag": "none"},
                }
                return web.Response(body=page, content_type="text/html", headers=headers.get(kind))
            case "challenge-div":
                return web.Response(body=b"<div>Checking your browser</div>", content_type="text/html")
            case "challenge-later":
                return web.Response(
                    body=b"<html>Just a moment", content_type="text/html", headers={"Retry-After": "3600"}
                )
            case "to":
                raise web.HTTPFound(request.query["url"])
            case "loop":
                raise web.HTTPMovedPermanently(f"/loop/{rest}x")
            case "stall-silent":
                await asyncio.sleep(60)
        response = web.StreamResponse()
        if kind in ("torn", "torn-once", "lie-long"):
            response.content_length = len(BODY) + 1000
        elif kind == "lie-short":
            response.content_length = 10
        await response.prepare(request)
        try:
            if kind == "empty":
                pass
            elif kind in ("torn", "lie-long") or (kind == "torn-once" and first):
                await response.write(BODY if kind == "lie-long" else BODY[:2000])
                assert request.transport
                (request.transport.close if kind == "lie-long" else request.transport.abort)()
            elif kind == "torn-once":
                await response.write(BODY + b"x" * 1000)
            elif kind == "lie-short":
                assert request.transport
                request.transport.write(BODY)
            elif kind == "endless":
                while True:
                    await response.write(b"x" * 65536)
            elif kind == "drip":
                while True:
                    await response.write(b"x")
                    await asyncio.sleep(0.01)
            elif kind == "stall":
                await response.write(BODY[:100])
                await asyncio.sleep(60)
        except ConnectionError:
            pass
        return response


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def fetch(server: Server, requests: Any, **settings: Any) -> list[Downloaded]:
    defaults: dict[str, Any] = {
        "user_agent": AGENT,
        "limiter": RateLimiter(float("inf")),
        "connect_to": {HOST: server.address},
        "retries": QUICK,
        "deadline": 5.0,
    }
    return list(download_all(requests, **(defaults | settings)))


def fetch_one(server: Server, path: str, md5: str = "", **settings: Any) -> Downloaded:
    (result,) = fetch(server, [Download("k", f"http://{HOST}/{path}", md5)], **settings)
    assert (result.key, result.url) == ("k", f"http://{HOST}/{path}")
    assert result.status == "ok" or result.status in REASONS
    assert str(server.address[1]) not in result.detail
    assert "0x" not in result.detail
    assert (result.content == b"") == (result.status != "ok")
    return result


def test_a_file(server: Server) -> None:
    due = Downloaded("k", f"http://{HOST}/ok", "ok", "", BODY, False, 1, f"md5:{MD5}")
    assert fetch_one(server, "ok", MD5.upper()) == due
    assert fetch_one(server, "ok").content == BODY
    assert server.hosts == {HOST}
    assert server.agents == {AGENT}


@pytest.mark.parametrize(
    ("path", "status", "detail", "asked"),
    [
        ("status/404", "not found", "HTTP 404 Not Found", 1),
        ("status/410", "not found", "HTTP 410 Gone", 1),
        ("status/451", "not found", "HTTP 451 Unavailable For Legal Reasons", 1),
        ("status/401", "refused", "HTTP 401 Unauthorized", 1),
        ("status/403", "refused", "HTTP 403 Forbidden", 1),
        ("status/400", "fetch failed", "HTTP 400 Bad Request", 1),
        ("status/500", "fetch failed", "HTTP 500 Internal Server Error", 3),
        ("status/503", "fetch failed", "HTTP 503 Service Unavailable", 3),
        ("status/599", "fetch failed", "HTTP 599", 1),
        ("status/206", "fetch failed", "HTTP 206 Partial Content", 1),
        ("empty", "empty file", "the body has 0 bytes", 2),
        ("torn", "fetch failed", "the connection broke off", 3),
        ("busy-for-long", "fetch failed", "HTTP 429 Too Many Requests", 1),
    ],
)
def test_faults_have_stable_reasons(server: Server, path: str, status: str, detail: str, asked: int) -> None:
    retries = Retries(attempts=3, base=0.02, cap=60)
    result = fetch_one(server, path, MD5, retries=retries)
    assert (result.status, result.detail) == (status, detail)
    assert server.counts[f"/{path}"] == asked


@pytest.mark.parametrize("path", ["flaky", "busy", "torn-once"])
def test_passing_faults_are_retried(server: Server, path: str) -> None:
    assert fetch_one(server, path).status == "ok"
    assert server.counts[f"/{path}"] == 2
    if path == "busy":
        assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize("path", ["drip", "stall", "stall-silent"])
def test_slow_servers_meet_the_deadline(server: Server, path: str) -> None:
    start = time.monotonic()
    result = fetch_one(server, path, deadline=0.4)
    assert (result.status, result.detail) == ("timed out", "no complete answer within the deadline")
    assert time.monotonic() - start < 3


def test_wrong_md5_and_wrong_size(server: Server) -> None:
    result = fetch_one(server, "ok", "0" * 32)
    assert (result.status, result.detail) == ("checksum mismatch", f"the MD5 is {MD5}")
    requests = [Download("a", f"http://{HOST}/ok", bytes=5), Download("b", f"http://{HOST}/ok", MD5, bytes=5)]
    wrong, right = fetch(server, requests)
    assert (result.final, result.attempts) == (True, 2)
    assert (wrong.status, wrong.detail) == ("checksum mismatch", f"{len(BODY)} bytes instead of 5")
    assert right.status == "ok"


def test_sha1_is_checked_too(server: Server) -> None:
    sha1 = hashlib.sha1(BODY).hexdigest()
    url = f"http://{HOST}/ok"
    good, bad = fetch(server, [Download("a", url, sha1=sha1.upper()), Download("b", url, MD5, sha1="0" * 40)])
    assert good.status == "ok"
    assert (bad.status, bad.detail) == ("checksum mismatch", f"the SHA-1 is {sha1}")


def test_passwords_in_urls_are_not_sent(server: Server) -> None:
    (result,) = fetch(server, [Download("k", f"http://me:secret@{HOST}/ok")])
    assert (result.status, result.final) == ("unsafe address", True)
    assert not server.counts


def test_endless_bodies_are_cut_off(server: Server) -> None:
    result = fetch_one(server, "endless", max_bytes=1_000_000)
    assert (result.status, result.detail) == ("too many bytes", "more than 1000000 bytes")


def test_false_content_lengths(server: Server) -> None:
    assert fetch_one(server, "lie-long", MD5).status == "ok"
    assert fetch_one(server, "lie-long").status == "fetch failed"
    # Which of the two depends on whether the surplus bytes come in the same packet.
    assert fetch_one(server, "lie-short", MD5).status in ("checksum mismatch", "fetch failed")


def test_surplus_bytes_do_not_spoil_the_next_file(server: Server) -> None:
    requests = [Download(f"{i}", f"http://{HOST}/{'ok' if i % 2 else 'lie-short'}", MD5) for i in range(20)]
    results = fetch(server, requests, concurrency=1, retries=Retries(attempts=4, base=0.01))
    assert [r.status == "ok" for r in results] == [bool(i % 2) for i in range(20)]


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("file:///etc/passwd", "only http and https are fetched, not file"),
        ("ftp://example.org/a.jpg", "only http and https are fetched, not ftp"),
        ("", "only http and https are fetched, not a URL without a scheme"),
        ("no scheme at all", "only http and https are fetched, not a URL without a scheme"),
        ("http://", "the URL names no host"),
        ("http://[::1", "the URL is malformed"),
        ("http://exa mple.org:port/", "the URL is malformed"),
        ("http://127.0.0.1/", "the host is not on the public internet"),
        ("http://[::1]/", "the host is not on the public internet"),
        ("http://localhost/", "the host is not on the public internet"),
        ("http://169.254.169.254/", "the host is not on the public internet"),
    ],
)
def test_unsafe_addresses_also_after_a_redirect(server: Server, url: str, detail: str) -> None:
    (direct,) = fetch(server, [Download("k", url)])
    assert (direct.status, direct.detail) == ("unsafe address", detail)
    if ":" in url and not url.endswith(("//", "port/", "[::1")):
        result = fetch_one(server, f"to/?url={url}")
        assert (result.status, result.detail) == ("unsafe address", detail)
    assert server.counts["/etc/passwd"] == 0


@pytest.mark.parametrize(
    "host",
    [
        *("2130706433", "127.1", "127.0.1", "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "017700000001", "0", "00", "0.0"),
        *("127.0.0.1.", "127.1.", "2130706433.", "127.000.000.001", "4294967295.1", "127.65530.1", "0x", "1.0X7F"),
        *("127.0.0.1%00", "foo%40127.0.0.1", "[::1%25lo]", "[fe80::1%25eth0]", "[64:ff9b::127.0.0.1%25lo]"),
        *("[::127.0.0.1]", "127。0。0。1", "１２７.０.０.１", "⑫7.0.0.1", "[::ffff:7f00:1]", "0.0.0.0", "[::]"),
    ],
)
def test_no_spelling_of_loopback_is_requested(server: Server, host: str) -> None:
    (result,) = fetch(server, [Download("k", f"http://{host}:{server.address[1]}/ok")])
    assert result.status == "unsafe address"
    assert not server.counts
    # by a check of our own: some releases of aiohttp pass these hosts to the system, which reads them as addresses
    with pytest.raises(UnsafeAddressError, match="the host is n"):
        Routes().check("http", URL(f"http://{host}/").raw_host, 80)


def test_addresses_are_checked_again_at_the_socket() -> None:
    async def errors() -> list[str]:
        found = []
        async with open_session("test/1 (me@example.org)", Routes(), connections=1, stall=5) as session:
            for host in ("127.0.0.1", "[::1]", "localhost"):
                try:
                    await session.get(f"http://{host}:9/")
                except UnsafeAddressError as error:
                    found.append(str(error))
        return found

    assert asyncio.run(errors()) == ["the host is not on the public internet"] * 3


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:192.168.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
        ("somewhere", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_redirects(server: Server) -> None:
    assert fetch_one(server, "to/?url=/ok", MD5).status == "ok"
    result = fetch_one(server, "loop/")
    assert (result.status, result.detail) == ("fetch failed", "redirected more than 5 times")


def test_private_addresses_with_permission(server: Server) -> None:
    url = f"http://127.0.0.1:{server.address[1]}/ok"
    (result,) = fetch(server, [Download("k", url)], allow_private=True)
    assert result.status == "ok"


@pytest.mark.parametrize("path", ["challenge", "challenge-noindex", "challenge-div", "challenge-gzip"])
@pytest.mark.parametrize("image", [True, False])
def test_a_challenge_in_place_of_a_known_file_is_requested_again(server: Server, path: str, image: bool) -> None:
    (result,) = fetch(server, [Download("k", f"http://{HOST}/{path}", MD5, image=image)])
    assert (result.status, result.final) == ("fetch failed", False)
    if path != "challenge-gzip":
        assert result.detail == "an HTML challenge page instead of the file"
        assert result.attempts == 3


def test_a_challenge_that_asks_for_a_long_pause_ends_the_requests_to_its_host(server: Server) -> None:
    results = fetch(server, [Download(f"{i}", f"http://{HOST}/challenge-later", MD5) for i in range(3)], concurrency=1)
    assert {(result.status, result.final) for result in results} == {("fetch failed", False)}
    assert server.counts["/challenge-later"] == 1


def test_named_private_hosts_and_no_others(server: Server) -> None:
    port = server.address[1]
    other = Server()
    try:
        for host in ("127.0.0.1", "localhost"):
            named = {"allow_private": [f"{host.upper()}:{port}"], "connect_to": {}}
            (result,) = fetch(server, [Download("k", f"http://{host}:{port}/ok", MD5)], **named)
            assert result.status == "ok"
            refused = [
                f"http://{host}:{other.address[1]}/ok",
                f"http://{host}:{port}/to/?url=http://{host}:{other.address[1]}/ok",
                f"http://{host}:{port}/to/?url=http://169.254.169.254/ok",
                f"http://{host}:{port}/to/?url=http://{'localhost' if host[0] == '1' else '127.0.0.1'}:{port}/ok",
                f"http://[::ffff:127.0.0.1]:{port}/ok",
                f"http://[::1]:{port}/ok",
            ]
            for result in fetch(server, [Download(url, url) for url in refused], **named):
                assert (result.status, result.detail) == ("unsafe address", "the host is not on the public internet")
        assert not other.counts
    finally:
        other.close()


def test_a_named_host_at_another_address(server: Server) -> None:
    named = [f"booru.lan:80:127.0.0.1:{server.address[1]}"]
    ok, other_port = fetch(
        server,
        [Download("a", "http://Booru.lan/ok", MD5), Download("b", "http://booru.lan:81/ok")],
        allow_private=named,
        connect_to={},
        retries=Retries(attempts=1),
    )
    assert ok.status == "ok"
    assert (other_port.status, other_port.detail) == ("fetch failed", "the host name was not found")
    assert server.hosts == {"booru.lan"}


@pytest.mark.parametrize("resolved", [["10.0.0.7"], ["10.0.0.7", "93.184.216.34"]])
def test_names_resolve_to_private_addresses_only_where_named(
    resolved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in resolved]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **settings: answers)
    routes = Routes(allow_private=["booru.lan:8080"])
    assert [address for address, _ in routes.resolve("Booru.Lan", 8080)] == resolved
    for host, port in (("booru.lan", 80), ("evil.example", 8080), ("evil.booru.lan", 8080)):
        if len(resolved) == 1:
            with pytest.raises(UnsafeAddressError):
                routes.resolve(host, port)
        else:
            assert routes.resolve(host, port) == [("93.184.216.34", port)]


@pytest.mark.parametrize(
    "entry",
    ["", "booru.lan", "booru.lan:", "booru.lan:0", "booru.lan:65536", "http://booru.lan:80", "booru.lan:80/x", "::1:80",
     "a:80:b", "127.0.0.1:80:10.0.0.1:80", "me@booru.lan:80", "*:80:", "127.1:80", "2130706433:80"],
)  # fmt: skip
def test_malformed_private_hosts(entry: str) -> None:
    with pytest.raises(ScraperError, match="allow_private"):
        Routes(allow_private=[entry])


def test_unreachable_and_unknown_hosts(server: Server) -> None:
    unknown = [Download("a", "http://no-such-host.invalid/a.jpg")]
    (result,) = fetch(server, unknown)
    assert (result.status, result.detail) == ("fetch failed", "the host name was not found")
    (result,) = fetch(server, unknown, connect_to={"no-such-host.invalid": ("127.0.0.1", 1)})
    assert (result.status, result.detail) == ("fetch failed", "no connection could be made")


def test_results_keep_the_order_of_requests(server: Server) -> None:
    chance = random.Random(7)
    paths = [f"later/{i}-{chance.random() / 10:.3f}" if i % 5 else "status/404" for i in range(300)]
    requests = [Download(str(i), f"http://{HOST}/{path}") for i, path in enumerate(paths)]
    results = fetch(server, requests, per_host=16)
    assert [r.key for r in results] == [str(i) for i in range(300)]
    assert all(r.content == (r.key.encode() if int(r.key) % 5 else b"") for r in results)


def test_connections_to_a_host_are_limited(server: Server) -> None:
    fetch(server, [Download(str(i), f"http://{HOST}/later/{i}-0.02") for i in range(40)], per_host=3)
    assert server.most == 3


def test_requests_are_read_only_a_little_ahead(server: Server) -> None:
    taken = []

    def endless() -> Iterator[Download]:
        for i in range(10**9):
            taken.append(threading.current_thread())
            yield Download(str(i), f"http://{HOST}/ok")

    results = download_all(
        endless(), user_agent=AGENT, requests_per_second=1e9, connect_to={HOST: server.address}, concurrency=4
    )
    assert next(results).key == "0"
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 40
    assert set(taken) == {threading.current_thread()}
    assert not [thread for thread in threading.enumerate() if thread.name == "downloads"]


def test_downloads_go_on_while_the_caller_is_busy(server: Server) -> None:
    requests = [Download(str(i), f"http://{HOST}/later/{i}-0.05") for i in range(4)]
    for result in download_all(
        requests,
        user_agent=AGENT,
        requests_per_second=1000,
        connect_to={HOST: server.address},
        concurrency=2,
        deadline=0.5,
    ):
        assert result.status == "ok"
        time.sleep(0.3)


def test_a_fault_in_the_callers_iterable_reaches_the_caller(server: Server) -> None:
    def broken() -> Iterator[Download]:
        yield Download("a", f"http://{HOST}/ok")
        raise ScraperError("the crawl ended early")

    with pytest.raises(ScraperError, match="ended early"):
        fetch(server, broken())
    assert fetch(server, []) == []


def test_the_asynchronous_door(server: Server) -> None:
    async def collect() -> list[Downloaded]:
        stream: AsyncIterator[Downloaded] = download(
            [Download(str(i), f"http://{HOST}/later/{i}-{0.1 - i / 100:.3f}") for i in range(10)],
            user_agent=AGENT,
            requests_per_second=1000,
            connect_to={HOST: server.address},
        )
        return [result async for result in stream]

    assert [r.content for r in asyncio.run(collect())] == [str(i).encode() for i in range(10)]


def test_the_rate_holds_in_every_second_and_queues_do_not_time_out(server: Server) -> None:
    requests = [Download(str(i), f"http://{HOST}/ok") for i in range(35)]
    results = fetch(server, requests, limiter=None, requests_per_second=20, deadline=0.5)
    assert [r.status for r in results] == ["ok"] * 35
    assert all(sum(start <= t < start + 1 for t in server.times) <= 20 for start in server.times)


def test_one_busy_answer_pauses_the_whole_host(server: Server) -> None:
    paths = ["busy", *["ok"] * 5]
    results = fetch(server, [Download(p, f"http://{HOST}/{p}") for p in paths], limiter=None, requests_per_second=50)
    assert {r.status for r in results} == {"ok"}
    assert sum(t < server.times[0] + 0.9 for t in server.times) < 4


def test_user_agents_without_a_contact_are_refused(server: Server) -> None:
    with pytest.raises(ScraperError, match="User-Agent must"):
        fetch(server, [], user_agent="")
