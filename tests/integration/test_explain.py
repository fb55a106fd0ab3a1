"""`animesion explain`: rows of each kind of network, and pages of single images and of a split."""

from __future__ import annotations

import csv
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from animesion_training.analysis import explain, layers
from animesion_training.analysis.class_similarity import class_similarity
from animesion_training.analysis.predictions import Predictions, predict_split
from animesion_training.data import open_data
from animesion_training.distributed import distributed_context
from animesion_training.eval.pieces import Piece
from animesion_training.models import create_model
from animesion_training.weights import load_model, save_model
from tests.conftest import draw
from tests.running import run_here

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3}
STAGES: dict[str, Any] = {"keep_rate": 0.5, "reduction_layers": [1, 2]}
TRANSFORMER = "vit_tiny_patch16"
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "resnet": ("resnet18", {}, ["Grad-CAM"]),
    "lrnet": ("lrnet14", {}, ["Grad-CAM"]),
    "vit": (TRANSFORMER, SMALL, ["attention rollout"]),
    "ila": (TRANSFORMER, {"adapter": "ila", **SMALL}, ["attention rollout"]),
    "lora": (TRANSFORMER, {"adapter": "lora", **SMALL}, ["attention rollout"]),
    "glsim": (TRANSFORMER, {"selector": "glsim", **SMALL}, ["similarity", "box", "crop"]),
    "rams": (TRANSFORMER, {"selector": "rams", **SMALL}, ["rollout", "box", "crop"]),
    "evit": (TRANSFORMER, {"reduction": "evit", **STAGES, **SMALL}, ["after block1", "after block2"]),
    "evit-clca": (
        TRANSFORMER,
        {"reduction": "evit", "cache": "clc", "head": "cla", **STAGES, **SMALL},
        ["after block1", "after block2"],
    ),
    "ats": (TRANSFORMER, {"reduction": "ats", **STAGES, **SMALL}, ["after block1", "after block2"]),
    "dynamicvit": (TRANSFORMER, {"reduction": "dynamicvit", **STAGES, **SMALL}, ["after block1", "after block2"]),
    "cropr": (TRANSFORMER, {"reduction": "cropr", **STAGES, **SMALL}, ["after block1", "after block2"]),
    "tome": (TRANSFORMER, {"reduction": "tome", **STAGES, **SMALL}, ["after block1", "after block2"]),
    "dpcknn": (TRANSFORMER, {"reduction": "dpcknn", **STAGES, **SMALL}, ["after cluster0", "after cluster1"]),
}


def explained(weights: Path, images: list[Path], **options: Any) -> list[explain.Explained]:
    model, card = load_model(weights)
    with distributed_context("cpu") as context:
        return list(
            explain.Explainer(model, card, context, **options)(Piece(str(path), path.read_bytes()) for path in images)
        )


