"""Which sample comes when: the order of an epoch, its cut into batches, each rank's share. Pure functions.

There is one order for all ranks, a function of (seed, epoch, samples drawn, shards). A global batch is a stretch of it
and a rank's batch is a slice of that stretch, so a position in the order says all there is to say about progress: it
stays valid for another number of ranks, workers or another batch size. What is drawn is left to `sampling`, reading to
`sources`.
"""

from __future__ import annotations

import numpy as np

from animesion_training.data import seeds
from animesion_training.data.seeds import IntArray


def training_order(draws: IntArray, shards: IntArray, *, seed: int, epoch: int, window: int = 0) -> IntArray:
    """Shuffle the samples of an epoch.

    Shards are put into a new random order each epoch and taken in windows of several; the samples of a window are
    shuffled together. No more than one window of shards is read at a time.

    Args:
        draws: the samples of the epoch, shape (D,); one may occur several times.
        shards: the shard of every sample of the split, shape (N,).
        seed: of the run.
        epoch: from 0.
        window: shards in a window; 0 for one window of all, a full shuffle.

    Returns:
        `draws` in the epoch's order, shape (D,).
    """
    keys = seeds.hashes(seed, seeds.ORDER, epoch, np.arange(len(draws), dtype=np.int64))
    if window == 0:
        return draws[np.argsort(keys, kind="stable")]
    numbers, place = np.unique(shards[draws], return_inverse=True)
    turn = np.empty(len(numbers), dtype=np.int64)
    turn[np.argsort(seeds.hashes(seed, seeds.SHARDS, epoch, numbers), kind="stable")] = np.arange(len(numbers))
    return draws[np.lexsort((keys, turn[place] // window))]


def batch_ends(total: int, batch_size: int, world_size: int, *, consumed: int = 0, train: bool = True) -> IntArray:
    """Where the global batches of an epoch end.

    In training every rank takes part in every batch: a remainder smaller than the number of ranks joins the batch
    before it. In evaluation a rank may be left without a sample of the last batch.

    Args:
        total: samples in the epoch.
        batch_size: samples of one rank's full batch.
        world_size: number of ranks.
        consumed: samples already used; cutting starts behind them.
        train: whether each rank needs a sample of each batch.

    Returns:
        Ascending ends in the order, the last one `total`; empty when nothing is left, and in training also when fewer
        samples are left than there are ranks (only a resume with more ranks than before can leave so few).
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
    """A rank's slice of a global batch; sizes differ by one at most.

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
