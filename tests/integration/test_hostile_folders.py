"""A build folder of a stranger: nothing outside it is read, written or removed, and each fault is one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import animesion
from animesion import publishing
from animesion.config.recipe import Recipe
from animesion.errors import UsageError
from animesion.publishing import urls
from animesion.schemas import FEATURES, INDEX, PLAN
from animesion.storage import names, parquet, receipts
from animesion.storage.workspace import Workspace
from tests.conftest import draw

NOTHING = {"sha256": "0" * 64, "bytes": 0, "mtime_ns": 0}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A finished build of twelve images, and its recipe."""
    root = tmp_path_factory.mktemp("built")
    for number in range(12):
        path = root / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(path)
    recipe = animesion.load_recipe("folder", [f"source.path={root / 'images'}", "classes.minimum=1"])
    animesion.build(recipe, root / "out", workers=1)
    return root / "out", recipe


@pytest.fixture
def stranger(built: tuple[Path, Recipe], tmp_path: Path) -> tuple[Path, Recipe]:
    """A copy of the build, beside a file that must stay as it is."""
    shutil.copytree(built[0], tmp_path / "out")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "train-00009.tar").write_text("precious")
    (tmp_path / "victim").write_text("precious")
    return tmp_path / "out", built[1]


def rebuilt(folder: Path, recipe: Recipe) -> None:
    """Build again in the folder: the dataset is as good as new, or the build is refused in a sentence."""
    refused = ""
    try:
        kept = animesion.build(recipe, folder, workers=1).kept
    except UsageError as error:
        refused = str(error)
    assert "\n" not in refused
    assert refused or (kept == len(list(animesion.open_dataset(folder).samples())) == 12)
    assert (folder.parent / "victim").read_text() == "precious"
    assert (folder.parent / "home" / "train-00009.tar").read_text() == "precious"


def receipt(unit: str, outputs: object, facts: object = None) -> str:
    content = {"unit": unit, "code": "", "params": "", "inputs": {}, "outputs": outputs, "facts": facts or {}}
    return json.dumps(content)


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


@pytest.mark.parametrize(
    "name",
    [
        "../victim",
        "ABSOLUTE",
        "data/../../victim",
        "recipe.toml",
        "dataset.json",
        "./recipe.toml",
        "data/train-00000.tar",
    ],
)
def test_receipts_remove_no_files_but_their_own(stranger: tuple[Path, Recipe], name: str) -> None:
    folder, recipe = stranger
    name = str(folder.parent / "victim") if name == "ABSOLUTE" else name
    unit = "inspect/part-00009"
    for facts in ({}, {"crashed": [], "detections": ""}):
        (folder / f".receipts/{unit}.json").write_text(receipt(unit, {name: NOTHING}, facts))
        workspace = Workspace(folder)
        assert workspace.receipt(unit) is None
        workspace.forget("inspect", {"inspect/part-00000"})
        assert not (folder / f".receipts/{unit}.json").exists()
        assert (folder / "recipe.toml").exists()
        assert (folder / "data/train-00000.tar").exists()
    rebuilt(folder, recipe)


def piped(path: Path) -> None:
    """A named pipe, on which a reader would wait for ever, in place of a file."""
    path.unlink()
    os.mkfifo(path)


def linked(path: Path, target: Path) -> None:
    """A link in place of a file or folder."""
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "outputs are a list": lambda f: edited(f / ".receipts/fetch/part-00000.json", outputs=[1, 2]),
    "outputs are numbers": lambda f: edited(f / ".receipts/fetch/part-00000.json", outputs={"raw/part-00000.tar": 7}),
    "no outputs": lambda f: edited(f / ".receipts/curate.json", outputs={}),
    "no facts": lambda f: edited(f / ".receipts/curate.json", facts={}),
    "facts of other types": lambda f: edited(
        f / ".receipts/fetch/part-00000.json", facts={"items": "many", "fetched": None, "bytes": []}
    ),
    "negative numbers": lambda f: edited(
        f / ".receipts/fetch/part-00000.json", facts={"items": -5, "fetched": 0, "bytes": 0}
    ),
    "huge numbers": lambda f: edited(
        f / ".receipts/fetch/part-00000.json", facts={"items": 2**70, "fetched": 0, "bytes": 0}
    ),
    "deep": lambda f: (f / ".receipts/curate.json").write_text("[" * 100_000),
    "a deep marker": lambda f: (f / ".receipts/recipe.json").write_text("[" * 100_000),
    "a pipe": lambda f: piped(f / ".receipts/curate.json"),
    "a pipe as output": lambda f: piped(f / "curated.parquet"),
    "a linked folder": lambda f: linked(f / "data", f.parent / "home"),
    "a linked lock": lambda f: linked(f / ".receipts/lock", f.parent / "victim"),
    "a linked ledger": lambda f: linked(f / ".crawl/ledger.sqlite", f.parent / "victim"),
    "a linked table": lambda f: linked(f / "curated.parquet", f.parent / "victim"),
    "a table that is none": lambda f: replaced(f, b"junk"),
    "a table of other columns": lambda f: replaced(f, table_bytes(pa.table({"a": [1]}))),
}


