"""Autocast by the names of precision that recipes and commands use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run the block in `bf16` or `fp16` autocast, or without autocast for `fp32`."""
    if precision == "fp32":
        yield
    else:
        with torch.autocast(device.type, _DTYPES[precision]):
            yield
