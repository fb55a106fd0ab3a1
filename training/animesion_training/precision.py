"""Autocast by the names of precision that recipes and commands use, and how torch computes in general."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: Instructions that multiply bfloat16: without them, a CPU emulates it.
_CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def resolve(precision: str, device: torch.device) -> str:
    """Choose the precision for `auto`: bf16 on GPUs that compute in it, fp16 on others, and fp32 on a CPU.

    Args:
        precision: `auto`, or one that is returned as it is.
        device: that computes.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def emulates_bf16(device: torch.device) -> bool:
    """Whether the device is a CPU without instructions for bfloat16; False where torch does not tell."""
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities) and not any(map(capabilities.get, _CPU_BF16))


@contextlib.contextmanager
def numerics(device: torch.device, *, deterministic: bool, tf32: bool) -> Iterator[None]:
    """Set how torch computes, and restore it after the block; must be entered before the first computation on a GPU.

    Args:
        device: that computes; without `deterministic`, nothing is set for a CPU.
        deterministic: use bit-reproducible algorithms alone. Otherwise cuDNN times its algorithms for each size of a
            batch, and takes the fastest.
        tf32: compute products of fp32 in TF32 on GPUs that have it, with 10 bits of mantissa.
    """
    cudnn: Any = torch.backends.cudnn
    flags = (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision())
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses matrix products without it
            torch.use_deterministic_algorithms(True)
        if device.type == "cuda":
            cudnn.benchmark = not deterministic
            cudnn.allow_tf32 = tf32
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = flags[:2]
        torch.set_float32_matmul_precision(flags[2])
        torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warned)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run the block in `bf16` or `fp16` autocast, or without autocast for `fp32`."""
    if precision == "fp32":
        yield
    else:
        with torch.autocast(device.type, _DTYPES[precision]):
            yield
