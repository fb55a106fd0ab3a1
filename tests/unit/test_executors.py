"""Executors: results, errors, dying workers and the bisection of keys."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from animesion.errors import AnimesionError, UsageError
from animesion.executors import Executor, WorkerDiedError, local
from animesion.executors.local import LocalExecutor
from tests.workers import KeptWorkers


@dataclass(frozen=True)
class Square:
    name: str
    number: int

    def run(self) -> int:
        return self.number**2


@dataclass(frozen=True)
class Where:
    name: str

    def run(self) -> int:
        return os.getpid()


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
                if self.how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)  # as a decoder that never returns
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


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_run_once(workers: int) -> None:
    with LocalExecutor(workers) as executor:
        jobs = [Square(f"job {i}", i) for i in range(20)]
        assert collect(executor, jobs) == {f"job {i}": i**2 for i in range(20)}
        assert collect(executor, jobs[:3]) == {f"job {i}": i**2 for i in range(3)}


def test_light_jobs_run_here_until_there_is_a_worker() -> None:
    found: list[int] = []
    with LocalExecutor(1) as executor:
        for light in (True, False, True):
            executor.run([Where("job")], lambda job, result: found.append(result), light=light)
            assert executor.has_run
        with pytest.raises(UsageError, match="it was you"):
            executor.run([Failing("bad", UsageError("it was you"))], light=True)
    assert found[0] == os.getpid() != found[1]
    assert found[2] == found[1]


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
    [("segfault", 24, (0, 10, 11, 23)), ("memory", 6, (0, 3)), ("exit", 6, (2, 5))],
)
def test_poison_is_bisected_and_given_up(how: str, count: int, numbers: tuple[int, ...]) -> None:
    keys = tuple(f"key-{i:03d}" for i in range(count))
    poison = frozenset(keys[number] for number in numbers)
    with KeptWorkers(2) as executor:  # dozens start
        results = collect(executor, [Deadly("part", keys, poison, how), Square("other", 3)])
    assert results["other"] == 9
    assert set(results["part"][1]) == poison


def test_a_death_without_a_crashing_key_is_an_error() -> None:
    keys = tuple(f"key-{i}" for i in range(16))
    with KeptWorkers(1) as executor, pytest.raises(WorkerDiedError, match="no single image is the cause"):
        executor.run([HeavyTogether("part", keys, frozenset())])


def test_a_job_that_cannot_be_narrowed_is_named() -> None:
    with LocalExecutor(1) as executor, pytest.raises(AnimesionError, match="worker for kamikaze died"):
        executor.run([Failing("kamikaze", MemoryError())])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_START", 0.3), ("_SILENCE", 1.0), ("_BEAT", 0.1)):
        monkeypatch.setattr(local, name, seconds)


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("import time; time.sleep(60)", "did not answer for 0 s"),
        ("raise SystemExit(3)", "ended with exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with SIGKILL"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, program: str, what: str) -> None:
    """It must not be put down to the images of its job."""
    monkeypatch.setattr(local, "_WORKER", program)
    job = Deadly("part", ("a", "b"), frozenset())
    with LocalExecutor(1) as executor, pytest.raises(WorkerDiedError, match=f"{what} before its first job: it may be"):
        executor.run([job])


@dataclass(frozen=True)
class Asleep:
    """Waits without working, as in a lock that nobody opens."""

    name: str
    seconds: float
    working: bool = False

    def run(self) -> str:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if not self.working:
                time.sleep(0.01 if self.seconds < 1 else 60)
        return "done"


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_does_nothing_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_START", 60.0)
    with LocalExecutor(2) as executor:
        jobs = [Asleep("long", 2.0, working=True), Asleep("short", 0.3)]
        assert collect(executor, jobs) == {"long": "done", "short": "done"}
        with pytest.raises(WorkerDiedError, match="did nothing for 1 s and was stopped: it may be short of memory"):
            executor.run([Asleep("for ever", 60.0)])


@pytest.mark.usefixtures("impatient")
def test_images_that_stop_their_worker_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_START", 60.0)
    with LocalExecutor(1) as executor:
        results = collect(executor, [Deadly("part", ("a", "b", "c"), frozenset({"b"}), "stop")])
    assert results["part"] == (3, ("b",))
