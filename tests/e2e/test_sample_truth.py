"""The whole build against the sample world's own account of what must become of each post."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import animesion
from animesion_sample.world import World
from tests.sample_truth import truth


def verdicts(out: Path) -> dict[int, dict[str, Any]]:
    return {int(row["source_id"]): row for row in pq.read_table(out / "curated.parquet").to_pylist()}


def check(out: Path, posts: int, minimum: int) -> None:
    expected = truth(World(posts), minimum)
    found = verdicts(out)
    assert found.keys() == expected.keys()
    for post, due in expected.items():
        row = found[post]
        assert (row["kept"], row["reason"]) == (due.outcome == "kept", due.reason), (post, due)
        if row["kept"]:
            assert row["label"] == due.label, post
        if row["reason"].endswith("duplicate"):
            assert row["keeper"] == f"danbooru-{due.keeper}", (post, due)
        for other in due.with_posts:
            assert found[other]["split"] == row["split"], (post, other)


def test_every_post_of_the_small_world_ends_as_planned(small_build: Path) -> None:
    check(small_build, 300, 5)


@pytest.mark.slow
def test_every_post_of_the_full_world_ends_as_planned(tmp_path: Path) -> None:
    result = animesion.build(animesion.load_recipe("daf-re", ["source.posts=1000"], sample=True), tmp_path / "full")
    check(tmp_path / "full", 1000, 20)
    assert result.seen == result.kept + sum(result.dropped.values())


def test_groups_are_in_one_split_and_classes_in_every_split(small_build: Path) -> None:
    split_of_group: dict[str, str] = {}
    splits_of_class: dict[str, set[str]] = {}
    for row in verdicts(small_build).values():
        if row["kept"]:
            assert split_of_group.setdefault(row["group"], row["split"]) == row["split"]
            splits_of_class.setdefault(row["label"], set()).add(row["split"])
    assert all(splits == {"train", "val", "test"} for splits in splits_of_class.values())


def test_provenance_does_not_depend_on_the_port(small_build: Path) -> None:
    rows = verdicts(small_build).values()
    assert all(row["file_url"].startswith("http://sample-booru.invalid/") for row in rows if row["kept"])


@pytest.mark.parametrize("reason", ["label conflict", "exact duplicate", "pixel duplicate", "near duplicate"])
def test_duplicates_have_a_cluster(small_build: Path, reason: str) -> None:
    dropped = [row for row in verdicts(small_build).values() if row["reason"] == reason]
    assert dropped
    assert all(row["cluster"] for row in dropped)
