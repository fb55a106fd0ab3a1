"""Helpers for computations whose result depends on the precision that autocast chooses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """In which attention on x runs: the least float32 would be -inf in a shorter type, and a row of -inf alone NaN."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """What computations on x enter that rounding would spoil; the meta device, for counting, has no autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
