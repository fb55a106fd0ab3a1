"""Worker processes that outlive a build: starting one takes longer than most of the tests' builds keep it busy."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from animesion.executors import local

#: Workers that wait for the next build, and the environment that each was started in; the last used come last.
_waiting: list[tuple[object, local._Worker]] = []
_MOST = 3


class KeptWorkers(local.LocalExecutor):
    """As `LocalExecutor`, but takes workers of earlier builds and leaves its own to later ones.

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


def stop(but: int = 0) -> None:
    """End the workers that wait, except so many that were used last."""
    while len(_waiting) > but:
        _waiting.pop(0)[1].stop()


def _environment() -> object:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environment, os.getcwd(), tuple(sys.path)
