"""Jobs on Ray: on this machine, or on a cluster whose machines share the files.

What becomes of jobs that kill their workers is `engine`'s; Ray's own retries are off, so that both engines do the same.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from types import TracebackType
from typing import Any

from animesion.errors import UsageError
from animesion.executors.base import ONE_THREAD, Answer, Executor, Job, cores, run_job


class RayExecutor(Executor):
    """Ray tasks of one core each. Ray starts when the engine is made, unless it runs already, and ends with it."""

    def __init__(self, workers: int = 0, address: str = "") -> None:
        """Start Ray or connect to it.

        Args:
            workers: jobs in flight at once; 0 for one a core of the machine or cluster.
            address: of a cluster, as `ray.init` takes it; empty for Ray on this machine.

        Raises:
            UsageError: Ray is not installed, or the cluster cannot be reached.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of what it will do later
        try:
            import ray
        except ImportError:
            raise UsageError("--engine ray needs Ray: pip install 'animesion[ray]'") from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
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
            except Exception as error:  # Ray raises its own, gRPC's and the system's
                said = " ".join(str(error).split())[:200]
                where = f"at {address} cannot be reached" if address else "could not be started"
                raise UsageError(f"Ray {where}: {said}") from None
        super().__init__(workers or int(ray.cluster_resources().get("CPU", 1)))
        # A worker that has run a job may run the next; one that died is replaced.
        self._task = ray.remote(num_cpus=1, max_retries=0)(run_job)
        self._flying: set[Any] = set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what runs; end Ray if it was started here."""
        for handle in self._flying:
            self._ray.cancel(handle, force=True)
        if self._ours:
            self._ray.shutdown()

    def _submit(self, job: Job) -> Hashable:
        handle: Hashable = self._task.remote(job)
        self._flying.add(handle)
        return handle

    def _ended(self, handles: Sequence[Any]) -> Iterator[tuple[Hashable, Answer]]:
        ready, _ = self._ray.wait(list(handles), num_returns=1)
        for handle in ready:
            self._flying.discard(handle)
            yield handle, self._answer(handle)

    def _answer(self, handle: Any) -> Answer:
        gone = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(handle)
        except (gone.WorkerCrashedError, gone.OutOfMemoryError, gone.NodeDiedError) as error:
            return "died", type(error).__name__
        except gone.RayError as error:  # Ray itself is in trouble
            return "fault", str(error)
        return answer
