"""Boorus as sources, end to end: listing, labels by tables, files, resuming, updates, credentials."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import animesion
from animesion import sources
from animesion.cli import main
from animesion.errors import AnimesionError, UsageError
from animesion.pipeline import runner
from animesion_sample.faults import LASTING, PASSING, FaultPlan, LocalServer, local_server
from animesion_sample.source import HOST
from animesion_sample.world import World
from tests import booru_dialects as dialects
from tests.booru_dialects import Entry, ZerochanTraps

from .crawling import raw

NAMES = ("gelbooru", "safebooru", "moebooru", "zerochan")
SETTINGS = ["source.contact=me@example.org", "source.requests_per_second=10"]


def entry(number: int, *characters: str, **changes: Any) -> Entry:
    tags = {"character": characters or ("hatsune_miku",), "artist": ("inkwell",), "general": ("solo",)}
    fields: dict[str, Any] = {"id": number, "tags": tags, "content": b"\xff\xd8\xff%d" % number, "extension": "jpg"}
    return Entry(**(fields | changes))


def label(name: str, tag: str) -> str:
    """A character tag as this source gives it."""
    return tag.replace("_", " ").title() if name == "zerochan" else tag


def recipe(name: str, *overrides: str, url: str = f"http://{HOST}") -> Any:
    user = ["source.username=Miku"] if name == "zerochan" else []
    return animesion.load_recipe(
        "folder", [f"source={{kind='{name}'}}", *SETTINGS, f"source.url={url}", *user, *overrides]
    )


@contextlib.contextmanager
def serving(
    name: str, posts: list[Entry], monkeypatch: pytest.MonkeyPatch, plan: FaultPlan | None = None, **settings: Any
) -> Iterator[LocalServer]:
    """Every source that is made while the block runs reaches the server under any name that the tests use."""
    original = sources.make
    with local_server(lambda: getattr(dialects, name)(posts, **settings), plan) as server:

        def made(recipe: Any) -> Any:
            source: Any = original(recipe)
            source.connect_to = dict.fromkeys((HOST, "gelbooru.com"), server.address)
            return source

        with monkeypatch.context() as patched:
            patched.setattr(sources, "make", made)
            yield server


def listed(name: str, *overrides: str, **settings: str) -> list[Any]:
    source: Any = sources.make(recipe(name, *overrides, **settings))
    with source.session():
        return list(source.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_build_fetches_the_listed_files_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Counter[str]
) -> None:
    posts = [
        entry(1), entry(2, "rin", rating="s"), entry(3, visible=False), entry(4, parent=2),
        entry(5, extension="mp4"), entry(6, rating="e"),
    ]  # fmt: skip
    with serving(name, posts, monkeypatch) as server:
        result = runner.run(recipe(name), tmp_path, workers=1, until="fetch")
        rows = raw(tmp_path)
        assert (result.seen, list(rows)) == (6, [f"{name}-{number}" for number in range(1, 7)])
        assert [row["reason"] for row in rows.values()] == ["", "", "not visible", "", "unsupported format", ""]
        assert rows[f"{name}-1"]["md5"] == posts[0].md5
        tar = (tmp_path / "raw" / "part-00000.tar").read_bytes()
        for row in rows.values():  # also where a digest was checked on the way and is not computed again
            content = tar[row["offset"] : row["offset"] + row["bytes"]]
            if not row["reason"]:
                assert row["md5"] == hashlib.md5(content).hexdigest()
                assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert rows[f"{name}-2"]["labels"] == [label(name, "rin")]
        assert rows[f"{name}-1"]["page_url"].startswith(f"http://{HOST}/")
        assert {row["licence"] for row in rows.values()} == {""}
        if name != "zerochan":
            assert "post:2" in rows[f"{name}-4"]["families"]
            assert [row["rating"] for row in rows.values()][1::4] == ["s", "e"]
        assert sorted(asked) == [f"{name}-{number}" for number in (1, 2, 4, 6)]

        asked.clear()
        requests = len(server.journal.queries)
        runner.run(recipe(name), tmp_path, workers=1, until="fetch")
        assert not asked
        assert len(server.journal.queries) == requests

        posts += [entry(7), entry(8)]
        assert runner.run(recipe(name), tmp_path, workers=1, until="fetch", update=True).seen == 8
        assert sorted(asked) == [f"{name}-7", f"{name}-8"]
        assert [row["order"] for row in raw(tmp_path).values()] == list(range(8))


@pytest.mark.parametrize("name", NAMES)
def test_ids_searches_and_limits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posts = [entry(number, "rin" if number % 2 else "len") for number in range(1, 8)]
    ids = tmp_path / "ids.txt"
    with serving(name, posts, monkeypatch):
        assert [item.source_id for item in listed(name, f"source.tags={label(name, 'rin')}")] == ["1", "3", "5", "7"]
        assert [item.source_id for item in listed(name, "source.limit=2")] == ["6", "7"]
        ids.write_text("5\n\n3\n99\n5\n")
        assert [item.source_id for item in listed(name, f"source.ids={ids}")] == ["3", "5"]
        source: Any = sources.make(recipe(name, f"source.ids={ids}"))
        with source.session():
            items = list(source.items())
            assert [item.source_id for item in source.items_after(items[0])] == ["5"]
            assert [payload.content for payload in source.read(items)] == [posts[2].content, posts[4].content]
        ids.write_text("5\nhello\n")
        with pytest.raises(UsageError, match=r"source\.ids: line 2 of .* is 'hello', not a post id"):
            listed(name, f"source.ids={ids}")
        with pytest.raises(UsageError, match=r"source\.ids: .*absent\.txt cannot be read"):
            listed(name, f"source.ids={tmp_path / 'absent.txt'}")


@pytest.mark.parametrize("name", [*NAMES, "danbooru"])
def test_labels_by_the_tables_of_aliases_and_implications(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"aliases": ("kagamine_rin", "rin"), "implications": ("rin_(append)", "rin")}
    options = []
    for option, (tag, other) in rows.items():
        path = tmp_path / f"{option}.jsonl"
        path.write_text(json.dumps({"antecedent_name": label(name, tag), "consequent_name": label(name, other)}))
        options.append(f"source.{option}={path}")
    posts = [entry(1, "kagamine_rin"), entry(2, "rin_(append)", "rin"), entry(3, "len", "rin")]
    expected = [("rin",), ("rin_(append)",), ("len", "rin")]
    general = [("rin",), ("rin",), ("len", "rin")]
    if name == "danbooru":
        source: Any = sources.make(recipe(name, *options))
        from animesion_scrapers import Post

        site: Any = _Given([Post(str(post.id), name, tags={"character": post.tags["character"]}) for post in posts])
        assert [source.candidates(post) for post in source.posts(site, "")] == expected
        return
    with serving(name, posts, monkeypatch):
        if name == "zerochan":  # one label an image, so that nothing is left for implications
            assert [item.labels for item in listed(name, *options)] == [("Rin",), ("Rin (Append)",), ("Len",)]
            return
        assert [item.labels for item in listed(name, *options)] == expected
        assert [item.labels for item in listed(name, *options, "source.implied=keep-general")] == general
        path.write_text('{"antecedent_name": "a", "consequent_name": "a"}\n{}')
        with pytest.raises(UsageError, match=r"source\.implications: line 2 of .* has no antecedent_name"):
            listed(name, *options)
    with pytest.raises(UsageError, match=r"source\.implied"):
        listed(name, "source.implied=neither")


@pytest.mark.parametrize("name", NAMES)
def test_items_have_their_tags_by_category_if_the_recipe_asks_for_tags(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {"character": ("rin",), "copyright": ("vocaloid",), "artist": ("inkwell",), "general": ("solo", "long_hair")}
    with serving(name, [entry(1, tags=tags)], monkeypatch):
        assert [item.tags for item in listed(name)] == [None]
        [item] = listed(name, 'tags.categories=["general"]')  # which ones are kept is decided after curate
    found = {category: sorted(names) for category, names in (item.tags or {}).items() if names}
    if name == "zerochan":  # which has no categories
        assert found == {"general": sorted(label(name, tag) for each in tags.values() for tag in each)}
    else:
        assert found == {category: sorted(names) for category, names in tags.items()}


class _Given:
    """A site with given posts."""

    def __init__(self, posts: list[Any]) -> None:
        self._posts = posts

    def posts(self, query: str, limit: int | None, newer_than: str) -> Iterator[Any]:
        return iter(self._posts)


def test_gelbooru_takes_its_key_from_the_environment_and_sends_it_to_no_other_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving("gelbooru", [entry(1)], monkeypatch, key=("39", "s3cret")) as server:
        at_home = recipe("gelbooru", url="http://gelbooru.com")
        with pytest.raises(AnimesionError, match=r"requires an API key .* set GELBOORU_USER_ID and GELBOORU_API_KEY"):
            runner.run(at_home, tmp_path / "out", workers=1, until="fetch")
        assert not server.journal.queries
        monkeypatch.setenv("GELBOORU_USER_ID", "39")
        monkeypatch.setenv("GELBOORU_API_KEY", "s3cret")
        assert runner.run(at_home, tmp_path / "out", workers=1, until="fetch").seen == 1
        files = [path for path in server.journal.queries if path.startswith("/images/")]
        assert files == ["/images/1/1.jpg"]
        with pytest.raises(AnimesionError, match="401 Unauthorized"):
            listed("gelbooru")
        assert [query for query in server.journal.queries if "s3cret" in query][-1] != server.journal.queries[-1]
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes()


def test_safebooru_takes_labels_from_a_file_where_the_site_has_no_categories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tmp_path / "characters.txt"
    names.write_text("rin\nhatsune_miku\n")
    posts = [entry(1), entry(2, "rin", "len")]
    with serving("safebooru", posts, monkeypatch, tag_info=False):
        assert [item.labels for item in listed("safebooru")] == [(), ()]
        found = listed("safebooru", f"source.characters={names}")
    assert [item.labels for item in found] == [("hatsune_miku",), ("rin",)]


def test_characters_of_a_file_are_character_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "characters.txt"
    path.write_text("rin\nlen\n")
    tags = {"general": ("solo", "rin"), "character": ()}
    with serving("safebooru", [entry(1, tags=tags)], monkeypatch, tag_info=False):
        [item] = listed("safebooru", f"source.characters={path}", 'tags.categories=["general"]')
    assert item.labels == ("rin",)
    assert {name: names for name, names in (item.tags or {}).items() if names} == {
        "general": ("solo",),
        "character": ("rin",),
    }


def test_zerochan_gets_the_user_in_every_request_and_requires_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traps = ZerochanTraps(aliases={"Miku": "Hatsune Miku"}, gone=frozenset({2}))
    with serving("zerochan", [entry(1), entry(2), entry(3, "rin")], monkeypatch, traps=traps) as server:
        runner.run(recipe("zerochan", "source.tags=Miku", "source.strict=true"), tmp_path, workers=1, until="fetch")
        assert [row["labels"] for row in raw(tmp_path).values()] == [["Hatsune Miku"]]
        agents = {headers["User-Agent"] for headers in server.journal.headers}
    assert len(agents) == 1
    assert agents.pop().endswith("(me@example.org) - Miku")
    with pytest.raises(UsageError, match=r"'source\.username' is missing"):
        sources.make(animesion.load_recipe("folder", ["source={kind='zerochan'}", *SETTINGS]))
    with pytest.raises(AnimesionError, match="User-Agent"):
        listed("zerochan", "source.username='  '")


@pytest.mark.parametrize("name", NAMES)
def test_files_that_misbehave_are_accounted_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posts = [entry(number) for number in range(1, 13)]
    kinds = ("404", "wrong md5", "empty", "500", "truncated")
    plan = FaultPlan(share=0.7, kinds=kinds, prefix="/images/")
    short = ["source.deadline=3", "source.stall=0.5"]
    with serving(name, posts, monkeypatch, plan):
        runner.run(recipe(name, *short), tmp_path, workers=1, until="fetch")
    fault = {f"{name}-{post.id}": plan.fault(f"/images/{post.id}/{post.id}.jpg") for post in posts}
    rows = raw(tmp_path)
    assert {key for key, row in rows.items() if row["sha256"]} == {
        key for key in fault if not fault[key] or fault[key] in PASSING
    }
    assert {fault[key] for key, row in rows.items() if row["reason"]} <= LASTING.keys()
    assert len(set(fault.values())) > 3


def test_a_listing_that_breaks_off_leaves_nothing_behind_and_the_next_run_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = FaultPlan(share=1.0, kinds=("403 challenge",), prefix="/post.json")
    with (
        serving("moebooru", [entry(1)], monkeypatch, plan),
        pytest.raises(AnimesionError, match=rf"^http://{HOST}: {HOST} answered 403 .* HTML challenge page"),
    ):
        runner.run(recipe("moebooru"), tmp_path, workers=1, until="fetch")
    with serving("moebooru", [entry(1)], monkeypatch):
        assert runner.run(recipe("moebooru"), tmp_path, workers=1, until="fetch").seen == 1


def test_drawn_posts_go_all_the_way_to_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(200)
    chosen = [post for post in world.posts if not post.trouble and len(post.characters) == 1][:24]
    posts = dialects.of_world(world, chosen)
    settings = ["classes.minimum=1", "crop.detector=none"]
    with serving("moebooru", posts, monkeypatch):
        result = runner.run(recipe("moebooru", *settings), tmp_path, workers=1)
    assert result.seen == len(posts)
    assert result.seen == result.kept + sum(result.dropped.values())
    assert result.kept > len(posts) // 2
    assert {row["labels"][0] for row in raw(tmp_path).values()} == {post.characters[0] for post in chosen}
    assert list(tmp_path.rglob("*.tar"))


def test_a_dry_run_and_the_listing_of_options_know_the_sites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["source={kind='moebooru'}", *SETTINGS, f"source.url=http://{HOST}"]
    settings = [part for value in arguments for part in ("--set", value)]
    with serving("moebooru", [entry(1), entry(2)], monkeypatch), pytest.raises(SystemExit):
        main(["build", "folder", *settings, "--dry-run", "--json", "--out", str(tmp_path / "out")])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["listed"], facts["to_fetch"], facts["bytes_to_fetch"]) == (2, 2, 8)
    assert not (tmp_path / "out").exists()
    for name in NAMES:
        with pytest.raises(SystemExit):
            main(["sources", name])
        output = capsys.readouterr().out
        assert "aliases" in output
        assert "implied" in output


@pytest.mark.parametrize("name", ["safebooru", "moebooru"])
def test_a_booru_on_loopback_is_crawled_when_it_is_named(name: str, tmp_path: Path) -> None:
    with local_server(lambda: getattr(dialects, name)([entry(1), entry(2)])) as server:
        url = f"http://127.0.0.1:{server.address[1]}"
        with pytest.raises(AnimesionError, match="not on the public internet"):
            listed(name, url=url)
        allowed = f"source.allow_private=['127.0.0.1:{server.address[1]}']"
        runner.run(recipe(name, allowed, url=url), tmp_path, workers=1, until="fetch")
        assert [row["reason"] for row in raw(tmp_path).values()] == ["", ""]
    with pytest.raises(UsageError, match="allow_private accepts host:port"):
        sources.make(recipe(name, "source.allow_private=['127.0.0.1']"))
