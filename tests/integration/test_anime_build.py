"""A build whose faces are found by the network of the package, as the source has no table of boxes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pyarrow.parquet as pq

import animesion
from animesion.config.recipe import Recipe
from animesion.pipeline import rules
from animesion.schemas import Box, DropReason, Item
from animesion_sample.characters import CAST
from animesion_sample.drawing import Drawing, render
from animesion_sample.scenes import SCENES


def recipe(root: Path) -> Recipe:
    settings = [f"source.path={root}", "crop.detector=auto", "crop.min_score=0.5", "classes.minimum=1"]
    return animesion.load_recipe("folder", settings)


def test_a_source_without_a_table_of_boxes_is_searched(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(3):
        image = render(Drawing(f"anime build/{number}", (CAST[number].name,), 400, 320))
        image.save(tmp_path / "images" / "a" / f"face{number}.png")
    two = render(Drawing("anime build/two", (CAST[4].name, CAST[6].name), 480, 320))
    two.save(tmp_path / "images" / "a" / "two.png")
    SCENES["beach"]((400, 320), Random(1)).convert("RGB").save(tmp_path / "images" / "a" / "none.png")
    result = animesion.build(recipe(tmp_path / "images"), tmp_path / "out", workers=1, until="curate")
    assert "the source has no table of boxes for 5 images: the detector 'anime' looked for faces" in result.notes
    table = pq.read_table(tmp_path / "out" / "curated.parquet", columns=["source_id", "reason"]).to_pylist()
    reasons = {Path(row["source_id"]).stem: row["reason"] for row in table}
    assert reasons["none"] == DropReason.NO_FACE
    assert reasons["two"] == DropReason.SEVERAL_FACES
    assert [reasons[f"face{number}"] for number in range(3)] == [""] * 3


def test_a_table_decides_before_an_image_is_fetched() -> None:
    chosen = recipe(Path("images"))

    def reason(*boxes: Box, table: bool = True) -> str:
        return rules.metadata_reason(Item("a", "folder", "a", "a", 0, ("x",), boxes=boxes if table else None), chosen)

    assert reason() == DropReason.NO_FACE
    assert reason(Box(0, 0, 0.5, 0.5, 0.9)) == ""
    assert reason(table=False) == ""
