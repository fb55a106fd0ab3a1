"""The Danbooru crawler and its metadata client, against real HTTP servers on loopback."""

import base64
import gzip
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from animesion_scrapers import (
    Breakers,
    Danbooru,
    HostDownError,
    RateLimiter,
    Retries,
    ScraperError,
    StatusError,
    UnsafeAddressError,
)
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.limits import HEADROOM
from animesion_scrapers.http.metadata import MetadataClient
from animesion_scrapers.http.retries import asked_pause

AGENT = "animesion-tests/1.0 (tests@example.org)"
HOST = "sample-booru.invalid"
QUICK = Retries(attempts=3, base=0.02, cap=3.0)


class Site:
    """A server whose answers a test writes as a function of the query; remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.times: list[float] = []
        self.answer: Callable[[str, dict[str, str]], Any] = lambda path, query: []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.times.append(time.monotonic())
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                site.seen.append((parts.path, query, dict(self.headers)))
                answer = site.answer(parts.path, query)
                if callable(answer):
                    answer(self)
                    return
                status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = ("127.0.0.1", self.server.server_port)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def booru(site: Site) -> Iterator[Danbooru]:
    with open_booru(site) as booru:
        yield booru


def open_booru(site: Site, **settings: Any) -> Danbooru:
    defaults: dict[str, Any] = {
        "user_agent": AGENT,
        "requests_per_second": 1000,
        "connect_to": {HOST: site.address},
        "retries": QUICK,
        "timeout": 5,
    }
    return Danbooru(f"http://{HOST}", **(defaults | settings))


def post(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_url": f"http://{HOST}/data/{number}.jpg", "md5": f"{number:032x}", **fields}


def paged(ids: list[int], size: int) -> Callable[[str, dict[str, str]], Any]:
    def answer(path: str, query: dict[str, str]) -> Any:
        below = int(query["page"][1:]) if "page" in query else max(ids) + 1
        return [post(number) for number in sorted((i for i in ids if i < below), reverse=True)[:size]]

    return answer


def test_pages_run_down_by_smallest_id_until_an_empty_one(site: Site, booru: Danbooru) -> None:
    site.answer = paged(list(range(1, 8)), 3)
    assert [p.id for p in booru.posts("solo rating:g")] == ["7", "6", "5", "4", "3", "2", "1"]
    assert [query.get("page") for _, query, _ in site.seen] == [None, "b5", "b2", "b1"]
    path, query, headers = site.seen[0]
    assert (path, query) == ("/posts.json", {"tags": "solo rating:g", "limit": "200"})
    assert headers["User-Agent"] == AGENT
    assert headers["Host"] == HOST
    assert "Authorization" not in headers


def test_limit_stops_early_and_asks_for_no_more(site: Site, booru: Danbooru) -> None:
    site.answer = paged(list(range(1, 8)), 3)
    assert [p.id for p in booru.posts(limit=3)] == ["7", "6", "5"]
    assert len(site.seen) == 1
    assert list(booru.posts(limit=0)) == []
    assert len(site.seen) == 1


def test_duplicates_within_and_across_pages_are_listed_once(site: Site, booru: Danbooru) -> None:
    pages = iter([[9, 8, 8], [9, 8, 7], [6, 7, 5], []])
    site.answer = lambda path, query: [post(i) for i in next(pages)]
    assert [p.id for p in booru.posts()] == ["9", "8", "7", "6", "5"]


def test_a_site_that_ignores_the_page_does_not_loop(site: Site, booru: Danbooru) -> None:
    site.answer = lambda path, query: [post(2), post(1)]
    found: list[str] = []
    with pytest.raises(ScraperError, match=r"page below post 1 with posts that it had already sent\.$"):
        found.extend(p.id for p in booru.posts())
    assert len(site.seen) == 2


def test_posts_by_id_are_batched_ordered_and_unique(site: Site, booru: Danbooru) -> None:
    def answer(path: str, query: dict[str, str]) -> Any:
        ids = [int(i) for i in query["tags"].removeprefix("id:").split(",")]
        return [post(i) for i in sorted(ids, reverse=True) if i != 13]

    site.answer = answer
    wanted: list[int | str] = [5, "3", 13, 5, *range(100, 250)]
    assert [int(p.id) for p in booru.posts_by_id(wanted)] == [5, 3, *range(100, 250)]
    assert [len(query["tags"].split(",")) for _, query, _ in site.seen] == [100, 53]
    with pytest.raises(ScraperError, match="positive integer, not 'x1'"):
        list(booru.posts_by_id(["x1"]))


@pytest.mark.parametrize(
    "tags",
    ["hatsune_miku solo rating:g -status:deleted id:<5", "(saber_(fate) or rin)", "-rating:e ~a ~b", 'source:"a b" c'],
)
def test_searches_within_the_tag_limit(site: Site, booru: Danbooru, tags: str) -> None:
    assert list(booru.posts(tags)) == []


@pytest.mark.parametrize("tags", ["a b c", "a b user:x", "a b order:score", "order:score"])
def test_searches_that_the_site_would_refuse_are_not_sent(site: Site, booru: Danbooru, tags: str) -> None:
    with pytest.raises(ScraperError, match=r"allows 2 tags in a search|must not contain order:score"):
        booru.posts(tags)
    assert not site.seen


def test_every_field(site: Site, booru: Danbooru) -> None:
    entry = {
        "id": 1796291,
        "created_at": "2014-09-15T19:27:31.639-04:00",
        "source": "https://i.pximg.net/1_p0.jpg",
        "md5": "0123456789ABCDEF0123456789abcdef",
        "rating": "s",
        "image_width": 640,
        "image_height": 480,
        "file_ext": "jpg",
        "file_size": 12345,
        "parent_id": 7,
        "pixiv_id": 99,
        "is_pending": False,
        "is_flagged": True,
        "is_deleted": True,
        "is_banned": False,
        "tag_string_general": "1girl solo",
        "tag_string_artist": "someone",
        "tag_string_character": "hatsune_miku",
        "tag_string_copyright": "vocaloid",
        "tag_string_meta": "",
        "file_url": "/data/01/23/0123.jpg",
    }
    site.answer = lambda path, query: [] if "page" in query else [entry]
    (found,) = booru.posts()
    assert found.page_url == f"http://{HOST}/posts/1796291"
    assert found.file_url == f"http://{HOST}/data/01/23/0123.jpg"
    assert (found.id, found.site, found.md5) == ("1796291", "danbooru", "0123456789abcdef0123456789abcdef")
    assert (found.width, found.height, found.bytes, found.extension) == (640, 480, 12345, "jpg")
    assert (found.parent_id, found.pixiv_id, found.rating, found.author) == ("7", "99", "s", "someone")
    assert found.tags == {
        "general": ("1girl", "solo"),
        "artist": ("someone",),
        "character": ("hatsune_miku",),
        "copyright": ("vocaloid",),
        "meta": (),
    }
    assert found.flags == ("deleted", "flagged")
    assert found.created_at == entry["created_at"]


def test_missing_keys_and_malformed_values_are_empty(site: Site, booru: Danbooru) -> None:
    nonsense = {
        "id": 1,
        "md5": "zz",
        "image_width": -5,
        "image_height": "480",
        "file_size": 1 << 70,
        "file_ext": "../sh",
        "rating": "x",
        "source": "\ud800",
        "tag_string_general": 5,
        "created_at": "yesterday",
        "parent_id": True,
        "file_url": None,
        "is_deleted": "yes",
    }
    site.answer = lambda path, query: [] if "page" in query else [{"id": 2}, nonsense]
    hidden, odd = booru.posts()
    for found in (hidden, odd):
        assert (found.file_url, found.md5, found.extension, found.rating, found.source) == ("", "", "", "", "")
        assert (found.width, found.height, found.bytes, found.parent_id, found.created_at) == (0, 0, 0, "", "")
        assert found.flags == ()
        assert set(found.tags) == {"general", "artist", "character", "copyright", "meta"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"success": True}, "other than a list of posts"),
        ([1], "other than a post"),
        ([{"md5": "x"}], "without a valid id"),
        ([{"id": "5"}], "without a valid id"),
        ([{"id": True}], "without a valid id"),
        (b"[" * 100_000, "not JSON"),
        (b'[{"id": 1}', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_hostile_documents_are_one_sentence(site: Site, booru: Danbooru, document: Any, message: str) -> None:
    site.answer = lambda path, query: document
    with pytest.raises(ScraperError, match=message) as caught:
        list(booru.posts())
    assert str(caught.value).startswith(HOST)
    assert str(site.address[1]) not in str(caught.value)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(site: Site, booru: Danbooru, form: str) -> None:
    answers = iter([429, 200, 200])

    def answer(path: str, query: dict[str, str]) -> Any:
        if next(answers) == 429:
            when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
            return 429, {"Retry-After": "1" if form == "seconds" else when}, {"success": False}
        return [] if "page" in query else [post(1)]

    site.answer = answer
    assert [p.id for p in booru.posts()] == ["1"]
    assert site.times[1] - site.times[0] >= 0.9


def test_retry_after_nonsense_is_ignored() -> None:
    texts = ("", "soon", "-5", "²", "Mon, 01 Jan 2001 00:00:00 GMT")
    assert [asked_pause({"Retry-After": text}) for text in texts] == [0.0] * 5
    assert Retries(cap=60).delay(0, asked_pause({"Retry-After": "999999999999"})) == 60
    assert Retries(base=1).delay(2) <= 4


@pytest.mark.parametrize("status", [401, 403, 404, 410, 422])
def test_refusals_are_final_and_carry_the_message(site: Site, booru: Danbooru, status: int) -> None:
    body = {"success": False, "error": "PostQuery::TagLimitError", "message": "You cannot search\nfor more."}
    site.answer = lambda path, query: (status, {}, body)
    with pytest.raises(StatusError, match=r"to /posts\.json: You cannot search for more\.$") as caught:
        list(booru.posts())
    assert caught.value.status == status
    assert str(caught.value).startswith(f"{HOST} answered {status} ")
    assert len(site.seen) == 1


def test_server_errors_are_retried_then_reported(site: Site, booru: Danbooru) -> None:
    site.answer = lambda path, query: (503, {}, b"<html>down</html>")
    with pytest.raises(StatusError, match=r"answered 503 Service Unavailable to /posts\.json\.$"):
        list(booru.posts())
    assert len(site.seen) == 3


def test_challenge_pages_are_recognised(site: Site, booru: Danbooru) -> None:
    page = b"<!DOCTYPE html><title>Just a moment...</title>"
    site.answer = lambda path, query: (403, {"Content-Type": "text/html", "cf-mitigated": "challenge"}, page)
    with pytest.raises(StatusError, match="HTML challenge page instead of JSON"):
        list(booru.posts())
    site.answer = lambda path, query: (200, {"Content-Type": "text/html"}, page)
    with pytest.raises(StatusError, match="HTML page instead of JSON"):
        list(booru.posts())


def test_a_connection_cut_short_is_retried_then_reported(site: Site, booru: Danbooru) -> None:
    def torn(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n[{")
        handler.close_connection = True

    site.answer = lambda path, query: torn
    with pytest.raises(ScraperError, match=rf"^{HOST} could not be read: the connection broke off\.$"):
        list(booru.posts())
    assert len(site.seen) == 3


def test_a_dripping_answer_ends(site: Site) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        handler.close_connection = True
        try:
            while True:
                handler.wfile.write(b" ")
                time.sleep(0.02)
        except OSError:
            pass

    site.answer = lambda path, query: drip
    with (
        open_booru(site, timeout=0.1, retries=Retries(attempts=1)) as booru,
        pytest.raises(ScraperError, match="the response took too long"),
    ):
        list(booru.posts())


def test_unreachable_and_unknown_hosts(site: Site) -> None:
    site.close()
    with open_booru(site) as booru, pytest.raises(ScraperError, match=rf"^{HOST} could not be read: no connection"):
        list(booru.posts())
    with open_booru(site, connect_to={}) as booru, pytest.raises(ScraperError, match="its name was not found"):
        list(booru.posts())


def test_answers_are_capped_after_decompression(site: Site) -> None:
    body = gzip.compress(b" " * 5_000_000 + b"[]")
    site.answer = lambda path, query: (200, {"Content-Encoding": "gzip"}, body)
    with open_booru(site) as booru:
        assert list(booru.posts()) == []
    client = MetadataClient(user_agent=AGENT, limiter=RateLimiter(), routes=booru._client._routes, max_bytes=1 << 20)
    with client, pytest.raises(ScraperError, match="more than 1048576 bytes"):
        client.get_json(f"http://{HOST}/")


def test_credentials_go_to_their_own_host_only(site: Site) -> None:
    other = "elsewhere.invalid"

    def answer(path: str, query: dict[str, str]) -> Any:
        if path == "/posts.json" and "page" not in query:
            return 302, {"Location": f"http://{other}/other.json"}, b""
        return 401, {}, {"message": "Bad key s3cret for miku"}

    site.answer = answer
    routes = {HOST: site.address, other: site.address}
    with (
        open_booru(site, login="miku", api_key="s3cret", connect_to=routes) as booru,
        pytest.raises(StatusError, match=r"Bad key \*\*\* for \*\*\*\.$"),
    ):
        list(booru.posts())
    (_, _, first), (_, _, second) = site.seen
    assert first["Authorization"] == "Basic " + base64.b64encode(b"miku:s3cret").decode()
    assert second["Host"] == other
    assert "Authorization" not in second


def test_credentials_in_the_query_stay_there_and_go_to_no_other_site(site: Site) -> None:
    settings: dict[str, Any] = {
        "user_agent": AGENT,
        "limiter": RateLimiter(1000),
        "routes": Routes({HOST: site.address}),
        "credentials": ("39", "s3cret"),
        "credentials_for": f"http://{HOST}",
        "credential_parameters": ("user_id", "api_key"),
        "retries": QUICK,
    }
    with MetadataClient(**settings) as client:
        site.answer = lambda path, query: {"said": query}
        assert client.get_json(f"http://{HOST}/a", {"tags": "b"}) == {
            "said": {"tags": "b", "user_id": "39", "api_key": "s3cret"}
        }
        assert "Authorization" not in site.seen[0][2]
        site.answer = lambda path, query: (403, {}, {"message": f"Bad key {query['api_key']}"})
        with pytest.raises(StatusError, match=r"Bad key \*\*\*\.$"):
            client.get_json(f"http://{HOST}/a", {})
        site.answer = lambda path, query: (302, {"Location": "http://elsewhere.invalid/?api_key=s3cret"}, b"")
        with pytest.raises(UnsafeAddressError, match="to another site with an API key"):
            client.get_json(f"http://{HOST}/a", {})
    assert {headers["Host"] for _, _, headers in site.seen} == {HOST}


def test_a_busy_site_with_status_200_is_retried(site: Site) -> None:
    answers = iter([{"error": {"code": "maxlag"}}, {"query": 1}])
    site.answer = lambda path, query: (200, {"Retry-After": "1"}, next(answers))
    routes = Routes({HOST: site.address})
    with MetadataClient(user_agent=AGENT, limiter=RateLimiter(1000), routes=routes, retries=QUICK) as client:
        assert client.get_json(f"http://{HOST}/w", is_busy=lambda document: "error" in str(document)) == {"query": 1}
    assert site.times[1] - site.times[0] >= 0.95


def test_a_long_retry_after_ends_the_run_and_holds_the_host_back(site: Site) -> None:
    site.answer = lambda path, query: (429, {"Retry-After": "3600"}, {"message": "Slow down."})
    limiter = RateLimiter(1000)
    with open_booru(site, limiter=limiter) as booru:
        with pytest.raises(StatusError, match=r"Slow down\.$"):
            list(booru.posts())
        with pytest.raises(HostDownError, match="asked for a pause of 60 more min"):
            list(booru.posts())
    assert len(site.seen) == 1


def test_a_site_that_keeps_failing_is_given_up(site: Site) -> None:
    site.answer = lambda path, query: (500, {}, b"")
    breakers = Breakers(failures=4, cooldown=0.01, longest_cooldown=0.01, probes=2)
    with open_booru(site, breakers=breakers) as booru:
        for _ in range(10):
            with pytest.raises((StatusError, HostDownError)):
                list(booru.posts())
    assert len(site.seen) == 6


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.1:1/", "not on the public internet"),
        ("http://localhost/", "not on the public internet"),
        ("http://[::ffff:10.0.0.1]/", "not on the public internet"),
        ("http://169.254.169.254/latest/", "not on the public internet"),
        ("file:///etc/passwd", "only http and https"),
        ("http://user:pw@example.org/", "passwords in a URL are not sent"),
    ],
)
def test_redirects_to_unsafe_places_are_refused(site: Site, booru: Danbooru, location: str, message: str) -> None:
    site.answer = lambda path, query: (302, {"Location": location}, b"")
    with pytest.raises(UnsafeAddressError, match=message):
        list(booru.posts())
    assert len(site.seen) == 1


def test_redirect_loops_end(site: Site, booru: Danbooru) -> None:
    site.answer = lambda path, query: (301, {"Location": "/posts.json"}, b"")
    with pytest.raises(ScraperError, match="more than 5 times"):
        list(booru.posts())


def test_private_hosts_need_permission(site: Site) -> None:
    settings: dict[str, Any] = {"user_agent": AGENT, "requests_per_second": 1000}
    url = f"http://127.0.0.1:{site.address[1]}"
    with Danbooru(url, **settings) as booru, pytest.raises(UnsafeAddressError, match="not on the public internet"):
        list(booru.posts())
    for allowed in (True, [f"127.0.0.1:{site.address[1]}"]):
        with Danbooru(url, **settings, allow_private=allowed) as booru:
            assert list(booru.posts()) == []
    other = [f"127.0.0.1:{site.address[1] + 1}"]
    with Danbooru(url, **settings, allow_private=other) as booru, pytest.raises(UnsafeAddressError):
        list(booru.posts())


def test_a_named_private_host_redirects_to_no_other(site: Site) -> None:
    url = f"http://127.0.0.1:{site.address[1]}"
    allowed = [f"127.0.0.1:{site.address[1]}"]
    for location in ("http://127.0.0.1:1/", f"http://localhost:{site.address[1]}/", "http://10.0.0.1/"):
        site.seen.clear()
        answer = (302, {"Location": location}, b"")
        site.answer = partial(lambda given, path, query: given, answer)
        with (
            Danbooru(url, user_agent=AGENT, requests_per_second=1000, allow_private=allowed) as booru,
            pytest.raises(UnsafeAddressError, match="not on the public internet"),
        ):
            list(booru.posts())
        assert len(site.seen) == 1


def test_a_named_host_at_another_address(site: Site) -> None:
    allowed = [f"booru.lan:80:127.0.0.1:{site.address[1]}"]
    with Danbooru("http://booru.lan", user_agent=AGENT, requests_per_second=1000, allow_private=allowed) as booru:
        assert list(booru.posts()) == []


@pytest.mark.parametrize(
    "agent", ["", "   ", "my-crawler/1.0", "Mozilla/5.0 (me@example.org)", "a\r\nb: me@example.org"]
)
def test_user_agents_without_a_contact_are_refused(agent: str) -> None:
    with pytest.raises(ScraperError, match="User-Agent must"):
        Danbooru(user_agent=agent)


def test_half_a_login_is_refused() -> None:
    with pytest.raises(ScraperError, match="both or neither"):
        Danbooru(user_agent=AGENT, login="miku")


def test_rate_is_kept_by_threads_together(site: Site) -> None:
    limiter = RateLimiter(10)

    def read() -> None:
        with open_booru(site, limiter=limiter) as booru:
            for _ in range(7):
                list(booru.posts())

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(site.times)
    assert len(times) == 14
    assert all(sum(start <= t < start + 1 for t in times) <= 10 for start in times)


def test_turns_are_never_closer_than_the_rate() -> None:
    limiter = RateLimiter(100, {"Slow.example": 20})
    granted = []
    for _ in range(5):
        limiter.wait("slow.EXAMPLE")
        granted.append(time.monotonic())
        limiter.wait("other.example")
    assert all(b - a >= HEADROOM / 20 - 1e-3 for a, b in itertools.pairwise(granted))
    with pytest.raises(ValueError, match="above zero"):
        RateLimiter(0)


def test_importing_the_package_loads_no_http_library() -> None:
    code = "import sys, animesion_scrapers; print('aiohttp' in sys.modules, 'requests' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]
