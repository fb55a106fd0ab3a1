"""The order of an epoch, its batches, and each rank's share of them, as pure functions.

All ranks share one order, a function of (seed, epoch, samples drawn, shards). A global batch is a slice of it and a
rank's batch is a slice of that. A position in the order is therefore valid for any number of ranks or workers and any
batch size. `sampling` draws the samples, `sources` opens them.
"""

from __future__ import annotations

import numpy as np

from animesion_training.data import seeds
from animesion_training.data.seeds import IntArray


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


def batch_ends(total: int, batch_size: int, world_size: int, *, consumed: int = 0, train: bool = True) -> IntArray:
    """Compute where the global batches of an epoch end.

    In training, every rank takes part in every batch: a remainder smaller than the number of ranks joins the batch
    before it. In evaluation, a rank may have no sample of the last batch.

    Args:
        total: samples in the epoch.
        batch_size: samples of one rank's full batch.
        world_size: number of ranks.
        consumed: samples already consumed; batches start behind them.
        train: whether every rank needs a sample of every batch.

    Returns:
        Ascending ends in the order, the last one `total`. Empty when nothing is left, and in training also when fewer
        samples are left than there are ranks, which happens only after resuming with more ranks than before.
    """
    step, left = batch_size * world_size, total - consumed
    if left <= 0 or (train and left < world_size):
        return np.empty(0, dtype=np.int64)
    ends = np.arange(consumed + step, total + 1, step, dtype=np.int64)
    rest = left % step
    if rest == 0:
        return ends
    if train and rest < world_size and len(ends):
        ends[-1] = total
        return ends
    return np.append(ends, total)


def share(start: int, end: int, rank: int, world_size: int) -> tuple[int, int]:
    """Compute a rank's slice of a global batch; sizes differ by at most one.

    Args:
        start: where the global batch starts in the order.
        end: where it ends.
        rank: from 0.
        world_size: number of ranks.

    Returns:
        Start and end in the order; equal when the batch has too few samples for this rank.
    """
    size = end - start
    return start + rank * size // world_size, start + (rank + 1) * size // world_size
