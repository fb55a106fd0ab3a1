"""Danbooru as a source, on the sample world: searches, ids, retries, updates and dry runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import animesion
from animesion import sources
from animesion.cli import main
from animesion.errors import AnimesionError, UsageError
from animesion.pipeline import runner
from animesion_sample.faults import local_server
from animesion_sample.server import SampleServer, serve
from animesion_sample.source import HOST
from animesion_sample.world import World

from .crawling import raw


@pytest.fixture(scope="module")
def server() -> Iterator[SampleServer]:
    with serve(posts=300, processes=1) as running:
        yield running


def danbooru(server: SampleServer, *overrides: str) -> Any:
    settings = ["source={kind='danbooru'}", "source.contact=me@example.org", f"source.url=http://{HOST}"]
    source: Any = sources.make(
        animesion.load_recipe("folder", [*settings, "source.requests_per_second=10", *overrides])
    )
    source.connect_to = {HOST: (server.host, server.port)}
    return source


def test_published_ids_and_their_files(server: SampleServer, tmp_path: Path) -> None:
    world = World(300)
    chosen = [post for post in world.posts if not post.trouble][:3]
    (tmp_path / "ids.txt").write_text("\n".join(str(post.id) for post in reversed(chosen)) + "\n")
    source = danbooru(server, f"source.ids={tmp_path / 'ids.txt'}")
    with source.session():
        items = list(source.items())
        payloads = list(source.read(items))
    assert [item.source_id for item in items] == [str(post.id) for post in chosen]
    assert [payload.content for payload in payloads] == [world.file(post) for post in chosen]
    (tmp_path / "ids.txt").write_text("12\nhello\n")
    with pytest.raises(UsageError, match=r"line 2 .* is 'hello'"):
        list(danbooru(server, f"source.ids={tmp_path / 'ids.txt'}").items())


def test_searches_and_limits(server: SampleServer) -> None:
    source = danbooru(server, "source.tags=rating:q", "source.limit=5")
    with source.session():
        items = list(source.items())
    assert len(items) == 5
    assert {item.rating for item in items} == {"q"}
    with source.session(), pytest.raises(AnimesionError, match="tags"):
        list(danbooru(server, "source.tags=one two three").items())


def test_only_posts_newer_than_the_last_item_are_listed(server: SampleServer, tmp_path: Path) -> None:
    source = danbooru(server, "source.tags=rating:g")
    with source.session():
        whole = list(source.items())
        newer = list(source.items_after(whole[-8]))
    assert newer == whole[-7:]
    ids = [item.source_id for item in whole[:4]]
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    source = danbooru(server, f"source.ids={tmp_path / 'ids.txt'}")
    with source.session():
        assert [item.source_id for item in source.items_after(whole[1])] == ids[2:]


def test_a_changed_rule_asks_the_site_for_nothing_again(tmp_path: Path, asked: Counter[str]) -> None:
    small = ["source.posts=200", "classes.minimum=3"]
    runner.run(animesion.load_recipe("daf-re", small, sample=True), tmp_path, workers=1, until="curate")
    first = set(asked)
    asked.clear()
    # ratings q and e come in: only what was passed over before is fetched now
    wider = animesion.load_recipe("daf-re", [*small, "filter.ratings=[]"], sample=True)
    runner.run(wider, tmp_path, workers=1, until="curate", replace=True)
    assert first
    assert asked
    assert not set(asked) & first


def growing(posts: list[dict[str, Any]]) -> web.Application:
    """A booru whose posts are the entries of a list, which a test lets grow."""

    async def listing(request: web.Request) -> web.Response:
        tags = request.query.get("tags", "")
        above = int(tags.rpartition("id:>")[2]) if "id:>" in tags else 0
        below = int(request.query.get("page", "b999999")[1:])
        found = [post for post in reversed(posts) if above < post["id"] < below]
        return web.json_response(found[: int(request.query["limit"])])

    async def file(request: web.Request) -> web.Response:
        return web.Response(body=b"\xff\xd8\xff" + request.match_info["name"].encode())

    app = web.Application()
    app.router.add_get("/posts.json", listing)
    app.router.add_get("/data/{name}", file)
    return app


def entry(number: int) -> dict[str, Any]:
    return {
        "id": number,
        "file_ext": "jpg",
        "file_url": f"/data/{number}.jpg",
        "rating": "g",
        "tag_string_character": "a",
    }


def test_an_update_adds_new_posts_and_changes_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Counter[str]
) -> None:
    posts = [entry(number) for number in range(1, 6)]
    settings = ["source={kind='danbooru'}", "source.contact=me@example.org", "source.requests_per_second=10"]
    with local_server(lambda: growing(posts)) as server:
        address = server.address
        recipe = animesion.load_recipe("folder", [*settings, f"source.url=http://{HOST}"])
        original = sources.make

        def made(recipe: Any) -> Any:
            source: Any = original(recipe)
            source.connect_to = {HOST: address}
            return source

        monkeypatch.setattr(sources, "make", made)
        out = tmp_path / "out"
        runner.run(recipe, out, workers=1, until="fetch")
        posts += [entry(number) for number in range(6, 9)]
        runner.run(recipe, out, workers=1, until="fetch")
        assert len(raw(out)) == 5
        asked.clear()
        result = runner.run(recipe, out, workers=1, until="fetch", update=True)
        assert result.seen == 8
        assert sorted(asked) == ["danbooru-6", "danbooru-7", "danbooru-8"]
        whole = raw(out)
        assert [row["order"] for row in whole.values()] == list(range(8))
        asked.clear()
        assert runner.run(recipe, out, workers=1, until="fetch", update=True).seen == 8
        assert not asked
        assert sorted(path.name for path in (out / ".crawl").iterdir()) == [
            "hosts.sqlite",
            "ledger.sqlite",
            "robots.sqlite",
        ]


def test_a_dry_run_reports_requests_bytes_and_time_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    posts = [entry(number) | {"file_size": 1000} for number in range(1, 31)]
    del posts[0]["file_size"]
    settings = ["source={kind='danbooru'}", "source.contact=me@example.org", "source.requests_per_second=0.5"]
    with local_server(lambda: growing(posts)) as server:
        original = sources.make

        def made(recipe: Any) -> Any:
            source: Any = original(recipe)
            source.connect_to = {HOST: server.address}
            return source

        monkeypatch.setattr(sources, "make", made)
        arguments = [part for value in [*settings, f"source.url=http://{HOST}"] for part in ("--set", value)]
        with pytest.raises(SystemExit):
            main(["build", "folder", *arguments, "--dry-run", "--json", "--out", str(tmp_path / "out")])
        facts = json.loads(capsys.readouterr().out)
        with pytest.raises(SystemExit):
            main(["build", "folder", *arguments, "--dry-run", "--out", str(tmp_path / "out")])
        assert not server.journal.paths["/data/1.jpg"]
    output = capsys.readouterr().out
    assert "30 to fetch, 0.0 MB announced, 1 of unknown size" in output
    assert "crawl: 32 file requests, 0:01:07 at the site's rate limit" in output
    assert (facts["listed"], facts["to_fetch"], facts["bytes_to_fetch"], facts["bytes_unknown"]) == (30, 30, 29_000, 1)
    assert facts["requests"] == 32  # with robots.txt and tdmrep.json
    assert 62 <= facts["seconds"] < 70
    assert not (tmp_path / "out").exists()
