"""Executors: results, errors, dying workers and the bisection of keys."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from animesion.errors import AnimesionError, UsageError
from animesion.executors import Executor, WorkerDiedError
from animesion.executors.local import LocalExecutor


@dataclass(frozen=True)
class Square:
    name: str
    number: int

    def run(self) -> int:
        return self.number**2


@dataclass(frozen=True)
class Failing:
    name: str
    error: Exception

    def run(self) -> None:
        raise self.error


@dataclass(frozen=True)
class DiesOnce:
    name: str
    marker: Path

    def run(self) -> str:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "survived"


@dataclass(frozen=True)
class Deadly:
    """Dies on the keys in `poison`, as a decoder with a bug does."""

    name: str
    keys: tuple[str, ...]
    poison: frozenset[str]
    how: str = "segfault"
    given_up: tuple[str, ...] = ()

    def probe(self, keys: Sequence[str]) -> Deadly:
        return replace(self, keys=tuple(keys))

    def without(self, keys: Sequence[str]) -> Deadly:
        return replace(self, given_up=(*self.given_up, *keys))

    def run(self) -> tuple[int, tuple[str, ...]]:
        for key in self.keys:
            if key in self.poison and key not in self.given_up:
                if self.how == "segfault":
                    os.kill(os.getpid(), signal.SIGSEGV)
                if self.how == "memory":
                    raise MemoryError
                os._exit(3)
        return len(self.keys), self.given_up


@dataclass(frozen=True)
class HeavyTogether(Deadly):
    """Dies only when one process works through many keys."""

    def run(self) -> tuple[int, tuple[str, ...]]:
        if len(self.keys) > 10:
            os._exit(9)
        return len(self.keys), self.given_up


def collect(executor: Executor, jobs: Sequence[Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    executor.run(jobs, lambda job, result: results.__setitem__(job.name, result))
    return results


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_job_is_run_once(workers: int) -> None:
    with LocalExecutor(workers) as executor:
        jobs = [Square(f"job {i}", i) for i in range(20)]
        assert collect(executor, jobs) == {f"job {i}": i**2 for i in range(20)}
        assert collect(executor, jobs[:3]) == {f"job {i}": i**2 for i in range(3)}


def test_a_users_error_is_raised_unchanged() -> None:
    with LocalExecutor(2) as executor, pytest.raises(UsageError, match="it was you"):
        executor.run([Failing("bad", UsageError("it was you")), Square("good", 2)])


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with LocalExecutor(1) as executor, pytest.raises(RuntimeError, match=r"(?s)bad failed.*ZeroDivisionError"):
        executor.run([Failing("bad", ZeroDivisionError("x"))])


def test_a_worker_that_is_killed_once_is_replaced(tmp_path: Path) -> None:
    with LocalExecutor(2) as executor:
        assert collect(executor, [DiesOnce("job", tmp_path / "marker")]) == {"job": "survived"}


@pytest.mark.parametrize(
    ("how", "count", "numbers"),
    [("segfault", 100, (0, 42, 43, 99)), ("memory", 6, (0, 3)), ("exit", 6, (2, 5))],
)
def test_poison_is_bisected_and_given_up(how: str, count: int, numbers: tuple[int, ...]) -> None:
    keys = tuple(f"key-{i:03d}" for i in range(count))
    poison = frozenset(keys[number] for number in numbers)
    with LocalExecutor(2) as executor:
        results = collect(executor, [Deadly("part", keys, poison, how), Square("other", 3)])
    assert results["other"] == 9
    assert set(results["part"][1]) == poison


def test_a_death_without_a_crashing_key_is_an_error() -> None:
    keys = tuple(f"key-{i}" for i in range(16))
    with LocalExecutor(1) as executor, pytest.raises(WorkerDiedError, match="no single image is the cause"):
        executor.run([HeavyTogether("part", keys, frozenset())])


def test_a_job_that_cannot_be_narrowed_is_named() -> None:
    with LocalExecutor(1) as executor, pytest.raises(AnimesionError, match="worker for kamikaze died"):
        executor.run([Failing("kamikaze", MemoryError())])
