"""`run.batch_size = 0`: the largest batch that fits, the same in every process and in a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from animesion.errors import UsageError
from animesion_training import memory
from animesion_training.cli.train import train
from animesion_training.distributed import DistributedContext
from animesion_training.engine import batch_size, runs
from animesion_training.recipe import TrainRecipe, load
from tests import ranks

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)


def recipe(*overrides: str) -> TrainRecipe:
    return load("scratch", [*ranks.SMALL, "run.batch_size=0", *overrides])


def trial(*overrides: str) -> batch_size._Trial:
    return batch_size._Trial(recipe(*overrides), ranks.drawn(8), CPU)


def largest(monkeypatch: pytest.MonkeyPatch, free: float, *overrides: str) -> int:
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: int(free))
    return batch_size.largest_power(trial(*overrides).fits_on_cpu(), 2, 2**30)


def test_the_largest_power_of_two_is_found_by_few_trials() -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= 50

    assert batch_size.largest_power(fits, 2, 1024) == 32
    assert tried == [2, 4, 8, 16, 32, 64]
    assert batch_size.largest_power(fits, 2, 31) == 16
    with pytest.raises(UsageError, match="not even 64 images fit"):
        batch_size.largest_power(fits, 64, 1024)


def test_a_batch_on_a_cpu_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    some, with_views = largest(monkeypatch, 1e9), largest(monkeypatch, 1e9, "model.selector=cal")
    assert some == 8192  # 500 MB of 55 kB
    assert largest(monkeypatch, 4e9) == 4 * some
    assert largest(monkeypatch, 1e9, "model.img_size=64") < some
    assert with_views < some
    assert largest(monkeypatch, 1e9, "model.selector=cal", "run.accumulate=4") > with_views
    assert largest(monkeypatch, 1e9, "run.checkpointing=true") == some  # not measured: it needs less
    with pytest.raises(UsageError, match="not even 2 images fit"):
        largest(monkeypatch, 1e4)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: None)
    with pytest.raises(UsageError, match="does not tell its free memory"):
        batch_size.settle(recipe(), ranks.drawn(40), ALONE, notify=lambda text: None)


def test_the_memory_of_an_image_is_that_of_the_tensors_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is compared with the peak of the allocator in torch's profiler."""

    tried = trial("model.options.embed_dim=64", "model.options.depth=3")

    def peak(count: int) -> int:
        with torch.profiler.profile(profile_memory=True) as trace:
            tried.step(count)
        events: Any = trace.profiler
        now = most = 0
        for _, change in sorted((e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.nbytes()):
            now += change
            most = max(most, now)
        return most

    tried.step(2)
    measured = (peak(96) - peak(32)) / 64
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: int(4 * tried.state + 2 * 1000 * measured))
    fits = tried.fits_on_cpu()
    assert fits(600)
    assert not fits(1100)


def test_a_gpu_tries_until_its_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    peaks: list[int] = []
    for name, value in {
        "mem_get_info": lambda device: (9 * gib, 10 * gib),
        "memory_reserved": lambda device: gib,
        "max_memory_reserved": lambda device: peaks[-1] * gib // 8,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    tried = trial()

    def limited(count: int) -> None:
        if count > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        peaks.append(count)

    monkeypatch.setattr(tried, "step", limited)
    assert batch_size.largest_power(tried.fits_on_gpu, 2, 1024) == 64
    assert len(peaks) == 12  # two steps of each size
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * gib, 10 * gib))
    assert not tried.fits_on_gpu(64)  # it runs, with too little to spare

    def broken(count: int) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(tried, "step", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        tried.fits_on_gpu(2)


def test_a_run_keeps_its_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: int(1e15))
    data = ranks.drawn(100)
    told: list[str] = []
    found = batch_size.settle(recipe(), data, ALONE, out=tmp_path, notify=told.append)
    assert found.run.batch_size == 4
    assert told[0].startswith("run.batch_size = 4: the largest power of two that fits into memory")
    runs.claim(tmp_path, found, {})
    (tmp_path / runs.LAST).touch()
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 0)  # nothing is tried again
    assert batch_size.settle(recipe(), data, ALONE, out=tmp_path, notify=told.append).digest() == found.digest()
    assert len(told) == 1


@pytest.mark.parametrize("given", ["0", "-4", "1e3", "all", "٣"])
def test_the_option_takes_a_number_or_auto(given: str) -> None:
    answer = CliRunner().invoke(train, ["--data", "x", "--out", "y", "--batch-size", given])
    assert answer.exit_code == 2
    assert f"'{given}' is neither a number from 1 nor auto" in answer.output


def test_free_memory_respects_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    whole = memory.free_bytes(CPU)
    assert whole is not None
    files = {"memory.max": "8000", "memory.current": "6000", "memory.stat": "anon 4000\ninactive_file 1500\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory.free_bytes(CPU) == 3500
    (tmp_path / "memory.max").write_text("max\n")
    free = memory.free_bytes(CPU)
    assert free is not None
    assert free > 3500
