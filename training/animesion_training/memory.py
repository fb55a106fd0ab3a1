"""Free memory of a device, within the limits that the system sets to this process, and how the process keeps memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_GROUPS = Path("/sys/fs/cgroup")

#: Parameters of mallopt(3): within `kept_heap`, and after it. Setting one ends glibc's own adaptation of the
#: thresholds, so the latter are those that it ends at where large blocks are freed.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_WITHIN = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20, _MMAP_MAX: 0}
_AFTER = {_TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65_536}


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not tell.

    On a CPU, that is the available memory of the machine, or of the control group (container or job) if it is less.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [each for each in (_of_machine(), _of_group()) if each is not None]
    return min(found, default=None)


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """Within the block, keep memory that is freed for the next tensors; afterwards return it to the system.

    glibc maps large tensors one by one and unmaps them when they are freed, so the kernel clears every page again in
    each step. On a CPU, that is a quarter of the time that a small network takes to train. Without glibc, this does
    nothing.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    try:
        for name, value in _WITHIN.items():
            libc.mallopt(name, value)
        yield
    finally:
        for name, value in _AFTER.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)


def _of_machine() -> int | None:
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo", encoding="ascii") as facts:
        return next(int(line.split()[1]) * 1024 for line in facts if line.startswith("MemAvailable:"))
    with contextlib.suppress(AttributeError, OSError, ValueError):  # elsewhere: half of all memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return None


def _of_group() -> int | None:
    """What is left of the limit of a control group, in the files of version 2 or 1; its file cache counts as free."""
    for limit, used, freeable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            left = int((_GROUPS / limit).read_text()) - int((_GROUPS / used).read_text())
            facts = (_GROUPS / limit).with_name("memory.stat").read_text().splitlines()
            return left + sum(int(line.split()[1]) for line in facts if line.split()[0] == freeable)
    return None
