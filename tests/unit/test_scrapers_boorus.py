"""Gelbooru, Safebooru.org, Moebooru and Zerochan, against real HTTP servers on loopback."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from animesion_sample.faults import FaultPlan, LocalServer, local_server
from animesion_scrapers import Post, RateLimiter, Retries, ScraperError, Site, StatusError, sites
from animesion_scrapers.credentials import find
from tests import booru_dialects as dialects
from tests.answering import answering
from tests.booru_dialects import Entry, ZerochanTraps

AGENT = "animesion-tests/1.0 (tests@example.org) - Miku"
HOST = "sample-booru.invalid"
QUICK = Retries(attempts=3, base=0.02, cap=3.0)
NAMES = ("gelbooru", "safebooru", "moebooru", "zerochan")
BY_ID = ("gelbooru", "safebooru", "moebooru")
LISTINGS = {"gelbooru": "/index.php", "safebooru": "/index.php", "moebooru": "/post.json", "zerochan": "/"}


def entry(number: int, **changes: Any) -> Entry:
    tags = {"character": ("hatsune_miku",), "copyright": ("vocaloid",), "artist": ("ink&pen",), "general": ("solo",)}
    fields: dict[str, Any] = {"id": number, "tags": tags, "content": b"\xff\xd8\xff%d" % number, "rating": "g"}
    return Entry(**(fields | changes))


def entries(count: int) -> list[Entry]:
    return [entry(number) for number in range(1, count + 1)]


def serving(
    name: str, posts: list[Entry], plan: FaultPlan | None = None, **settings: Any
) -> contextlib.AbstractContextManager[LocalServer]:
    return local_server(lambda: getattr(dialects, name)(posts, **settings), plan)


def opened(name: str, server: LocalServer, page: int = 0, **settings: Any) -> Site:
    """A site of this name at the server; `page` makes its pages small."""
    defaults: dict[str, Any] = {
        "user_agent": AGENT,
        "limiter": RateLimiter(1e6),
        "connect_to": {HOST: server.address},
        "retries": QUICK,
        "timeout": 5,
    }
    return sites.load(name)(f"http://{HOST}", **(defaults | settings))


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three posts a page at every site."""
    monkeypatch.setitem(dialects.LONGEST_PAGES, "gelbooru", 3)
    for name in NAMES:
        monkeypatch.setitem(dialects.LONGEST_PAGES, name, 3)


def ids(posts: Iterator[Post]) -> list[int]:
    return [int(post.id) for post in posts]


def test_every_site_declares_itself() -> None:
    assert set(NAMES) <= set(sites.names())
    for name in NAMES:
        info = sites.load(name).info
        limiter = info.limiter(1000.0)
        assert info.name == name
        assert info.url.startswith("https://")
        assert info.terms.startswith("https://")
        assert info.label_tags
        assert not info.licence
        assert all(limiter.interval(host) >= 1.0 for host in info.limits)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", NAMES)
def test_pages_run_down_by_id_to_the_end(name: str) -> None:
    with serving(name, entries(8)) as server, opened(name, server) as site:
        assert ids(site.posts("Hatsune Miku" if name == "zerochan" else "hatsune_miku")) == list(range(8, 0, -1))
        assert ids(site.posts(limit=2)) == [8, 7]
        asked = len(server.journal.queries)
        assert ids(site.posts(limit=0)) == []
        assert len(server.journal.queries) == asked


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", NAMES)
def test_only_newer_posts_are_listed_and_no_further_page_is_requested(name: str) -> None:
    with serving(name, entries(9)) as server, opened(name, server) as site:
        assert ids(site.posts(newer_than="7")) == [9, 8]
        listed = [query for query in server.journal.queries if "limit=" in query or "p=1" in query]
        assert not [query for query in listed if "id%3A%3C" in query or "p=2" in query]
        assert ids(site.posts(newer_than="9")) == []
        with pytest.raises(ScraperError, match="positive integer, not 'x'"):
            list(site.posts(newer_than="x"))


@pytest.mark.parametrize("name", NAMES)
def test_posts_by_id_are_in_order_unique_and_without_missing_ones(name: str) -> None:
    with serving(name, entries(9)) as server, opened(name, server) as site:
        assert ids(site.posts_by_id([5, "3", 77, 5, 9])) == [5, 3, 9]
        for wrong in ("x1", 0, -4, True, "9" * 30, "²"):
            with pytest.raises(ScraperError, match="A post id is a positive integer"):
                list(site.posts_by_id([wrong]))


