"""Autocast by the names of precision that recipes and commands use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

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
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run the block in `bf16` or `fp16` autocast, or without autocast for `fp32`."""
    if precision == "fp32":
        yield
    else:
        with torch.autocast(device.type, _DTYPES[precision]):
            yield
