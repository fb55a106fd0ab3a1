"""The order of an epoch, its batches, and each rank's share of them, as pure functions.

All ranks share one order, a function of (seed, epoch, samples drawn, blocks). A global batch is a slice of it, the same
for any number of ranks, and a rank's batch is a part of that. A position in the order is therefore valid for any number
of ranks or workers. `sampling` draws the samples, `sources` opens them, `blocks` says which lie together.

With a window, samples of a block follow each other at the same place of successive batches (`spread`). A rank has a
range of places, so it reads a part of the blocks, for any number of ranks. That order also depends on the batch size.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from animesion_training.data import seeds
from animesion_training.data.seeds import IntArray

#: What becomes of the samples after the last full batch of an epoch; see `batch_ends`.
Last = Literal["keep", "join", "drop"]


def training_order(
    draws: IntArray, blocks: IntArray, ends: IntArray, *, seed: int, epoch: int, window: int = 0
) -> IntArray:
    """Shuffle the samples of an epoch.

    Without a window, this is a permutation of all samples. Otherwise blocks are shuffled and divided into windows, the
    samples of a window are shuffled together, and the result is spread over the batches.

    Args:
        draws: the samples of the epoch, shape (D,); one may occur several times.
        blocks: the block of every sample of the split, shape (N,).
        ends: of the global batches, from `batch_ends`; only the order with a window depends on them.
        seed: of the run.
        epoch: from 0.
        window: blocks that are shuffled together; 0 for all.

    Returns:
        `draws` in the epoch's order, shape (D,).
    """
    keys = seeds.hashes(seed, seeds.ORDER, epoch, np.arange(len(draws), dtype=np.int64))
    if window == 0:
        return draws[np.argsort(keys, kind="stable")]
    numbers, place = np.unique(blocks[draws], return_inverse=True)
    # turn of each block in the shuffled order of blocks
    turn = np.empty(len(numbers), dtype=np.int64)
    turn[np.argsort(seeds.hashes(seed, seeds.SHARDS, epoch, numbers), kind="stable")] = np.arange(len(numbers))
    return spread(draws[np.lexsort((keys, turn[place] // window))], ends)


def spread(samples: IntArray, ends: IntArray, columns: int = 0) -> IntArray:
    """Arrange samples so that neighbours get the same place in successive batches.

    Written as rows of a table, one per global batch, the result has the samples column by column. `share` gives a rank
    a range of columns: a range of the samples, or two of them with pairs.

    Args:
        samples: shape (N,).
        ends: ascending ends of the global batches; samples behind the last one keep their place.
        columns: how many columns the places of a batch form; 0 for one column per place.

    Returns:
        The samples in the order of the batches, shape (N,).
    """
    if len(ends) == 0:
        return samples
    sizes = np.diff(ends, prepend=0)
    batch = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(batch)) - (ends - sizes)[batch]
    # relative to the size of the batch: a rank has the same share of the last one, which may have another size
    column = place * columns // sizes[batch] if columns else (place + 0.5) / sizes[batch]
    order = samples.copy()
    order[np.lexsort((place, batch, column))] = samples[: len(batch)]
    return order


def class_runs(order: IntArray, labels: IntArray, together: int) -> IntArray:
    """Bring several samples of a class together, so that batches have positives: P x K sampling with K = `together`.

    The samples of each class, in their order, form runs of K, which take the place of their first sample. What fills no
    run follows at the end. A batch whose size is a multiple of K therefore has whole runs, except at the end of an
    epoch. (Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737.)

    Args:
        order: samples in the order of an epoch, shape (D,).
        labels: class id of every sample of the split, shape (N,).
        together: K, at least 1.

    Returns:
        The samples of `order`, shape (D,).
    """
    if together == 1:
        return order
    of_class = labels[order]
    by_class = np.argsort(of_class, kind="stable")  # places in the order, by class
    counts = np.bincount(of_class)
    starts = (np.cumsum(counts) - counts)[of_class[by_class]]
    rank = np.arange(len(order)) - starts  # of each sample within its class
    run = rank // together
    whole = run < counts[of_class[by_class]] // together
    first = by_class[starts + run * together]
    return order[by_class[np.lexsort((rank, first, ~whole))]]


def with_partners(order: IntArray, labels: IntArray, *, seed: int, epoch: int) -> IntArray:
    """Follow each sample of an epoch by its partner: another one of its class, uniform over the class.

    A class of one sample has that sample as partner. (CALMix, arXiv 2605.18700.)

    Args:
        order: samples in the order of an epoch, shape (D,).
        labels: class id of every sample of the split, shape (N,).
        seed: of the run.
        epoch: from 0.

    Returns:
        Sample, partner, sample, partner, ...; shape (2 D,).
    """
    members = np.argsort(labels, kind="stable")  # samples by class, (N,)
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts  # first member of each class
    rank = np.empty(len(labels), dtype=np.int64)  # of each sample within its class
    rank[members] = np.arange(len(labels)) - starts[labels[members]]
    keys = seeds.hashes(seed, seeds.PARTNERS, epoch, np.arange(len(order), dtype=np.int64))
    # a number below the others of the class; its own rank is left out
    other = (keys % np.maximum(counts[labels[order]] - 1, 1).astype(np.uint64)).astype(np.int64)
    other += (other >= rank[order]) & (counts[labels[order]] > 1)
    return np.stack((order, members[starts[labels[order]] + other]), axis=1).ravel()


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


def share(start: int, end: int, rank: int, world_size: int, *, pairs: bool = False, partners: bool = False) -> IntArray:
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
        partners: whether every other sample stays with the next one, and the last of an odd number with the two before
            it; `pairs` is ignored then.

    Returns:
        Ascending places in the order; none when the batch has too few samples for this rank.
    """
    size = end - start
    if partners:
        firsts = share(0, size // 2, rank, world_size)
        places = (2 * firsts[:, None] + np.arange(2)).ravel()
        has_last = len(firsts) and firsts[-1] == size // 2 - 1 if size > 1 else rank == 0
        return start + (np.append(places, size - 1) if size % 2 and has_last else places)
    units = size // 2 if pairs else size
    # rounded up, so that rank 0 always has a unit
    first, behind = -(-rank * units // world_size), -(-(rank + 1) * units // world_size)
    front = np.arange(start + first, start + behind, dtype=np.int64)
    if not pairs:
        return front
    middle = np.arange(start + units, end - units, dtype=np.int64) if first < behind == units else front[:0]
    return np.concatenate((front, middle, start + end - 1 - front[::-1]))
