"""Find pictures that are the same: equal bytes, equal pixels, and near duplicates by perceptual hash with a fine check.

A *duplicate* shows the same picture; an *alternate* (recoloured, other expression) passes the hash but not the fine
check and stays. Works on arrays; what is dropped for being a duplicate is decided in `animesion.stages.curate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]

_BITS = 64


def near_pairs(hashes: Hashes, radius: int) -> Pairs:
    """All pairs of 64-bit hashes at Hamming distance `radius` or less, exactly, without comparing all with all.

    The bits are cut into `radius + 2` bands. Two hashes within the radius differ in at most `radius` bands, so at
    least two bands agree: sorting by each pair of bands brings them side by side.

    Args:
        hashes: shape (n,).
        radius: at least 0.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order, no repeats.
    """
    edges = [_BITS * band // (radius + 2) for band in range(radius + 3)]
    bands = [np.uint64(((1 << (high - low)) - 1) << low) for low, high in itertools.pairwise(edges)]
    n = np.int64(len(hashes))
    found: list[npt.NDArray[np.int64]] = []
    for one, other in itertools.combinations(bands, 2):
        masked = hashes & (one | other)
        order = np.argsort(masked, kind="stable")
        masked, ordered = masked[order], hashes[order]
        # position of the first entry that differs in the two bands, so that a step never leaves its bucket
        step, alive = 1, np.arange(len(hashes) - 1)
        while len(alive):
            alive = alive[alive + step < len(hashes)]
            alive = alive[masked[alive] == masked[alive + step]]
            close = alive[np.bitwise_count(ordered[alive] ^ ordered[alive + step]) <= radius]
            if len(close):
                a, b = order[close].astype(np.int64), order[close + step].astype(np.int64)
                found.append(np.minimum(a, b) * n + np.maximum(a, b))
            step += 1
    if not found:
        return np.empty((0, 2), dtype=np.int64)
    codes = np.unique(np.concatenate(found))
    return np.stack([codes // n, codes % n], axis=1)


def same_thumbnail(
    thumbnails: npt.NDArray[np.uint8], pairs: Pairs, mean_difference: float, max_difference: int
) -> npt.NDArray[np.bool_]:
    """The fine check: whether the colour thumbnails of each pair agree.

    Args:
        thumbnails: shape (n, k), values 0 to 255.
        pairs: shape (m, 2), indices into `thumbnails`.
        mean_difference: most mean absolute difference.
        max_difference: most absolute difference of any value.

    Returns:
        Shape (m,).
    """
    verdict = np.empty(len(pairs), dtype=np.bool_)
    for start in range(0, len(pairs), 65_536):
        chunk = pairs[start : start + 65_536]
        gap = np.abs(thumbnails[chunk[:, 0]].astype(np.int16) - thumbnails[chunk[:, 1]].astype(np.int16))
        verdict[start : start + len(chunk)] = (gap.mean(axis=1) <= mean_difference) & (
            gap.max(axis=1) <= max_difference
        )
    return verdict


def equal_pairs(values: Sequence[str]) -> Pairs:
    """Pairs that link equal non-empty values in a chain: enough to connect them, linear in their number."""
    last: dict[str, int] = {}
    pairs = []
    for i, value in enumerate(values):
        if value:
            if value in last:
                pairs.append((last[value], i))
            last[value] = i
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def components(n: int, pair_sets: Iterable[Pairs]) -> npt.NDArray[np.int64]:
    """Connected components: for each of `n` nodes the smallest node that it is connected with."""
    parent = list(range(n))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for pairs in pair_sets:
        for a, b in pairs.tolist():
            x, y = root(a), root(b)
            if x != y:
                parent[max(x, y)] = min(x, y)
    return np.array([root(i) for i in range(n)], dtype=np.int64)
