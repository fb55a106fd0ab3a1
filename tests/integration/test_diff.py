"""`animesion diff` and `animesion card` on real builds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import animesion
from animesion.cli.diff import diff
from animesion.errors import UsageError
from animesion.schemas import CURATED, INDEX
from animesion.storage import parquet
from animesion_training.cli.card import card


def difference(before: Path, after: Path) -> dict[str, Any]:
    result = CliRunner().invoke(diff, [str(before), str(after), "--json"], catch_exceptions=False)
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if document["identical"] else 1)
    return document


def differing(document: dict[str, Any]) -> set[str]:
    return {name for name, value in document.items() if name not in ("a", "b", "identical", "totals") and value}


@pytest.fixture
def folder(small_dataset: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy, ignore=shutil.ignore_patterns("raw", "features", "pack", ".receipts"))
    return copy


def rebuild(small_dataset: Path, out: Path, *overrides: str) -> Path:
    animesion.build(animesion.load_recipe(str(small_dataset / "recipe.toml"), list(overrides)), out, workers=1)
    return out


def test_the_same_build_twice_is_identical(small_dataset: Path, tmp_path: Path) -> None:
    again = rebuild(small_dataset, tmp_path / "again")
    document = difference(small_dataset, again)
    assert document["identical"]
    assert not differing(document)
    result = CliRunner().invoke(diff, [str(small_dataset), str(again)])
    assert (result.exit_code, result.stdout) == (0, "identical: 37 samples\n")


def test_another_recipe(small_dataset: Path, tmp_path: Path) -> None:
    other = rebuild(
        small_dataset, tmp_path / "other", "classes.minimum=12", "pack.quality=60", 'label.rename={"初音ミク"="miku"}'
    )
    document = difference(small_dataset, other)
    values = {change["what"]: (change["before"], change["after"]) for change in document["recipe"]}
    assert values == {
        "classes.minimum": ("1", "12"),
        "label.rename.初音ミク": ("", "'miku'"),
        "pack.quality": ("95", "60"),
    }
    assert {change["what"] for change in document["classes"]} >= {"plain (blue) & co", "初音ミク", "miku"}
    assert len(document["removed"]) == 11
    assert document["added"] == []
    assert {(change["before"], change["after"]) for change in document["reasons"]} == {("kept", "rare class")}
    assert sorted(change["what"] for change in document["reasons"]) == document["removed"]
    assert {(change["before"], change["after"]) for change in document["relabelled"]} == {("初音ミク", "miku")}
    assert len(document["relabelled"]) == 14
    assert document["repainted"]
    assert document["totals"][-1] == {"what": "total", "before": "37", "after": "26"}

    back = difference(other, small_dataset)
    assert back["added"] == document["removed"]
    result = CliRunner().invoke(diff, [str(small_dataset), str(other)])
    assert result.exit_code == 1
    assert "11 samples removed" in result.stdout
    assert "and 6 more (--json prints all)" in result.stdout
    assert "classes.minimum: 1 -> 12" in result.stdout
    assert "total 37 -> 26" in result.stdout


def test_moved_and_repainted_samples(small_dataset: Path, folder: Path) -> None:
    rows = animesion.open_dataset(folder).index.to_pylist()
    rows[0] |= {"split": "test"}
    rows[1] |= {"sha256": "0" * 64}
    parquet.write(folder / "index.parquet", parquet.table(rows, INDEX))
    document = difference(small_dataset, folder)
    assert differing(document) == {"moved", "repainted"}
    assert document["moved"] == [{"what": rows[0]["key"], "before": "train", "after": "test"}]
    assert [change["what"] for change in document["repainted"]] == [rows[1]["key"]]


def test_reasons_differ(small_dataset: Path, folder: Path) -> None:
    rows = pq.read_table(folder / "curated.parquet").to_pylist()
    rows[0] |= {"kept": False, "reason": "near duplicate"}
    parquet.write(folder / "curated.parquet", parquet.table(rows, CURATED))
    document = difference(small_dataset, folder)
    assert document["reasons"] == [{"what": rows[0]["key"], "before": "kept", "after": "near duplicate"}]


def test_shards_that_differ_in_nothing_else(small_dataset: Path, folder: Path) -> None:
    facts = json.loads((folder / "dataset.json").read_bytes())
    facts["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    (folder / "dataset.json").write_text(json.dumps(facts))
    document = difference(small_dataset, folder)
    assert differing(document) == {"shards"}
    assert not document["identical"]


def test_no_dataset_is_wrong_usage(small_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        CliRunner().invoke(diff, [str(small_dataset), str(tmp_path)], catch_exceptions=False)


def test_card_is_the_published_one(small_dataset: Path, tmp_path: Path) -> None:
    published = (small_dataset / "README.md").read_text(encoding="utf-8")
    result = CliRunner().invoke(card, [str(small_dataset)], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, published)
    out = tmp_path / "card.md"
    result = CliRunner().invoke(card, [str(small_dataset), "--out", str(out)], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, "")
    assert out.read_text(encoding="utf-8") == published


def test_card_of_a_damaged_dataset(folder: Path) -> None:
    facts = json.loads((folder / "dataset.json").read_bytes())
    del facts["long_tail"]
    (folder / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="lacks values of the card"):
        CliRunner().invoke(card, [str(folder)], catch_exceptions=False)
