"""Run jobs in worker processes, and survive a job that kills its worker.

A job is a picklable object with `run()`. Local workers are fresh interpreters (no fork, no re-import of the caller's
main module), end with their parent however it dies, and are fed over a socket; Ray's are in `ray_engine`. A job whose
worker dies is tried once more and then bisected until the single key that kills it is known; what to do without that
key is the job's decision.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from animesion.errors import AnimesionError, UsageError

Answer = tuple[str, Any]
"""`("done", result)`, `("error", AnimesionError)`, `("fault", traceback)` or `("died", how)`."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment of workers: the processes already use every core."""

_WORKER = "from animesion.engine import _serve; _serve({job}, {alive})"


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


class _Worker:
    """One worker process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        alive_read, self._alive = os.pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment |= ONE_THREAD
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WORKER.format(job=theirs.fileno(), alive=alive_read)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), alive_read),
                env=environment,
            )
        finally:
            theirs.close()
            os.close(alive_read)
        self.connection = Connection(ours.detach())

    def send(self, job: Job) -> None:
        # it may have died while idle or at start: receiving says so
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Answer:
        try:
            kind, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.stop()
            return "died", _describe(self.process.returncode)
        return kind, value

    def stop(self) -> None:
        self.connection.close()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Engine(ABC):
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
                f"the worker for {job.name} died ({how}) twice and no single picture is to blame: "
                "it may be short of memory, try fewer --workers"
            )
        return job.without(guilty)

    def _kills(self, job: Job) -> bool:
        """Whether a worker dies of the job."""
        [(_, (kind, value))] = self._ended([self._submit(job)])
        if kind in {"error", "fault"}:
            raise value if isinstance(value, AnimesionError) else RuntimeError(value)
        return kind == "died"


class LocalEngine(Engine):
    """Worker processes of this machine; they start when first needed and serve every stage."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._pool: list[_Worker] = []
        self._idle: list[_Worker] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        for worker in self._pool:
            if kind is not None:
                worker.process.kill()
            worker.stop()
        self._pool.clear()
        self._idle.clear()

    def _submit(self, job: Job) -> _Worker:
        if not self._idle:
            self._pool.append(_Worker())
            self._idle.append(self._pool[-1])
        worker = self._idle.pop()
        worker.send(job)
        return worker

    def _ended(self, handles: Sequence[_Worker]) -> Iterator[tuple[_Worker, Answer]]:
        by_connection = {worker.connection: worker for worker in handles}
        for ready in wait(list(by_connection)):
            worker = by_connection[ready]  # type: ignore[index]
            answer = worker.receive()
            if answer[0] == "died":
                self._pool.remove(worker)
            else:
                self._idle.append(worker)
            yield worker, answer


def make(engine: str = "local", workers: int = 0) -> Engine:
    """An engine by its name.

    Args:
        engine: `local`; `ray` for Ray on this machine; `ray:ADDRESS` for a cluster, where `ray:auto` is the one that
            this machine belongs to. Every machine needs this package, and the output and the source's files under the
            same paths.
        workers: jobs in flight at once; 0 for one a core of the machine or cluster.

    Raises:
        UsageError: there is none of that name, Ray is not installed or its cluster cannot be reached.
    """
    kind, _, address = engine.partition(":")
    if kind == "ray":
        from animesion.ray_engine import RayEngine

        return RayEngine(workers, address)
    if engine != "local":
        raise UsageError(f"there is no engine '{engine}': give local, ray or ray:ADDRESS")
    return LocalEngine(workers or cores())


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(code: int) -> str:
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            pass
    return f"exit status {code}"


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


def _serve(job_descriptor: int, alive_descriptor: int) -> None:
    """The worker's main loop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def end_with_parent() -> None:
        os.read(alive_descriptor, 1)  # returns only when the parent's end is closed
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    connection = Connection(job_descriptor)
    while True:
        try:
            job: Job = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        answer = run_job(job)
        try:
            connection.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
        except (BrokenPipeError, ConnectionResetError):
            return
