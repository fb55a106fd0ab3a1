"""Training on drawn images: runs learn, resume exactly, share batches over processes, and reject invalid input."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import animesion
from animesion.errors import UsageError
from animesion.report import runs as report_runs
from animesion_training.engine import checkpoint, loop, runs
from animesion_training.engine.meter import DivergedError
from animesion_training.engine.watcher import Watcher
from animesion_training.recipe import TrainRecipe, load
from animesion_training.run_weights import BEST, FINAL
from animesion_training.weights import load_model
from tests.running import run_here

CLI = "from animesion.cli import main; main()"
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
FAST = (
    "model.name=resnet10t", "model.img_size=32", "run.batch_size=16", "data.workers=0", "schedule.warmup_steps=2",
    "optimizer.lr=0.02", "run.log_steps=1", "augment.scale=[0.5, 1.0]",
)  # fmt: skip


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built dataset of three easily distinguished classes: noise of one colour each, 40 images per class."""
    root = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(5)
    for name, colour in COLOURS.items():
        (root / "set" / name).mkdir(parents=True)
        for i in range(40):
            noise = rng.normal(0, 60, (12, 12, 3)) + np.array(colour)
            image = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
            image.save(root / "set" / name / f"{i}.png")
    settings = [
        f"source.path={root / 'set'}",
        "split.train=60",
        "split.val=20",
        "split.test=20",
        "duplicates.near=false",
    ]
    animesion.build(animesion.load_recipe("folder", settings), root / "built", workers=1)
    return root / "built"


