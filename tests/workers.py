"""Worker processes and sample servers that start fast: a fresh interpreter imports for longer than most tests need it.

They are forks of a process that has imported what they need and has done nothing else (`forkserver`), and workers
outlive a build. What `animesion` commands in processes of their own start is as ever.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import TracebackType

import PIL

from animesion.executors import local
from animesion.executors.base import ONE_THREAD

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "animesion.dedup.compare",
        "animesion.sources.folder",
        "animesion.dedup.residual",
        "animesion.dedup.search",
        "animesion.detectors.anime",
        "animesion.pipeline.inspect",
        "animesion.pipeline.pack",
        "animesion.report.boxes",
        "animesion.report.pairs",
        "animesion_sample.api",
        "animesion_sample.store",
        "blake3",
        "imagehash",
        "pandas",
        "pyarrow.parquet",
        *(f"PIL.{plugin}" for plugin in PIL._plugins),
    ]
)


#: Workers that wait for the next build, and the environment that each was started in; the last used come last.
_waiting: list[tuple[object, local.Worker]] = []
_MOST = 3


class KeptWorkers(local.LocalExecutor):
    """As `LocalExecutor`, but forks its workers, takes those of earlier builds and leaves its own to later ones.

    A worker serves another build only in the environment, folder and module path that it was started with, and only
    after a build without an error, at which workers are killed.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._environment = _environment()
        for each in [each for each in reversed(_waiting) if each[0] == self._environment][:workers]:
            _waiting.remove(each)
            self._pool.append(each[1])
            self._idle.append(each[1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._environment == _environment():
            _waiting.extend((self._environment, worker) for worker in self._idle)
            self._pool = [worker for worker in self._pool if worker not in self._idle]
            self._idle.clear()
        super().__exit__(kind, error, trace)
        stop(_MOST)

    def _start(self) -> local.Worker:
        return _Forked()


def stop(but: int = 0) -> None:
    """End the workers that wait, except so many that were used last."""
    while len(_waiting) > but:
        _waiting.pop(0)[1].stop()


def _environment() -> object:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environment, os.getcwd(), tuple(sys.path)


class _Forked(local.Worker):
    def _run(self, job: int, alive: int) -> local.Process:
        # the process is sent duplicates of the two
        ends = Connection(os.dup(job)), Connection(os.dup(alive), writable=False)
        settings = {**os.environ, **ONE_THREAD}, os.getcwd(), sys.path, local._BEAT
        process = FORKS.Process(target=_serve, args=(*ends, *settings), daemon=True)
        process.start()
        for end in ends:
            end.close()
        return _Process(process)


class _Process:
    """A process of `multiprocessing` as one of `subprocess`."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return code


def no_fsync(descriptor: int) -> None:
    """In place of `os.fsync`: what tests write need not survive a power failure, and each call takes milliseconds."""


def _serve(
    job: Connection, alive: Connection, environment: dict[str, str], folder: str, path: list[str], beat_seconds: float
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    importlib.invalidate_caches()
    setattr(os, "fsync", no_fsync)  # noqa: B010, to a checker of types this is another function
    local.serve(job.fileno(), alive.fileno(), beat_seconds)
