"""Trainings and studies that are killed at any time: the same command ends with the same weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
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


def state(out: Path) -> set[tuple[str, int]]:
    """The names and times of the files of a run; those that are being written have no time."""
    found = set()
    for path in out.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((str(path), 0 if path.name.startswith(".tmp-") else path.stat().st_mtime_ns))
    return found


def watched(command: list[str], out: Path, until: float = math.inf) -> int:
    """Run a command until its folder has changed a number of times, and kill it then; returns the changes."""
    process = subprocess.Popen([sys.executable, "-c", CLI, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    before, changes = state(out), 0
    while process.poll() is None and changes < until:
        now = state(out)
        changes += now != before
        before = now
        time.sleep(0.001)
    process.kill()
    error = process.communicate()[1].decode()
    assert process.returncode in (0, -signal.SIGKILL), error
    return changes if process.returncode == 0 else -changes


def killed(whole: tuple[list[str], Path], command: tuple[list[str], Path], seed: int) -> None:
    """Run a command undisturbed; kill the other one after some of its writes, several times, and let it finish."""
    rng, start, kills = random.Random(seed), time.monotonic(), 0
    changes = watched(*whole)
    assert changes > 20
    while kills < KILLS:
        if watched(*command, rng.randint(1, changes // 2)) < 0:
            kills += 1
        elif kills >= KILLS // 2:
            break
        else:  # done too early
            shutil.rmtree(command[1])
            kills = 0
    assert watched(*command) >= 0
    print(f"{kills} kills in {time.monotonic() - start:.0f} s; {changes} changes of the folder undisturbed")


def weights(run: Path) -> dict[str, bytes]:
    return {
        f"{name}/{key}": tensor.tobytes()
        for name in ("best.safetensors", "last.safetensors")
        for key, tensor in torch_only.load_file(run / name).items()
    }


def report(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "report").iterdir()}


def losses(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_training_ends_with_the_same_weights(data: Path, tmp_path: Path, seed: int) -> None:
    def command(out: Path) -> list[str]:
        chosen = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
        return ["train", "--data", str(data), "--out", str(out), *chosen, "--device", "cpu", "--resume"]

    whole, run = tmp_path / "whole", tmp_path / "run"
    killed((command(whole), whole), (command(run), run), seed)
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)
    assert report(run).keys() == report(whole).keys()
    assert not list(run.rglob(".tmp-*"))


def test_a_killed_study_ends_with_the_same_table(data: Path, tmp_path: Path) -> None:
    shared = "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in SETTINGS.items())
    study = tmp_path / "study.toml"
    study.write_text(f'name = "study"\n[set]\n{shared}[grid]\n"run.seed" = [0, 1]\n"augment.flip" = [0.0, 0.5]\n')

    def command(out: Path) -> list[str]:
        return ["study", str(study), "--data", str(data), "--out", str(out), "--device", "cpu"]

    whole, run = tmp_path / "whole", tmp_path / "run"
    killed((command(whole), whole), (command(run), run), 7)
    assert not list(run.rglob(".tmp-*"))
    for name in ("table.csv", "table.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    for one in (path for path in whole.iterdir() if path.is_dir()):
        assert weights(run / one.name) == weights(one)
        assert report(run / one.name) == report(one)