def test_moebooru_looks_up_a_hundred_ids_a_request() -> None:
    with serving("moebooru", entries(150)) as server, opened("moebooru", server) as site:
        assert ids(site.posts_by_id(range(150, 0, -1))) == list(range(150, 0, -1))
        assert len(server.journal.queries) == 2


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", BY_ID)
@pytest.mark.parametrize("fault", ["duplicates", "vanishing", "absent fields", "single object", "missing post"])
def test_faulty_listings_give_each_post_once(name: str, fault: str) -> None:
    plan = FaultPlan(share=1.0, kinds=(fault,), prefix=LISTINGS[name])
    with serving(name, entries(10), plan) as server, opened(name, server) as site:
        if (name, fault) == ("moebooru", "missing post"):
            with pytest.raises(ScraperError, match="other than version 2 of the API"):
                list(site.posts())
            return
        if (name, fault) == ("moebooru", "single object"):
            with pytest.raises(ScraperError, match="other than version 2 of the API"):
                list(site.posts())
            return
        found = {int(post.id): post for post in site.posts()}
    whole = [number for number in range(10, 0, -1) if fault != "vanishing" or number != 7]
    assert list(found) == ([] if (name, fault) == ("gelbooru", "missing post") else whole)
    hidden = [number for number, post in found.items() if not post.file_url and not post.md5]
    assert hidden == ([10, 5] if fault == "absent fields" else [])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("fault", "message", "times"),
    [
        ("401", "answered 401 Unauthorized", 1),
        ("403 challenge", "answered 403 Forbidden to .* with an HTML challenge page instead of JSON", 1),
        ("500", "answered 500 Internal Server Error", 3),
        ("invalid json", "that is not JSON", 3),
        ("html", "HTML page instead of JSON", 1),
    ],
)
def test_answers_that_are_none_end_in_one_sentence(name: str, fault: str, message: str, times: int) -> None:
    plan = FaultPlan(share=1.0, kinds=(fault,), prefix=LISTINGS[name], times=99)
    with (
        serving(name, entries(4), plan) as server,
        opened(name, server) as site,
        pytest.raises(ScraperError, match=message) as caught,
    ):
        list(site.posts())
    assert str(caught.value).startswith(HOST)
    assert str(caught.value).endswith("." if fault != "401" or name != "gelbooru" else "GELBOORU_API_KEY.")
    assert sum(server.journal.paths.values()) == times


@pytest.mark.parametrize("name", BY_ID)
def test_not_found_is_an_error_and_429_is_waited_out(name: str) -> None:
    plan = FaultPlan(share=1.0, kinds=("404",), prefix=LISTINGS[name])
    with (
        serving(name, entries(4), plan) as server,
        opened(name, server) as site,
        pytest.raises(StatusError, match="404 Not Found"),
    ):
        list(site.posts())
    plan = FaultPlan(share=1.0, kinds=("429 wait",), prefix=LISTINGS[name])
    with serving(name, entries(4), plan) as server, opened(name, server) as site:
        start = time.monotonic()
        assert ids(site.posts(limit=1)) == [4]
        assert time.monotonic() - start >= 0.95


@pytest.mark.parametrize("name", NAMES)
def test_a_site_that_repeats_its_page_does_not_loop(name: str) -> None:
    def same(request: web.Request) -> web.Response:
        posts = [{"id": number, "tags": "a"} for number in (2, 1)]
        if request.path in {"/1", "/2"}:
            return web.json_response({"id": int(request.path[1:])})
        documents = {
            "gelbooru": {"tag": []} if request.query.get("s") == "tag" else {"post": posts},
            "safebooru": posts,
            "moebooru": {"posts": posts, "tags": {"a": "general"}},
            "zerochan": {"items": posts},
        }
        return web.json_response(documents[name])

    found: list[int] = []
    with (
        answering(same) as server,
        opened(name, server) as site,
        pytest.raises(ScraperError, match=r"what it had already sent\.|posts that it had already sent\."),
    ):
        found.extend(int(post.id) for post in site.posts())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "document",
    ["nonsense", 5, [5], [{"md5": "x"}], [{"id": "-5"}], {"post": "x"}, {"posts": 5, "tags": {}}, {"items": [[]]}],
)
def test_hostile_documents_are_one_sentence(name: str, document: Any) -> None:
    with (
        answering(lambda request: web.json_response(document)) as server,
        opened(name, server) as site,
        pytest.raises(ScraperError, match=rf"^{HOST} .*\.$"),
    ):
        list(site.posts())


