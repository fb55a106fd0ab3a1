"""Distributed training: rank and device of this process, and the collectives that the package uses.

`torchrun` starts the processes; without it there is one. The training loop is `animesion_training.engine.loop`.
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
    """Rank and device of this process.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: the device that it computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows messages."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place; on a GPU without waiting for the result."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank, in every process; they must be picklable."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.world_size > 1:
            dist.barrier()


def local_processes() -> int:
    """Return the number of processes that `torchrun` started on this machine; 1 without it."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(local)) if local.isdecimal() else 1


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def distributed_context(device: str = "auto") -> Iterator[DistributedContext]:
    """Join the process group that `torchrun` started, or run as a single process.

    Args:
        device: `auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:N`; with several processes, each takes the GPU
            of its local rank, and `cuda:N` is refused.

    Raises:
        UsageError: an unknown device, no GPU that torch can use, or fewer GPUs than processes on this machine.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = _device(device, local_rank(), world_size)
    if world_size == 1:
        yield DistributedContext(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # with the device, NCCL connects here and not within the first step, and objects are sent from this GPU
        dist.init_process_group("nccl", device_id=chosen)
    else:
        dist.init_process_group("gloo")
    try:
        yield DistributedContext(rank, world_size, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, number: int, world_size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}': give auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    if device.index is not None and world_size > 1:
        raise UsageError(
            f"--device {name} would put all {world_size} processes on one GPU: give --device cuda, and choose GPUs "
            "with CUDA_VISIBLE_DEVICES"
        )
    if not torch.cuda.is_available():
        raise UsageError("torch finds no usable GPU: omit --device or give cpu")
    if device.index is not None:
        return device
    if number >= torch.cuda.device_count():
        raise UsageError(
            f"this machine has {torch.cuda.device_count()} GPUs, and process {number} (from 0) finds none left: "
            "start one process per GPU"
        )
    return torch.device("cuda", number)
