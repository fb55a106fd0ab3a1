"""iNaturalist, GBIF, Wikimedia Commons and Wikidata, against real HTTP servers on loopback."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count, repeat
from typing import Any

import pytest
from aiohttp import web

from animesion_sample.faults import FaultPlan, LocalServer, local_server
from animesion_scrapers import Post, RateLimiter, Retries, ScraperError, Site, StatusError, sites, wikidata
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.metadata import MetadataClient
from tests import flora
from tests.answering import answering
from tests.flora import Plant, Wiki, plants, wiki_of

AGENT = "animesion-tests/1.0 (tests@example.org)"
HOST = "sample-flora.invalid"
QUICK = Retries(attempts=3, base=0.02, cap=3.0)
NAMES = ("inaturalist", "gbif", "commons")
LISTINGS = {"inaturalist": "/v1/observations", "gbif": "/v1/occurrence/search", "commons": "/w/api.php"}
QUERIES = {"inaturalist": "Rosa gallica", "gbif": "Rosa gallica", "commons": "Category:Rosa gallica"}


def application(name: str, found: Any, **settings: Any) -> web.Application:
    return flora.commons(found) if name == "commons" else getattr(flora, name)(found, **settings)


def serving(
    name: str, found: list[Plant], plan: FaultPlan | None = None, **settings: Any
) -> contextlib.AbstractContextManager[LocalServer]:
    served: Any = wiki_of(found) if name == "commons" else found
    return local_server(lambda: application(name, served, **settings), plan)


def opened(name: str, server: LocalServer, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "user_agent": AGENT,
        "limiter": RateLimiter(1e6),
        "connect_to": {HOST: server.address},
        "retries": QUICK,
        "timeout": 5,
    }
    site: Site = sites.load(name)(f"http://{HOST}", **(defaults | settings))
    return site


def roses(count: int) -> list[Plant]:
    return [Plant(number, cultivar="Peace") for number in range(1, count + 1)]


def _same(document: Any, request: web.Request) -> web.Response:
    return web.json_response(document)


def numbers(posts: Iterator[Post]) -> list[int]:
    return [int(post.id.partition("-")[0]) for post in posts]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in flora.LONGEST_PAGES:
        monkeypatch.setitem(flora.LONGEST_PAGES, name, 3)
    from animesion_scrapers.sites import gbif

    monkeypatch.setattr(gbif, "PAGE", 3)


def test_every_site_declares_itself() -> None:
    assert set(NAMES) <= set(sites.names())
    for name in NAMES:
        info = sites.load(name).info
        assert info.name == name
        assert info.terms.startswith("https://")
        assert not info.licence
    limiter = sites.load("commons").info.limiter(1000.0)
    assert sites.load("commons").info.connections()["upload.wikimedia.org"] == 2
    assert limiter.interval("commons.wikimedia.org") >= 1.0
    assert sites.load("inaturalist").info.limiter(1000.0).interval("api.inaturalist.org") >= 1.0


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", NAMES)
def test_all_pages_are_read(name: str) -> None:
    with serving(name, roses(8)) as server, opened(name, server) as site:
        assert numbers(site.posts(QUERIES[name])) == list(range(1, 9))
        assert numbers(site.posts(QUERIES[name], limit=2)) == [1, 2]
        asked = len(server.journal.queries)
        assert numbers(site.posts(QUERIES[name], limit=0)) == []
        assert len(server.journal.queries) == asked


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", NAMES)
def test_only_newer_posts_are_listed(name: str) -> None:
    with serving(name, roses(8)) as server, opened(name, server) as site:
        last = list(site.posts(QUERIES[name]))[5].id
        assert numbers(site.posts(QUERIES[name], newer_than=last)) == [7, 8]
        with pytest.raises(ScraperError, match="'x'"):
            list(site.posts(QUERIES[name], newer_than="x"))


@pytest.mark.parametrize("name", NAMES)
def test_posts_by_id_are_in_order_and_unique(name: str) -> None:
    with serving(name, roses(9)) as server, opened(name, server) as site:
        assert numbers(site.posts_by_id([5, "3", 99, 5, 4])) == [5, 3, 4]
        whole = list(site.posts_by_id([7]))
        assert list(site.posts_by_id([whole[0].id])) == whole
        for wrong in ("x", 0, -1, True):
            with pytest.raises(ScraperError, match="id"):
                list(site.posts_by_id([wrong]))


@pytest.mark.parametrize("name", NAMES)
def test_every_field(name: str) -> None:
    plant = Plant(12, cultivar="Peace", licence="cc-by-sa", photos=2)
    with serving(name, [plant]) as server, opened(name, server) as site:
        post, *others = site.posts(QUERIES[name])
    assert post.site == name
    assert post.page_url.startswith("http")
    assert post.file_url.startswith(f"http://{HOST}/photos/120/")
    assert post.extension == "jpg"
    assert post.created_at.startswith("2024-06-01")
    if name == "commons":
        assert not others
        assert (post.id, post.parent_id) == ("12", "")
        assert post.tags["cultivar"] == ("Rosa gallica 'Peace'",)
        assert post.tags["taxon"] == ("Rosa gallica",)
        assert post.author == "Ada Green & friends"
        assert post.licence == "CC-BY-SA-3.0-DE"
        assert (post.width, post.height, post.bytes) == (96, 72, len(plant.images[0]))
        assert len(post.sha1) == 40
        return
    assert (len(others), post.parent_id, post.author) == (1, "12", "Ada Green")
    assert others[0].parent_id == "12"
    assert post.tags["species"] == ("Rosa gallica",)
    if name == "inaturalist":
        assert (post.id, others[0].id) == ("12-120", "12-121")
        assert post.licence == "CC-BY-SA"
        assert post.tags["general"] == ("captive",)
        assert post.file_url.endswith("/large.jpg")
    else:
        assert post.licence == "CC-BY-SA-4.0"
        assert post.tags["cultivar"] == ("Rosa gallica 'Peace'",)
        assert post.id.startswith("12-")


@pytest.mark.parametrize("name", NAMES)
def test_faulty_listings_are_retried(name: str) -> None:
    for fault in ("503", "500", "429", "reset", "truncated", "garbage", "wrong length"):
        plan = FaultPlan(share=1.0, kinds=(fault,), prefix=LISTINGS[name])
        with serving(name, roses(3), plan) as server, opened(name, server) as site:
            assert numbers(site.posts(QUERIES[name])) == [1, 2, 3], fault


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("403 challenge", "answered 403 Forbidden to .* with an HTML challenge page instead of JSON"),
        ("404", "404 Not Found"),
        ("html", "HTML page instead of JSON"),
        ("invalid json", "not JSON"),
    ],
)
def test_answers_that_are_none_end_in_one_sentence(name: str, fault: str, message: str) -> None:
    plan = FaultPlan(share=1.0, kinds=(fault,), prefix=LISTINGS[name], times=99)
    query = "7" if name == "inaturalist" else QUERIES[name]
    with serving(name, roses(3), plan) as server, opened(name, server) as site:
        with pytest.raises(ScraperError, match=message) as caught:
            list(site.posts(query))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_retry_after_is_waited_out(name: str) -> None:
    plan = FaultPlan(share=1.0, kinds=("429 wait",), prefix=LISTINGS[name])
    with serving(name, roses(1), plan) as server, opened(name, server) as site:
        begin = time.monotonic()
        assert numbers(site.posts(QUERIES[name])) == [1]
        assert time.monotonic() - begin >= 0.9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "document",
    [
        *([], 7, None, {"results": 3}, {"results": [3]}, {"results": [{"id": "x", "key": -1}]}),
        *({"query": []}, {"error": []}, {"query": {"pages": {"1": 5, "2": {"pageid": "7"}}}}),
    ],
)
def test_hostile_documents_are_one_sentence(name: str, document: Any) -> None:
    with answering(lambda request: web.json_response(document)) as server, opened(name, server) as site:
        with pytest.raises(ScraperError) as caught:
            list(site.posts("7"))
        assert "\n" not in str(caught.value)


def test_malformed_fields_are_empty() -> None:
    odd = {"id": 5, "taxon": 3, "user": [], "photos": [4, {"id": 6, "url": "http://[::", "license_code": 9}]}
    with answering(lambda request: web.json_response({"results": [odd]})) as server:
        with opened("inaturalist", server) as site:
            [post] = site.posts_by_id([5])
        assert (post.id, post.licence, post.author) == ("5-6", "all rights reserved", "")
    odd = {
        "key": 5,
        "media": [3, {"type": "StillImage", "identifier": "file:///etc/passwd", "license": []}, {"type": 1}],
    }
    with answering(lambda request: web.json_response(odd)) as server, opened("gbif", server) as site:
        [post] = site.posts_by_id([5])
    assert (post.file_url, post.licence, post.tags["cultivar"]) == ("file:///etc/passwd", "", ())


# -- names of taxa ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inaturalist", "gbif"])
def test_taxa_by_name_and_number_and_suggestions(name: str) -> None:
    found = [*roses(2), Plant(7, taxon="Rosa rugosa"), Plant(8, taxon="Malus domestica")]
    with serving(name, found) as server, opened(name, server) as site:
        assert numbers(site.posts("Rosa")) == [1, 2, 7]
        assert numbers(site.posts("Rosa rugosa")) == [7]
        number = flora._taxa(found)["Malus domestica"]
        assert numbers(site.posts(str(number))) == [8]
        with pytest.raises(ScraperError, match=r"no taxon .*'Rosa galica'; it offers .*Rosa gallica"):
            list(site.posts("Rosa galica"))
        with pytest.raises(ScraperError, match=r"no taxon .*'Quercus'\.$"):
            list(site.posts("Quercus"))
        with pytest.raises(ScraperError, match="needs a taxon"):
            list(site.posts(" "))


def test_a_common_name_is_taken_if_one_taxon_has_it() -> None:
    with serving("inaturalist", roses(2)) as server, opened("inaturalist", server) as site:
        assert numbers(site.posts("french rose")) == [1, 2]
    same = {"results": [{"id": 3, "name": "Rosa", "rank": "genus"}, {"id": 4, "name": "Rosa", "rank": "species"}]}
    with (
        answering(lambda request: web.json_response(same)) as server,
        opened("inaturalist", server) as site,
        pytest.raises(ScraperError, match=r"several taxa: Rosa \(genus, 3\), Rosa \(species, 4\)"),
    ):
        list(site.posts("Rosa"))


@pytest.mark.parametrize(("name", "given"), [("inaturalist", "taxon_id"), ("gbif", "offset")])
def test_search_parameters_are_checked(name: str, given: str) -> None:
    with serving(name, plants(30)) as server:
        with pytest.raises(ScraperError, match=f"'{given}' is not a search parameter"):
            opened(name, server, search={given: "1"})
        wanted = {"photo_license": "cc0,cc-by"} if name == "inaturalist" else {"license": "CC0_1_0,CC_BY_4_0"}
        with opened(name, server, search=wanted) as site:
            assert {post.licence.removesuffix("-4.0") for post in site.posts("Rosa")} == {"CC0-1.0", "CC-BY"}


# -- iNaturalist -----------------------------------------------------------------------------------------------------


def test_the_size_of_photos_and_the_rank_of_names() -> None:
    with serving("inaturalist", roses(1)) as server, opened("inaturalist", server, size="original") as site:
        [post] = site.posts("Rosa")
        assert post.file_url.endswith("/original.jpg")
        assert (post.width, post.height) == (96, 72)
    taxa = {
        "genus": ("Rosa", 20, ()), "subspecies": ("Rosa gallica officinalis", 5, ("Rosa gallica",)),
        "hybrid": ("Rosa × damascena", 10, ("Rosa × damascena",)), "nothing": (None, None, ()),
    }  # fmt: skip
    for name, level, species in taxa.values():
        entry = {
            "id": 1,
            "taxon": {"name": name, "rank_level": level},
            "photos": [{"id": 2, "url": "/p/square.jpeg?1"}],
        }
        answer = partial(_same, {"results": [entry]})
        with answering(answer) as server, opened("inaturalist", server) as site:
            [post] = site.posts_by_id([1])
        assert post.tags["species"] == species
        assert post.file_url == f"http://{HOST}/p/large.jpeg?1"


def test_pages_that_do_not_move_on_end_the_crawl() -> None:
    page = {"results": [{"id": 5, "photos": []}]}
    with (
        answering(lambda request: web.json_response(page)) as server,
        opened("inaturalist", server) as site,
        pytest.raises(ScraperError, match="above observation 5 with what it had already sent"),
    ):
        list(site.posts("7"))


# -- GBIF ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pages")
def test_a_search_that_is_too_large_is_refused_on_its_first_page() -> None:
    with serving("gbif", roses(9), extra=100_000) as server, opened("gbif", server) as site:
        with pytest.raises(ScraperError, match=r"100,009 occurrences .* 100,000: narrow it"):
            list(site.posts("Rosa"))
        assert sum("offset" in query for query in server.journal.queries) == 1
        assert numbers(site.posts("Rosa", limit=4)) == [1, 2, 3, 4]


def test_the_cache_of_gbif_serves_the_files() -> None:
    found = [Plant(4, photos=2)]
    with serving("gbif", found) as server, opened("gbif", server, cache=True) as site:
        posts = list(site.posts("Rosa"))
    assert all(f"http://{HOST}/v1/image/cache/occurrence/4/media/" in post.file_url for post in posts)
    assert len({post.file_url for post in posts}) == 2


def test_only_still_images_count_and_each_once() -> None:
    media = [
        {"type": "Sound", "identifier": "https://example.org/a.mp3"},
        {"type": "StillImage", "identifier": "https://example.org/a.jpg", "rightsHolder": "A"},
        {"type": "StillImage", "identifier": "https://example.org/a.jpg"},
        {"type": "StillImage", "references": "https://example.org/page"},
        {"type": "StillImage", "identifier": "https://example.org/b", "format": "image/png"},
    ]
    entry = {"key": 5, "scientificName": "Malus domestica 'Gala'", "license": _by(), "media": media}
    with answering(lambda request: web.json_response(entry)) as server, opened("gbif", server) as site:
        posts = list(site.posts_by_id([5]))
    assert [(post.extension, post.author) for post in posts] == [("jpg", "A"), ("png", "")]
    assert {post.licence for post in posts} == {"CC-BY-4.0"}
    assert {post.tags["cultivar"] for post in posts} == {("Malus domestica 'Gala'",)}


def _by() -> str:
    return "http://creativecommons.org/licenses/by/4.0/legalcode"


# -- Commons ---------------------------------------------------------------------------------------------------------


def wiki_server(wiki: Wiki, plan: FaultPlan | None = None) -> contextlib.AbstractContextManager[LocalServer]:
    return local_server(lambda: flora.commons(wiki), plan)


@pytest.mark.usefixtures("small_pages")
def test_cultivars_follow_from_the_tree_and_cycles_end() -> None:
    found = plants(24)
    wiki = wiki_of(found)
    wiki.parts = True
    with wiki_server(wiki) as server, opened("commons", server) as site:
        posts = list(site.posts("plants"))
        asked = [query for query in server.journal.queries if "cmtitle" in query]
    assert {post.id: post.tags["cultivar"] for post in posts} == {str(each.id): (each.name,) for each in found}
    assert len(asked) == len(set(asked))
    assert not site.notes


def test_the_walk_is_bounded_in_depth_and_number_with_a_note() -> None:
    wiki = wiki_of(plants(6))
    with wiki_server(wiki) as server:
        with opened("commons", server, depth=1) as site:
            assert list(site.posts("Plants")) == []
            assert "deeper than 1 levels" in site.notes[0]
        with opened("commons", server, most_categories=4) as site:
            assert len(list(site.posts("Plants"))) == 2
            assert "stopped after 4 categories; at least 2 were left out" in site.notes[0]


def test_the_cultivar_of_a_category_applies_to_those_below_without_a_better_one() -> None:
    found = [Plant(1, cultivar="Peace"), Plant(2, taxon="x"), Plant(3, cultivar="Climbing Peace"), Plant(4, taxon="y")]
    found.append(Plant(5, taxon="z"))
    wiki = Wiki(
        found,
        tree={"Rosa gallica 'Peace'": ["peace in Portland", "Rosa gallica 'Climbing Peace'", "Gardens"]},
        within={
            "peace in Portland": [2],
            "Gardens": [5],
            "Rosa gallica 'Peace'": [3],
            "Rosa gallica 'Iceberg'": [4],
            "Rosa gallica 'Climbing Peace'": [4],
        },
    )
    with wiki_server(wiki) as server, opened("commons", server) as site:
        posts = {post.id: post.tags["cultivar"] for post in site.posts("Rosa gallica 'Peace'|Rosa gallica 'Iceberg'")}
    peace, climbing, iceberg = (f"Rosa gallica '{name}'" for name in ("Peace", "Climbing Peace", "Iceberg"))
    assert posts == {"1": (peace,), "2": (peace,), "3": (climbing,), "4": (iceberg, climbing), "5": ()}


def test_titles_that_cannot_be_and_categories_that_are_empty() -> None:
    with wiki_server(wiki_of(plants(3))) as server, opened("commons", server) as site:
        for title in ("", "Category:", "Rosa [x]", "a" * 300):
            with pytest.raises(ScraperError, match="not a title on Wikimedia Commons"):
                list(site.posts(title))
        with pytest.raises(ScraperError, match="nothing in Category:Nonsense: check the spelling of the category"):
            list(site.posts("nonsense"))
        assert len(list(site.posts("Nonsense|Plants"))) == 3
        assert site.notes == [f"{HOST} has nothing in Category:Nonsense"]
        with pytest.raises(ScraperError, match="250, 330, 500"):
            opened("commons", server, width=512)


def test_a_lagging_wiki_is_retried_and_other_errors_are_reported() -> None:
    wiki = wiki_of(plants(3))
    wiki.lagging = 1
    with wiki_server(wiki) as server, opened("commons", server) as site:
        begin = time.monotonic()
        assert len(list(site.posts("Plants"))) == 3
        assert time.monotonic() - begin >= 0.9
        wiki.lagging = 99
        with pytest.raises(StatusError, match="seconds lagged"):
            list(site.posts("Plants"))
        wiki.lagging, wiki.error = 0, ("badvalue", "Unrecognized\nvalue <b>.")
        with pytest.raises(ScraperError, match=r"refuses the request \(badvalue\): Unrecognized value <b>\.$"):
            list(site.posts("Plants"))


@pytest.mark.parametrize("query", [{}, {"pages": [{"pageid": 1, "title": "File:A.jpg"}]}])
@pytest.mark.parametrize("places", [repeat("7"), map(str, count())])
def test_a_wiki_that_repeats_itself_is_an_error(query: dict[str, object], places: Iterator[str]) -> None:
    def answer(request: web.Request) -> web.Response:
        return web.json_response({"query": query, "continue": {"cmcontinue": next(places)}})

    with (
        answering(answer) as server,
        opened("commons", server) as site,
        pytest.raises(ScraperError, match="what it had already sent"),
    ):
        list(site.posts("Plants"))


def test_scaled_files_have_no_digest() -> None:
    with wiki_server(wiki_of(plants(2))) as server, opened("commons", server, width=250) as site:
        assert all(post.sha1 for post in site.posts("Plants"))  # the originals are smaller
    info = {"url": "/a.jpg", "thumburl": "/250.jpg", "width": 900, "sha1": "a" * 40, "size": 9}
    response = {"query": {"pages": [{"pageid": 4, "title": "File:A.jpg", "imageinfo": [info]}]}}
    with answering(lambda request: web.json_response(response)) as server, opened("commons", server, width=250) as site:
        [post] = site.posts_by_id([4])
    assert (post.file_url, post.sha1, post.bytes) == (f"http://{HOST}/250.jpg", "", 0)


# -- Wikidata --------------------------------------------------------------------------------------------------------


def asked_wikidata(server: LocalServer, parent: str, most: int = 100) -> list[wikidata.KnownCultivar]:
    limiter, routes = RateLimiter(1e6), Routes({HOST: server.address}, False)
    with MetadataClient(user_agent=AGENT, limiter=limiter, routes=routes, retries=QUICK) as client:
        return list(wikidata.known_cultivars(client, parent, base_url=f"http://{HOST}", most=most))


def test_cultivars_of_wikidata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikidata, "PAGE", 2)
    names = [f"Name{letter}" for letter in "abcdefg"]
    found = [replace(plant, taxon="Rosa gallica") for plant in plants(14, names)]
    with wiki_server(wiki_of(found)) as server:
        known = asked_wikidata(server, "Q34687")
        assert [each.item for each in known] == [f"Q{1001 + place}" for place in range(7)]
        assert [str(each.cultivar) for each in known] == [f"Rosa gallica '{name}'" for name in names]
        assert [bool(each.category) for each in known] == [True, True, False] * 2 + [True]
        assert [bool(each.file) for each in known] == [False, False, True] * 2 + [False]
        assert len(asked_wikidata(server, "Q34687", most=3)) == 3
        assert asked_wikidata(server, "Q1") == []
        with pytest.raises(ScraperError, match="'Rosa' is not an item"):
            asked_wikidata(server, "Rosa")
        with opened("commons", server) as site:
            titles = {each.file: each.cultivar for each in known if each.file}
            assert [post.tags["cultivar"] for post in site.posts_by_title(titles)] == [
                ("Rosa gallica 'Namec'",), ("Rosa gallica 'Namef'",),
            ]  # fmt: skip


def test_a_service_that_ignores_the_offset_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikidata, "PAGE", 2)
    items = [{"item": {"value": f"http://www.wikidata.org/entity/Q{number}"}} for number in (1, 2)]
    with answering(lambda request: web.json_response({"results": {"bindings": items}})) as server:
        assert len(asked_wikidata(server, "Q34687", most=2)) == 2
        with pytest.raises(ScraperError, match="the page from row 2 with what it had already sent"):
            asked_wikidata(server, "Q34687")


def test_a_service_timeout_is_reported() -> None:
    def gave_up(request: web.Request) -> web.Response:
        return web.Response(status=500, text="java.util.concurrent.TimeoutException", content_type="text/plain")

    with answering(gave_up) as server, pytest.raises(StatusError, match="500"):
        asked_wikidata(server, "Q34687")
    nothing = answering(lambda request: web.json_response({"results": 5}))
    with nothing as server, pytest.raises(ScraperError, match="a response to /sparql without results"):
        asked_wikidata(server, "Q34687")
    rows = [{"item": {"value": "x"}}, 5, {"item": {"value": "http://www.wikidata.org/entity/Q5"}, "name": 7}]
    document = json.dumps({"results": {"bindings": rows}})
    with answering(lambda request: web.Response(text=document, content_type="application/json")) as server:
        [known] = asked_wikidata(server, "Q34687")
    assert known == wikidata.KnownCultivar("Q5", None, "", "")
