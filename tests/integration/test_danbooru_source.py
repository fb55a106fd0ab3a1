"""The crawler as a source, against the sample world's server: searches, published ids, what is not asked for twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import animesion
import animesion_scrapers
from animesion import sources
from animesion.errors import AnimesionError, UsageError
from animesion.sample.server import SampleServer, serve
from animesion.sample.source import HOST
from animesion.sample.world import World


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
    with pytest.raises(UsageError, match=r"entry 2 .* is 'hello'"):
        list(danbooru(server, f"source.ids={tmp_path / 'ids.txt'}").items())


def test_searches_and_limits(server: SampleServer) -> None:
    source = danbooru(server, "source.tags=rating:q", "source.limit=5")
    with source.session():
        items = list(source.items())
    assert len(items) == 5
    assert {item.rating for item in items} == {"q"}
    with source.session(), pytest.raises(AnimesionError, match="tags"):
        list(danbooru(server, "source.tags=one two three").items())


def test_a_changed_rule_asks_the_site_for_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = animesion_scrapers.download_all

    def counting(requests: Iterable[Any], **options: Any) -> Any:
        requests = list(requests)
        asked.extend(request.key for request in requests if request.key != "table")
        return original(requests, **options)

    monkeypatch.setattr(animesion_scrapers, "download_all", counting)
    small = ["source.posts=200", "classes.minimum=3"]
    animesion.build(animesion.load_recipe("daf-re", small, sample=True), tmp_path, workers=1, until="curate")
    first = set(asked)
    asked.clear()
    # ratings q and e come in: only what was passed over before is fetched now
    wider = animesion.load_recipe("daf-re", [*small, "filter.ratings=[]"], sample=True)
    animesion.build(wider, tmp_path, workers=1, until="curate", replace=True)
    assert first
    assert asked
    failed = {row["key"] for row in _rows(tmp_path) if row["sha256"] == ""}
    assert not set(asked) & (first - failed)


def _rows(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(out / "curated.parquet").to_pylist()
    return rows
