"""Every built-in recipe runs from end to end without a network, and gives what its drawn collection contains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import animesion
from animesion.config.recipe import builtin_names
from animesion.errors import UsageError
from animesion.verification.checks import verify
from animesion_sample.benchmarks import WRITERS
from animesion_sample.collections import SampleFilesOptions, write
from animesion_sample.leaves import STAGES, DrawnLeaf, render

from .conftest import shard_digests

#: Overrides that keep a build small; what each recipe must come to: images seen, splits, classes, split strategy.
SETS: dict[str, tuple[list[str], int, dict[str, int], int, str]] = {
    "cotton80": (["source.classes=5"], 30, {"train": 15, "test": 15}, 5, "published"),
    "soy-local": (["source.classes=4"], 24, {"train": 12, "test": 12}, 4, "published"),
    "soy-global": (["source.classes=6"], 36, {"train": 18, "test": 18}, 6, "published"),
    "soy-gene": (["source.classes=3"], 53, {"train": 26, "test": 27}, 3, "published"),
    "soy-ageing": (["source.classes=2"], 100, {"train": 50, "test": 50}, 2, "published"),
    "cub-200-2011": (["source.classes=3"], 23, {"train": 12, "test": 11}, 3, "published"),
    "stanford-cars": (["source.classes=3"], 23, {"train": 12, "test": 11}, 3, "published"),
    "fgvc-aircraft": (["source.classes=3"], 29, {"train": 12, "val": 6, "test": 11}, 3, "published"),
    "stanford-dogs": (["source.classes=3"], 23, {"train": 12, "test": 11}, 3, "published"),
    "flowers-102": (["source.classes=3"], 29, {"train": 12, "val": 6, "test": 11}, 3, "published"),
    "oxford-pets": (["source.classes=3"], 23, {"train": 12, "test": 11}, 3, "published"),
    "food-101": (["source.classes=3"], 23, {"train": 12, "test": 11}, 3, "published"),
    "nabirds": (["source.classes=3"], 23, {"train": 12, "test": 11}, 3, "published"),
    "vegfru": (["source.classes=3"], 29, {"train": 12, "val": 6, "test": 11}, 3, "published"),
    "inaturalist-2017": (["source.classes=3"], 18, {"train": 12, "val": 6}, 3, "published"),
    "daf-re-full-published": (["source.classes=2"], 54, {"train": 37, "val": 5, "test": 12}, 2, "published"),
    "daf-re-published": (["source.classes=2"], 54, {"train": 37, "val": 5, "test": 12}, 2, "published"),
}
OTHERS = {
    "daf-re-full": ["source.posts=200", "classes.minimum=5"],
    "booru": ["source.posts=200"],
    "folder": ["source.classes=3"],
    "urls": ["source.posts=200"],
    "cultivar": ["source.classes=3"],
    "moeimouto": ["source.classes=4"],
    "icartoonface": ["source.classes=4"],
}


def built(name: str, overrides: list[str], out: Path, workers: int = 2) -> Any:
    return animesion.build(animesion.load_recipe(name, overrides, sample=True), out, workers=workers)


def test_every_recipe_is_tried() -> None:
    assert sorted(["daf-re", *SETS, *OTHERS]) == builtin_names()  # daf-re: test_sample_truth.py


#: Benchmarks whose builds differ from those of the others in the listing only, which
#: `test_a_drawn_set_that_lost_a_file_is_refused_like_a_real_one` reads for each.
ALIKE = set(WRITERS) - {"cub-200-2011", "stanford-cars", "inaturalist-2017"}


def as_drawn(name: str, out: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Build a published set, check it, and return it with the rows of its images."""
    overrides, seen, splits, classes, strategy = SETS[name]
    result = built(name, overrides, out, workers=1 if name in WRITERS else 2)
    assert (result.seen, result.kept, result.dropped) == (seen, seen, {})
    assert (result.splits, len(result.classes)) == (splits, classes)
    dataset = animesion.open_dataset(out)
    assert dataset.split_strategy == strategy
    rows = pq.read_table(out / "curated.parquet").to_pylist()
    packed = pq.read_table(out / "index.parquet").to_pylist()
    assert {row["key"]: row["sha256"] for row in rows} == {row["key"]: row["sha256"] for row in packed}  # byte for byte
    return dataset, rows


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE))
        for name in SETS
        if name not in ("daf-re-full-published", "daf-re-published")  # the next two tests
    ],
)
def test_published_sets_come_out_as_drawn(name: str, tmp_path: Path) -> None:
    as_drawn(name, tmp_path / "out")


def test_published_tags_travel_with_the_samples(tmp_path: Path) -> None:
    dataset, _ = as_drawn("daf-re-full-published", tmp_path / "out")
    tags = [sample.tags for sample in dataset.samples("test")]
    # those of the smaller class are rarer than the recipe's minimum
    assert Counter((category, name) for each in tags for category, names in each.items() for name in names) == {
        ("general", "solo"): 12,
        ("character", "minamo shiori"): 8,
        ("copyright", "tidal_letters"): 8,
    }


