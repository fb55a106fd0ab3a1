"""Find images that are the same: equal bytes, equal pixels, and near duplicates by perceptual hash with a fine check.

A *duplicate* shows the same image; an *alternate* (recoloured, other expression) passes the hash but not the fine
check and stays. Works on arrays; what is dropped for being a duplicate is decided in `animesion.pipeline.curate`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from animesion.schemas import THUMBNAIL_SIDE

HashArray = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]

_BITS = 64

#: Bits of the bands that hashes are sorted by; the other half of the sorted words is the row.
_KEY_BITS = 32

#: Entries of a sorted list that are compared at once, and rows compared with all others at once.
_CHUNK, _SCAN_ROWS = 1 << 20, 256

#: Seconds, roughly: an entry sorted, a pair compared in a bucket, a choice of bands, a pair compared all against all.
_SORT_COST, _COMPARE_COST, _PASS_COST, _SCAN_COST = 3e-8, 8e-9, 1e-4, 1.5e-9

#: Single precision may be off by so much in a cosine.
_ROUNDING = 1e-4

#: Pairs whose thumbnails are compared at once: about 100 MB.
_FINE_CHUNK = 16_384

#: More different images than this under one hash are compared with some neighbours only.
_CROWD, _CROWD_NEIGHBOURS = 256, 64


def near_pairs(hashes: HashArray, radius: int) -> Pairs:
    """All pairs of 64-bit hashes at Hamming distance `radius` or less, exactly, without comparing all with all.

    The bits are cut into `radius + k` bands. Two hashes within the radius differ in at most `radius` bands, so at least
    k bands agree: sorting by each choice of k bands brings them side by side. A pair is taken from the first k bands
    that agree, so it is found once. k grows with the radius and the number of hashes, by an estimate of the work; where
    comparing all with all is less work, that is done (with faiss where it is installed).

    Time grows with the number of hashes as long as buckets are small: on evenly spread hashes a million take seconds
    at radius 4. Memory is bounded by about 60 bytes a hash, a working set of 200 MB and 16 bytes for each pair found.

    Args:
        hashes: shape (n,), n below 2^32.
        radius: at least 0.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order, no repeats.
    """
    agreeing, banded = _plan(len(hashes), radius)
    codes = _banded(hashes, radius, agreeing) if banded else _scanned(hashes, radius)
    codes.sort()
    n = np.uint64(max(1, len(hashes)))
    pairs = np.empty((len(codes), 2), dtype=np.int64)
    np.floor_divide(codes, n, out=pairs[:, 0], casting="unsafe")
    np.remainder(codes, n, out=pairs[:, 1], casting="unsafe")
    return pairs


def _plan(n: int, radius: int) -> tuple[int, bool]:
    """How many bands must agree, and whether bands are less work than all against all."""
    costs = {}
    for agreeing in range(1, 5):
        bands = radius + agreeing
        if bands > _BITS:
            break
        compared = n * n / 2 / 2.0 ** min(_KEY_BITS, agreeing * _BITS // bands)
        costs[agreeing] = math.comb(bands, agreeing) * (n * _SORT_COST + compared * _COMPARE_COST + _PASS_COST)
    if not costs:
        return 1, False
    best = min(costs, key=lambda agreeing: costs[agreeing])
    return best, costs[best] <= n * n / 2 * _SCAN_COST


def _banded(hashes: HashArray, radius: int, agreeing: int) -> HashArray:
    """Codes `i * n + j` of the pairs, by sorting on every choice of bands that may agree."""
    count = radius + agreeing
    edges = [_BITS * band // count for band in range(count + 1)]
    spans = [(low, high - low) for low, high in itertools.pairwise(edges)]
    masks = [np.uint64(((1 << width) - 1) << low) for low, width in spans]
    n = len(hashes)
    rows = np.arange(n, dtype=np.uint64)
    found = [np.empty(0, dtype=np.uint64)]
    for chosen in itertools.combinations(range(count), agreeing):
        keys = _band_keys(hashes, [spans[band] for band in chosen])
        keys <<= np.uint64(_KEY_BITS)
        keys |= rows
        keys.sort()
        order = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        keys >>= np.uint64(_KEY_BITS)
        ordered = hashes[order]
        earlier = [masks[band] for band in range(chosen[-1]) if band not in chosen]
        for start in range(0, n, _CHUNK):  # temporaries stay small, however many hashes there are
            found += _in_buckets(keys, ordered, order, (start, min(start + _CHUNK, n)), radius, earlier)
        if len(found) > 1000:
            found = [np.concatenate(found)]
    return np.concatenate(found)


def _band_keys(hashes: HashArray, spans: Sequence[tuple[int, int]]) -> HashArray:
    """The bits of some bands side by side, the lowest 32 of them."""
    keys = np.zeros(len(hashes), dtype=np.uint64)
    for low, width in spans:
        keys <<= np.uint64(width % _BITS)
        keys |= (hashes >> np.uint64(low)) & np.uint64((1 << width) - 1)
    keys &= np.uint64((1 << _KEY_BITS) - 1)
    return keys


def _in_buckets(
    keys: HashArray,
    ordered: HashArray,
    order: npt.NDArray[np.uint32],
    span: tuple[int, int],
    radius: int,
    earlier: Sequence[np.uint64],
) -> list[HashArray]:
    """Compare each entry of a span with those that follow it in its bucket; codes of the close ones."""
    n = np.uint64(len(keys))
    start, stop = span
    found = []
    step, alive = 1, start + np.flatnonzero(keys[start : min(stop, len(keys) - 1)] == keys[start + 1 : stop + 1])
    while len(alive):
        gap = ordered[alive] ^ ordered[alive + step]
        close = np.flatnonzero(np.bitwise_count(gap) <= radius)
        if len(close):
            gap, at = gap[close], alive[close]
            first = np.ones(len(close), dtype=np.bool_)
            for mask in earlier:  # a band before these agrees too: found there
                first &= (gap & mask) != 0
            a, b = order[at[first]].astype(np.uint64), order[at[first] + step].astype(np.uint64)
            found.append(np.minimum(a, b) * n + np.maximum(a, b))
        step += 1
        alive = alive[alive < len(keys) - step]
        alive = alive[keys[alive] == keys[alive + step]]
    return found


def _scanned(hashes: HashArray, radius: int) -> HashArray:
    """Codes `i * n + j` of the pairs, by comparing all with all: blocks of rows, by faiss where it is installed."""
    n = len(hashes)
    found = [np.empty(0, dtype=np.uint64)]
    index = _binary_index(hashes)
    for start in range(0, n, _SCAN_ROWS):
        rows = hashes[start : start + _SCAN_ROWS]
        if index is not None:
            limits, _, others = index.range_search(rows.view(np.uint8).reshape(-1, 8), radius + 1)
            i = start + np.repeat(np.arange(len(rows)), np.diff(limits.astype(np.int64)))
            j = others.astype(np.int64)
        else:
            gap = np.bitwise_count(rows[:, None] ^ hashes[None, start:])
            i, j = np.nonzero(gap <= radius)
            i, j = i + start, j + start
        above = i < j
        found.append(i[above].astype(np.uint64) * np.uint64(n) + j[above].astype(np.uint64))
    return np.concatenate(found)


def _binary_index(hashes: HashArray) -> Any:
    """A faiss index of the hashes, or None where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    index = faiss.IndexBinaryFlat(_BITS)
    index.add(np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8))
    return index


