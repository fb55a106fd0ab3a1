"""Free memory of a device, within the limits that the system sets to this process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not tell.

    On a CPU, that is the available memory of the machine, or of the control group (container or job) if it is less.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [each for each in (_of_machine(), _of_group()) if each is not None]
    return min(found, default=None)


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