def test_the_copy_across_splits_is_found_and_kept(tmp_path: Path) -> None:
    _, rows = as_drawn("daf-re-published", tmp_path / "out")
    digests = Counter(row["sha256"] for row in rows)
    first, second = (row for row in rows if digests[row["sha256"]] == 2)
    assert first["cluster"] == second["cluster"] != ""
    assert {first["split"], second["split"]} == {"train", "test"}
    assert all(row["page_url"].startswith("http://sample-booru.invalid/") for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soy-ageing", "daf-re-published"])
def test_published_sets_do_not_depend_on_workers_and_verify(name: str, tmp_path: Path) -> None:
    overrides = SETS[name][0]
    for workers in (1, 2):
        built(name, overrides, tmp_path / str(workers), workers)
    assert shard_digests(tmp_path / "1") == shard_digests(tmp_path / "2")
    faults = verify(animesion.open_dataset(tmp_path / "1"), workers=1).faults
    assert not [fault for check, found in faults.items() if check != "leaks" for fault in found]
    assert all("as the split strategy published allows" in fault.text for fault in faults["leaks"])


@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_come_out_without_a_fault(name: str, tmp_path: Path) -> None:
    result = built(name, OTHERS[name], tmp_path / "out")
    assert result.kept >= 35
    assert result.seen == result.kept + sum(result.dropped.values())
    report = verify(animesion.open_dataset(tmp_path / "out"), workers=1)
    assert report.clean, report.faults
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "drawn sample, not real data" in card


def test_one_stage_of_soy_ageing_is_drawn_and_counted(tmp_path: Path) -> None:
    reader = write(SampleFilesOptions(layout="soy-ageing", classes=2, stage="R4"), tmp_path)
    items = list(reader.items())
    assert Counter(item.split for item in items) == {"train": 10, "test": 10}
    assert {item.source_id.split("/")[1] for item in items} == {"R4"}
    with pytest.raises(UsageError, match="Cotton80 has no stages"):
        list(write(SampleFilesOptions(layout="cotton80", classes=2, stage="R4"), tmp_path / "cotton").items())


def test_faulty_drawn_photographs_are_dropped_as_planned(tmp_path: Path) -> None:
    result = built("cultivar", ["source.classes=4"], tmp_path / "out")
    assert result.dropped == {"truncated image": 1, "too small": 1, "near duplicate": 1}
    rows = {row["source_id"]: row for row in pq.read_table(tmp_path / "out" / "curated.parquet").to_pylist()}
    assert rows["soybean-01/copy.jpg"]["reason"] == "near duplicate"
    assert rows["soybean-03/002.jpg"]["reason"] == "truncated image"
    assert not rows["soybean-02/001.jpg"]["plain"]  # turned
    assert Counter(row["label"] for row in rows.values() if row["kept"]) == {
        "soybean-01": 13,
        "soybean-02": 14,
        "soybean-03": 11,
        "cotton-04": 13,
    }


@pytest.mark.parametrize("layout", ["cotton80", "soy-gene", "soy-ageing", "moeimouto", *WRITERS])
def test_a_drawn_set_that_lost_a_file_is_refused_like_a_real_one(layout: Any, tmp_path: Path) -> None:
    reader = write(SampleFilesOptions(layout=layout, classes=2), tmp_path)
    images = sorted(path for path in tmp_path.rglob("*.*") if path.suffix in (".png", ".jpg"))
    assert len(list(reader.items())) == len(images) - (layout == "oxford-pets")  # one of its images is in no list
    images[3].unlink()
    with pytest.raises(UsageError, match=r"is not as published: .* of .* images"):
        list(reader.items())


def test_equal_options_draw_equal_files(tmp_path: Path) -> None:
    def drawn(seed: int, name: str) -> dict[str, bytes]:
        write(SampleFilesOptions(layout="soy-ageing", classes=2, seed=seed), tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*.*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    first = drawn(0, "first")
    assert first == drawn(0, "again")
    other = drawn(1, "other")
    assert other.keys() == first.keys()
    assert not {first[name] for name in first if name.endswith(".png")} & set(other.values())


def test_leaves_yellow_from_stage_to_stage() -> None:
    def redness(number: int, stage: str) -> float:
        """Red minus green in the middle of the leaf, of 255."""
        middle = np.asarray(
            render(DrawnLeaf("soybean", number, "0", 96, stage)).crop((36, 36, 60, 60)), dtype=np.float64
        )
        return float((middle[..., 0] - middle[..., 1]).mean())

    for number in range(1, 6):
        levels = [redness(number, stage) for stage in STAGES]
        assert levels[-1] > levels[0] + 10
