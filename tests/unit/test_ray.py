"""The Ray executor: the same bytes, and jobs that kill their workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_executors import Deadly, DiesOnce, Failing, Square, collect

import animesion
from animesion.dedup import near
from animesion.errors import UsageError
from animesion.executors import Executor, make
from animesion.executors.shared import Shared
from animesion.pipeline import runner
from animesion.progress import Progress

ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Executor]:
    with make("ray", 2) as executor:
        yield executor


def test_jobs_errors_and_deaths_on_ray(on_ray: Executor, tmp_path: Path) -> None:
    assert collect(on_ray, [Square(f"job {i}", i) for i in range(20)]) == {f"job {i}": i**2 for i in range(20)}
    assert collect(on_ray, [DiesOnce("job", tmp_path / "marker")]) == {"job": "survived"}
    keys = tuple(f"key-{i:02d}" for i in range(8))
    assert collect(on_ray, [Deadly("part", keys, frozenset({"key-03"}))]) == {"part": (8, ("key-03",))}
    with pytest.raises(UsageError, match="it was you"):
        on_ray.run([Failing("bad", UsageError("it was you"))])
    with pytest.raises(RuntimeError, match=r"(?s)bad failed.*ZeroDivisionError"):
        on_ray.run([Failing("bad", ZeroDivisionError("x"))])


class _Killing(Progress):
    """Kills the workers of Ray when the first shard is packed and the next ones are under way."""

    def __init__(self) -> None:
        self.stage = ""
        self.killed: list[int] = []

    def started(self, stage: str, total: int | None) -> None:
        self.stage = stage

    def advanced(self, count: int) -> None:
        if self.stage == "pack" and not self.killed:
            listed = subprocess.run(
                ["pgrep", "-f", "^ray::(run_job|IDLE)"], capture_output=True, text=True, check=False
            )
            for pid in map(int, listed.stdout.split()):
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)


def test_the_same_bytes_locally_and_on_ray_with_workers_killed(
    on_ray: Executor, tmp_path: Path, class_folders: Path
) -> None:
    recipe = animesion.load_recipe("folder", [f"source.path={class_folders}", "pack.shard_samples=4"])
    sums = {}
    for name, engine, workers in (("one", "local", 1), ("two", "local", 2), ("four", "local", 4), ("ray", "ray", 2)):
        watcher = _Killing() if engine == "ray" else Progress()
        runner.run(recipe, tmp_path / name, workers=workers, engine=engine, progress=watcher)
        sums[name] = (tmp_path / name / "SHA256SUMS").read_text()
        if isinstance(watcher, _Killing):
            assert watcher.killed
    assert len(set(sums.values())) == 1


def test_pairs_are_searched_on_ray(on_ray: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "SHARED_FROM", 0)
    monkeypatch.setattr(near, "JOB_HASHES", 2000)
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 6000, dtype=np.uint64)
    hashes[4000:] = hashes[:2000] ^ np.uint64(0b10000111)
    pairs = near.near_pairs(hashes, 4, Shared(on_ray, tmp_path)).tolist()
    assert [pair for pair in pairs if pair[0] < 2000 and pair[1] >= 4000] == [[i, i + 4000] for i in range(2000)]
    assert pairs == near.near_pairs(hashes, 4).tolist()


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no engine 'rays'"):
        make("rays")


_RAYLET_DIES = """
import os, signal, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
from test_executors import Asleep
from animesion.errors import AnimesionError
from animesion.executors import make

def kill():
    time.sleep(3)
    lines = subprocess.run(["ps", "-eww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    found = [line.split(None, 2) for line in lines]
    raylets = [pid for pid, parent, command in found if int(parent) == os.getpid() and "raylet/raylet" in command]
    for pid in raylets + [pid for pid, parent, _ in found if parent in raylets]:
        os.kill(int(pid), signal.SIGKILL)

with make("ray", 1) as executor:
    threading.Thread(target=kill, daemon=True).start()
    try:
        executor.run([Asleep("job", 20.0, True)])
    except AnimesionError as error:
        print("refused:", error, flush=True)
"""


@pytest.mark.slow
def test_a_dead_raylet_ends_the_run() -> None:
    """In a process of its own, as the raylet serves all tests of this one."""
    run = subprocess.run(
        [sys.executable, "-c", _RAYLET_DIES, str(Path(__file__).parent)], capture_output=True, text=True, timeout=180
    )
    assert "refused: Ray has no machine left that runs jobs" in run.stdout, run.stderr[-2000:]
