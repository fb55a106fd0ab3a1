"""Class sampling: instance, class-balanced, square-root and progressively balanced.

The four samplings are those of Kang et al., "Decoupling representation and classifier for long-tailed recognition"
(ICLR 2020), section 3.1, made deterministic: each class has a whole quota of draws per epoch, and draws its samples
from a shuffled deck, which is reshuffled when it is used up, across epochs. An epoch has as many draws as the split has
samples. `schedule` orders them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.data.seeds import IntArray

SAMPLINGS = ("instance", "class-balanced", "square-root", "progressive")


def check_sampling(sampling: str) -> None:
    """Check that a name is one of `SAMPLINGS`.

    Raises:
        UsageError: an unknown sampling.
    """
    if sampling not in SAMPLINGS:
        raise UsageError(f"unknown sampling '{sampling}': choose from {', '.join(SAMPLINGS)}")


def class_shares(counts: IntArray, sampling: str, *, epoch: int = 0, epochs: int = 1) -> npt.NDArray[np.float64]:
    """Compute each class's share of the draws: p_j = n_j^q / sum n_i^q.

    Args:
        counts: samples of each class, shape (C,); an empty class has share 0.
        sampling: `instance` (q = 1), `class-balanced` (q = 0), `square-root` (q = 1/2) or `progressive`, which moves
            linearly from instance to class-balanced: (1 - t/T) p_instance + (t/T) p_balanced (equation 3).
        epoch: t, from 0; progressive sampling is class-balanced from t = T on.
        epochs: T.

    Returns:
        Shape (C,), sums to 1.

    Raises:
        UsageError: an unknown sampling.
    """
    check_sampling(sampling)
    if sampling == "progressive":
        done = min(1.0, epoch / max(1, epochs))
        return (1 - done) * class_shares(counts, "instance") + done * class_shares(counts, "class-balanced")
    power = {"instance": 1.0, "square-root": 0.5, "class-balanced": 0.0}[sampling]
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** power, 0.0)
    shares: npt.NDArray[np.float64] = weights / max(weights.sum(), 1.0)
    return shares


def class_quotas(counts: IntArray, sampling: str, *, epoch: int = 0, epochs: int = 1) -> IntArray:
    """Compute whole numbers of draws of each class in an epoch, by largest remainder; they sum to the samples.

    Args:
        counts: samples of each class, shape (C,).
        sampling: one of `SAMPLINGS`.
        epoch: from 0.
        epochs: length of the run, for `progressive`.

    Returns:
        Shape (C,).
    """
    total = int(counts.sum())
    exact = class_shares(counts, sampling, epoch=epoch, epochs=epochs) * total
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    missing = total - int(quotas.sum())
    # rounded, so that float noise does not decide which class gets the remaining draws
    order = np.argsort(-np.round(exact - quotas, 9), kind="stable")
    quotas[order[:missing]] += 1
    return quotas


def epoch_draws(
    labels: IntArray, num_classes: int, sampling: str, *, seed: int, epoch: int, epochs: int = 1
) -> IntArray:
    """Draw the samples of an epoch, in no particular order.

    Args:
        labels: class id of every sample, shape (N,).
        num_classes: C; labels are 0..C-1.
        sampling: one of `SAMPLINGS`.
        seed: of the run.
        epoch: from 0.
        epochs: length of the run, for `progressive`.

    Returns:
        Shape (N,). With `instance`, every sample once; otherwise no sample of a class is repeated before all samples of
        that class were drawn, counted over the whole run.
    """
    if sampling == "instance":
        return np.arange(len(labels), dtype=np.int64)
    counts = np.bincount(labels, minlength=num_classes).astype(np.int64)
    quotas = class_quotas(counts, sampling, epoch=epoch, epochs=epochs)
    if sampling == "progressive":
        past = [class_quotas(counts, sampling, epoch=t, epochs=epochs) for t in range(min(epoch, epochs))]
        first = np.sum(past, axis=0, dtype=np.int64) if past else np.zeros_like(quotas)
        first = first + max(0, epoch - epochs) * quotas
    else:
        first = epoch * quotas
    return _deal(labels, counts, first, quotas, seed)


def blend_draws(parts: Sequence[tuple[int, int]], *, seed: int, epoch: int) -> IntArray:
    """Draw the samples of an epoch of blended datasets, in no particular order.

    Args:
        parts: samples of each dataset, and its draws in an epoch.
        seed: of the run.
        epoch: from 0.

    Returns:
        Shape (D,), D draws in total. No sample of a dataset is repeated before all of its samples were drawn, counted
        over the whole run.
    """
    counts, quotas = (np.array(column, dtype=np.int64) for column in zip(*parts, strict=True))
    return _deal(np.repeat(np.arange(len(counts)), counts), counts, epoch * quotas, quotas, seed)


def _deal(labels: IntArray, counts: IntArray, first: IntArray, quotas: IntArray, seed: int) -> IntArray:
    """For each class, deal the cards `first` to `first + quota` of its sequence of shuffled decks.

    A deck contains each sample of the class once. Decks are numbered from 0 over the whole run.
    """
    members = np.argsort(labels, kind="stable")  # samples by class, (N,)
    starts = np.cumsum(counts) - counts  # first member of each class, (C,)
    drawn = np.flatnonzero(quotas)  # classes with draws, (K,); size, begin and end below are (K,) too
    size, begin, end = counts[drawn], first[drawn], first[drawn] + quotas[drawn]
    # the decks that contain the cards begin to end
    deck_from, deck_to = begin // size, (end - 1) // size + 1
    decks = deck_to - deck_from
    owner = np.repeat(np.arange(len(drawn)), decks)  # one entry per deck
    deck = deck_from[owner] + _ranges(decks)
    card_of = np.repeat(np.arange(len(owner)), size[owner])  # one entry per card: its deck
    samples = members[starts[drawn][owner][card_of] + _ranges(size[owner])]
    keys = seeds.hashes(seed, seeds.CYCLES, deck[card_of], samples)
    shuffled = np.lexsort((keys, card_of))  # shuffles each deck
    # position of each card in the sequence of its class; cards outside begin to end are not dealt
    place = (deck * size[owner])[card_of] + _ranges(size[owner])
    dealt: IntArray = samples[shuffled][(place >= begin[owner][card_of]) & (place < end[owner][card_of])]
    return dealt


def _ranges(lengths: IntArray) -> IntArray:
    """Concatenate ranges from 0 of the given lengths: [2, 3] gives [0, 1, 0, 1, 2]."""
    starts = np.cumsum(lengths) - lengths
    ranges: IntArray = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
    return ranges
