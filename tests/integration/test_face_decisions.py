"""Faces that a curator decides on: from the page of `animesion browse` to the next build."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import requests
from PIL import Image

import animesion
from animesion.report import facts, live
from tests.cascades import BRIGHT
from tests.conftest import draw
from tests.serving import served

TOKEN = "a-token-of-a-test"

#: Places of the bright squares in each image, as left, top and side.
PLACES: dict[str, list[tuple[int, int, int]]] = {
    "one": [(60, 60, 30)],
    "other": [(150, 60, 30)],
    "two": [(60, 60, 30), (200, 60, 36)],
    "none": [],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A recipe whose detector finds bright squares, on images with none, one and two."""
    root = tmp_path_factory.mktemp("faces")
    (root / "models").mkdir()
    (root / "models" / "lbpcascade_animeface.xml").write_bytes(BRIGHT)
    for name, squares in PLACES.items():
        image = Image.new("RGB", (300, 200), (20, 20, 20))
        for left, top, side in squares:
            image.paste(Image.new("RGB", (side, side), (230, 230, 230)), (left, top))
        (root / "images" / "a").mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / "a" / f"{name}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANIMESION_DETECTORS", str(root / "models"))
        yield [
            f"source.path='{root / 'images'}'",
            "crop.detector=lbp",
            "crop.min_score=0.5",
            "split.strategy=single",
            "duplicates.near=false",
        ]


