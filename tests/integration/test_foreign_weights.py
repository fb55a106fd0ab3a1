"""Commands on weights of other trainers, test-time augmentation and the learning-rate range test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from animesion_training import save_model
from animesion_training.models import create_model
from tests.running import run_here

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
FAST = ("model.name=resnet10t", "model.img_size=32", "run.batch_size=8", "data.workers=0", "schedule.warmup_steps=0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of noise of one colour each, below train and test."""
    root = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(5)
    for split, count in (("train", 16), ("test", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(0, 60, (40, 40, 3)) + np.array(colour)
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same network as weights of ours with class names, and as a checkpoint of timm's trainer."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    model = create_model("resnet10t", 3, 32)
    save_model(model, root / "ours.safetensors", tuple(COLOURS))
    args = argparse.Namespace(model="resnet10t", img_size=32, crop_pct=1.0, num_classes=3)
    content = {"arch": "resnet10t", "epoch": 2, "state_dict": model.state_dict(), "args": args}
    torch.save(content, root / "theirs.pth.tar")
    return root / "ours.safetensors", root / "theirs.pth.tar"


def evaluate(data: Path, weights: Path, *more: str) -> dict[str, object]:
    answer = run_here("eval", "--data", str(data), "--checkpoint", str(weights), "--json", "--device", "cpu", *more)
    assert answer.returncode == 0, answer.stderr
    document: dict[str, object] = json.loads(answer.stdout)
    return document


@pytest.mark.parametrize("tta", ["none", "flip", "crops"])
def test_eval_gives_the_same_for_both_files(
    folders: Path, files: tuple[Path, Path], tta: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = (evaluate(folders, each, "--tta", tta) for each in files)
    assert ours["samples"] == 12
    assert ours["top_1"] == theirs["top_1"]
    assert ours["calibration"] == theirs["calibration"]
    assert ours["tta"] == tta
    assert "resnet10t of timm with 3 classes at 32x32 pixels; it has no class names" in caplog.text


def test_every_command_takes_the_foreign_file(folders: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    picture = str(folders / "test" / "red" / "0.png")
    shown = [
        json.loads(run_here("predict", picture, "--json", "--device", "cpu", "--checkpoint", str(each)).stdout)
        for each in files
    ]
    names = [[guess["name"] for guess in each["guesses"]] for each in shown]
    assert names[0] == [list(COLOURS)[int(number)] for number in names[1]]
    theirs = str(files[1])
    exported = run_here("export", theirs, "--to", "hf", "--out", str(tmp_path / "hub"))
    assert exported.returncode == 0, exported.stderr
    assert evaluate(folders, tmp_path / "hub")["calibration"] == evaluate(folders, files[1])["calibration"]
    settings = [part for value in (*FAST, "schedule.epochs=1") for part in ("--set", value)]
    distilled = run_here(
        "train", "--data", str(folders), "--recipe", "kd", "--teacher", theirs, "--init", theirs, "--device", "cpu",
        "--out", str(tmp_path / "run"), *settings,
    )  # fmt: skip
    assert distilled.returncode == 0, distilled.stderr


def test_another_number_of_classes_is_refused(folders: Path, tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=5)
    torch.save({"arch": "resnet10t", "state_dict": model.state_dict()}, tmp_path / "five.pth")
    answer = run_here("eval", "--data", str(folders), "--checkpoint", str(tmp_path / "five.pth"), "--device", "cpu")
    assert answer.returncode == 2
    assert "has 3 classes, and" in answer.stderr
    assert "was trained for 5" in answer.stderr


def test_find_lr_suggests_a_rate_and_writes_nothing(folders: Path, tmp_path: Path) -> None:
    settings = [part for value in (*FAST, "schedule.epochs=1") for part in ("--set", value)]
    command = ("train", "--data", str(folders), "--find-lr", "--device", "cpu", "--json", *settings)
    answer = run_here(*command, "--out", str(tmp_path / "run"))
    assert answer.returncode == 0, answer.stderr
    test = json.loads(answer.stdout)
    assert 20 < len(test["rates"]) == len(test["losses"]) <= 100
    assert test["rates"] == sorted(test["rates"])
    assert 1e-6 < test["suggested"] < test["lowest"] < 10
    assert not (tmp_path / "run").exists()
    again = json.loads(run_here(*command).stdout)
    assert again == test
