"""A dataset that grows: images that were published stay in their splits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import animesion
from animesion.cli.log import log
from animesion.config.recipe import Recipe
from animesion.errors import UsageError
from animesion.pipeline import removal, runner
from animesion.verification import checks, diff
from tests.conftest import draw


def recipe(images: Path, *overrides: str) -> Recipe:
    return animesion.load_recipe("folder", [f'source.path="{images}"', "split.train=60", "split.val=20",
                                            "split.test=20", *overrides])  # fmt: skip


def splits_in(out: Path) -> dict[str, str]:
    return {row["key"]: row["split"] for row in pq.read_table(out / "curated.parquet").to_pylist() if row["kept"]}


def test_published_images_keep_their_split(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for i in range(40):
        path = images / ("miku" if i % 2 else "rin") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i).save(path)
    animesion.build(recipe(images), tmp_path / "old", workers=1)
    before = splits_in(tmp_path / "old")
    for i in range(100, 160):
        draw(i).save(images / ("miku" if i % 3 else "rin") / f"{i}.png")
    keep = f'split.keep="{tmp_path / "old"}"'
    result = animesion.build(recipe(images, keep), tmp_path / "new", workers=1)
    after = splits_in(tmp_path / "new")
    assert len(after) == 100
    assert {key: after[key] for key in before} == before
    assert {split for key, split in after.items() if key not in before} == {"train", "val", "test"}
    assert "40 of 40 published images kept their split" in result.notes
    fresh = animesion.build(recipe(images), tmp_path / "fresh", workers=1)
    assert {key: splits_in(fresh.out)[key] for key in before} != before
    # a larger copy takes the place of a published image, in its split
    tested = {key for key, split in before.items() if split != "train"}
    for i in range(40):
        label = "miku" if i % 2 else "rin"
        draw(i).resize((256, 256 + 32 * (i % 3))).save(images / label / f"larger {i}.png")
    animesion.build(recipe(images, keep), tmp_path / "larger", workers=1)
    rows = pq.read_table(tmp_path / "larger" / "curated.parquet").to_pylist()
    replaced = {row["key"]: row["keeper"] for row in rows if row["key"] in before and row["keeper"]}
    kept = splits_in(tmp_path / "larger")
    assert tested & replaced.keys()
    assert {key: kept[keeper] for key, keeper in replaced.items()} == {key: before[key] for key in replaced}
    # the recipe's digest is that of the content
    moved = tmp_path / "moved"
    (tmp_path / "old").rename(moved)
    assert recipe(images, f'split.keep="{moved}"').split.keep_digest()
    with pytest.raises(UsageError, match=r"split\.keep: .* is not a finished dataset"):
        recipe(images, keep).digest()
    with pytest.raises(UsageError, match="keep requires strategy 'grouped', 'by-class' or 'auto', not 'single'"):
        recipe(images, f'split.keep="{moved}"', "split.strategy=single")


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").glob("*.tar"))}


def draw_more(images: Path, seeds: range, *labels: str) -> None:
    for i in seeds:
        path = images / labels[i % len(labels)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i).save(path)


def test_an_update_leaves_shards_splits_and_class_ids(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    draw_more(images, range(60), "miku", "rin")
    chosen = recipe(images, "pack.shard_samples=8", "pack.size=32")
    animesion.build(chosen, out, workers=1)
    before, shards, first = splits_in(out), digests(out), (out / "dataset.json").read_bytes()
    times = {name: (out / "data" / name).stat().st_mtime_ns for name in shards}
    assert not animesion.build(chosen, out, workers=1, update=True).changed
    assert "parent" not in json.loads(first)

    draw_more(images, range(100, 120), "aoi", "rin")  # a class whose name comes first
    (images / "miku" / "0.png").unlink()
    result = animesion.build(chosen, out, workers=1, update=True)
    after = splits_in(out)
    assert {key: after[key] for key in before} == before
    assert len(after) == 80
    assert result.classes == ["miku", "rin", "aoi"]
    assert "1 image is no longer at the source" in " ".join(result.notes)
    grown = digests(out)
    assert {name: grown[name] for name in shards} == shards
    assert {name: (out / "data" / name).stat().st_mtime_ns for name in shards} == times
    assert grown.keys() > shards.keys()
    assert checks.verify(animesion.open_dataset(out), workers=1).clean
    facts = json.loads((out / "dataset.json").read_bytes())
    parent = hashlib.sha256(first).hexdigest()
    assert (facts["parent"], facts["added"], facts["removed"]) == (parent, 20, 0)
    found = diff.compare(animesion.open_dataset(out / "versions" / parent), animesion.open_dataset(out))
    assert (found.added, found.removed, found.moved) == (sorted(after.keys() - before.keys()), [], [])
    assert facts["lineage"] == [{"dataset": parent, "images": 60, "added": 60, "removed": 0}]
    draw_more(images, range(130, 131), "rin")
    with pytest.raises(UsageError, match="has versions"):
        animesion.build(chosen, out, workers=1)
    (images / "rin" / "130.png").unlink()
    assert not animesion.build(chosen, out, workers=1).changed

    # the shard of a removed image is written again, and the list goes on
    key = next(key for key in sorted(before) if before[key] == "train")
    removal.remove(out, [key])
    left = digests(out)
    assert sum(left.get(name) != digest for name, digest in grown.items()) == 1
    draw_more(images, range(140, 142), "rin")
    animesion.build(chosen, out, workers=2, update=True)
    last = splits_in(out)
    assert key not in last
    assert {name: each for name, each in last.items() if name in after} == {k: v for k, v in after.items() if k != key}
    assert {name: digests(out)[name] for name in left} == left
    shown = CliRunner().invoke(log, [str(out)])
    assert [line.split()[1:] for line in shown.output.splitlines()] == [
        ["81", "images", "+2", "+0"], ["79", "images", "+0", "-1"], ["80", "images", "+20", "+0"],
        ["60", "images", "first"]]  # fmt: skip

    # in new shards, with the same splits
    runner.run(chosen, out, workers=1, update=True, compact=True)
    assert splits_in(out) == last
    assert len(digests(out)) < len(left)
    assert checks.verify(animesion.open_dataset(out), workers=1).clean
