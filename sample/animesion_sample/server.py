"""Serving of a sample world over loopback, from a few processes that share a socket and a folder of drawn files.

The processes end with the block, and also when their parent process is killed. The API is in ``api``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from animesion_sample.faults import FaultPlan

_STARTUP_SECONDS = 60.0

#: Starts the processes; the tests' one starts them faster.
CONTEXT: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class SampleServer:
    """Address of the sample booru."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://{self.host}:{self.port}"


@contextlib.contextmanager
def serve(
    posts: int = 500,
    seed: int = 0,
    processes: int = 2,
    host: str = "127.0.0.1",
    port: int = 0,
    faults: FaultPlan | None = None,
) -> Iterator[SampleServer]:
    """Serve a sample world while the block runs.

    The processes are spawned, so a script that calls this needs the usual ``if __name__ == "__main__"`` guard.

    Args:
        posts: Number of posts of the world.
        seed: Seed of the world.
        processes: Number of server processes, which also draw ahead of the requests.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        faults: Faults to inject. Processes count them separately, so use a single process.

    Yields:
        The server's address, once all processes accept connections.

    Raises:
        OSError: The address is in use.
        RuntimeError: A server process did not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="animesion-sample-"))
    workers: list[SpawnProcess | ForkServerProcess] = []
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
        listener.setblocking(False)
        signals: list[Connection] = []
        for number in range(max(1, processes)):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            worker = CONTEXT.Process(
                target=_work,
                args=(listener, theirs, posts, seed, folder, faults),
                name=f"sample-booru-{number}",
                daemon=True,
            )
            worker.start()
            theirs.close()
            workers.append(worker)
            signals.append(ours)
        for ready in signals:
            with ready:
                _await_ready(ready)
        yield SampleServer(host, listener.getsockname()[1])
    finally:
        listener.close()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
            worker.close()
        shutil.rmtree(folder, ignore_errors=True)


def _await_ready(ready: Connection) -> None:
    try:
        if ready.poll(_STARTUP_SECONDS):
            ready.recv()
            return
    except EOFError:
        pass
    raise RuntimeError("a process of the sample server did not start; see its own message above")


def _work(
    listener: socket.socket, ready: Connection, posts: int, seed: int, folder: Path, faults: FaultPlan | None
) -> None:
    """The main function of a server process."""
    import asyncio
    import signal
    import sys
    import threading

    from animesion_sample.store import DrawnFiles
    from animesion_sample.world import World

    # Ctrl-C is sent to the whole process group, but the parent ends the server.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    # Drawing and serving share this process: short turns keep responses quick.
    sys.setswitchinterval(0.001)
    store = DrawnFiles(World(posts, seed), folder)
    asyncio.run(_answer(store, listener, ready, faults))


def _end_with_parent(folder: Path) -> None:
    import os
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        # Renamed first, as other processes may still draw into the folder.
        with contextlib.suppress(OSError):
            shutil.rmtree(folder.rename(folder.with_suffix(".gone")))
        os._exit(0)


async def _answer(store: object, listener: socket.socket, ready: Connection, faults: FaultPlan | None) -> None:
    import asyncio
    import threading

    from aiohttp import web

    from animesion_sample.api import application
    from animesion_sample.store import DrawnFiles

    assert isinstance(store, DrawnFiles)
    runner = web.AppRunner(application(store, faults), access_log=None)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    ready.send(True)
    ready.close()
    threading.Thread(target=store.warm, daemon=True).start()
    await asyncio.Event().wait()
