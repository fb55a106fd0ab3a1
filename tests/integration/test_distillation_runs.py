"""Distillation end to end on drawn images: train a teacher, rank and explain it, train students."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import animesion
from animesion.errors import UsageError
from animesion_training.engine import checkpoint, loop, runs
from animesion_training.engine.meter import DivergedError
from animesion_training.engine.watcher import Watcher
from animesion_training.models.cal import CALClassifier
from animesion_training.recipe import TrainRecipe, load
from animesion_training.run_weights import BEST
from animesion_training.weights import load_model, save_model
from tests.running import run_here

CLI = "from animesion.cli import main; main()"
FAST = (
    "model.img_size=32", "model.pretrained=false", "run.batch_size=16", "data.workers=0", "schedule.warmup_steps=2",
    "run.log_steps=1", "augment.trivial=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built dataset of three classes: a small disc of one colour somewhere on noise, 24 images per class."""
    root = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:48, :48]
    for name, colour in {"blue": (30, 40, 220), "green": (30, 200, 40), "red": (220, 40, 30)}.items():
        (root / "set" / name).mkdir(parents=True)
        for i in range(24):
            y, x = rng.integers(12, 36, 2)
            pixels = rng.normal(128, 40, (48, 48, 3))
            pixels[(rows - y) ** 2 + (columns - x) ** 2 < 80] = colour
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "set" / name / f"{i}.png")
    settings = [f"source.path={root / 'set'}", "split.train=50", "split.val=25", "split.test=25"]
    animesion.build(animesion.load_recipe("folder", [*settings, "duplicates.near=false"]), root / "built", workers=1)
    return root / "built"


