"""A dataset that grows: images that were published stay in their splits."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import animesion
from animesion.config.recipe import Recipe
from animesion.errors import UsageError
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
    with pytest.raises(UsageError, match="keep requires strategy 'grouped' or 'auto', not 'single'"):
        recipe(images, f'split.keep="{moved}"', "split.strategy=single")
