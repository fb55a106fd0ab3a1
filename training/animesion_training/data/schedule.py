"""The order of an epoch, its batches, and each rank's share of them, as pure functions.

All ranks share one order, a function of (seed, epoch, samples drawn, shards). A global batch is a slice of it, the same
for any number of ranks, and a rank's batch is a part of that. A position in the order is therefore valid for any number
of ranks or workers and any batch size. `sampling` draws the samples, `sources` opens them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from animesion_training.data import seeds
from animesion_training.data.seeds import IntArray

#: What becomes of the samples after the last full batch of an epoch; see `batch_ends`.
Last = Literal["keep", "join", "drop"]


def training_order(draws: IntArray, shards: IntArray, *, seed: int, epoch: int, window: int = 0) -> IntArray:
    """Shuffle the samples of an epoch.

    Shards are shuffled and divided into windows; the samples of a window are shuffled together. Only the shards of one
    window are read at a time.

    Args:
        draws: the samples of the epoch, shape (D,); one may occur several times.
        shards: the shard of every sample of the split, shape (N,).
        seed: of the run.
        epoch: from 0.
        window: shards in a window; 0 for a full shuffle of all shards.

    Returns:
        `draws` in the epoch's order, shape (D,).
    """
    keys = seeds.hashes(seed, seeds.ORDER, epoch, np.arange(len(draws), dtype=np.int64))
    if window == 0:
        return draws[np.argsort(keys, kind="stable")]
    numbers, place = np.unique(shards[draws], return_inverse=True)
    # turn of each shard in the shuffled order of shards
    turn = np.empty(len(numbers), dtype=np.int64)
    turn[np.argsort(seeds.hashes(seed, seeds.SHARDS, epoch, numbers), kind="stable")] = np.arange(len(numbers))
    return draws[np.lexsort((keys, turn[place] // window))]


def batch_ends(total: int, batch_size: int, *, consumed: int = 0, last: Last = "keep", pairs: bool = False) -> IntArray:
    """Compute where the global batches of an epoch end; the number of ranks plays no part.

    Args:
        total: samples in the epoch.
        batch_size: samples of a full global batch.
        consumed: samples already consumed; batches start behind them.
        last: what becomes of a rest that fills no batch: `keep` makes it a batch, `join` adds it to the batch before,
            `drop` leaves it out.
        pairs: whether a batch needs two samples: a rest of one then joins the batch before.

    Returns:
        Ascending ends in the order. Without `drop` the last one is `total`, unless fewer samples are left than a batch
        needs, which happens only after resuming with another batch size.
    """
    left = total - consumed
    ends = np.arange(consumed + batch_size, total + 1, batch_size, dtype=np.int64)
    rest = left % batch_size if left > 0 else 0
    if rest == 0 or last == "drop":
        return ends
    if len(ends) and (last == "join" or (pairs and rest == 1)):
        ends[-1] = total
        return ends
    return ends if pairs and rest == 1 else np.append(ends, total)


def share(start: int, end: int, rank: int, world_size: int, *, pairs: bool = False) -> IntArray:
    """Compute a rank's places of a global batch; the first ranks have some even if there are too few for all.

    With `pairs`, the first sample stays with the last, the second with the last but one, and so on: each rank has no
    sample or at least two, and for every one also its mirror image in the batch. The middle one of an odd number stays
    with the pair around it. Numbers of samples then differ by at most three, and otherwise by at most one.

    Args:
        start: where the global batch starts in the order.
        end: where it ends; with `pairs` at least 2 behind the start.
        rank: from 0.
        world_size: number of ranks.
        pairs: whether mirror images stay together.

    Returns:
        Ascending places in the order; none when the batch has too few samples for this rank.
    """
    size = end - start
    units = size // 2 if pairs else size
    # rounded up, so that rank 0 always has a unit
    first, behind = -(-rank * units // world_size), -(-(rank + 1) * units // world_size)
    front = np.arange(start + first, start + behind, dtype=np.int64)
    if not pairs:
        return front
    middle = np.arange(start + units, end - units, dtype=np.int64) if first < behind == units else front[:0]
    return np.concatenate((front, middle, start + end - 1 - front[::-1]))
