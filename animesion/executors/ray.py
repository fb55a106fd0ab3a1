"""Run jobs on Ray: on this machine, or on a cluster whose machines share the files.

Ray's own retries are off: the base class handles jobs that kill their workers, in the same way for all executors.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from types import TracebackType
from typing import Any

from animesion.errors import UsageError
from animesion.executors.base import ONE_THREAD, Answer, Executor, Job, WorkerDiedError, cores, run_job

_PATIENCE = 10.0
"""Seconds without a finished job after which the cluster is checked."""

_NO_NODE = (
    "Ray has no machine left that runs jobs: see its logs, start it again if it is a cluster, and run the same command "
    "again, it resumes"
)


class RayExecutor(Executor):
    """Runs jobs as Ray tasks of one core each.

    Starts Ray, or connects to it, unless this process is connected already; shuts down only what it started.

    Args:
        workers: number of jobs that run at once; 0 for one per core of the machine or cluster.
        address: address of a cluster, as `ray.init` takes it; empty for Ray on this machine.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, workers: int = 0, address: str = "") -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning on a future default
        try:
            import ray
        except ImportError:
            raise UsageError("--engine ray needs Ray: pip install 'animesion[ray]'") from None
        self._ray = ray
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            paths = os.pathsep.join(path for path in sys.path if path)
            settings: dict[str, Any] = {
                "runtime_env": {"env_vars": {**ONE_THREAD, **({} if address else {"PYTHONPATH": paths})}},
                "log_to_driver": False,
                "logging_level": logging.ERROR,
            }
            if address:
                settings["address"] = address
            else:
                settings |= {"num_cpus": workers or cores(), "include_dashboard": False}
            try:
                ray.init(**settings)
            except Exception as error:  # Ray raises its own errors, gRPC's and the system's
                message = " ".join(str(error).split())[:200]
                failure = f"at {address} cannot be reached" if address else "could not be started"
                raise UsageError(f"Ray {failure}: {message}") from None
        super().__init__(workers or int(ray.cluster_resources().get("CPU", 1)))
        # Ray keeps a worker for further tasks, and replaces one that died.
        self._task = ray.remote(num_cpus=1, max_retries=0)(run_job)
        self._running: set[Any] = set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel running jobs, and shut Ray down if it was started here."""
        for handle in self._running:
            self._ray.cancel(handle, force=True)
        if self._started_ray:
            self._ray.shutdown()

    def _submit(self, job: Job) -> Hashable:
        handle: Hashable = self._task.remote(job)
        self._running.add(handle)
        return handle

    def _ended(self, handles: Sequence[Any]) -> Iterator[tuple[Hashable, Answer]]:
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait(list(handles), num_returns=1, timeout=_PATIENCE)
            # A job that is submitted after the last node has died waits for another node for ever.
            if not ready and not self._has_node():
                raise WorkerDiedError(_NO_NODE)
        for handle in ready:
            self._running.discard(handle)
            yield handle, self._answer(handle)

    def _has_node(self) -> bool:
        """Whether a machine of the cluster is alive, for all that its head knows."""
        try:
            return any(node["Alive"] for node in self._ray.nodes())
        except Exception:  # Ray's own errors, and gRPC's, where the head does not answer
            return False

    def _answer(self, handle: Any) -> Answer:
        errors = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(handle)
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            return "died", type(error).__name__
        except errors.LocalRayletDiedError:
            return "error", WorkerDiedError(_NO_NODE)
        except errors.RayError as error:  # a failure of Ray itself; jobs' own errors are in the answer
            return "fault", str(error)
        return answer