def test_every_field_of_gelbooru() -> None:
    post = entry(1796291, rating="s", size=(640, 480), parent=7, source="https://i.pximg.net/1_p0.jpg?a=1&b=2")
    with serving("gelbooru", [post]) as server, opened("gelbooru", server) as site:
        (found,) = site.posts()
    assert found == Post(
        id="1796291",
        site="gelbooru",
        page_url=f"http://{HOST}/index.php?page=post&s=view&id=1796291",
        file_url=f"http://{HOST}/images/291/1796291.png",
        md5=post.md5,
        extension="png",
        width=640,
        height=480,
        rating="s",
        tags={
            "general": ("solo",),
            "artist": ("ink&pen",),
            "character": ("hatsune_miku",),
            "copyright": ("vocaloid",),
            "meta": (),
        },
        parent_id="7",
        source="https://i.pximg.net/1_p0.jpg?a=1&b=2",
        author="ink&pen",
        created_at=post.created.isoformat(),
    )


def test_every_field_of_safebooru_moebooru_and_zerochan() -> None:
    post = entry(1796291, rating="s", size=(640, 480), parent=7, source="somewhere", status="active")
    found = {}
    for name in NAMES[1:]:
        with serving(name, [post]) as server, opened(name, server) as site:
            (found[name],) = site.posts()
    for name, got in found.items():
        assert (got.id, got.site, got.md5, got.extension) == ("1796291", name, post.md5, "png")
        assert (got.width, got.height, got.source) == (640, 480, "somewhere")
        assert got.file_url == f"http://{HOST}/images/291/1796291.png"
    for name in ("safebooru", "moebooru"):
        assert (found[name].parent_id, found[name].rating, found[name].author) == ("7", "s", "ink&pen")
        assert found[name].tags["character"] == ("hatsune_miku",)
        assert found[name].tags["general"] == ("solo",)
    assert found["moebooru"].created_at == post.created.isoformat()
    assert found["moebooru"].page_url == f"http://{HOST}/post/show/1796291"
    assert (found["moebooru"].bytes, found["zerochan"].bytes) == (len(post.content), len(post.content))
    assert found["safebooru"].created_at == ""  # the site tells when it was changed, not when it was posted
    assert found["zerochan"].tags["primary"] == ("Hatsune Miku",)
    assert found["zerochan"].tags["general"] == ("Vocaloid", "Ink&Pen", "Solo")
    assert found["zerochan"].rating == ""


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_malformed_fields_are_empty(name: str) -> None:
    odd = {
        "id": "4", "md5": "zz", "hash": 5, "width": "-5", "height": [], "size": "x", "file_size": 1 << 70, "full": None,
        "file_url": 7, "rating": "x", "source": "\ud800", "tags": 5, "tag_info": [5, {}], "created_at": "Xxx Foo 99",
        "parent_id": True, "directory": "../..", "image": "../../etc/passwd", "file_ext": "../sh", "status": [],
        "primary": {}, "tag": None,
    }  # fmt: skip

    def answer(request: web.Request) -> web.Response:
        posts = [] if "id:<" in request.query.get("tags", "") or request.query.get("p", "1") != "1" else [odd]
        if request.path == "/4":
            return web.json_response(odd)
        documents = {
            "gelbooru": {"@attributes": {}, "post": posts},
            "safebooru": posts,
            "moebooru": {"posts": posts, "tags": {"a": 5}},
            "zerochan": {"items": posts},
        }
        return web.json_response(documents[name])

    with answering(answer) as server, opened(name, server) as site:
        (found,) = site.posts()
    assert (found.id, found.file_url, found.md5, found.extension, found.rating) == ("4", "", "", "", "")
    assert (found.width, found.height, found.bytes, found.parent_id) == (0, 0, 0, "")
    assert (found.source, found.created_at, found.author, found.flags) == ("", "", "", ())
    assert all(tags == () for tags in found.tags.values())