def candidate_pairs(hashes: HashArray, radius: int) -> Pairs:
    """As `near_pairs`, in bounded memory where very many images share one hash.

    A hash that more than 256 different images share is that of an image without structure (blank, or nearly). There
    each image is paired with the 64 that follow it, instead of with all, and stands for itself alone towards others.

    Args:
        hashes: shape (n,), of images with different pixels.
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


def found_pairs(hashes: HashArray, flipped: HashArray | None, radius: int) -> tuple[Pairs, npt.NDArray[np.bool_]]:
    """The pairs of `candidate_pairs`, then those of one image with the mirror image of another.

    Args:
        hashes: shape (n,), of images with different pixels.
        flipped: shape (n,), of their mirror images; None looks for no mirrored pairs.
        radius: at least 0.

    Returns:
        Pairs, shape (m, 2), and for each whether it is a mirrored one, shape (m,). A pair that is close both ways is
        there twice.
    """
    plain = candidate_pairs(hashes, radius)
    if flipped is None:
        return plain, np.zeros(len(plain), dtype=np.bool_)
    crossed = cross_pairs(hashes, flipped, radius)
    crossed = crossed[crossed[:, 0] != crossed[:, 1]]  # a symmetric image is no duplicate of itself
    crossed = np.unique(np.sort(crossed, axis=1), axis=0)
    return np.concatenate([plain, crossed]), np.arange(len(plain) + len(crossed)) >= len(plain)


def cross_pairs(hashes: HashArray, others: HashArray, radius: int) -> Pairs:
    """Pairs of a hash and one of the others at Hamming distance `radius` or less, crowds bounded as above.

    Args:
        hashes: shape (n,).
        others: shape (k,).
        radius: at least 0.

    Returns:
        Shape (m, 2), indices into `hashes` and into `others`.
    """
    n = len(hashes)
    pairs = candidate_pairs(np.concatenate([hashes, others]), radius)
    pairs = pairs[(pairs[:, 0] < n) & (pairs[:, 1] >= n)]
    pairs[:, 1] -= n
    return pairs


def distances(
    hashes: HashArray, flipped: HashArray, pairs: Pairs, mirrored: npt.NDArray[np.bool_] | bool
) -> npt.NDArray[np.int64]:
    """Differing bits of each pair, shape (m,); of a mirrored one, those between one image and the other's mirror."""
    a, b = pairs[:, 0], pairs[:, 1]
    plain = np.bitwise_count(hashes[a] ^ hashes[b])
    crossed = np.minimum(np.bitwise_count(hashes[a] ^ flipped[b]), np.bitwise_count(flipped[a] ^ hashes[b]))
    apart: npt.NDArray[np.int64] = np.where(mirrored, crossed, plain).astype(np.int64)
    return apart


