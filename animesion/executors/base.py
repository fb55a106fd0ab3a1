"""The base of all executors: run jobs in other processes, and recover from a job that kills its worker.

A job is a picklable object with `run()`. A job whose worker dies is tried once more and then bisected until the keys
that kill it are known; the job itself decides how to continue without them. Subclasses in `local` and `ray` start the
processes.
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
"""`("done", result)`, `("error", AnimesionError)`, `("fault", traceback)` or `("died", cause)`."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_IO_THREADS"), "1")
"""Environment of workers: one process per core already uses every core, and each thread reserves memory."""


class Job(Protocol):
    """A unit of work that runs in another process; the job and its result are picklable."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def run(self) -> Any:
        """Do the work and return its result."""


@runtime_checkable
class Divisible(Protocol):
    """A job over keys that can be bisected if it kills its worker."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def keys(self) -> Sequence[str]:
        """The keys that the job processes."""

    def probe(self, keys: Sequence[str]) -> Job:
        """A job that does the dangerous work for these keys only and writes nothing."""

    def without(self, keys: Sequence[str]) -> Job:
        """The same job without processing these keys."""


class WorkerDiedError(AnimesionError):
    """A worker died repeatedly, and no single key is the cause."""


class Executor(ABC):
    """Runs jobs in parallel; a context manager that stops its workers on exit.

    Subclasses start and stop processes. Retries and bisection are here, so that they are the same everywhere.

    Attributes:
        workers: number of jobs that run at once.
        has_run: whether any job has been run.
    """

    def __init__(self, workers: int) -> None:
        self.workers = max(1, workers)
        self.has_run = False
        self._has_workers = False

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop all workers, after an error without waiting for their jobs."""

    @abstractmethod
    def _submit(self, job: Job) -> Hashable:
        """Start a job; returns its handle."""

    @abstractmethod
    def _ended(self, handles: Sequence[Any]) -> Iterator[tuple[Hashable, Answer]]:
        """Wait until at least one of the jobs has ended; yields the handle and answer of each that has."""

    def run(
        self,
        jobs: Iterable[Job],
        finished: Callable[[Job, Any], None] = lambda job, result: None,
        *,
        light: bool = False,
    ) -> None:
        """Run all jobs.

        Args:
            jobs: jobs, which start in this order.
            finished: called in this process with each job and its result, in the order in which jobs end.
            light: they decode no image, and together take about as long as a worker takes to start: as long as there
                is no worker, they run in this process.

        Raises:
            AnimesionError: a job raised it; other running jobs are stopped when the executor exits.
            RuntimeError: a job failed with a fault of the program.
            WorkerDiedError: a job kills its worker and no single key is the cause.
        """
        if light and not self._has_workers:
            for job in jobs:
                self.has_run = True
                finished(job, job.run())
            return
        queue: deque[tuple[Job, int]] = deque((job, 0) for job in jobs)  # with the number of failed attempts
        running: dict[Hashable, tuple[Job, int]] = {}
        while queue or running:
            while queue and len(running) < self.workers:
                self.has_run = self._has_workers = True
                job, attempt = queue.popleft()
                running[self._submit(job)] = job, attempt
            for handle, (kind, value) in self._ended(list(running)):
                ended, attempt = running.pop(handle)
                if kind == "done":
                    finished(ended, value)
                elif kind == "died":
                    if attempt == 0:  # the kernel or a user may have killed the worker, not the job itself
                        queue.appendleft((ended, 1))
                    else:
                        queue.appendleft((self._narrowed(ended, value), 0))
                elif kind == "error":
                    raise value
                else:
                    raise RuntimeError(f"{ended.name} failed in its worker:\n{value}")

    def _narrowed(self, job: Job, cause: str) -> Job:
        """The job without the keys that kill its worker, which are found by bisection, one probe at a time.

        Raises:
            WorkerDiedError: the job has no keys, or dies only as a whole.
        """
        if not isinstance(job, Divisible):
            raise WorkerDiedError(f"the worker for {job.name} died ({cause}) twice: see the system's log")
        crashing: list[str] = []
        suspects = [list(job.keys)]
        while suspects:
            keys = suspects.pop()
            if not self._kills(job.probe(keys)):
                continue
            if len(keys) == 1:
                crashing.append(keys[0])
            else:
                # Both halves are probed, as several keys may kill; the first half is on top of the stack.
                middle = len(keys) // 2
                suspects += [keys[middle:], keys[:middle]]
        # All keys together take more memory than any alone, so a death without a crashing key points to memory.
        if not crashing:
            raise WorkerDiedError(
                f"the worker for {job.name} died ({cause}) twice and no single image is the cause: "
                "it may be short of memory, try fewer --workers"
            )
        return job.without(crashing)

    def _kills(self, job: Job) -> bool:
        """Whether the job kills its worker."""
        [(_, (kind, value))] = self._ended([self._submit(job)])
        if kind in {"error", "fault"}:
            raise value if isinstance(value, AnimesionError) else RuntimeError(value)
        return kind == "died"


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_job(job: Job) -> Answer:
    """Run a job in the current process, which is a worker."""
    try:
        return "done", job.run()
    except AnimesionError as error:
        return "error", error
    except MemoryError:
        os._exit(137)  # as if the kernel had killed the worker, so that the job is bisected
    except Exception:
        return "fault", traceback.format_exc()
