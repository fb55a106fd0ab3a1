"""Families by name across splits are found by `verify` and by a build against a published dataset, from any source."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

import animesion
from animesion import sources
from animesion.cli import main
from animesion.config.recipe import Recipe
from animesion_sample.faults import LocalServer, local_server
from tests.conftest import draw

HOST = "one.invalid"
SPLITS = ("train", "val", "test")


def png(number: int) -> bytes:
    out = io.BytesIO()
    draw(number, 96).save(out, "PNG")
    return out.getvalue()


def application() -> web.Application:
    async def file(request: web.Request) -> web.Response:
        number = int("".join(filter(str.isdecimal, request.match_info["name"]))[-4:])
        return web.Response(body=png(number), content_type="image/png")

    app = web.Application()
    app.router.add_get("/{name}.png", file)
    return app


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    with local_server(application) as running:
        original = sources.make

        def made(recipe: Any) -> Any:
            source: Any = original(recipe)
            source.connect_to = {HOST: running.address}
            return source

        monkeypatch.setattr(sources, "make", made)
        yield running


def from_urls(folder: Path, rows: list[tuple[str, str]]) -> Recipe:
    """A recipe for images of one class with these names and splits."""
    folder.mkdir()
    lines = [f"http://{HOST}/{name}.png,miku,{split}" for name, split in rows]
    (folder / "urls.csv").write_text("\n".join(["url,label,split", *lines]))
    settings = [f"source.path={folder / 'urls.csv'}", "source.contact=me@example.org", "split.strategy=published"]
    return animesion.load_recipe("urls", [*settings, "source.requests_per_second=10", "source.robots=false"])


def from_parquet(folder: Path, rows: list[tuple[str, str]]) -> Recipe:
    folder.mkdir()
    for split in SPLITS:
        names = [name for name, each in rows if each == split]
        images = [
            {"bytes": png(int("".join(filter(str.isdecimal, name))[-4:])), "path": f"{name}.png"} for name in names
        ]
        pq.write_table(pa.table({"image": images, "label": ["miku"] * len(names)}), folder / f"{split}.parquet")
    settings = ["source.kind=parquet", f"source.path={json.dumps(str(folder))}", "split.strategy=published"]
    return animesion.load_recipe("folder", settings)


@pytest.mark.parametrize("listing", [from_urls, from_parquet])
def test_pages_of_works_in_several_splits(
    listing: Any, server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [(f"90001{number}_p0", SPLITS[number % 3]) for number in range(10, 16)]
    moved = [(f"90001{number}_p1", SPLITS[(number + 1) % 3]) for number in range(10, 16)]
    animesion.build(listing(tmp_path / "a", old), tmp_path / "first", workers=1)
    both = listing(tmp_path / "b", [*old, *moved])
    both = both.model_copy(update={"duplicates": both.duplicates.model_copy(update={"action": "report"})})
    animesion.build(both, tmp_path / "both", workers=1)
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "both")])
    said = capsys.readouterr().out
    assert "same family by name" in said
    split = both.split.model_copy(update={"strategy": "grouped"})
    animesion.build(both.model_copy(update={"split": split}), tmp_path / "grouped", workers=1)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path / "grouped")])
    assert ended.value.code == 0
    against = listing(tmp_path / "c", moved)
    duplicates = against.duplicates.model_copy(update={"against": [str(tmp_path / "first")]})
    against = against.model_copy(update={"duplicates": duplicates})
    notes = animesion.build(against, tmp_path / "second", workers=1).notes
    [note] = [note for note in notes if "in another split" in note]
    assert note.startswith("6 images are from posts, works or files that")
