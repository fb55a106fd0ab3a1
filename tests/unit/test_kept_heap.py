"""Memory of freed tensors on a CPU."""

from __future__ import annotations

import ctypes
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs the extra train")
resource = pytest.importorskip("resource", reason="needs Unix")

from animesion_training.memory import kept_heap

PAGES = 48 << 8  # of 4 KiB in 48 MiB


def faults(count: int) -> int:
    """Pages that the system gives to `count` tensors of 48 MiB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(PAGES * 1024)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the allocator of glibc"
)
def test_memory_is_kept_within_the_block_and_returned_after_it() -> None:
    with kept_heap():
        faults(10)  # glibc reuses memory of one size after a few rounds
        assert faults(4) < PAGES // 10
    assert faults(4) > PAGES


def test_a_block_that_fails_returns_memory_too() -> None:
    with pytest.raises(ValueError, match="stop"), kept_heap():
        raise ValueError("stop")
    assert torch.ones(4).sum() == 4
