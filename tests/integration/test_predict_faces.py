"""`animesion predict --detector`: the face is cropped as in a build, then predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from animesion.cli import cli
from animesion_training.models import create_model
from animesion_training.weights import save_model
from tests.cascades import BRIGHT

NAMES = ("ann", "bea", "cia")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network that has learned nothing, and a detector of bright squares."""
    (tmp_path / "detectors").mkdir()
    (tmp_path / "detectors" / "lbpcascade_animeface.xml").write_bytes(BRIGHT)
    monkeypatch.setenv("ANIMESION_DETECTORS", str(tmp_path / "detectors"))
    torch.manual_seed(0)
    save_model(create_model("resnet18", 3, 64), tmp_path / "w.safetensors", NAMES)
    return tmp_path / "w.safetensors"


def predicted(weights: Path, *arguments: str | Path) -> tuple[int, list[dict[str, Any]]]:
    given = ["predict", "--checkpoint", weights, "--json", "--device", "cpu", *arguments]
    result = CliRunner().invoke(cli, list(map(str, given)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]


def drawn(path: Path, *squares: tuple[int, int, int]) -> Path:
    """A dark image of 400 x 300 px with bright squares (left, top, side), each in a window three times its size."""
    pixels = np.full((300, 400, 3), 20, np.uint8)
    for left, top, side in squares:
        pixels[top : top + side, left : left + side] = 230
    Image.fromarray(pixels).save(path)
    return path


def test_the_guesses_are_those_of_the_cut_out_face(weights: Path, tmp_path: Path) -> None:
    image = drawn(tmp_path / "a.png", (200, 120, 40))
    status, [line] = predicted(weights, image, "--detector", "lbp", "--margin", "0.1")
    left, top, right, bottom = line["box"]
    assert status == 0
    assert left < 200 < 240 < right
    assert top < 120 < 160 < bottom
    assert 0.5 <= line["score"] <= 1
    with Image.open(image) as whole:
        whole.crop((left, top, right, bottom)).save(tmp_path / "cut.png")
    _, [by_hand] = predicted(weights, tmp_path / "cut.png")
    assert line["guesses"] == by_hand["guesses"]
    _, [of_the_whole] = predicted(weights, image)
    assert of_the_whole["guesses"] != line["guesses"]
    assert "box" not in of_the_whole


def test_every_face_has_a_line_and_a_margin_widens_the_box(weights: Path, tmp_path: Path) -> None:
    image = drawn(tmp_path / "a.png", (100, 120, 30), (280, 120, 30))
    _, surest = predicted(weights, image, "--detector", "lbp")
    _, every = predicted(weights, image, "--detector", "lbp", "--all-faces")
    _, wide = predicted(weights, image, "--detector", "lbp", "--all-faces", "--margin", "0.2")
    assert len(surest) == 1
    assert len(every) == len(wide) >= 2
    assert surest[0] == every[0]
    assert {line["box"][0] < 200 for line in every} == {True, False}
    for narrow, wider in zip(every, wide, strict=True):
        assert wider["box"][0] < narrow["box"][0]
        assert wider["box"][2] > narrow["box"][2]


def test_an_image_without_a_face_is_a_problem_and_the_others_are_named(weights: Path, tmp_path: Path) -> None:
    faceless, broken = drawn(tmp_path / "a.png"), tmp_path / "b.jpg"
    broken.write_bytes(b"no image")
    good = drawn(tmp_path / "c.png", (200, 120, 40))
    status, lines = predicted(weights, faceless, broken, good, "--detector", "lbp")
    assert status == 1
    assert [line.get("problem") for line in lines] == ["no face found", "not an image", None]
    _, [line] = predicted(weights, good, "--detector", "lbp", "--min-score", "1")
    assert line["problem"] == "no face found"


def test_an_unknown_detector_is_one_sentence(weights: Path, tmp_path: Path) -> None:
    given = ["predict", "--checkpoint", str(weights), str(drawn(tmp_path / "a.png")), "--detector", "lpb"]
    result = CliRunner().invoke(cli, given)
    assert "there is no detector 'lpb'; did you mean 'lbp'?; installed are anime, auto, boxes, center, " in str(
        result.exception
    )