def recipe(*overrides: str, epochs: int = 2) -> TrainRecipe:
    return load("scratch", [*FAST, f"schedule.epochs={epochs}", *overrides])


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def train_arguments(data: Path, out: Path, *more: str) -> list[str]:
    settings = [part for value in (*FAST, *more) for part in ("--set", value)]
    return ["train", "--data", str(data), "--out", str(out), *settings, "--device", "cpu"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command of docs/scaling.md: two processes, started by the module that `torchrun` runs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, "-m", "animesion", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_on_cpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(*arguments, "--device", "cpu")


def test_a_run_learns_and_its_weights_serve(coloured: Path, tmp_path: Path) -> None:
    outcome = loop.train(recipe(epochs=6), coloured, tmp_path / "run", device="cpu")
    assert outcome.test is not None
    assert outcome.test.top_1 > 0.8
    assert outcome.steps == 6 * 5  # 72 images in batches of 16, the last smaller
    model, card = load_model(tmp_path / "run" / BEST)
    assert card.classes == ("blue", "green", "red")
    assert not model.training
    image = tmp_path / "red.png"
    Image.new("RGB", (60, 40), COLOURS["red"]).save(image)
    (tmp_path / "no.jpg").write_text("no image")
    best = ["--checkpoint", str(tmp_path / "run")]
    answer = run_on_cpu("predict", str(image), str(tmp_path / "no.jpg"), "--json", *best)
    assert answer.returncode == 1  # one of the two cannot be read
    first, second = map(json.loads, answer.stdout.splitlines())
    assert first["guesses"][0]["name"] == "red"
    assert second["problem"] == "not an image"
    report = json.loads((tmp_path / "run" / "report" / "evaluation.json").read_text())
    measured = run_on_cpu("eval", "--data", str(coloured), "--json", *best)
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["top_1"] == report["top_1"] == outcome.test.top_1
    shown = report_runs.of_run(tmp_path / "run", animesion.open_dataset(coloured))
    assert shown["evaluation"]["top_1"] == pytest.approx(outcome.test.top_1, abs=1e-6)
    assert len(shown["steps"]) == outcome.steps
    wrong = outcome.test.samples - round(outcome.test.top_1 * outcome.test.samples)
    assert len(shown["mistakes"]) == wrong
    assert all(each["image"] >= 0 for each in shown["mistakes"])


def test_equal_runs_are_equal_and_a_resumed_one_too(coloured: Path, tmp_path: Path) -> None:
    mixed = (
        "augment.mixup=0.4",
        "augment.cutmix=1.0",
        "run.ema=0.9",
        "run.save_steps=3",
        "model.options.drop_rate=0.2",
    )
    loop.train(recipe(*mixed, epochs=3), coloured, tmp_path / "whole", device="cpu")

    class StoppedError(Exception):
        pass

    class StopsAt(Watcher):
        def __init__(self, step: int) -> None:
            self.left = step

        def stepped(self, loss: float, rate: float, speed: float) -> None:
            self.left -= 1
            if self.left == 0:
                raise StoppedError

    # stopped between checkpoints: the steps after the last one are repeated with the same result
    for step in (4, 2, 5):
        with pytest.raises(StoppedError):
            loop.train(
                recipe(*mixed, epochs=3), coloured, tmp_path / "cut", resume=True, device="cpu", watcher=StopsAt(step)
            )
    loop.train(recipe(*mixed, epochs=3), coloured, tmp_path / "cut", resume=True, device="cpu")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (checkpoint.load(tmp_path / name / runs.LAST) for name in ("whole", "cut"))
    for part in ("model", "ema"):
        for key, tensor in one[part].items():
            assert torch.equal(tensor, other[part][key]), key
    assert one["stream"] == other["stream"]


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_losses(coloured: Path, tmp_path: Path) -> None:
    more = ("schedule.epochs=4", "run.save_steps=2")
    assert run_here(*train_arguments(coloured, tmp_path / "whole", *more)).returncode == 0
    arguments = train_arguments(coloured, tmp_path / "killed", *more)
    killed = [sys.executable, "-c", CLI, *arguments]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / runs.LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    refused = run_here(*arguments)
    assert refused.returncode == 2
    assert "add --resume" in refused.stderr
    done = subprocess.run([*killed, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(coloured: Path, tmp_path: Path) -> None:
    # layer norm, as batch norm sees another batch in each process
    more = ("model.name=vit_tiny_patch16", "optimizer.lr=0.005", "schedule.epochs=2", "run.accumulate=2")
    assert run_here(*train_arguments(coloured, tmp_path / "one", *more)).returncode == 0
    run = torchrun(*train_arguments(coloured, tmp_path / "two", *more))
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = np.array(losses(tmp_path / "one")), np.array(losses(tmp_path / "two"))
    assert one.shape == two.shape
    # the same sums in another order: float32 rounding, grown over the steps
    assert np.abs(one - two).max() < 2e-3
    assert abs(one[0] - two[0]) < 1e-5


def test_freezing_trains_what_is_left(coloured: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    loop.train(recipe(epochs=1), coloured, first, device="cpu")
    second = recipe(f"model.init={first / FINAL}", "model.freeze=['backbone']", "model.reset_head=true", epochs=1)
    loop.train(second, coloured, tmp_path / "second", device="cpu")
    before, after = (checkpoint.load(path / runs.LAST)["model"] for path in (first, tmp_path / "second"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.name=resnet999"], "resnet999"),
        (["model.freeze=['nothing']"], "no parameter matches 'nothing'"),
        (["objective.name=focl"], "did you mean 'focal'"),
        (["data.train=trian"], "has no split 'trian'"),
        (["optimizer.name=sgdd"], "sgdd"),
        (["run.batch_size=-1"], "run.batch_size"),
        (["run.batch_size=1"], "run.batch_size is 1, and resnet10t normalises over the batch"),
        (["run.static_graph=true", "run.accumulate=2"], "run.static_graph needs run.accumulate = 1"),
        (["model.pretrained=true", "model.init=x"], "give one"),
        (["augment.scale=[0.9, 0.1]"], "0 < low <= high"),
    ],
)
def test_mistakes_are_one_sentence(coloured: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("[", r"\[").replace("(", r"\(")):
        loop.train(recipe(*overrides), coloured, tmp_path / "run", device="cpu")


def test_a_loss_that_explodes_stops_with_a_sentence(coloured: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf).*lower optimizer.lr"):
        loop.train(
            recipe("optimizer.lr=1e12", "schedule.warmup_steps=0", epochs=4), coloured, tmp_path / "run", device="cpu"
        )


def test_a_checkpoint_from_elsewhere_runs_no_code(coloured: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    out = tmp_path / "run"
    loop.train(recipe(epochs=1), coloured, out, device="cpu")
    torch.save({"format": 1, "evil": Evil()}, out / runs.LAST)
    with pytest.raises(UsageError, match="is not a checkpoint of a run"):
        loop.train(recipe(epochs=1), coloured, out, resume=True, device="cpu")
    assert not (tmp_path / "owned").exists()


def test_a_study_is_one_table_and_carries_on(coloured: Path, tmp_path: Path) -> None:
    study = tmp_path / "sizes.toml"
    shared = "\n".join(f'"{key}" = {value}' for key, value in (pair.split("=") for pair in FAST[2:]))
    study.write_text(
        f'[set]\n"schedule.epochs" = 1\n{shared}\n'
        '[grid]\n"model.name" = ["resnet10t"]\n"model.img_size" = [32, 48]\n"run.seed" = [0, 1]\n'
    )
    order = ["study", str(study), "--data", str(coloured), "--out", str(tmp_path / "out"), "--json"]
    first = run_on_cpu(*order)
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)
    assert [(row["model.img_size"], row["runs"]) for row in rows] == [(32, 2), (48, 2)]
    assert rows[1]["multiply_adds"] > 2 * rows[0]["multiply_adds"]
    assert all(0 <= row["top_1"] <= 1 for row in rows)
    assert (tmp_path / "out" / "accuracy-cost.png").read_bytes().startswith(b"\x89PNG")
    again = run_on_cpu(*order)
    assert again.stderr.count("already done") == 4
    assert json.loads(again.stdout) == rows
    study.write_text('[grid]\n"model.nme" = ["resnet10t"]\n')
    wrong = run_on_cpu(*order)
    assert wrong.returncode == 2
    assert "did you mean 'model.name'" in wrong.stderr


@pytest.mark.parametrize("cache", ["ram", pytest.param("device", marks=pytest.mark.slow)])
def test_a_run_from_the_cache_learns_and_resumes(coloured: Path, tmp_path: Path, cache: str) -> None:
    settings = (f"data.cache={cache}", "run.save_steps=3")
    outcome = loop.train(recipe(*settings, epochs=6), coloured, tmp_path / "run", device="cpu")
    assert outcome.test is not None
    assert outcome.test.top_1 > 0.8

    class StoppedError(Exception):
        pass

    class StopsEarly(Watcher):
        def ended(self, epoch: int, numbers: dict[str, float]) -> None:
            if epoch == 2:
                raise StoppedError

    with pytest.raises(StoppedError):
        loop.train(recipe(*settings, epochs=6), coloured, tmp_path / "cut", device="cpu", watcher=StopsEarly())
    loop.train(recipe(*settings, epochs=6), coloured, tmp_path / "cut", device="cpu", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [("run.precision=bf16",), ("run.precision=fp16",), ("run.precision=bf16", "run.checkpointing=true", "run.ema=0.9")],
    ids=["bf16", "fp16", "bf16-checkpointing-ema"],
)
def test_lower_precision_trains_alike(coloured: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    model = ("model.name=resnet10t", "optimizer.lr=0.005")
    loop.train(recipe(*model, epochs=2), coloured, tmp_path / "full", device="cpu")
    loop.train(recipe(*model, *settings, epochs=2), coloured, tmp_path / "less", device="cpu")
    full, less = losses(tmp_path / "full"), losses(tmp_path / "less")
    assert full != less  # it was in fact computed otherwise
    assert np.allclose(full, less, atol=0.1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_has_the_losses_of_the_plain_one(
    coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    # inductor, the default, traces the same graphs and then runs a C++ compiler for 20 seconds
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = ("model.name=vit_tiny_patch16", "model.options.depth=1", "optimizer.lr=0.005", "data.val=", "data.test=")
    loop.train(recipe(*model, epochs=1), coloured, tmp_path / "plain", device="cpu")
    loop.train(recipe(*model, "run.compile=true", epochs=1), coloured, tmp_path / "compiled", device="cpu")
    assert np.allclose(losses(tmp_path / "plain"), losses(tmp_path / "compiled"), atol=1e-4)
    model_, _ = load_model(tmp_path / "compiled" / FINAL)
    assert not any("_orig_mod" in name for name, _ in model_.named_parameters())


def test_trackers_get_the_numbers_of_the_log(coloured: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    trackers = ("run.tensorboard=true", "run.wandb=offline")
    loop.train(recipe(*trackers, epochs=1), coloured, out, device="cpu")
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [round(event.value, 4) for event in board.Scalars("step/loss")] == [round(v, 4) for v in losses(out)]
    loop.train(recipe("run.wandb=offline", epochs=2), coloured, out, device="cpu", resume=True)
    names = {path.name for path in out.glob("wandb/offline-run-*/*.wandb")}
    assert names == {f"run-{(out / 'wandb-id.txt').read_text()}.wandb"}  # one run for both
