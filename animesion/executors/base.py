"""Run jobs in other processes, and survive a job that kills its worker: what all executors share.

A job is a picklable object with `run()`. A job whose worker dies is tried once more and then bisected until the single
key that kills it is known; what to do without that key is the job's decision. Where jobs run is in `local` and `ray`.
"""

from __future__ import annotations

import os
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from animesion.errors import AnimesionError

Answer = tuple[str, Any]
"""`("done", result)`, `("error", AnimesionError)`, `("fault", traceback)` or `("died", how)`."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment of workers: the processes already use every core."""


class Job(Protocol):
    """A unit of work; runs in another process, so it and its result are picklable."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    def run(self) -> Any:
        """Do the work."""


@runtime_checkable
class Divisible(Protocol):
    """A job over keys that can be narrowed when it kills its worker."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def keys(self) -> Sequence[str]:
        """What the job works through."""

    def probe(self, keys: Sequence[str]) -> Job:
        """A job that does the dangerous work for these keys only and writes nothing."""

    def without(self, keys: Sequence[str]) -> Job:
        """The same job with these keys given up."""


class WorkerDiedError(AnimesionError):
    """A worker died and no single key is to blame."""


class Executor(ABC):
    """Runs jobs somewhere; a context manager. What runs them is the subclass's, what becomes of the dead is not.

    Attributes:
        workers: jobs in flight at once.
    """

    def __init__(self, workers: int) -> None:
        self.workers = max(1, workers)

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what runs; after an error, at once."""

    @abstractmethod
    def _submit(self, job: Job) -> Hashable:
        """Begin a job; returns its handle."""

    @abstractmethod
    def _ended(self, handles: Sequence[Any]) -> Iterator[tuple[Hashable, Answer]]:
        """Wait until one of the jobs has ended; gives those that have."""

    def run(self, jobs: Iterable[Job], finished: Callable[[Job, Any], None] = lambda job, result: None) -> None:
        """Run all jobs; `finished(job, result)` is called in this process as each ends, in no fixed order.

        Raises:
            AnimesionError: what a job raised; the other running jobs are stopped with the engine.
            RuntimeError: a job failed with a fault of the program.
            WorkerDiedError: a job kills its worker and cannot be narrowed to a key.
        """
        queue: deque[tuple[Job, int]] = deque((job, 0) for job in jobs)
        flying: dict[Hashable, tuple[Job, int]] = {}
        while queue or flying:
            while queue and len(flying) < self.workers:
                job, attempt = queue.popleft()
                flying[self._submit(job)] = job, attempt
            for handle, (kind, value) in self._ended(list(flying)):
                ended, attempt = flying.pop(handle)
                if kind == "done":
                    finished(ended, value)
                elif kind == "died":
                    if attempt == 0:  # the kernel or a person may have killed it: once more
                        queue.appendleft((ended, 1))
                    else:
                        queue.appendleft((self._narrowed(ended, value), 0))
                elif kind == "error":
                    raise value
                else:
                    raise RuntimeError(f"{ended.name} failed in its worker:\n{value}")

    def _narrowed(self, job: Job, how: str) -> Job:
        if not isinstance(job, Divisible):
            raise WorkerDiedError(f"the worker for {job.name} died ({how}) twice: see the system's log")
        guilty: list[str] = []
        suspects = [list(job.keys)]
        while suspects:
            keys = suspects.pop()
            if not self._kills(job.probe(keys)):
                continue
            if len(keys) == 1:
                guilty.append(keys[0])
            else:
                middle = len(keys) // 2
                suspects += [keys[middle:], keys[:middle]]
        if not guilty:
            raise WorkerDiedError(
                f"the worker for {job.name} died ({how}) twice and no single image is to blame: "
                "it may be short of memory, try fewer --workers"
            )
        return job.without(guilty)

    def _kills(self, job: Job) -> bool:
        """Whether a worker dies of the job."""
        [(_, (kind, value))] = self._ended([self._submit(job)])
        if kind in {"error", "fault"}:
            raise value if isinstance(value, AnimesionError) else RuntimeError(value)
        return kind == "died"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_job(job: Job) -> Answer:
    """Run a job where it is, in a worker."""
    try:
        return "done", job.run()
    except AnimesionError as error:
        return "error", error
    except MemoryError:
        os._exit(137)  # as if the kernel had done it: the engine narrows it down
    except Exception:
        return "fault", traceback.format_exc()