def test_gelbooru_asks_for_each_tag_once_a_crawl_in_batches() -> None:
    posts = [
        entry(
            number, tags={"character": (f"c{number}",), "general": tuple(f"g{number}_{place}" for place in range(30))}
        )
        for number in range(1, 11)
    ]
    with serving("gelbooru", posts) as server, opened("gelbooru", server) as site:
        assert {post.tags["character"] for post in site.posts()} == {(f"c{number}",) for number in range(1, 11)}
        asked = [query for query in server.journal.queries if "s=tag" in query]
        assert len(asked) == 4  # 310 tags
        assert len(ids(site.posts())) == 10
        assert len([query for query in server.journal.queries if "s=tag" in query]) == 4


@pytest.mark.usefixtures("small_pages")
def test_gelbooru_pages_deeper_than_numbers_reach() -> None:
    with serving("gelbooru", entries(10)) as server, opened("gelbooru", server) as site:
        assert len(ids(site.posts("solo"))) == 10
        assert not [query for query in server.journal.queries if "pid=" in query]
        assert [query for query in server.journal.queries if "tags=solo+id%3A%3C8&" in query]


def test_gelbooru_requires_its_key_before_the_first_request_and_never_shows_it(tmp_path: Path) -> None:
    gelbooru = sites.load("gelbooru")
    with pytest.raises(ScraperError, match=r"^gelbooru\.com requires an API key"):
        gelbooru(user_agent=AGENT)
    spec = gelbooru.info.credentials
    assert spec is not None
    with pytest.raises(ScraperError, match="set GELBOORU_USER_ID and GELBOORU_API_KEY"):
        find(spec, {}, tmp_path / "netrc")
    with pytest.raises(ScraperError, match="GELBOORU_USER_ID is set and GELBOORU_API_KEY is not"):
        find(spec, {"GELBOORU_USER_ID": "39"}, tmp_path / "netrc")

    with serving("gelbooru", entries(2), key=("39", "s3cret")) as server:
        with opened("gelbooru", server, login="39", api_key="s3cret") as site:
            assert ids(site.posts()) == [2, 1]
        assert all("Authorization" not in headers for headers in server.journal.headers)
        with (
            opened("gelbooru", server, login="39", api_key="other") as site,
            pytest.raises(StatusError, match=r"401 Unauthorized .*Check GELBOORU_USER_ID and GELBOORU_API_KEY\.$"),
        ):
            list(site.posts())

    def echo(request: web.Request) -> web.Response:
        return web.json_response({"success": "false", "reason": f"bad key {request.query['api_key']}"})

    with (
        answering(echo) as server,
        opened("gelbooru", server, login="39", api_key="s3cret") as site,
        pytest.raises(ScraperError, match=rf"^{HOST} refused: bad key \*\*\*\.$"),
    ):
        list(site.posts())


def test_safebooru_sends_an_empty_body_for_no_posts_and_the_reason_of_a_failed_search() -> None:
    with serving("safebooru", entries(3)) as server, opened("safebooru", server) as site:
        assert ids(site.posts("no_such_tag")) == []
        with pytest.raises(ScraperError, match=rf"^{HOST} refused: search down\.$"):
            list(site.posts("search_down"))
        assert len([query for query in server.journal.queries if "search_down" in query]) == QUICK.attempts
    answer = json.dumps({"@attributes": {"success": "false", "reason": "search\ndown"}})
    with (
        answering(lambda request: web.Response(text=answer)) as server,
        opened("safebooru", server) as site,
        pytest.raises(ScraperError, match="refused: search down"),
    ):
        list(site.posts())


def test_safebooru_pages_within_its_limit_and_tags_without_categories_are_general() -> None:
    with serving("safebooru", entries(3), tag_info=False) as server, opened("safebooru", server) as site:
        posts = list(site.posts())
        assert all("limit=500" in query for query in server.journal.queries)
    assert posts[0].tags["general"] == ("hatsune_miku", "vocaloid", "ink&pen", "solo")
    assert posts[0].tags["character"] == ()
    assert posts[0].md5 == entry(3).md5


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("gelbooru", "a sort:score"),
        ("safebooru", "a sort:score:desc"),
        ("moebooru", "a order:score"),
        ("moebooru", "id:<5"),
        ("moebooru", "a b c d e f g"),
        ("moebooru", "-a -b -c -d -e -f -g"),
        ("zerochan", "123"),
        ("zerochan", "a,,b"),
        ("zerochan", ".."),
    ],
)
def test_searches_that_cannot_work_are_not_sent(name: str, query: str) -> None:
    with (
        serving(name, entries(2)) as server,
        opened(name, server) as site,
        pytest.raises(ScraperError, match=r"must not contain|allows 6|not a tag|tag or several"),
    ):
        site.posts(query)
    assert not server.journal.queries


