"""Run jobs in worker processes of this machine.

Workers are fresh interpreters (no fork, no second import of the caller's main module). They receive jobs over a socket
and end with their parent, even if it is killed.
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
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType

from animesion.executors.base import ONE_THREAD, Answer, Executor, Job, run_job

_WORKER = "from animesion.executors.local import _serve; _serve({job}, {alive})"


class LocalExecutor(Executor):
    """Runs jobs in worker processes of this machine, which start on demand and serve all stages."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._pool: list[_Worker] = []
        self._idle: list[_Worker] = []

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
            # A dead worker is not replaced here; the next submitted job starts one if it has to.
            if answer[0] == "died":
                self._pool.remove(worker)
            else:
                self._idle.append(worker)
            yield worker, answer


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
        # The worker may have died while idle or at start; `receive` then reports it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Answer:
        """Wait for the answer to the last job."""
        try:
            kind, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.stop()
            return "died", _exit_cause(self.process.returncode)
        return kind, value

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


def _serve(job_descriptor: int, alive_descriptor: int) -> None:
    """The worker's main loop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group; only the parent handles it

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


def _exit_cause(code: int) -> str:
    """Name of the signal that killed a process, or its exit status."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            pass
    return f"exit status {code}"
