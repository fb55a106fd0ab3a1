"""Randomness without state: hashes of (seed, epoch, position) in place of generators.

A generator must be replayed to resume and split to be shared; a hash needs neither, so that what happens to a sample
does not depend on threads, ranks, batch size or interruptions. The mixer is SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014). The numpy and torch halves compute the same numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

#: What a hash is for; the same seed must not crop, flip and shuffle alike.
ORDER, SHARDS, CYCLES, AUGMENT, CROP, DIVISION, VIEWS = range(1, 8)

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mixed(values: Hashes) -> Hashes:
    with np.errstate(over="ignore"):  # wrapping around is the point
        values = values + np.uint64(_STEP)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def hashes(seed: int, purpose: int, epoch: int | IntArray, positions: IntArray) -> Hashes:
    """One hash a position.

    Args:
        seed: of the run; any integer.
        purpose: one of this module's constants.
        epoch: of all positions, or one each, shape (N,).
        positions: shape (N,), not negative.

    Returns:
        Shape (N,), uint64.
    """
    state = np.array([seed & (2**64 - 1)], dtype=np.uint64)
    state = _mixed(_mixed(state) ^ np.uint64(purpose))
    state = _mixed(state ^ np.atleast_1d(np.asarray(epoch, dtype=np.int64)).view(np.uint64))
    return _mixed(state ^ positions.astype(np.int64, copy=False).view(np.uint64))


def uniforms(seeds: Hashes, count: int, purpose: int) -> npt.NDArray[np.float64]:
    """`count` numbers of [0, 1) for each seed.

    Args:
        seeds: shape (N,).
        count: numbers for each.
        purpose: one of this module's constants.

    Returns:
        Shape (N, count), multiples of 2^-24.
    """
    with np.errstate(over="ignore"):
        counters = (np.arange(count, dtype=np.uint64) + np.uint64(purpose << 32)) * np.uint64(_STEP)
        mixed = _mixed(seeds[:, None] + counters)
    return (mixed >> np.uint64(40)).astype(np.float64) * 2.0**-24


def tensor_uniforms(seeds: Tensor, count: int, purpose: int) -> Tensor:
    """`uniforms` on a device.

    Args:
        seeds: shape (N,), int64: the bits of the hashes.
        count: numbers for each.
        purpose: one of this module's constants.

    Returns:
        Shape (N, count), float32, on the seeds' device.
    """
    counters = torch.arange(count, dtype=torch.int64, device=seeds.device) + (purpose << 32)
    values = seeds[:, None] + counters * _signed(_STEP) + _signed(_STEP)
    values = (values ^ _shifted(values, 30)) * _signed(_FIRST)
    values = (values ^ _shifted(values, 27)) * _signed(_SECOND)
    values = values ^ _shifted(values, 31)
    return _shifted(values, 40).to(torch.float32) * 2.0**-24


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(values: Tensor, bits: int) -> Tensor:
    # torch shifts the sign in; a hash wants zeros
    return (values >> bits) & ((1 << (64 - bits)) - 1)
