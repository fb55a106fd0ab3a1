"""Stateless random numbers: hashes of (seed, epoch, position) instead of generators.

The random numbers of a sample do not depend on threads, ranks, batch size or interruptions, and nothing has to be
restored to resume. The mixer is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014). The numpy and torch functions compute the same numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

#: Purposes of hashes, so that the numbers for shuffling, cropping and so on are independent.
ORDER, SHARDS, CYCLES, AUGMENT, CROP, DIVISION, VIEWS, FAKE, TAG_ORDER, TAG_MASK = range(1, 11)
PARTNERS, MIXTURES, MASKS, OFFSETS = range(11, 15)

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(values: Hashes) -> Hashes:
    with np.errstate(over="ignore"):  # overflow is intended
        values = values + np.uint64(_STEP)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def hashes(seed: int, purpose: int, epoch: int | IntArray, positions: IntArray) -> Hashes:
    """Compute one hash per position.

    Args:
        seed: of the run; any integer.
        purpose: one of this module's constants.
        epoch: one for all positions, or one per position, shape (N,).
        positions: shape (N,), not negative.

    Returns:
        Shape (N,), uint64.
    """
    state = np.array([seed & (2**64 - 1)], dtype=np.uint64)
    state = _mix(_mix(state) ^ np.uint64(purpose))
    state = _mix(state ^ np.atleast_1d(np.asarray(epoch, dtype=np.int64)).view(np.uint64))
    return _mix(state ^ positions.astype(np.int64, copy=False).view(np.uint64))


def uniforms(seeds: Hashes, count: int, purpose: int) -> npt.NDArray[np.float64]:
    """Compute `count` uniform numbers in [0, 1) for each seed.

    Args:
        seeds: shape (N,).
        count: numbers per seed.
        purpose: one of this module's constants.

    Returns:
        Shape (N, count), multiples of 2^-24.
    """
    with np.errstate(over="ignore"):
        counters = (np.arange(count, dtype=np.uint64) + np.uint64(purpose << 32)) * np.uint64(_STEP)
        mixed = _mix(seeds[:, None] + counters)
    return (mixed >> np.uint64(40)).astype(np.float64) * 2.0**-24


def tensor_uniforms(seeds: Tensor, count: int, purpose: int) -> Tensor:
    """Compute `uniforms` with torch, on any device.

    Args:
        seeds: shape (N,), int64: the bits of the hashes.
        count: numbers per seed.
        purpose: one of this module's constants.

    Returns:
        Shape (N, count), float32, on the seeds' device.
    """
    counters = torch.arange(count, dtype=torch.int64, device=seeds.device) + (purpose << 32)
    values = seeds[:, None] + counters * _to_signed(_STEP) + _to_signed(_STEP)
    values = (values ^ _shift_right(values, 30)) * _to_signed(_FIRST)
    values = (values ^ _shift_right(values, 27)) * _to_signed(_SECOND)
    values = values ^ _shift_right(values, 31)
    return _shift_right(values, 40).to(torch.float32) * 2.0**-24


def _to_signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # torch's shift is arithmetic: clear the bits that it fills with the sign
    return (values >> bits) & ((1 << (64 - bits)) - 1)