def cosine_pairs(vectors: npt.NDArray[np.float32], threshold: float) -> Pairs:
    """All pairs of vectors whose cosine is at least the threshold, exactly: all are compared with all.

    faiss does it where it is installed, else numpy; what is near the threshold is computed again in double precision,
    so both give the same pairs. Time grows with n squared times d: a minute for 100,000 vectors of 512 on two cores.
    Memory is bounded by a copy of the vectors, 200 MB and 16 bytes for each pair found.

    Args:
        vectors: shape (n, d), of unit length; those of zeros pair with nothing.
        threshold: above 0.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order.
    """
    chosen = np.flatnonzero(vectors.any(axis=1))
    given = np.ascontiguousarray(vectors[chosen])
    n = len(given)
    found = [np.empty((0, 2), dtype=np.int64)]
    index = None
    try:
        import faiss

        index = faiss.IndexFlatIP(given.shape[1])
        index.add(given)
    except ImportError:
        pass
    rows = max(1, min(1024, 20_000_000 // max(1, n)))
    for start in range(0, n, rows):
        block = given[start : start + rows]
        if index is not None:
            limits, _, others = index.range_search(block, threshold - _ROUNDING)
            ends: Pairs = limits.astype(np.int64)
            i, j = np.repeat(np.arange(len(block)), ends[1:] - ends[:-1]), others.astype(np.int64)
        else:
            i, j = np.nonzero(block @ given[start:].T > threshold - _ROUNDING)
            j = j + start
        i = i + start
        pairs = np.stack([i, j], axis=1)[i < j]
        for first in range(0, len(pairs), _FINE_CHUNK):
            part = pairs[first : first + _FINE_CHUNK]
            a, b = (given[part[:, side]].astype(np.float64) for side in (0, 1))
            found.append(part[np.einsum("ij,ij->i", a, b) >= threshold])
    pairs = np.concatenate(found)
    ordered: Pairs = chosen[pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]]
    return ordered


def same_thumbnail(
    thumbnails: npt.NDArray[np.uint8],
    pairs: Pairs,
    mean_difference: float,
    max_difference: int,
    mirrored: npt.NDArray[np.bool_] | None = None,
    tone: float = 0.0,
) -> npt.NDArray[np.bool_]:
    """The fine check: whether the colour thumbnails of each pair agree.

    Args:
        thumbnails: shape (n, 768), values 0 to 255: rows, columns and channels of `THUMBNAIL_SIDE` squared RGB.
        pairs: shape (m, 2), indices into `thumbnails`.
        mean_difference: most mean absolute difference.
        max_difference: most absolute difference of any value.
        mirrored: shape (m,), whether the second of the pair is to be mirrored; None for no pair.
        tone: largest change of brightness and contrast of the whole image that is evened out first, as a share: one
            factor and one shift for all channels, so that recoloured images stay apart.

    Returns:
        Shape (m,).
    """
    verdict = np.empty(len(pairs), dtype=np.bool_)
    for start in range(0, len(pairs), _FINE_CHUNK):
        chunk = pairs[start : start + _FINE_CHUNK]
        second = thumbnails[chunk[:, 1]]
        if mirrored is not None and (turned := mirrored[start : start + len(chunk)]).any():
            square = second[turned].reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
            second[turned] = square[:, :, ::-1].reshape(len(square), -1)
        first = thumbnails[chunk[:, 0]]
        gap = np.abs(first.astype(np.int16) - second.astype(np.int16))
        same = (gap.mean(axis=1) <= mean_difference) & (gap.max(axis=1) <= max_difference)
        if tone:
            rest = np.flatnonzero(~same)
            gap = np.abs(_evened(first[rest], second[rest], tone))
            same[rest] = (gap.mean(axis=1) <= mean_difference) & (gap.max(axis=1) <= max_difference)
        verdict[start : start + len(chunk)] = same
    return verdict


def _evened(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], tone: float) -> npt.NDArray[np.float32]:
    """What is left between thumbnails when the second is brought to mean and contrast of the first, within bounds."""
    a, b = first.astype(np.float32), second.astype(np.float32)
    means = [each.mean(axis=1, keepdims=True) for each in (a, b)]
    spreads = [each.std(axis=1, keepdims=True) for each in (a, b)]
    factor = np.clip(spreads[0] / np.maximum(spreads[1], 1.0), 1 / (1 + tone), 1 + tone)
    shift = np.clip(means[0] - factor * means[1], -255 * tone / 2, 255 * tone / 2)
    left: npt.NDArray[np.float32] = a - (factor * b + shift)
    return left


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
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([np.empty((0, 2), dtype=np.int64), *pair_sets])
    graph = coo_array((np.ones(len(pairs), dtype=np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, names = connected_components(graph, directed=False)
    smallest = np.unique(names, return_index=True)[1]
    named: npt.NDArray[np.int64] = smallest.astype(np.int64)[names]
    return named
