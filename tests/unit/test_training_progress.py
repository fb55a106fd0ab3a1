"""What `animesion train` shows: the plan first, and a line at least every ten seconds without a terminal."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from animesion_training import precision
from animesion_training.cli.progress import Screen
from animesion_training.distributed import DistributedContext
from animesion_training.engine.plan import describe
from animesion_training.models import create_model
from animesion_training.recipe import builtin_names, load
from tests import ranks


def test_lines_come_every_ten_seconds_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    screen = Screen(None)
    screen.message("resnet18 on faces")
    screen.started(1, 3, 100, 40)
    for _ in range(60):
        clock[0] += 0.5
        screen.stepped(2.5, 0.1, 1234.5)
    for done in range(0, 5000, 250):
        clock[0] += 1
        screen.scored("val", done + 250, 5000)
    screen.ended(1, {"train_loss": 2.5, "val_top_1": 0.25})
    assert capsys.readouterr().err.splitlines() == [
        "resnet18 on faces",
        "epoch 1/3: step 60 of 100, loss 2.500, 1,234 images/s",
        "epoch 1/3: step 80 of 100, loss 2.500, 1,234 images/s",
        "epoch 1/3: step 100 of 100, loss 2.500, 1,234 images/s",
        "val: image 2,500 of 5,000",
        "val: image 5,000 of 5,000",
        "epoch 1: train loss 2.5, val top-1 25.00%",
    ]


def test_bars_follow_epochs_and_evaluations() -> None:
    with Progress(TextColumn("{task.description}"), console=Console(quiet=True)) as bars:
        screen = Screen(bars)
        screen.started(1, 2, 5, 3)
        assert [(task.description, task.completed, task.total) for task in bars.tasks] == [("epoch 1/2", 3, 5)]
        screen.stepped(1.0, 0.1, 10.0)
        assert bars.tasks[0].completed == 4
        screen.scored("val", 2, 8)
        screen.scored("val", 6, 8)
        assert [(task.description, task.completed, task.total) for task in bars.tasks] == [("val", 6, 8)]
        screen.scored("val", 8, 8)
        screen.ended(1, {})
        screen.started(2, 2, 5, 0)
        assert [task.description for task in bars.tasks] == ["epoch 2/2"]


@pytest.mark.parametrize(
    ("overrides", "world_size", "done", "lines"),
    [
        (
            ("model.freeze=['backbone']",),
            1,
            0,
            [
                "vit_tiny_patch16 at 32 px (0.0 M parameters, 0.0 M trained) on drawn: 3 classes, images: 9 train",
                "3 steps of 64 images, 3 per epoch, in bf16 on cpu, into runs/a",
                "this CPU has no instructions for bf16 and emulates it: run.precision = 'fp32' is faster",
            ],
        ),
        (
            ("run.batch_size=2", "data.val=val"),
            3,
            2,
            [
                "vit_tiny_patch16 at 32 px (0.0 M parameters) on drawn: 3 classes, images: 9 train, 9 val",
                "3 steps of 2 images, 3 per epoch, in bf16 on cpu, 3 processes, into runs/a; continuing after step 2 "
                "of 3",
                "this CPU has no instructions for bf16 and emulates it: run.precision = 'fp32' is faster",
                "2 of 3 processes have no images, because run.batch_size is 2 and a process needs two of them: give a "
                "larger batch",
            ],
        ),
    ],
)
def test_the_plan_of_a_run(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], world_size: int, done: int, lines: list[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    recipe = load("scratch", [*ranks.SMALL, *overrides])
    model = create_model("vit_tiny_patch16", 3, 32, depth=1, embed_dim=16, num_heads=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not recipe.model.freeze or name.startswith("head"))
    context = DistributedContext(0, world_size, torch.device("cpu"))
    found = describe(
        recipe, ranks.drawn(9), model, context, Path("runs/a"), precision="bf16", steps=3, done=done, pairs=True
    )
    assert found == lines


def test_built_in_recipes_leave_the_precision_to_the_device() -> None:
    for name in builtin_names():
        recipe = load(name)
        assert (recipe.run.precision, recipe.teacher.precision, recipe.run.tf32) == ("auto", "auto", True)


def test_numerics_are_set_for_a_run_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def now() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        products = torch.get_float32_matmul_precision()
        exact = torch.are_deterministic_algorithms_enabled()
        return cudnn.benchmark, cudnn.allow_tf32, products, exact, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    before, gpu, cpu = now(), torch.device("cuda", 0), torch.device("cpu")
    with precision.numerics(gpu, deterministic=False, tf32=True):
        assert now() == (True, True, "high", False, None)
    with precision.numerics(gpu, deterministic=False, tf32=False):
        assert now() == (True, False, "highest", False, None)
    with precision.numerics(cpu, deterministic=False, tf32=True):
        assert now() == before
    with contextlib.suppress(KeyError), precision.numerics(gpu, deterministic=True, tf32=True):
        assert now() == (False, True, "high", True, ":4096:8")
        raise KeyError
    assert now() == before


def test_precision_auto_fits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def supports(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return not including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supports)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert precision.resolve("auto", gpu) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert precision.resolve("auto", gpu) == "fp16"
    assert asked == [False]
    assert precision.resolve("auto", cpu) == "fp32"
    assert [precision.resolve(name, cpu) for name in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]
    for capabilities, emulated in (({"avx2": True}, True), ({"avx512_bf16": True}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert precision.emulates_bf16(cpu) == emulated
        assert not precision.emulates_bf16(gpu)