def table_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def replaced(folder: Path, content: bytes) -> None:
    """Replace a table, with a receipt that says that it is the one."""
    path = folder / "raw/part-00000.parquet"
    path.write_bytes(content)
    known = json.loads((folder / ".receipts/fetch/part-00000.json").read_bytes())["outputs"]
    known["raw/part-00000.parquet"] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "mtime_ns": path.stat().st_mtime_ns,
    }
    edited(folder / ".receipts/fetch/part-00000.json", outputs=known)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_folders_are_built_again_or_refused(
    stranger: tuple[Path, Recipe], damage: Callable[[Path], object]
) -> None:
    folder, recipe = stranger
    damage(folder)
    rebuilt(folder, recipe)


def test_every_receipt_of_a_build_is_read_again(built: tuple[Path, Recipe]) -> None:
    folder, _ = built
    found = [path for path in (folder / ".receipts").rglob("*.json") if path.name != "recipe.json"]
    units = [str(path.relative_to(folder / ".receipts").with_suffix("")) for path in found]
    assert {unit.partition("/")[0] for unit in units} == {
        *("plan", "fetch", "inspect", "compare", "curate", "shards", "index", "plots", "thumbnails", "finalize")
    }
    for unit, path in zip(units, found, strict=True):
        assert receipts.parse(unit, path.read_bytes()), unit
        assert receipts.parse(unit + "0", path.read_bytes()) is None


@pytest.mark.parametrize(
    ("column", "value"),
    [("key", "../x"), ("key", ""), ("key", None), ("key", "a" * 91), ("shard", "data/../x.tar"),
     ("shard", "/etc/passwd"), ("offset", -1), ("size", -1), ("sample_offset", -(2**63))],
)  # fmt: skip
def test_tables_with_names_and_places_outside_are_refused(tmp_path: Path, column: str, value: object) -> None:
    row: dict[str, Any] = {"key": "a-1", "split": "train", "shard": "data/train-00000.tar", "sha256": ""}
    row |= dict.fromkeys(("offset", "size", "label", "sample_offset", "sample_size"), 0)
    parquet.write(tmp_path / "good.parquet", parquet.table([row], INDEX))
    assert len(parquet.read(tmp_path / "good.parquet", INDEX)) == 1
    parquet.write(tmp_path / "bad.parquet", parquet.table([row | {column: value}], INDEX))
    with pytest.raises(parquet.DamagedTableError, match=rf"is damaged \(column {column}\): build again into another"):
        parquet.read(tmp_path / "bad.parquet", INDEX)


def test_tables_with_missing_values_are_refused(tmp_path: Path) -> None:
    parquet.write(tmp_path / "f.parquet", parquet.table([{"key": "a", "reason": "", "width": None}], FEATURES))
    with pytest.raises(parquet.DamagedTableError, match="column width"):
        parquet.read(tmp_path / "f.parquet", FEATURES, ("key", "reason", "crop", "width"))
    parquet.write(tmp_path / "f.parquet", parquet.table([{"key": "a", "reason": "corrupt image"}], FEATURES))
    assert len(parquet.read(tmp_path / "f.parquet", FEATURES)) == 1
    parquet.write(tmp_path / "p.parquet", parquet.table([{"key": "a", "locator": "{}"}], PLAN))
    with pytest.raises(parquet.DamagedTableError, match="column source"):
        parquet.read(tmp_path / "p.parquet", PLAN)


def test_repeated_keys_and_huge_numbers_are_refused(stranger: tuple[Path, Recipe]) -> None:
    folder, _ = stranger
    for name in ("curated.parquet", "index.parquet"):
        table = pq.read_table(folder / name)
        pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), folder / name)
        with pytest.raises(UsageError, match=r"parquet is damaged \(a key occurs twice\)"):
            animesion.open_dataset(folder).read_table(name)
    facts = json.loads((folder / "dataset.json").read_bytes())
    facts["splits"]["train"]["samples"] = 2**70
    (folder / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"dataset\.json is damaged \(splits\.train\.samples"):
        animesion.open_dataset(folder)


@pytest.mark.parametrize("name", ["classes.csv", "plots/lorenz.png", "data/train-00000.tar", "recipe.toml", "plots"])
@pytest.mark.parametrize("inside", [True, False])
def test_publish_follows_no_link(stranger: tuple[Path, Recipe], tmp_path: Path, name: str, inside: bool) -> None:
    folder, _ = stranger
    elsewhere = tmp_path / "out" / "copy" if inside else tmp_path / "copy"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(UsageError, match=rf"{name} is a link, and links are not followed"):
        publishing.files_of(folder)
    with pytest.raises(UsageError, match=rf"{name} is a link, and links are not followed"):
        urls.write(animesion.open_dataset(folder), tmp_path / "home")
    assert len(list((tmp_path / "home").iterdir())) == 1


def test_names_that_lead_out_of_a_folder() -> None:
    for good in ("a", "data/train-00000.tar", "a/b/c.d-e_f", "plots/x.jpg"):
        assert names.is_path(good)
    for bad in ("", "/a", "../a", "a/../b", "a//b", ".hidden", "a/.b", "a\n", "a\0", "a/", "~", "C:\\a", "a b"):
        assert not names.is_path(bad)