@pytest.fixture(scope="module")
def built(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build by that recipe; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("built") / "out"
    animesion.build(animesion.load_recipe("folder", settings), out, workers=1)
    return out


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {Path(row["source_id"]).stem: row for row in pq.read_table(out / "curated.parquet").to_pylist()}


def test_what_a_curator_chooses_is_what_the_next_build_crops(settings: list[str], built: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    before = rows(out)
    assert {name: row["reason"] for name, row in before.items()} == {
        "one": "", "other": "", "two": "several faces", "none": "no face",
    }  # fmt: skip
    browser = live.Browser(animesion.open_dataset(out), tmp_path / "decisions.toml")
    with served(live.application(browser, TOKEN)) as port:
        site = f"http://127.0.0.1:{port}/api"
        [item] = requests.get(f"{site}/drops", params={"reason": "several faces"}, timeout=10).json()["items"]
        assert len(item["boxes"]) == 2
        details = requests.get(f"{site}/details/{item['key']}", timeout=10).json()
        assert (details["boxes"], details["crop"], details["original"]) == (item["boxes"], None, True)
        # the thumbnail and the image to draw in show everything, not the best face alone
        for path, size in (("image", (192, 128)), ("original", (300, 200))):
            answer = requests.get(f"{site}/{path}/{item['key']}", timeout=10)
            with Image.open(io.BytesIO(answer.content)) as image:
                assert image.size == size
        kept = before["one"]["key"]
        details = requests.get(f"{site}/details/{kept}", timeout=10).json()
        assert len(details["boxes"]) == 1
        left, top, right, bottom = before["one"]["crop"]
        assert details["crop"] == pytest.approx([left / 300, top / 200, right / 300, bottom / 200], abs=1e-4)
        for path, size in (("original", (300, 200)), ("sample", (right - left, bottom - top))):
            answer = requests.get(f"{site}/{path}/{kept}", timeout=10)
            with Image.open(io.BytesIO(answer.content)) as image:
                assert image.size == size
        for path in ("details/absent", "original/absent", "original/..%2f..%2fetc%2fpasswd"):
            assert requests.get(f"{site}/{path}", timeout=10).status_code == 404
        chosen = item["boxes"][1][:4]
        decisions = {
            "box": {item["key"]: chosen, before["none"]["key"]: [0.1, 0.2, 0.3, 0.6]},
            "several": [before["other"]["key"]],
        }
        headers = {live.TOKEN_HEADER: TOKEN}
        saved = requests.put(
            f"{site}/decisions", json={"decisions": decisions, "revision": ""}, headers=headers, timeout=10
        )
        assert saved.status_code == 200
        backwards = {"box": {item["key"]: [0.5, 0.5, 0.1, 0.6]}}
        body = {"decisions": backwards, "revision": saved.json()["revision"]}
        assert requests.put(f"{site}/decisions", json=body, headers=headers, timeout=10).status_code == 400
    recipe = animesion.load_recipe("folder", [*settings, f"curate.decisions='{tmp_path / 'decisions.toml'}'"])
    animesion.build(recipe, out, workers=1, replace=True)
    after = rows(out)
    assert {name: row["reason"] for name, row in after.items()} == {
        "one": "", "other": "several faces", "two": "", "none": "",
    }  # fmt: skip
    assert after["none"]["crop"] == [30, 40, 90, 120]
    expected = [share * side for share, side in zip(chosen, (300, 200, 300, 200), strict=True)]
    assert after["two"]["crop"] == pytest.approx(expected, abs=1)
    assert after["one"] == before["one"] | {"class_id": after["one"]["class_id"], "group": after["one"]["group"]}


def test_the_report_shows_the_whole_image_with_its_boxes(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "out")
    found = facts.of_dataset(animesion.open_dataset(tmp_path / "out"))
    drops = {each["reason"]: each["items"] for each in found["drops"]}
    [several], [none] = drops["several faces"], drops["no face"]
    assert len(several["boxes"]) == 2
    assert all(0 <= left < right <= 1 and 0 < score <= 1 for left, _, right, _, score in several["boxes"])
    assert none["boxes"] == []
    assert several["image"] >= 0
    json.dumps(found, allow_nan=False)
    # a damaged table of features costs the boxes, not the report
    features = tmp_path / "out" / "features" / "part-00000.parquet"
    table = pq.read_table(features)
    pq.write_table(table.drop_columns(["boxes"]), features)
    browser = live.Browser(animesion.open_dataset(tmp_path / "out"), tmp_path / "d.toml")
    assert browser.items(browser.drops("several faces"))[0]["boxes"] == []


def test_detectors_that_agree_crop_and_a_box_of_one_is_unsure(settings: list[str], tmp_path: Path) -> None:
    """The centre overlaps both squares and can be the same as one of them."""
    several = [each for each in settings if "detector" not in each] + ["crop.detector=['lbp', 'center']"]
    options = ["crop.detector_options.center.share=0.9", "crop.agreement=0.1"]
    animesion.build(animesion.load_recipe("folder", [*several, *options]), tmp_path / "out", workers=1)
    found = rows(tmp_path / "out")
    assert found["none"]["reason"] == "unsure face"
    assert found["two"]["reason"] == "several faces"
    assert "unsure" in found["two"]["detail"]
    looser = [*several, *options, "crop.unsure=report"]
    animesion.build(animesion.load_recipe("folder", looser), tmp_path / "out", workers=1, replace=True)
    assert rows(tmp_path / "out")["two"]["reason"] == ""


def test_boxes_of_a_table_are_decided_before_images_are_fetched_and_a_decision_fetches_them(tmp_path: Path) -> None:
    lines = {1: [(0.1, 0.9)], 2: [(0.1, 0.9), (0.6, 0.95)], 3: []}
    text = []
    for number, faces in lines.items():
        (tmp_path / "images" / f"{number:04}").mkdir(parents=True)
        draw(number).save(tmp_path / "images" / f"{number:04}" / f"{number}.png")
        text += [f"{number:04}/{number}.png\t7\t{x},0.1,{x + 0.3},0.6,{score}" for x, score in faces]
    (tmp_path / "labels.csv").write_text("".join(f"0,{number:04}/{number}.png\n" for number in lines))
    (tmp_path / "faces.tsv").write_text("\n".join(text) + "\n")
    paths = {"labels": "labels.csv", "images": "images", "faces": "faces.tsv"}
    settings = [f"source.{name}={tmp_path / path}" for name, path in paths.items()]
    settings = ["source={kind='labels'}", *settings, "crop.detector=boxes", "split.strategy=single"]

    def build(*more: str) -> dict[str, dict[str, Any]]:
        animesion.build(animesion.load_recipe("folder", [*settings, *more]), tmp_path / "out", workers=1, replace=True)
        return rows(tmp_path / "out")

    found = build()
    assert [found[name]["reason"] for name in "123"] == ["", "several faces", "no face"]
    # another rule on the boxes fetches the images that it needs
    assert [build("crop.faces=best")[name]["reason"] for name in "123"] == ["", "", "no face"]
    (tmp_path / "d.toml").write_text(f"[box]\n{found['3']['key']} = [0.25, 0.25, 0.75, 0.75]\n")
    decided = build(f"curate.decisions='{tmp_path / 'd.toml'}'")
    assert [decided[name]["reason"] for name in "123"] == ["", "several faces", ""]
    side = decided["3"]["width"]
    assert decided["3"]["crop"][0] == side // 4
