"""One process or many: which part this process plays, and the few things that processes tell one another.

Processes are started by `torchrun`; without it there is one. What is computed is `animesion_training.engine.loop`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from animesion.errors import UsageError


@dataclass(frozen=True)
class DistributedContext:
    """Where this process stands.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: what it computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes, in float64."""
        if self.world_size == 1:
            return list(numbers)
        # MPS and some backends lack float64, gloo and NCCL have it
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(number) for number in tensor.tolist()]

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process by rank, in every process; values are picklable and come from our own ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when every process is here."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def distributed_context(device: str = "auto") -> Iterator[DistributedContext]:
    """Take part in the run that `torchrun` started, or be alone.

    Args:
        device: `auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: the device is not there.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local_rank)
    if world_size == 1:
        yield DistributedContext(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield DistributedContext(rank, world_size, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device '{name}': give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no GPU that torch can use here: leave --device out or give cpu")
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device
