"""`animesion audit`: planted wrong labels come first, and the page shows hostile names as text."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from animesion.cli import cli
from animesion_training.analysis.audit import find_label_errors
from animesion_training.models import create_model
from animesion_training.weights import save_model

COLOURS = {"red": (200, 40, 40), "<script>alert(1)</script>": (40, 180, 60), "=blue": (40, 60, 210)}
PLANTED = {"wrong-1", "wrong-2"}


def drawn(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """A colour with grain and a blob of its own."""
    rng = np.random.default_rng(seed)
    pixels = np.array(colour) + rng.integers(-30, 31, (48, 48, 3))
    top, left = rng.integers(0, 30, 2)
    pixels[top : top + 12, left : left + 12] += 40
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network: colours are far apart in it already."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "any.safetensors"
    save_model(create_model("resnet18", 3, img_size=48), path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built dataset with two images of red among the green and blue."""
    root = tmp_path_factory.mktemp("audit")
    folders = {"red": "red", "<script>alert(1)</script>": "green", "=blue": "blue"}
    for number, (name, colour) in enumerate(COLOURS.items()):
        folder = root / "images" / folders[name]
        folder.mkdir(parents=True)
        for i in range(14):
            drawn(colour, 100 * number + i).save(folder / f"{i}.png")
    drawn(COLOURS["red"], 900).save(root / "images" / "green" / "wrong-1.png")
    drawn(COLOURS["red"], 901).save(root / "images" / "blue" / "wrong-2.png")
    rename = ["label.rename.green='<script>alert(1)</script>'", "label.rename.blue='=blue'"]
    sets = [f"source.path='{root / 'images'}'", "pack.format=png", "duplicates.near=false", *rename]
    done = CliRunner().invoke(
        cli, ["build", "folder", *(word for each in sets for word in ("--set", each)), "--out", str(root / "out")]
    )
    assert done.exit_code == 0, done.output
    return root / "out"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, arguments), "--device", "cpu"])


class Seen(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_planted_labels_come_first_in_every_form(weights: Path, built: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    done = run(built, "--checkpoint", weights, "--out", tmp_path / "audit", "--limit", "3")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["images"] == 44
    first = found["findings"][:2]
    assert {next(name for name in PLANTED if name in row["key"]) for row in first} == PLANTED
    for row in first:
        assert (row["kind"], row["suggested"]) == ("other class", "red")
        assert row["nearest_label"] == "red"
        assert row["score"] == pytest.approx(row["other"] - row["own"], abs=1e-5)
    scores = [row["score"] for row in found["findings"]]
    assert scores == sorted(scores, reverse=True)
    assert len(found["findings"]) <= 10

    with (tmp_path / "audit" / "audit.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [row["key"] for row in found["findings"]]
    assert not any(value.startswith("=") for row in rows for value in row.values())

    text = (tmp_path / "audit" / "audit.html").read_text()
    seen = Seen()
    seen.feed(text)
    assert "script" not in seen.tags
    assert seen.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in seen.sources)
    assert seen.tags.count("img") == 2 * min(3, len(rows))
    assert "<script>alert(1)</script>" in "".join(seen.text)
    assert {path: path.read_bytes() for path in built.rglob("*") if path.is_file()} == before


def test_the_same_audit_gives_the_same_files(weights: Path, built: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(built, "--checkpoint", weights, "--out", tmp_path / name).exit_code == 0
    for file in ("audit.csv", "audit.json", "audit.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_json_on_the_screen_and_nothing_written(weights: Path, built: Path) -> None:
    done = run(built, "--checkpoint", weights, "--json")
    rows = json.loads(done.output)
    assert {row["suggested"] for row in rows[:2]} == {"red"}


def test_wrong_requests_are_one_sentence(weights: Path, built: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((built, "--checkpoint", tmp_path / "none.safetensors"), "not found"),
        ((tmp_path / "none", "--checkpoint", weights), "not found"),
        ((built, "--checkpoint", weights, "--out", built), "is a built dataset"),
        ((built, "--model", "no-such-network"), "no-such-network"),
    ):
        done = run(*arguments)
        assert done.exit_code != 0
        assert message in str(done.exception)
        assert "\n" not in str(done.exception)


def test_neighbourhoods_against_plain_loops() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, 60)
    labels[0] = 4  # the only one of its class
    vectors = rng.normal(size=(60, 8)) + np.eye(8)[labels % 8] * 2
    named = [(f"k{i:02d}", "train") for i in range(60)]
    findings, pairs = find_label_errors(torch.from_numpy(vectors), labels, named, list("abcde"), 3)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = unit @ unit.T
    due, mixed = {}, 0
    for i in range(1, 60):
        inner = sorted((similar[i, j] for j in range(60) if j != i and labels[j] == labels[i]), reverse=True)
        outer = sorted(((similar[i, j], j) for j in range(60) if labels[j] != labels[i]), reverse=True)
        own, other = np.mean(inner[:3]), np.mean([value for value, _ in outer[:3]])
        mixed += outer[0][0] > inner[0]
        if other > own:
            due[f"k{i:02d}"] = (other - own, f"k{outer[0][1]:02d}")
    found = {each.key: (each.score, each.nearest) for each in findings if each.kind == "other class"}
    assert found.keys() == due.keys()
    for key, (score, nearest) in due.items():
        assert found[key][0] == pytest.approx(score, abs=1e-5)
        assert found[key][1] == nearest
    assert sum(pair.images for pair in pairs) == mixed


def test_a_stray_image_of_no_class_is_an_outlier() -> None:
    rng = np.random.default_rng(6)
    labels = np.repeat([0, 1], 20)
    vectors = np.eye(8)[labels] + rng.normal(scale=0.05, size=(40, 8))
    vectors[7] = [0.5, -0.5, 1, 0, 0, 0, 0, 0]
    named = [(f"k{i:02d}", "train") for i in range(40)]
    findings, _ = find_label_errors(torch.from_numpy(vectors), labels, named, ["a", "b"], 5)
    assert [(each.key, each.kind, each.suggested) for each in findings if each.deviation > 10] == [
        ("k07", "outlier", "")
    ]
