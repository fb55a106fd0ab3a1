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

#: More different pictures than this under one hash are compared with some neighbours only.
_CROWD, _CROWD_NEIGHBOURS = 256, 64


def near_pairs(hashes: Hashes, radius: int) -> Pairs:
    """All pairs of 64-bit hashes at Hamming distance `radius` or less, exactly, without comparing all with all.

    The bits are cut into `radius + k` bands. Two hashes within the radius differ in at most `radius` bands, so at least
    k bands agree: sorting by each choice of k bands brings them side by side. k = 2 does for small radii; for larger
    ones k = 3 keeps the buckets small.

    Args:
        hashes: shape (n,).
        radius: at least 0.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order, no repeats.
    """
    agreeing = 2 if radius <= 4 else 3
    edges = [_BITS * band // (radius + agreeing) for band in range(radius + agreeing + 1)]
    bands = [np.uint64(((1 << (high - low)) - 1) << low) for low, high in itertools.pairwise(edges)]
    n = max(1, len(hashes))
    codes = np.empty(0, dtype=np.int64)
    for chosen in itertools.combinations(bands, agreeing):
        masked = hashes & np.bitwise_or.reduce(np.array(chosen, dtype=np.uint64))
        order = np.argsort(masked, kind="stable")
        masked, ordered = masked[order], hashes[order]
        found = [codes]
        # compare each entry with the one `step` places on, as long as the two are in one bucket
        step, alive = 1, np.arange(len(hashes) - 1)
        while len(alive):
            alive = alive[alive + step < len(hashes)]
            alive = alive[masked[alive] == masked[alive + step]]
            close = alive[np.bitwise_count(ordered[alive] ^ ordered[alive + step]) <= radius]
            if len(close):
                a, b = order[close].astype(np.int64), order[close + step].astype(np.int64)
                found.append(np.minimum(a, b) * n + np.maximum(a, b))
            step += 1
        if len(found) > 1:
            codes = np.unique(np.concatenate(found))
    return np.stack([codes // n, codes % n], axis=1)


def candidate_pairs(hashes: Hashes, radius: int) -> Pairs:
    """As `near_pairs`, in bounded memory where very many pictures share one hash.

    A hash that more than 256 different pictures share is that of a picture without structure (blank, or nearly). There
    each picture is paired with the 64 that follow it, instead of with all, and stands for itself alone towards others.

    Args:
        hashes: shape (n,), of pictures with different pixels.
        radius: at least 0.
    """
    order = np.argsort(hashes, kind="stable")
    _, starts, sizes = np.unique(hashes[order], return_index=True, return_counts=True)
    crowded = np.flatnonzero(sizes > _CROWD)
    if not len(crowded):
        return near_pairs(hashes, radius)
    left_out = np.zeros(len(hashes), dtype=np.bool_)
    found = []
    for start, size in zip(starts[crowded].tolist(), sizes[crowded].tolist(), strict=True):
        members = order[start : start + size]
        left_out[members[1:]] = True
        found += [np.stack([members[:-step], members[step:]], axis=1) for step in range(1, _CROWD_NEIGHBOURS + 1)]
    rest = np.flatnonzero(~left_out)
    pairs = np.sort(np.concatenate([rest[near_pairs(hashes[rest], radius)], *found]), axis=1)
    return np.unique(pairs, axis=0).astype(np.int64)


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