def test_moebooru_counts_tags_and_excluded_tags_each() -> None:
    with serving("moebooru", entries(2)) as server, opened("moebooru", server) as site:
        assert ids(site.posts("solo -a -b -c -d -e -f rating:g")) == [2, 1]


def test_moebooru_in_its_first_version_is_refused() -> None:
    with (
        answering(lambda request: web.json_response([{"id": 1}])) as server,
        opened("moebooru", server) as site,
        pytest.raises(ScraperError, match="other than version 2"),
    ):
        list(site.posts())


def test_zerochan_gets_a_user_agent_with_the_users_name() -> None:
    for agent in ("my-crawler/1.0 (me@example.org)", "my-crawler/1.0 (me@example.org) - ", " - Miku"):
        with pytest.raises(ScraperError, match=r"User-Agent does not end in a user's name"):
            sites.load("zerochan")(user_agent=agent)
    with pytest.raises(ScraperError, match="contain a contact"):
        sites.load("zerochan")(user_agent="my-crawler/1.0 - Miku")
    with serving("zerochan", entries(1)) as server, opened("zerochan", server) as site:
        assert ids(site.posts()) == [1]
        assert {headers["User-Agent"] for headers in server.journal.headers} == {AGENT}


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("past_the_end", [404, 200])
def test_zerochan_ends_where_there_is_no_such_page(past_the_end: int) -> None:
    traps = ZerochanTraps(past_the_end=past_the_end)
    with serving("zerochan", entries(6), traps=traps) as server, opened("zerochan", server) as site:
        assert ids(site.posts("Solo")) == [6, 5, 4, 3, 2, 1]


@pytest.mark.usefixtures("small_pages")
def test_zerochan_that_stops_before_the_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("animesion_scrapers.sites.zerochan.DEEPEST_PAGE", 2)
    monkeypatch.setattr("animesion_scrapers.sites.zerochan.PAGE", 3)
    traps = ZerochanTraps(deepest_page=2)
    with (
        serving("zerochan", entries(9), traps=traps) as server,
        opened("zerochan", server) as site,
        pytest.raises(ScraperError, match=r"returns only 2 pages of /Solo and has more: narrow the search\."),
    ):
        list(site.posts("Solo"))


def test_zerochan_follows_aliases_and_skips_deleted_entries() -> None:
    traps = ZerochanTraps(aliases={"Miku": "Hatsune Miku", "Loop": "Loop"}, gone=frozenset({2}), raw=frozenset({3}))
    with serving("zerochan", entries(3), traps=traps) as server, opened("zerochan", server) as site:
        found = list(site.posts("Miku"))
        assert [post.id for post in found] == ["3", "1"]
        assert found[0].tags["primary"] == ("Hatsune Miku",)
        with pytest.raises(ScraperError, match=r"redirected .* more than 5 times"):
            list(site.posts("Loop"))
        with pytest.raises(ScraperError, match=r"has nothing under /No\+Such\+Tag"):
            list(site.posts("No Such Tag"))


def test_zerochan_searches_several_tags_and_strictly() -> None:
    posts = [entry(1), entry(2, tags={"character": ("rin",), "general": ("hatsune_miku", "solo")})]
    with serving("zerochan", posts) as server:
        with opened("zerochan", server) as site:
            assert ids(site.posts("Hatsune Miku, Solo")) == [2, 1]
            assert ids(site.posts("Rin,Solo")) == [2]
        with opened("zerochan", server, strict=True) as site:
            assert ids(site.posts("Hatsune Miku")) == [1]


def test_zerochan_names_the_page_that_is_not_json() -> None:
    def answer(request: web.Request) -> web.Response:
        if request.query.get("p") == "2":
            return web.Response(text='{"items": [', content_type="application/json")
        if request.path == "/Solo":
            return web.json_response({"items": [{"id": 5}]})
        return web.json_response({"id": 5})

    with (
        answering(answer) as server,
        opened("zerochan", server) as site,
        pytest.raises(ScraperError, match=r"answered /Solo with something that is not JSON \(page 2\)\.$"),
    ):
        list(site.posts("Solo"))