@pytest.mark.parametrize(("name", "options", "titles"), KINDS.values(), ids=KINDS)
def test_each_kind_of_network_has_its_panels(
    name: str, options: dict[str, Any], titles: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_model(create_model(name, 3, 96, **options), tmp_path / "w.safetensors", ("a", "b", "c"))
    images = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(images):
        draw(i, 90).save(path)
    rows = explained(tmp_path / "w.safetensors", images)
    assert [row.name for row in rows] == list(map(str, images))
    for row in rows:
        assert [panel.title for panel in row.panels] == ["image", *titles]
        assert all(panel.pixels.shape == (96, 96, 3) for panel in row.panels)
        changed = [panel for panel in row.panels[1:] if panel.title != "crop"]  # which may be of the whole image
        assert all(not np.array_equal(row.panels[0].pixels, panel.pixels) for panel in changed)
        assert sorted(name for name, _ in row.guesses) == ["a", "b", "c"]
        assert sum(p for _, p in row.guesses) == pytest.approx(1, abs=1e-5)
        assert [p for _, p in row.guesses] == sorted((p for _, p in row.guesses), reverse=True)
    # three lines of guesses below each row
    assert explain.sheet(rows, 64).size == (6 + (len(titles) + 1) * 70, 20 + 2 * (64 + 3 * 14 + 6))


def test_half_of_the_patches_are_dark_when_half_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16", 3, 96, reduction="topk", keep_rate=0.5, reduction_layers=[1], **SMALL)
    save_model(model, tmp_path / "w.safetensors", ("a", "b", "c"))
    Image.new("RGB", (96, 96), (200, 180, 160)).save(tmp_path / "p.png")
    [row] = explained(tmp_path / "w.safetensors", [tmp_path / "p.png"])
    assert (row.panels[1].pixels[..., 0] < 100).mean() == 0.5


def test_the_map_is_of_the_class_that_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(create_model("resnet18", 3, 64), tmp_path / "w.safetensors", ("ann", "bea", "cia"))
    draw(1).save(tmp_path / "p.png")
    rows = [explained(tmp_path / "w.safetensors", [tmp_path / "p.png"], target=name)[0] for name in ("ann", "bea")]
    assert [row.target for row in rows] == ["ann", "bea"]
    assert rows[0].guesses == rows[1].guesses
    assert not np.array_equal(rows[0].panels[1].pixels, rows[1].panels[1].pixels)
    result = run_here(
        "explain", str(tmp_path / "w.safetensors"), str(tmp_path / "p.png"), "--target", "anna", "--out", "x.png"
    )
    assert (result.returncode, "the network has no class 'anna'" in result.stderr) == (2, True)


# -- a split ---------------------------------------------------------------------------------------------------------

CLASSES = ("<b>ann</b>", "bea", "初音ミク")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with weights, and class folders with a hostile name, whose training images are in test as well."""
    root = tmp_path_factory.mktemp("world")
    for split, count in (("train", 6), ("test", 4)):
        for i, name in enumerate(CLASSES):
            folder = root / "faces" / split / name.replace("/", "∕")
            folder.mkdir(parents=True)
            for k in range(count):
                draw(10 * i + k).save(folder / f"{k}.png")
    classes = tuple(sorted(name.replace("/", "∕") for name in CLASSES))
    torch.manual_seed(0)
    (root / "run").mkdir()
    save_model(create_model("resnet18", 3, 64), root / "run" / "best.safetensors", classes)
    save_model(create_model(TRANSFORMER, 3, 64, **SMALL), root / "vit.safetensors", classes)
    return root


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S
    )
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def test_a_page_of_images_has_their_nearest_training_images(world: Path, tmp_path: Path) -> None:
    image = world / "faces" / "test" / "bea" / "1.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    arguments = [str(world / "run"), str(image), str(tmp_path / "broken.png"), "--data", str(world / "faces")]
    result = run_here("explain", *arguments, "--out", str(tmp_path / "p.html"), "--neighbours", "2", "--device", "cpu")
    assert result.returncode == 1
    assert "maps by gradcam: ResNet" in result.stderr
    assert "broken.png: not explained" in result.stderr
    data = page_data(tmp_path / "p.html")
    good, bad = data["rows"]
    assert bad["problem"]
    assert len(good["guesses"]) == 3
    # the same image is in train
    assert (good["neighbours"][0]["label"], good["neighbours"][0]["similarity"]) == ("bea", pytest.approx(1, abs=1e-3))
    assert good["neighbours"][0]["key"].endswith("bea/1.png")
    assert good["neighbours"][1]["similarity"] < 1
    assert [title for title, _ in good["panels"]] == ["image", "Grad-CAM"]


def test_a_page_of_a_split_and_its_table(world: Path, tmp_path: Path) -> None:
    page, table = tmp_path / "p.html", tmp_path / "t.csv"
    result = run_here(
        "explain", str(world / "run"), "--data", str(world / "faces"), "--split", "test", "--split", "train",
        "--out", str(page), "--csv", str(table), "--compare", str(world / "vit.safetensors"), "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    data = page_data(page)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    model, card = load_model(world / "run" / "best.safetensors")
    opened = open_data(world / "faces", classes=card.classes)
    samples = opened.select("test")
    places = [list(samples.keys).index(row["key"]) for row in rows]
    with distributed_context("cpu") as context:  # passes of their own over the images
        again = list(explain.Explainer(model, card, context)(Piece("", bytes(samples.read(i))) for i in places))
    for row, i, one in zip(rows, places, again, strict=True):
        assert [row[f"guess_{k}"] for k in (1, 2, 3)] == [name for name, _ in one.guesses]
        assert float(row["score_1"]) == pytest.approx(one.guesses[0][1], abs=1e-4)
        assert row["label"] == opened.classes[samples.labels[i]]
        assert row["correct"] == ("true" if row["guess_1"] == row["label"] else "false")
        assert float(row["loss"]) == pytest.approx(-np.log(dict(one.guesses)[row["label"]]), abs=1e-3)
    wrong = [row for row in rows if row["correct"] == "false"]
    found = data["mistakes"]
    assert (found["images"], found["wrong"], found["shown"]) == (12, len(wrong), len(wrong))
    listed = [(group["label"], group["guess"], item["name"]) for group in found["groups"] for item in group["items"]]
    assert sorted(listed) == sorted((row["label"], row["guess_1"], row["key"]) for row in wrong)
    for group in found["groups"]:
        scores = [item["guesses"][0][1] for item in group["items"]]
        assert scores == sorted(scores, reverse=True)
    points = data["map"]
    assert len(points["x"]) == len(points["image"]) == 12 + 18
    assert points["splits"] == ["test", "train"]
    assert max(map(abs, points["x"] + points["y"])) == points["unit"]
    assert all(0 <= i < len(data["images"]) for i in points["image"])
    assert len(data["classes"]["cosines"]) == 3
    cka = data["layers"]["cka"]
    assert (len(cka["rows"]), len(cka["columns"]), cka["images"]) == (5, 4, 12)
    assert data["layers"]["distance"] is None  # of a ResNet
    # nothing in the page is loaded from elsewhere, and names are data
    text = page.read_text(encoding="utf-8")
    assert "<b>ann" not in text
    assert "default-src 'none'" in html.unescape(text)


def test_a_network_is_its_own_twin(world: Path) -> None:
    one = load_model(world / "vit.safetensors")
    opened = open_data(world / "faces", classes=one[1].classes)
    with distributed_context("cpu") as context:
        same = layers.layer_similarity(one, one, opened, "test", context)
        distance = layers.mean_attention_distance(*one, opened, "test", context, most=8)
    assert same.rows == same.columns == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert [same.values[i][i] for i in range(4)] == pytest.approx([1] * 4)
    assert distance.shape == (4, 3)
    # 4 x 4 patches of 16 px: between none and the diagonal of the grid
    assert 0 < float(distance.min()) < float(distance.max()) < 48 * 2**0.5


def test_classes_are_as_similar_as_their_confusions_and_means(world: Path) -> None:
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 1], [1, 0]], dtype=np.float32)
    labels, guesses = np.array([0, 0, 2, 2, 3]), np.array([[0, 1], [2, 0], [2, 1], [0, 2], [1, 0]])
    found = class_similarity(
        Predictions(
            "test",
            ("a", "b", "c", "d"),
            list("vwxyz"),
            labels,
            guesses,
            np.full((5, 2), 0.5, np.float32),
            np.zeros(5, np.float32),
            vectors,
            np.zeros((5, 0, 0, 3), np.uint8),
        )
    )
    assert found.ids.tolist() == [0, 2, 3]
    assert found.counts.tolist() == [2, 2, 1]
    # one of two images of a is taken for c, one of two of c for a; that of d for b, which has no images
    assert found.confusion.tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]
    length = (1.6**2 + 0.8**2) ** 0.5  # of the sum of the vectors of a
    np.testing.assert_allclose(found.cosines[0], [1, 0.8 / length, 1.6 / length], rtol=1e-6)
    assert [pair[:2] for pair in found.pairs()] == [(0, 3), (0, 2), (2, 3)]
    assert found.pairs()[1][2] == pytest.approx(2 / 4)


def test_the_table_is_safe_to_open_in_a_spreadsheet(world: Path) -> None:
    model, card = load_model(world / "run" / "best.safetensors")
    opened = open_data(world / "faces", classes=card.classes)
    with distributed_context("cpu") as context:
        found = predict_split(model, card, opened, "test", context, top=2)
    assert found.guesses.shape == (12, 2)
    assert found.vectors.shape == (12, 512)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-5)
    hostile = replace(found, classes=("=cmd|' /C calc'!A0", *found.classes[1:]))
    assert "'=cmd|" in hostile.to_csv()
    assert "\n=cmd" not in hostile.to_csv()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{image}"], "give --out for a page or an image, or --csv"),
        (["{run}", "{image}", "--out", "x.txt"], "ends in .html, .png or .jpg"),
        (["{run}", "--out", "x.html"], "give IMAGES to explain, or --data for a split"),
        (["{run}", "{image}", "--csv", "x.csv", "--out", "x.html"], "leave IMAGES out"),
        (["{faces}", "{image}", "--out", "x.html"], "is a folder without weights"),
        (["{run}", "nothing.png", "--out", "x.html"], "file or folder nothing.png not found"),
        (["{run}", "--data", "{faces}", "--split", "val", "--out", "x.html"], "has no split 'val'"),
        (["{run}", "{image}", "--method", "rollout", "--out", "x.html"], "ResNet is no transformer"),
    ],
)
def test_what_cannot_be_explained_is_refused(world: Path, arguments: list[str], message: str) -> None:
    names = {
        "run": str(world / "run"),
        "image": str(world / "faces" / "test" / "bea" / "1.png"),
        "faces": str(world / "faces"),
    }
    result = run_here("explain", *(each.format(**names) for each in arguments))
    assert result.returncode == 2
    assert message in result.stderr
