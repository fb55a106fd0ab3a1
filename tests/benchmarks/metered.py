"""An executor that reports what its jobs take: used by other benchmarks."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from animesion import executors
from animesion.executors import Executor, Job
from animesion.executors.base import Answer


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Measured:
    """A job, and what it takes in its worker."""

    job: Job

    @property
    def name(self) -> str:
        """Name for messages."""
        return self.job.name

    def run(self) -> tuple[Any, str, float, int, int]:
        """The result, the worker, CPU-seconds, and its largest size before and after the job."""
        before, used = peak(), time.process_time()
        result = self.job.run()
        return result, f"{socket.gethostname()}/{os.getpid()}", time.process_time() - used, before, peak()


class Metered(Executor):
    """An executor that adds up what its jobs take; `engine` empty runs them in this process."""

    def __init__(self, engine: str, workers: int) -> None:
        super().__init__(workers)
        self.inner = executors.make(engine, workers) if engine else None
        self.jobs: dict[str, list[tuple[float, int, int]]] = {}

    def __exit__(self, *error: Any) -> None:
        """Stop the workers."""
        if self.inner:
            self.inner.__exit__(*error)

    def run(
        self,
        jobs: Iterable[Job],
        finished: Callable[[Any, Any], None] = lambda job, result: None,
        *,
        light: bool = False,
    ) -> None:
        """Run all jobs, light ones too, where the inner executor runs them."""

        def counted(job: Any, measured: tuple[Any, str, float, int, int]) -> None:
            result, worker, spent, before, after = measured
            self.jobs.setdefault(worker, []).append((spent, before, after))
            finished(job.job, result)

        wrapped = [Measured(job) for job in jobs]
        if self.inner:
            self.inner.run(wrapped, counted, light=light)
        else:
            for job in wrapped:
                counted(job, job.run())

    def _submit(self, job: Job) -> Hashable:
        raise NotImplementedError

    def _ended(self, handles: Sequence[Any]) -> Iterator[tuple[Hashable, Answer]]:
        raise NotImplementedError

    def show(self) -> None:
        """Print the figures of each worker."""
        for worker, figures in sorted(self.jobs.items()):
            spent, before, after = sum(each[0] for each in figures), figures[0][1], figures[-1][2]
            print(
                f"worker {worker}: {len(figures)} jobs, {spent:.1f} CPU-seconds, peak {after / 1e6:,.0f} MB, of which "
                f"{(after - before) / 1e6:,.0f} MB are of the jobs"
            )
