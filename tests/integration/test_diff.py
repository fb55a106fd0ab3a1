"""`animesion diff` and `animesion card` on real builds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

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
    assert "samples removed: 11" in result.stdout
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


ROWS = {
    "train": [(0, 1001), (0, 1002), (0, 1003), (1, 2001), (1, 2002), (1, 2003)],
    "val": [(0, 1004), (1, 2004)],
    "test": [(0, 1005), (1, 2005)],
}


def write_label_files(folder: Path, rows: dict[str, list[tuple[int, int]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classid_classname.csv").write_text("class_id,class_name\n0,rin\n1,miku\n")
    for split, images in rows.items():
        paths = [f"{class_id},{post % 1000:04d}/{post}.png\n" for class_id, post in images]
        (folder / f"{split}.csv").write_text("class_id,dir\n" + "".join(paths))
    return folder


@pytest.fixture(scope="module")
def published_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Label files and a build of them."""
    root = tmp_path_factory.mktemp("published")
    labels = write_label_files(root / "labels", ROWS)
    for _, post in [row for rows in ROWS.values() for row in rows]:
        path = root / "faces" / f"{post % 1000:04d}" / f"{post}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(post).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    recipe = animesion.load_recipe("daf-re-published", [f"source.labels={labels}", f"source.images={root / 'faces'}"])
    assert "rios2021dafre" in recipe.card.citation
    animesion.build(recipe, root / "out", workers=1)
    return labels, root / "out"


def test_a_build_agrees_with_its_label_files(published_build: tuple[Path, Path]) -> None:
    labels, out = published_build
    document = difference(labels, out)
    assert document["identical"]
    assert [total["before"] for total in document["totals"]] == ["6", "2", "2", "10"]
    result = CliRunner().invoke(diff, [str(labels), str(out)])
    assert (result.exit_code, result.stdout) == (0, "identical: 10 samples\n")
    # one split alone
    document = difference(labels / "test.csv", out)
    assert document["identical"]
    assert document["totals"][-1] == {"what": "total", "before": "2", "after": "2"}


def test_other_label_files_differ_in_named_images(published_build: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = published_build
    other = write_label_files(
        tmp_path / "labels",
        {
            "train": [(0, 1001), (0, 1002), (0, 1004), (1, 1003), (1, 2001), (1, 2002)],
            "val": [(1, 2004)],
            "test": [(0, 1005), (1, 2005), (1, 3001)],
        },
    )
    document = difference(other, out)
    assert differing(document) == {"counts", "missing", "extra", "relabelled", "moved"}
    assert document["missing"] == [{"what": "3001", "before": "miku, test", "after": "not in the dataset"}]
    assert document["extra"] == [{"what": "2003", "before": "", "after": "miku, train"}]
    assert document["relabelled"] == [{"what": "1003", "before": "miku", "after": "rin"}]
    assert document["moved"] == [{"what": "1004", "before": "train", "after": "val"}]
    assert {change["what"]: (change["before"], change["after"]) for change in document["counts"]} == {
        "rin, val": ("", "1"),
        "miku, test": ("2", "1"),
    }
    result = CliRunner().invoke(diff, [str(other), str(out)])
    assert result.exit_code == 1
    assert "published images missing in the dataset: 1\n  3001: miku, test -> not in the dataset" in result.stdout
    assert "samples: train 6, val 1 -> 2, test 3 -> 2, total 10" in result.stdout


def test_classes_by_name_and_dropped_images(published_build: tuple[Path, Path], tmp_path: Path) -> None:
    labels, out = published_build
    swapped = write_label_files(tmp_path / "labels", ROWS)
    (swapped / "classid_classname.csv").write_text("0,miku\n1,luka\n")
    document = difference(swapped, out)
    assert [(c["what"], c["before"], c["after"]) for c in document["classes"]] == [
        ("luka", "1", ""),
        ("miku", "0", "1"),
        ("rin", "", "0"),
    ]
    assert len(document["relabelled"]) == 10
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("raw", "features", "pack", ".receipts"))
    rows = pq.read_table(copy / "curated.parquet").to_pylist()
    [row] = [row for row in rows if row["source_id"] == "2005"]
    row |= {"kept": False, "reason": "too small", "split": "", "class_id": -1}
    parquet.write(copy / "curated.parquet", parquet.table(rows, CURATED))
    document = difference(labels, copy)
    assert document["missing"] == [{"what": "2005", "before": "miku, test", "after": "too small"}]
    (tmp_path / "labels" / "train_val.csv").write_text("0,a.png\n")
    with pytest.raises(UsageError, match=r"contains train.csv and train_val.csv; give one of them"):
        CliRunner().invoke(diff, [str(tmp_path / "labels"), str(out)], catch_exceptions=False)


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