@pytest.fixture(scope="module")
def teacher(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a CAL teacher of 48 px."""
    out = tmp_path_factory.mktemp("teacher")
    settings = ("model.name=resnet10t", "model.img_size=48", "optimizer.lr=0.02", "schedule.epochs=8")
    outcome = loop.train(load("cal-teacher", [*FAST, *settings]), coloured, out, device="cpu")
    assert outcome.test is not None
    assert outcome.test.top_1 > 0.6
    return out / BEST


def student(teacher: Path, *overrides: str, recipe: str = "tgda") -> TrainRecipe:
    return load(
        recipe,
        [
            *FAST,
            "model.name=lrnet14",
            "schedule.epochs=2",
            "optimizer.lr=0.002",
            f"teacher.weights={teacher}",
            *overrides,
        ],
    )


def lines(out: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == "step"]


def test_the_teacher_has_attention_and_its_file_says_so(teacher: Path) -> None:
    model, card = load_model(teacher)
    assert isinstance(model, CALClassifier)
    assert card.methods == {"selector": "cal"}
    assert card.crop_pct == pytest.approx(1 / 1.34)
    parts = model.forward_parts(torch.randn(2, 3, 48, 48))
    assert parts.attention.shape[:2] == (2, 32)


def test_views_teach_and_a_resumed_run_repeats_them(coloured: Path, teacher: Path, tmp_path: Path) -> None:
    loop.train(student(teacher), coloured, tmp_path / "whole", device="cpu")
    first = lines(tmp_path / "whole")
    assert first[0]["loss"] == pytest.approx(first[0]["loss_label"] + first[0]["loss_distillation"])
    assert all(line["loss_distillation"] > 0 for line in first)

    class StoppedError(Exception):
        pass

    class StopsAt(Watcher):
        left = 2

        def stepped(self, loss: float, rate: float, speed: float) -> None:
            self.left -= 1
            if not self.left:
                raise StoppedError

    cut = student(teacher, "run.save_steps=1")
    with pytest.raises(StoppedError):
        loop.train(cut, coloured, tmp_path / "cut", device="cpu", watcher=StopsAt())
    loop.train(cut, coloured, tmp_path / "cut", device="cpu", resume=True)
    assert [line["loss"] for line in lines(tmp_path / "cut")] == [line["loss"] for line in first]


def test_a_cal_run_resumes_with_its_feature_centers(coloured: Path, tmp_path: Path) -> None:
    settings = ("model.name=resnet10t", "optimizer.lr=0.01", "schedule.epochs=2", "data.val=", "data.test=")
    recipe = load("cal-teacher", [*FAST, *settings])
    loop.train(recipe, coloured, tmp_path / "whole", device="cpu")

    class StopsAfterOne(Watcher):
        def ended(self, epoch: int, numbers: dict[str, float]) -> None:
            if epoch == 1:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        loop.train(recipe, coloured, tmp_path / "cut", device="cpu", watcher=StopsAfterOne())
    loop.train(recipe, coloured, tmp_path / "cut", device="cpu", resume=True)
    assert [line["loss"] for line in lines(tmp_path / "cut")] == [line["loss"] for line in lines(tmp_path / "whole")]
    one, other = (checkpoint.load(tmp_path / name / runs.LAST)["method"] for name in ("whole", "cut"))
    assert one
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("teacher.img_size=48", "teacher.antialias=false"),
        ("model.name=vitfs_nano_patch16", "model.options.norm_layer=layernorm"),
        ("views.sample=false", "teacher.train_mode=true", "teacher.auxiliary=dkd"),
        ("augment.mixup=0.2", "run.precision=bf16", "run.accumulate=2"),
    ],
    ids=["unaliased", "one-pass", "original-modes", "mixed"],
)
def test_every_way_of_teaching_runs(coloured: Path, teacher: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    loop.train(
        student(teacher, "schedule.epochs=1", "data.test=", *overrides), coloured, tmp_path / "run", device="cpu"
    )
    steps = lines(tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert len({line["loss"] for line in steps}) == len(steps)


def test_plain_distillation_and_labels_alone_are_the_same_recipe(coloured: Path, teacher: Path, tmp_path: Path) -> None:
    short = ("schedule.epochs=1", "data.test=", "data.val=")
    loop.train(student(teacher, *short, recipe="kd"), coloured, tmp_path / "kd", device="cpu")
    loop.train(student(Path(), *short, "teacher.weights=", recipe="kd"), coloured, tmp_path / "ce", device="cpu")
    taught, alone = lines(tmp_path / "kd")[0], lines(tmp_path / "ce")[0]
    assert "loss_distillation" in taught
    assert "loss_distillation" not in alone
    # the teacher is shown larger images, so the crops are cut at another resolution, but of the same place
    assert taught["loss_label"] == pytest.approx(alone["loss"], abs=0.05)


def test_what_cannot_teach_is_refused(coloured: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give its weights with --teacher"):
        loop.train(student(Path(), "teacher.weights="), coloured, tmp_path / "none", device="cpu")
    plain = animesion_model(tmp_path / "plain.safetensors", ("blue", "green", "red"))
    with pytest.raises(UsageError, match="without attention maps; train a teacher with"):
        loop.train(student(plain), coloured, tmp_path / "plain", device="cpu")
    others = animesion_model(tmp_path / "others.safetensors", ("blue", "green", "yellow"))
    with pytest.raises(UsageError, match=r"the teacher .*red.* not .yellow"):
        loop.train(student(others, recipe="kd"), coloured, tmp_path / "others", device="cpu")
    with pytest.raises(UsageError, match=r"unknown auxiliary loss .dkdd.*dkd"):
        loop.train(student(teacher, "teacher.auxiliary=dkdd"), coloured, tmp_path / "aux", device="cpu")


def test_a_teacher_that_gives_nan_stops_the_run_with_a_sentence(coloured: Path, teacher: Path, tmp_path: Path) -> None:
    model, card = load_model(teacher)
    with torch.no_grad():
        next(model.parameters()).fill_(3e38)  # finite, but what it computes is not
    save_model(model, tmp_path / "bad.safetensors", card.classes)
    with pytest.raises(DivergedError, match="term distillation"):
        loop.train(student(tmp_path / "bad.safetensors"), coloured, tmp_path / "run", device="cpu")


def animesion_model(path: Path, classes: tuple[str, ...]) -> Path:
    from animesion_training import create_model

    save_model(create_model("resnet10t", len(classes), 32), path, classes)
    return path


def test_teachers_are_ranked_and_looked_at(coloured: Path, teacher: Path, tmp_path: Path) -> None:
    other = animesion_model(tmp_path / "fresh.safetensors", ("blue", "green", "red"))
    ranked = run_here("teachers", "--data", str(coloured), "--split", "val", str(teacher), str(other), "--json")
    assert ranked.returncode == 0, ranked.stderr
    rows = json.loads(ranked.stdout)
    assert [row["rank"] for row in rows] == [1, 2]
    defined = [row["ratio_1_2_normal"] for row in rows if row["ratio_1_2_normal"] is not None]
    assert defined == sorted(defined)
    by_path = {row["checkpoint"]: row for row in rows}
    assert by_path[str(teacher)]["top_1"] > by_path[str(other)]["top_1"]
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (60, 40), (30 * i, 90, 200)).save(images / f"{i}.png")
    drawn = run_here("explain", str(teacher), str(images), "--out", str(tmp_path / "maps.png"))
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "maps.png") as image:
        assert image.height > 3 * 128


@pytest.mark.slow
def test_two_processes_teach_as_one(coloured: Path, teacher: Path, tmp_path: Path) -> None:
    settings = (
        "model.name=vit_tiny_patch16", "model.options.depth=2", "optimizer.lr=0.002", "data.val=",
        "data.test=", "schedule.epochs=1", "model.options.drop_path_rate=0.0", f"teacher.weights={teacher}",
    )  # fmt: skip
    loop.train(load("tgda", [*FAST, *settings]), coloured, tmp_path / "one", device="cpu")
    arguments = [
        "train",
        "--recipe",
        "tgda",
        "--data",
        str(coloured),
        "--out",
        str(tmp_path / "two"),
        "--device",
        "cpu",
    ]
    arguments += [part for value in (*FAST, *settings) for part in ("--set", value)]
    script = tmp_path / "command.py"
    script.write_text(f"import sys\nsys.argv[1:] = {arguments!r}\n{CLI}\n")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    for part in ("loss_label", "loss_distillation"):
        # the same draws, the same sums in another order
        assert one[0][part] == pytest.approx(two[0][part], abs=1e-5)
        assert [line[part] for line in one] == pytest.approx([line[part] for line in two], abs=2e-3)
