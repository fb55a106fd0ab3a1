"""Sources of plants, end to end: listing, labels, licences, files, resuming, updates, Wikidata."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import animesion
from animesion import sources
from animesion.cli import main
from animesion.errors import AnimesionError, UsageError
from animesion.pipeline import runner
from animesion_sample.faults import LASTING, PASSING, FaultPlan, LocalServer, local_server
from animesion_sample.source import HOST
from tests import flora
from tests.flora import Plant, Wiki, plants, wiki_of

from .crawling import raw

NAMES = ("commons", "gbif", "inaturalist")
SETTINGS = ["source.contact=me@example.org", "source.requests_per_second=10"]
WIKIDATA = "query.wikidata.org"


def recipe(name: str, *overrides: str, base: str = "folder") -> Any:
    taxon = "source.category=Plants" if name == "commons" else "source.taxon=Rosa"
    url = f"source.url=http://{HOST}"
    return animesion.load_recipe(base, [f"source={{kind='{name}'}}", *SETTINGS, url, taxon, *overrides])


@contextlib.contextmanager
def serving(
    name: str, found: list[Plant], monkeypatch: pytest.MonkeyPatch, plan: FaultPlan | None = None
) -> Iterator[LocalServer]:
    """Every source that is made while the block runs reaches the server."""
    original = sources.make
    application = (lambda: flora.commons(wiki_of(found))) if name == "commons" else lambda: getattr(flora, name)(found)
    with local_server(application, plan) as server:

        def made(recipe: Any) -> Any:
            source: Any = original(recipe)
            source.connect_to = {HOST: server.address}
            return source

        with monkeypatch.context() as patched:
            patched.setattr(sources, "make", made)
            yield server


def roses(count: int, **changes: Any) -> list[Plant]:
    fields: dict[str, Any] = {"cultivar": "Peace"} | changes
    return [Plant(**({"id": number} | fields)) for number in range(1, count + 1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_build_fetches_the_listed_files_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Counter[str]
) -> None:
    found = [*roses(3), Plant(4, cultivar="Iceberg", photos=2, licence="cc-by-nc")]
    with serving(name, found, monkeypatch) as server:
        result = runner.run(recipe(name), tmp_path, workers=1, until="fetch")
        rows = list(raw(tmp_path).values())
        several = name != "commons"
        assert result.seen == 4 + several
        assert {row["reason"] for row in rows} == {""}
        labels = [row["labels"] for row in sorted(rows, key=lambda row: row["order"])]
        if name == "inaturalist":
            assert labels == [["Rosa gallica"]] * 5
        else:
            assert labels == [["Rosa gallica 'Peace'"]] * 3 + [["Rosa gallica 'Iceberg'"]] * (1 + several)
        assert {row["author"] for row in rows} == {"Ada Green" if several else "Ada Green & friends"}
        assert all(row["licence"].startswith("CC-BY") for row in rows)
        assert all(row["page_url"].startswith("http") for row in rows)
        if several:  # photos of one plant on one day stay together
            assert all("post:4" in row["families"] for row in rows if row["source_id"].startswith("4-"))
        assert len(asked) == 4 + several

        asked.clear()
        requests = len(server.journal.queries)
        runner.run(recipe(name), tmp_path, workers=1, until="fetch")
        assert not asked
        assert len(server.journal.queries) == requests

        found.append(Plant(7, cultivar="Peace"))
        assert runner.run(recipe(name), tmp_path, workers=1, until="fetch", update=True).seen == 5 + several
        assert len(asked) == 1
        assert [row["order"] for row in raw(tmp_path).values()] == list(range(5 + several))


@pytest.mark.parametrize("name", NAMES)
def test_licences_are_filtered_before_a_file_is_requested(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Counter[str]
) -> None:
    licences = ["cc0", "cc-by", "cc-by-sa", "cc-by-nc", ""]
    found = [Plant(number, cultivar="Peace", licence=each) for number, each in enumerate(licences, 1)]
    with serving(name, found, monkeypatch):
        only = recipe(name, 'filter.licences=["CC0", "CC-BY"]')
        runner.run(only, tmp_path, workers=1, until="fetch")
    reasons = [row["reason"] for row in sorted(raw(tmp_path).values(), key=lambda row: row["order"])]
    assert reasons == ["", "", "licence", "licence", "licence"]
    assert len(asked) == 2


@pytest.mark.parametrize("name", NAMES)
def test_files_that_misbehave_are_accounted_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = FaultPlan(share=0.6, kinds=(*LASTING, *PASSING), prefix="/photos/", seed=4)
    quick = ["source.deadline=1.5", "source.stall=0.4", "source.max_bytes=100000"]
    with serving(name, roses(12), monkeypatch, plan):
        result = runner.run(recipe(name, *quick), tmp_path, workers=1, until="fetch")
        rows = raw(tmp_path)
    assert len(rows) == result.seen == 12
    assert 0 < sum(not row["reason"] for row in rows.values()) < 12
    assert all(row["reason"] or row["sha256"] for row in rows.values())


def test_taxa_of_wikidata_lead_to_categories_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Plant(number, cultivar=name) for number, name in enumerate(["Anna", "Bella", "Clara", "Dora"] * 2, 1)]
    with local_server(lambda: flora.commons(Wiki(found))) as server:
        made = sources.make

        def reaching(recipe: Any) -> Any:
            source: Any = made(recipe)
            source.connect_to = {HOST: server.address, WIKIDATA: server.address}
            return source

        monkeypatch.setattr(sources, "make", reaching)
        service = f"source.wikidata_url=http://{WIKIDATA}"
        source: Any = sources.make(recipe("commons", service, "source.category=", "source.wikidata=Q34687"))
        with source.session():
            items = list(source.items())
            newer = list(source.items_after(items[2]))
        # the third cultivar has an image and no category: one of its two is known
        assert [(item.source_id, item.labels[0]) for item in items] == [
            (str(plant.id), plant.name) for plant in found if plant.id != 7
        ]
        assert [item.source_id for item in newer] == ["4", "5", "6", "8"]
        assert "3 cultivars of Q34687 with a category on Commons and 1 with only an image" in source.notes[0]
        empty = sources.make(recipe("commons", service, "source.category=", "source.wikidata=Q1"))
        with empty.session(), pytest.raises(UsageError, match="have no results"):
            list(empty.items())
        wrong = sources.make(recipe("commons", service, "source.category=", "source.wikidata=Rosa"))
        with wrong.session(), pytest.raises(AnimesionError, match="'Rosa' is not an item of Wikidata"):
            list(wrong.items())


def test_cultivars_go_all_the_way_to_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plants(60)
    overrides = ["filter.min_side=32", "classes.minimum=2", "duplicates.near=false"]
    with serving("commons", found, monkeypatch):
        result = runner.run(recipe("commons", *overrides, base="cultivar"), tmp_path, workers=1)
    allowed = [plant for plant in found if plant.licence in {"cc0", "cc-by", "cc-by-sa"}]
    assert result.kept == len(allowed)
    assert result.dropped["licence"] == 60 - len(allowed)
    dataset = animesion.open_dataset(tmp_path)
    assert {each.name for each in dataset.classes} == {plant.name for plant in allowed}
    index = pq.read_table(tmp_path / "index.parquet").to_pylist()
    assert len(index) == len(allowed)


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_invalid_values_are_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "source.category=Nonsense" if name == "commons" else "source.taxon=Rosa galica"
    with serving(name, roses(2), monkeypatch):
        with pytest.raises(AnimesionError, match=r"nothing in Category:Nonsense|no taxon .*Rosa galica"):
            runner.run(recipe(name, wrong), tmp_path / "none", workers=1, until="fetch")
        arguments = [part for value in recipe_arguments(name) for part in ("--set", value)]
        with pytest.raises(SystemExit):
            main(["build", "folder", *arguments, "--dry-run", "--json", "--out", str(tmp_path / "out")])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["listed"], facts["to_fetch"]) == (2, 2)
    assert not (tmp_path / "out").exists()


def recipe_arguments(name: str) -> list[str]:
    taxon = "source.category=Plants" if name == "commons" else "source.taxon=Rosa"
    return [f"source={{kind='{name}'}}", *SETTINGS, f"source.url=http://{HOST}", taxon]
