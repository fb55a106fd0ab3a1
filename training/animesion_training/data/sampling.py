"""How often each class is drawn in an epoch: instance, class-balanced, square-root and progressively balanced.

The four samplings are those of Kang et al., "Decoupling representation and classifier for long-tailed recognition"
(ICLR 2020), section 3.1, made deterministic: shares become whole quotas and a class deals its samples like a deck of
cards that is shuffled anew when it runs out, across epochs. An epoch has as many draws as the split has samples. In
which order they come is left to `schedule`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from animesion.errors import UsageError
from animesion_training.data import seeds
from animesion_training.data.seeds import IntArray

SAMPLINGS = ("instance", "class-balanced", "square-root", "progressive")


def check_sampling(sampling: str) -> None:
    """Refuse a name that is none of `SAMPLINGS`.

    Raises:
        UsageError: no such sampling.
    """
    if sampling not in SAMPLINGS:
        raise UsageError(f"there is no sampling '{sampling}'; choose from {', '.join(SAMPLINGS)}")


def class_shares(counts: IntArray, sampling: str, *, epoch: int = 0, epochs: int = 1) -> npt.NDArray[np.float64]:
    """The share of the draws that each class gets: p_j = n_j^q / sum n_i^q.

    Args:
        counts: samples of each class, shape (C,); a class without any gets nothing.
        sampling: `instance` (q = 1), `class-balanced` (q = 0), `square-root` (q = 1/2) or `progressive`, which goes
            from instance to class-balanced linearly: (1 - t/T) p_instance + (t/T) p_balanced (equation 3).
        epoch: t, from 0; progressive stays class-balanced once t has reached T.
        epochs: T.

    Returns:
        Shape (C,), sums to 1.

    Raises:
        UsageError: no such sampling.
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
    """Whole draws of each class in an epoch, by the largest remainder; they sum to the number of samples.

    Args:
        counts: samples of each class, shape (C,).
        sampling: one of `SAMPLINGS`.
        epoch: from 0.
        epochs: of the run; only `progressive` looks at it.

    Returns:
        Shape (C,).
    """
    total = int(counts.sum())
    exact = class_shares(counts, sampling, epoch=epoch, epochs=epochs) * total
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    missing = total - int(quotas.sum())
    # rounding keeps float noise from deciding which class gets the odd draw
    order = np.argsort(-np.round(exact - quotas, 9), kind="stable")
    quotas[order[:missing]] += 1
    return quotas


def epoch_draws(
    labels: IntArray, num_classes: int, sampling: str, *, seed: int, epoch: int, epochs: int = 1
) -> IntArray:
    """The samples of an epoch, in no particular order.

    Args:
        labels: class id of every sample, shape (N,).
        num_classes: C; ids are below it.
        sampling: one of `SAMPLINGS`.
        seed: of the run.
        epoch: from 0.
        epochs: of the run; only `progressive` looks at it.

    Returns:
        Shape (N,). With `instance` every sample once; otherwise no sample of a class comes again before all of that
        class came, counted over the whole run.
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
    return _dealt(labels, counts, first, quotas, seed)


def _dealt(labels: IntArray, counts: IntArray, first: IntArray, quotas: IntArray, seed: int) -> IntArray:
    """For each class the cards `first` to `first + quota` of its endless sequence of shuffled decks."""
    members = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    drawn = np.flatnonzero(quotas)
    size, begin, end = counts[drawn], first[drawn], first[drawn] + quotas[drawn]
    deck_from, deck_to = begin // size, (end - 1) // size + 1
    decks = deck_to - deck_from
    owner = np.repeat(np.arange(len(drawn)), decks)  # one entry a deck
    deck = deck_from[owner] + _counted(decks)
    card_of = np.repeat(np.arange(len(owner)), size[owner])  # one entry a card
    samples = members[starts[drawn][owner][card_of] + _counted(size[owner])]
    keys = seeds.hashes(seed, seeds.CYCLES, deck[card_of], samples)
    shuffled = np.lexsort((keys, card_of))
    place = (deck * size[owner])[card_of] + _counted(size[owner])
    dealt: IntArray = samples[shuffled][(place >= begin[owner][card_of]) & (place < end[owner][card_of])]
    return dealt


def _counted(lengths: IntArray) -> IntArray:
    """0, 1, ... for each length in turn: [2, 3] gives [0, 1, 0, 1, 2]."""
    starts = np.cumsum(lengths) - lengths
    counted: IntArray = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
    return counted
