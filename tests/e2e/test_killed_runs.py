"""Trainings and studies that are killed at any time: the same command ends with the same weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import animesion
from tests.conftest import draw_folders

torch_only = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.slow

CLI = "from animesion.cli import main; main()"
KILLS = int(os.environ.get("KILLS", "6"))
SETTINGS = {
    "model.name": "resnet10t", "model.img_size": 32, "run.batch_size": 8, "run.save_steps": 2, "run.log_steps": 1,
    "schedule.epochs": 3, "data.workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    recipe = animesion.load_recipe(
        "folder", [f"source.path={draw_folders(folder / 'set')}", "split.train=60", "split.val=20", "split.test=20"]
    )
    animesion.build(recipe, folder / "built", workers=1)
    return folder / "built"


def killed(whole: list[str], command: list[str], out: Path, seed: int) -> None:
    """Run a command undisturbed; kill the other one at random times, and let it finish."""
    rng, start = random.Random(seed), time.monotonic()
    subprocess.run([sys.executable, "-c", CLI, *whole], check=True, capture_output=True)
    duration, kills = time.monotonic() - start, 0
    line = [sys.executable, "-c", CLI, *command]
    while kills < KILLS:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.9) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            if kills:
                break
            shutil.rmtree(out)  # too late for a kill
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"{kills} kills in {time.monotonic() - start:.0f} s")


def weights(run: Path) -> dict[str, bytes]:
    return {
        f"{name}/{key}": tensor.tobytes()
        for name in ("best.safetensors", "last.safetensors")
        for key, tensor in torch_only.load_file(run / name).items()
    }


def losses(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_training_ends_with_the_same_weights(data: Path, tmp_path: Path, seed: int) -> None:
    def command(out: Path) -> list[str]:
        chosen = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
        return ["train", "--data", str(data), "--out", str(out), *chosen, "--device", "cpu", "--resume"]

    killed(command(tmp_path / "whole"), command(tmp_path / "run"), tmp_path / "run", seed)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_a_killed_study_ends_with_the_same_table(data: Path, tmp_path: Path) -> None:
    shared = "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in SETTINGS.items())
    study = tmp_path / "study.toml"
    study.write_text(f'name = "study"\n[set]\n{shared}[grid]\n"run.seed" = [0, 1]\n"augment.flip" = [0.0, 0.5]\n')

    def command(out: Path) -> list[str]:
        return ["study", str(study), "--data", str(data), "--out", str(out), "--device", "cpu"]

    killed(command(tmp_path / "whole"), command(tmp_path / "run"), tmp_path / "run", 7)
    for name in ("table.csv", "table.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for run in (path for path in (tmp_path / "whole").iterdir() if path.is_dir()):
        assert weights(tmp_path / "run" / run.name) == weights(run)
