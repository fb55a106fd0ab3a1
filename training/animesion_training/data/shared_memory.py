"""Memory that the processes of a machine share, for tensors that each of them would have otherwise.

The first process of a machine creates the memory, and the others map it. It has no name in a file system: it ends with
the last process that has mapped it, however that one ends, and the size of /dev/shm, 64 MB in many containers, is no
limit.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.distributed import DistributedContext, local_processes, local_rank

_ALIGNMENT = 64


def tensors(context: DistributedContext, *kinds: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
    """Allocate tensors in memory that the processes of a machine share; all processes must call it.

    Args:
        context: of this process.
        kinds: shape and type of each tensor.

    Returns:
        The tensors; their content is 0.

    Raises:
        UsageError: a process cannot map the memory; all processes raise it.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    first, name, descriptor = context.rank - local_rank(), "", -1
    if local_rank() == 0:
        name, descriptor = _create(starts[-1])
    names = context.all_gather((first, name))
    name = next(each for machine, each in names if machine == first and each)
    whole, problem = torch.empty(0, dtype=torch.uint8), ""
    try:
        whole = torch.from_file(name, shared=True, size=starts[-1], dtype=torch.uint8)
    except RuntimeError as error:
        problem = f"this machine's processes cannot share memory ({str(error).splitlines()[0][:200]}): omit --cache"
    problems = context.all_gather(problem)  # also waits for all: the name ends with the descriptor
    if descriptor >= 0:
        os.close(descriptor)
        if not name.startswith("/proc/"):
            Path(name).unlink()
    if problem := next(filter(None, problems), ""):
        raise UsageError(problem)
    return [
        whole[start : start + size].view(dtype).view(*shape)
        for (shape, dtype), start, size in zip(kinds, starts, sizes, strict=False)
    ]


def part(count: int) -> range:
    """Return the part of `count` rows that this process fills, among those of its machine."""
    rank, processes = local_rank(), local_processes()
    return range(rank * count // processes, (rank + 1) * count // processes)


def _create(size: int) -> tuple[str, int]:
    """Create memory; return a path under which other processes of this user can open it, and a descriptor."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("animesion-cache")
        name = f"/proc/{os.getpid()}/fd/{descriptor}"
    else:  # not Linux: a file, which the system keeps in memory while it can
        descriptor, name = tempfile.mkstemp(prefix="animesion-cache-")
    os.truncate(descriptor, size)
    return name, descriptor
