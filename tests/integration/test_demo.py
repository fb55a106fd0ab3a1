"""`animesion demo`: the page predicts what `animesion predict` predicts, without this package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from animesion_training import create_model, save_model
from tests.conftest import draw
from tests.running import run_here

pytest.importorskip("onnxscript", reason="networks are exported with the extra `export`")

NAMES = ["red <b>", "blue", "綠"]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, and the Space that is made of it with two examples."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    model = create_model("resnet18", 3, 48)
    (folder / "faces").mkdir()
    save_model(model, folder / "faces" / "best.safetensors", NAMES, mean=(0.4, 0.5, 0.6), crop_pct=0.9)
    (folder / "images").mkdir()
    draw(1, 200).save(folder / "images/a.jpg", quality=95)
    draw(2, 60).convert("RGBA").save(folder / "images/b.png")
    done = run_here(
        "demo", str(folder / "faces"), "--out", str(folder / "space"), "--licence", "mit", "--examples",
        str(folder / "images"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def page_of(space: Path) -> Any:
    """The module `app.py`, which is loaded from the written file."""
    spec = importlib.util.spec_from_file_location("written_app", space / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_predicts_what_the_command_predicts(space: Path) -> None:
    network = page_of(space / "space").Network(space / "space/model.onnx")
    for path in sorted((space / "images").iterdir()):
        done = run_here("predict", "--checkpoint", str(space / "faces"), str(path), "--json", "--device", "cpu")
        expected = {each["name"]: each["probability"] for each in json.loads(done.stdout)["guesses"]}
        found = network.predict(Image.open(path))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=0.02)
    assert network.predict(None) == {}


def test_the_space_has_a_card_and_examples_without_metadata(space: Path) -> None:
    root = space / "space"
    assert {path.name for path in root.iterdir()} - {"__pycache__"} == {
        "README.md", "TITLE", "app.py", "examples", "model.onnx", "requirements.txt",
    }  # fmt: skip
    head = yaml.safe_load((root / "README.md").read_text().split("---")[1])
    assert (head["title"], head["sdk"], head["license"]) == ("faces", "gradio", "mit")
    assert [path.name for path in sorted((root / "examples").iterdir())] == ["001.jpg", "002.jpg"]
    assert not Image.open(root / "examples/001.jpg").getexif()


def test_mistakes_are_sentences_and_leave_nothing(space: Path, tmp_path: Path) -> None:
    again = run_here("demo", str(space / "faces"), "--out", str(space / "space"))
    assert "not an empty folder" in again.stderr
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    bad = run_here(
        "demo", str(space / "faces"), "--out", str(tmp_path / "out"), "--examples", str(tmp_path / "bad.jpg")
    )
    assert bad.returncode == 2
    assert "cannot be an example" in bad.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jpg"]


@pytest.mark.slow
def test_gradio_serves_it(space: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    script = """
import sys

sys.path.insert(0, sys.argv[1])
import app
from gradio_client import Client, handle_file

page = app.page(app.Network(app.HERE / "model.onnx"))
_, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
image = handle_file(str(app.HERE / "examples/001.jpg"))
print(Client(url, verbose=False).predict(image, api_name="/predict"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(space / "space")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'confidences'" in done.stdout
