"""Compiled networks: one graph for all sizes of a batch, and outputs of CUDA graphs that are not overwritten."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from animesion.errors import UsageError
from animesion_training.distributed import DistributedContext
from animesion_training.engine.feed import feed
from animesion_training.engine.steps import CALStep
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.recipe import load
from tests import ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of nodes of each graph that torch.compile makes; it is then run as it is."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        found.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.accumulate=2",),
        ("model.selector=cal",),
        ("model.options.depth=4", "model.reduction=evit", "model.keep_rate=0.7", "model.cache=clc", "model.head=cla"),
    ],
    ids=["pieces", "cal", "clca"],
)
def test_a_network_is_compiled_once_for_all_sizes_of_a_batch(
    tmp_path: Path, graphs: list[int], overrides: tuple[str, ...]
) -> None:
    ends = []
    for compiled in ("true", "false"):
        settings = [*ranks.SMALL, *overrides, "model.img_size=48", "run.batch_size=6", f"run.compile={compiled}"]
        trainer = Trainer(load("scratch", settings), ranks.drawn(22), tmp_path, ALONE, Watcher())
        for batch, _ in feed(trainer.stream, ALONE.device):
            trainer.train_batch(batch)
        ends.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert trainer.step == 4  # three batches of 6, and one of 4
    assert len(graphs) == 1
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_cuda_graphs_have_one_size_and_keep_no_output(
    tmp_path: Path, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = ("run.compile=true", "run.compile_mode=reduce-overhead", "run.batch_size=4")
    with pytest.raises(UsageError, match=r"run.compile_mode = 'reduce-overhead' needs data.last = 'drop'"):
        load("scratch", mode)
    plain, modes, begun = torch.compile, [], []

    def compiling(network: Any, mode: str | None = None) -> Any:
        modes.append(mode)
        return plain(network)

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    settings = [*ranks.SMALL, *mode, "data.last=drop", "model.selector=cal", "run.accumulate=2"]
    trainer = Trainer(load("scratch", settings), ranks.drawn(9), tmp_path, ALONE, Watcher())
    outputs: list[Any] = []
    trainer.update.step.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    collect = trainer.update.step.collect

    def collecting(*args: Any) -> Any:
        assert isinstance(trainer.update.step, CALStep)
        kept.append(list(trainer.update.step._passed))
        return collect(*args)

    monkeypatch.setattr(trainer.update.step, "collect", collecting)
    for batch, _ in feed(trainer.stream, ALONE.device):
        trainer.train_batch(batch)
    assert modes == ["reduce-overhead"]
    assert len(begun) == 4  # two steps of two pieces
    places = {output.features.untyped_storage().data_ptr() for output in outputs}
    assert len(kept) == 2
    assert all(features.untyped_storage().data_ptr() not in places for step in kept for features, _ in step)
