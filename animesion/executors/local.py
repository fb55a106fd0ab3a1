"""Run jobs in worker processes of this machine.

Workers are fresh interpreters (no fork, no second import of the caller's main module). They receive jobs over a socket
and end with their parent, even if it is killed. A worker that does not report that it is ready, or gives no sign of
life or of work while it has a job, is killed: one without memory may hang in a library for ever.
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
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Protocol

from animesion.executors.base import ONE_THREAD, Answer, Executor, Job, WorkerDiedError, run_job

_WORKER = "from animesion.executors.local import serve; serve({job}, {alive}, {beat})"

_START = 60.0
"""Seconds in which a new worker has to report that it is ready."""

_SILENCE = 180.0
"""Seconds without a sign of a busy worker, or without any work of its processor, after which it is killed."""

_BEAT = 2.0
"""Seconds between two signs of a busy worker."""

_WORK = 0.02
"""Seconds of processor time that are work; sending a sign takes less than a millisecond."""


class LocalExecutor(Executor):
    """Runs jobs in worker processes of this machine, which start on demand and serve all stages."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._pool: list[Worker] = []
        self._idle: list[Worker] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the workers."""
        for worker in self._pool:
            if kind is not None:
                worker.process.kill()
            worker.stop()
        self._pool.clear()
        self._idle.clear()

    def _start(self) -> Worker:
        return Worker()

    def _submit(self, job: Job) -> Worker:
        if not self._idle:
            self._pool.append(self._start())
            self._idle.append(self._pool[-1])
        worker = self._idle.pop()
        worker.send(job)
        return worker

    def _ended(self, handles: Sequence[Worker]) -> Iterator[tuple[Worker, Answer]]:
        by_connection = {worker.connection: worker for worker in handles}
        answers: list[tuple[Worker, Answer]] = []
        while not answers:
            asked = time.monotonic()
            for ready in wait(list(by_connection), timeout=_BEAT):
                worker = by_connection[ready]  # type: ignore[index]
                if (answer := worker.receive()) is not None:
                    answers.append((worker, answer))
            # A process that was stopped, as by Ctrl-Z, must not take its own pause for its workers'.
            passed = min(time.monotonic() - asked, 2 * _BEAT)
            waiting = set(handles) - {worker for worker, _ in answers}
            answers += [(worker, answer) for worker in waiting if (answer := worker.fault_after(passed)) is not None]
        for worker, answer in answers:
            # A dead worker is not replaced here; the next submitted job starts one if it has to.
            if worker.process.returncode is not None:
                self._pool.remove(worker)
            else:
                self._idle.append(worker)
            yield worker, answer


class Process(Protocol):
    """What a worker needs of its process, as `subprocess.Popen` has it."""

    @property
    def returncode(self) -> int | None:
        """Exit status; None while it runs."""

    def kill(self) -> None:
        """Send SIGKILL."""

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, once it ended; `subprocess.TimeoutExpired` after so many seconds."""


class Worker:
    """One worker process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        alive_read, self._alive = os.pipe()
        try:
            self.process = self._run(theirs.fileno(), alive_read)
        finally:
            theirs.close()
            os.close(alive_read)
        self.connection = Connection(ours.detach())
        self._ready = False
        self._pending: bytes | None = None
        self._mute = 0.0  # seconds since the last message
        self._idle = 0.0  # seconds since it last worked
        self._worked = 0.0  # seconds of processor time, of all jobs

    def _run(self, job: int, alive: int) -> Process:
        """Start a process that calls `serve` with these descriptors."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.Popen(
            [sys.executable, "-c", _WORKER.format(job=job, alive=alive, beat=_BEAT)],
            stdin=subprocess.DEVNULL,
            pass_fds=(job, alive),
            env=environment | ONE_THREAD,
        )

    def send(self, job: Job) -> None:
        """Send a job, or keep it until the worker is ready: one that never reads would block this process too."""
        self._mute = self._idle = 0.0
        self._pending = pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL)
        if self._ready:
            self._send_pending()

    def _send_pending(self) -> None:
        if self._pending is not None:
            # The worker may have died while idle or at start; `receive` then reports it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.connection.send_bytes(self._pending)
            self._pending = None

    def receive(self) -> Answer | None:
        """The answer to the last job; None for another sign of life."""
        try:
            kind, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.stop()
            cause = _exit_cause(self.process.wait())
            return ("died", cause) if self._ready else ("error", _unstarted(f"ended with {cause}"))
        self._mute = 0.0
        if kind == "ready":
            self._ready = True
            self._idle = 0.0
            self._send_pending()
            return None
        if kind == "beat":
            if value - self._worked > _WORK:
                self._worked, self._idle = value, 0.0
            return None
        return kind, value

    def fault_after(self, seconds: float) -> Answer | None:
        """Count seconds without an answer; kills the worker and says so if they are too many."""
        self._mute += seconds
        self._idle += seconds
        if not self._ready and self._mute > _START:
            self._kill()
            return "error", _unstarted(f"did not answer for {_START:.0f} s")
        if self._ready and self._mute > _SILENCE:
            # As a decoder in an endless loop: the job is bisected.
            self._kill()
            return "died", f"no answer for {_SILENCE:.0f} s"
        if self._ready and self._idle > _SILENCE:
            self._kill()
            return "error", WorkerDiedError(
                f"a worker process did nothing for {_SILENCE:.0f} s and was stopped: it may be short of memory, or wait"
                " for a file; try fewer --workers, or run the same command again, it resumes"
            )
        return None

    def _kill(self) -> None:
        self.process.kill()
        self.stop()

    def stop(self) -> None:
        """Close the connection, which ends an idle worker; one that does not end in two seconds is killed."""
        self.connection.close()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _unstarted(what: str) -> WorkerDiedError:
    return WorkerDiedError(
        f"a worker process {what} before its first job: it may be short of memory; free some, or try fewer --workers"
    )


def serve(job_descriptor: int, alive_descriptor: int, beat_seconds: float) -> None:
    """The worker's main loop.

    Args:
        job_descriptor: of the socket over which jobs come and answers go.
        alive_descriptor: of the pipe whose other end closes with the parent.
        beat_seconds: time between two signs of life while it has a job.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group; only the parent handles it

    def end_with_parent() -> None:
        os.read(alive_descriptor, 1)  # returns only when the parent's end is closed
        os._exit(1)

    connection = Connection(job_descriptor)
    sending = threading.Lock()
    busy = threading.Event()

    def send(kind: str, value: object) -> None:
        message = pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL)
        with sending:
            connection.send_bytes(message)

    def beat() -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                busy.wait()
                time.sleep(beat_seconds)
                send("beat", time.process_time())

    threading.Thread(target=end_with_parent, daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
        send("ready", None)
        while True:
            job: Job = pickle.loads(connection.recv_bytes())
            busy.set()
            answer = run_job(job)
            busy.clear()
            send(*answer)


def _exit_cause(code: int) -> str:
    """Name of the signal that killed a process, or its exit status."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            pass
    return f"exit status {code}"
