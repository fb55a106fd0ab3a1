"""A run whose val and test have classes that are not in train: evaluated by embeddings, and never by top-1."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from animesion.cli import cli
from animesion.errors import UsageError
from animesion_training.cli.eval import eval_
from tests import ranks
from tests.integration.test_gallery import variants


def train(data: Path, out: Path, *overrides: str) -> Result:
    settings = [each for each in ranks.SMALL if not each.startswith(("data.val", "data.test"))]
    given = [part for each in (*settings, "run.batch_size=8", *overrides) for part in ("--set", each)]
    command = ["train", "--data", str(data), "--out", str(out), "--device", "cpu", *given]
    return CliRunner().invoke(cli, command)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    for i, split in enumerate(("train", "val", "test")):
        for c in range(2):
            variants(tmp_path / "faces" / split / f"{split} {c}", 2 * i + c, 7)
    return tmp_path / "faces"


def test_classes_outside_of_training_are_evaluated_by_retrieval(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(faces, run, "objective.name=supcon", "data.images_per_class=4", "schedule.epochs=2")
    assert result.exit_code == 0, (result.output, result.exception)
    for split in ("val", "test"):
        assert f"no class of the split '{split}' is trained on: it is evaluated by retrieval" in result.output
    assert "best validation mAP@R " in result.output
    assert "test, 2 classes that were not trained on: R@1 " in result.output
    with (run / "epochs.csv").open() as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == 2
    assert "val_top_1" not in epochs[0]
    assert 0 <= float(epochs[0]["val_map_at_r"]) <= 1
    report = json.loads((run / "report" / "similarity.json").read_text())
    assert report["verification"]["threshold"]["split"] == "val"
    assert report["retrieval"]["queries"] == 14
    assert not (run / "report" / "evaluation.json").exists()
    # the classifier knows none of the classes, and says so
    weights = ["--checkpoint", str(run), "--data", str(faces), "--device", "cpu"]
    refused = CliRunner().invoke(eval_, weights)
    assert isinstance(refused.exception, UsageError)
    assert "none of the classes in the split 'test'" in str(refused.exception)
    again = CliRunner().invoke(eval_, [*weights, "--task", "retrieval", "--task", "verification", "--json"])
    found = json.loads(again.output)
    assert found["retrieval"] == report["retrieval"]
    assert found["verification"] == report["verification"]
    fitted = CliRunner().invoke(eval_, [*weights, "--task", "verification", "--fit-split", "train", "--json"])
    assert "it does not fit them well" in json.loads(fitted.output)["notes"][0]


def test_a_split_with_some_unknown_classes_is_noted(faces: Path, tmp_path: Path) -> None:
    (faces / "val" / "val 0").rename(faces / "val" / "train 0")
    result = train(faces, tmp_path / "run", "data.test=")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "50.0% of the images in the split 'val' are of classes without training images, which count" in result.output
    assert "best validation top-1 " in result.output
