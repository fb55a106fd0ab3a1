"""Run the jobs of a stage in worker processes of this machine, or on Ray."""

from __future__ import annotations

from animesion.errors import UsageError
from animesion.executors.base import Divisible, Executor, Job, WorkerDiedError, cores

__all__ = ["Divisible", "Executor", "Job", "WorkerDiedError", "cores", "make"]


def make(engine: str = "local", workers: int = 0) -> Executor:
    """Create an executor by the name of its engine.

    Args:
        engine: `local`; `ray` for Ray on this machine; `ray:ADDRESS` for a cluster, where `ray:auto` is the cluster
            that this machine belongs to. Every machine of a cluster needs this package, and the output and the source's
            files under the same paths.
        workers: number of jobs that run at once; 0 for one per core of the machine or cluster.

    Raises:
        UsageError: unknown engine, Ray is not installed, or its cluster cannot be reached.
    """
    kind, _, address = engine.partition(":")
    if kind == "ray":
        from animesion.executors.ray import RayExecutor

        return RayExecutor(workers, address)
    if engine != "local":
        raise UsageError(f"there is no engine '{engine}': give local, ray or ray:ADDRESS")
    from animesion.executors.local import LocalExecutor

    return LocalExecutor(workers or cores())
