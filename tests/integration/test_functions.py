"""Train, evaluate and predict from Python: what the commands of these names do."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import animesion
import animesion_training
from animesion.errors import UsageError
from animesion_training.eval.metrics import Evaluation
from tests.conftest import draw


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colours in class folders below train, val and test, and a file that is no image."""
    root = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for label, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-30, 30, (32, 32, 3))
                pixels = np.clip(noise + colour, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def test_a_network_is_trained_evaluated_and_used(faces: Path, tmp_path: Path) -> None:
    overrides = ["model.name=resnet18", "model.img_size=32", "schedule.epochs=3", "run.batch_size=8"]
    outcome = animesion.train(faces, tmp_path / "run", overrides=overrides, device="cpu")
    assert outcome.steps == 9
    result = animesion.evaluate(outcome.out, faces, device="cpu")
    assert isinstance(result.metrics, Evaluation)
    assert result.metrics.top_1 == outcome.test.top_1 == result.as_json()["top_1"]
    result.write(tmp_path / "report")
    assert (tmp_path / "report").is_dir()
    assert animesion.evaluate(outcome.out, faces, tasks=["retrieval"], device="cpu").metrics.retrieval.queries == 8

    bad = tmp_path / "images" / "bad.jpg"
    bad.parent.mkdir()
    bad.write_bytes(b"no image")
    draw(1).save(tmp_path / "images" / "good.png")
    found = list(animesion.predict(outcome.out, tmp_path / "images", top=1, device="cpu"))
    assert [Path(each.path).name for each in found] == ["bad.jpg", "good.png"]
    assert found[0].problem
    assert not found[0].guesses
    assert len(found[1].guesses) == 1


def test_mistakes_are_sentences(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder without weights"):
        animesion.evaluate(tmp_path, faces)
    with pytest.raises(UsageError, match="did you mean 'scratch'"):
        animesion.train(faces, tmp_path / "run", recipe="scrach")
    assert {"train", "evaluate", "predict"} <= set(dir(animesion))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, place in project["entry-points"]["animesion.functions"].items():
        module, _, function = place.partition(":")
        assert getattr(importlib.import_module(module), function) is getattr(animesion_training, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        animesion.nothing()
