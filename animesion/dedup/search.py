"""Search for duplicates: equal values, hashes within a Hamming distance, similar thumbnails, similar embeddings.

A *duplicate* shows the same image. An *alternate* (recoloured, other expression) passes the hash but not the check of
the thumbnails, and is kept. All functions work on arrays; `animesion.dedup.clusters` decides which images are dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.dedup.digests import Digests
from animesion.schemas import THUMBNAIL_SIDE

HashArray = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]

_BITS = 64

#: Bits of a sorted 64-bit word that hold the bands of the hash; the other 32 bits hold the row.
_KEY_BITS = 32

#: Entries of a sorted list that are compared at once, and rows that are compared with all others at once.
_CHUNK, _SCAN_ROWS = 1 << 20, 256

#: Estimated seconds to sort an entry, to compare a pair in a bucket, to process a choice of bands, and to compare a
#: pair exhaustively.
_SORT_COST, _COMPARE_COST, _PASS_COST, _SCAN_COST = 3e-8, 8e-9, 1e-4, 1.5e-9

#: Upper bound of the rounding error of a cosine in single precision.
_ROUNDING = 1e-4

#: Pairs whose thumbnails are compared at once: about 100 MB.
_FINE_CHUNK = 16_384

#: Texts that are summed at once, and the base of their sums.
_SUMMED, _FACTOR = 1 << 16, 0x9E3779B97F4A7C15

#: If more different images than the first share one hash, each is compared with the second number of neighbours only.
CROWD, CROWD_NEIGHBOURS = 256, 64


def near_pairs(hashes: HashArray, radius: int) -> Pairs:
    """All pairs of 64-bit hashes at Hamming distance `radius` or less. Exact, without comparing every pair.

    The bits are cut into `radius + k` bands. Two hashes within the radius differ in at most `radius` bands, so at least
    k bands agree, and sorting by each choice of k bands makes them neighbours. A pair is taken from the first k bands
    that agree, so it is found once. k is chosen by an estimate of the work, which depends on the radius and the number
    of hashes. If an exhaustive comparison is less work, it is used instead (with faiss if it is installed).

    Time is nearly linear in the number of hashes while buckets are small: a million evenly distributed hashes take
    seconds at radius 4. Memory is bounded by about 60 bytes per hash, a working set of 200 MB and 16 bytes per pair.

    Args:
        hashes: shape (n,), n below 2^32.
        radius: at least 0.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order, no repeats.
    """
    agreeing, banded = _plan(len(hashes), radius)
    codes = _banded(hashes, radius, agreeing) if banded else _scanned(hashes, radius)
    # a pair is one integer, i * n + j, until here: sorting the codes sorts the pairs, in half the memory
    codes.sort()
    n = np.uint64(max(1, len(hashes)))
    pairs = np.empty((len(codes), 2), dtype=np.int64)
    np.floor_divide(codes, n, out=pairs[:, 0], casting="unsafe")
    np.remainder(codes, n, out=pairs[:, 1], casting="unsafe")
    return pairs


def _plan(n: int, radius: int) -> tuple[int, bool]:
    """Choose the number of agreeing bands.

    More agreeing bands mean longer keys and thus smaller buckets, but more choices of bands to sort by.

    Args:
        n: number of hashes.
        radius: Hamming distance.

    Returns:
        The number of bands that must agree, and whether banding is less work than an exhaustive comparison.
    """
    costs = {}
    for agreeing in range(1, 5):
        bands = radius + agreeing
        if bands > _BITS:
            break
        # on evenly distributed hashes, a key of b bits puts one pair in 2^b into the same bucket
        key_bits = min(_KEY_BITS, agreeing * _BITS // bands)
        compared = n * n / 2 / 2.0**key_bits
        costs[agreeing] = math.comb(bands, agreeing) * (n * _SORT_COST + compared * _COMPARE_COST + _PASS_COST)
    if not costs:
        return 1, False
    best = min(costs, key=lambda agreeing: costs[agreeing])
    return best, costs[best] <= n * n / 2 * _SCAN_COST


def _banded(hashes: HashArray, radius: int, agreeing: int) -> HashArray:
    """Codes `i * n + j` of the pairs, by sorting on every choice of bands that may agree.

    Args:
        hashes: shape (n,).
        radius: Hamming distance.
        agreeing: number of bands of a choice, k; there are `radius + k` bands.

    Returns:
        Shape (m,), unsorted.
    """
    count = radius + agreeing
    edges = [_BITS * band // count for band in range(count + 1)]
    spans = [(low, high - low) for low, high in itertools.pairwise(edges)]  # lowest bit and width of each band
    masks = [np.uint64(((1 << width) - 1) << low) for low, width in spans]
    n = len(hashes)
    rows = np.arange(n, dtype=np.uint64)
    found = [np.empty(0, dtype=np.uint64)]
    for chosen in itertools.combinations(range(count), agreeing):
        # key in the high half, row in the low half: one in-place sort of (n,) words instead of an argsort
        keys = band_keys(hashes, [spans[band] for band in chosen])
        keys <<= np.uint64(_KEY_BITS)
        keys |= rows
        keys.sort()
        order = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        keys >>= np.uint64(_KEY_BITS)
        ordered = hashes[order]
        # a pair that agrees in one of these bands too was found by an earlier choice
        earlier = [masks[band] for band in range(chosen[-1]) if band not in chosen]
        for start in range(0, n, _CHUNK):  # bounds the size of temporaries
            found += _in_buckets(keys, ordered, order, (start, min(start + _CHUNK, n)), radius, earlier)
        if len(found) > 1000:  # merge many small arrays, each of which has its overhead
            found = [np.concatenate(found)]
    return np.concatenate(found)


def band_keys(hashes: HashArray, spans: Sequence[tuple[int, int]]) -> HashArray:
    """The bits of some bands concatenated, the lowest 32 of them.

    Args:
        hashes: shape (n,).
        spans: lowest bit and width of each band.

    Returns:
        Shape (n,), below 2^32. Longer keys are truncated, which only makes buckets larger.
    """
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
    """Compare each entry of a span with the entries that follow it in its bucket.

    Args:
        keys: shape (n,), sorted; entries with equal keys are a bucket.
        ordered: shape (n,), the hashes in the order of the keys.
        order: shape (n,), the row of each entry.
        span: first entry and end.
        radius: Hamming distance.
        earlier: masks of the bands by which a pair would have been found before.

    Returns:
        Arrays of codes `i * n + j` of the pairs within the radius.
    """
    n = np.uint64(len(keys))
    start, stop = span
    found = []
    # entries with at least one more in their bucket; each turn compares entry p with entry p + step
    step, alive = 1, start + np.flatnonzero(keys[start : min(stop, len(keys) - 1)] == keys[start + 1 : stop + 1])
    while len(alive):
        gap = ordered[alive] ^ ordered[alive + step]  # the differing bits
        close = np.flatnonzero(np.bitwise_count(gap) <= radius)
        if len(close):
            gap, at = gap[close], alive[close]
            first = np.ones(len(close), dtype=np.bool_)
            for mask in earlier:  # no differing bit in an earlier band: that choice has reported the pair
                first &= (gap & mask) != 0
            a, b = order[at[first]].astype(np.uint64), order[at[first] + step].astype(np.uint64)
            found.append(np.minimum(a, b) * n + np.maximum(a, b))
        step += 1
        # an entry stays as long as the bucket reaches `step` entries further
        alive = alive[alive < len(keys) - step]
        alive = alive[keys[alive] == keys[alive + step]]
    return found


def _scanned(hashes: HashArray, radius: int) -> HashArray:
    """Codes `i * n + j` of the pairs, by comparing every pair, in blocks of rows; with faiss if it is installed."""
    n = len(hashes)
    found = [np.empty(0, dtype=np.uint64)]
    index = _binary_index(hashes)
    for start in range(0, n, _SCAN_ROWS):
        rows = hashes[start : start + _SCAN_ROWS]
        if index is not None:
            # faiss excludes the radius itself; results of row r are others[limits[r] : limits[r + 1]]
            limits, _, others = index.range_search(rows.view(np.uint8).reshape(-1, 8), radius + 1)
            i = start + np.repeat(np.arange(len(rows)), np.diff(limits.astype(np.int64)))
            j = others.astype(np.int64)
        else:
            gap = np.bitwise_count(rows[:, None] ^ hashes[None, start:])  # (block, n - start)
            i, j = np.nonzero(gap <= radius)
            i, j = i + start, j + start
        above = i < j
        found.append(i[above].astype(np.uint64) * np.uint64(n) + j[above].astype(np.uint64))
    return np.concatenate(found)


def _binary_index(hashes: HashArray) -> Any:
    """A faiss index of the hashes; None if faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    index = faiss.IndexBinaryFlat(_BITS)
    index.add(np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8))
    return index


def candidate_pairs(hashes: HashArray, radius: int) -> Pairs:
    """Like `near_pairs`, in bounded memory when very many images share one hash.

    A hash that is shared by more than 256 different images belongs to images without structure (blank or nearly so).
    Each of these images is paired with the 64 that follow it, instead of with all. Only the first one is compared with
    the rest of the images.

    Args:
        hashes: shape (n,), of images with different pixels.
        radius: at least 0.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order.
    """
    order = np.argsort(hashes, kind="stable")
    _, starts, sizes = np.unique(hashes[order], return_index=True, return_counts=True)
    crowded = np.flatnonzero(sizes > CROWD)
    if not len(crowded):
        return near_pairs(hashes, radius)
    left_out = np.zeros(len(hashes), dtype=np.bool_)
    found = []
    for start, size in zip(starts[crowded].tolist(), sizes[crowded].tolist(), strict=True):
        members = order[start : start + size]
        left_out[members[1:]] = True  # the first one represents the crowd in the search below
        found += [np.stack([members[:-step], members[step:]], axis=1) for step in range(1, CROWD_NEIGHBOURS + 1)]
    rest = np.flatnonzero(~left_out)
    pairs = np.sort(np.concatenate([rest[near_pairs(hashes[rest], radius)], *found]), axis=1)
    return np.unique(pairs, axis=0).astype(np.int64)


def found_pairs(hashes: HashArray, flipped: HashArray | None, radius: int) -> tuple[Pairs, npt.NDArray[np.bool_]]:
    """The pairs of `candidate_pairs`, followed by the pairs of one image with the mirror image of another.

    Args:
        hashes: shape (n,), of images with different pixels.
        flipped: shape (n,), of their mirror images; None skips mirrored pairs.
        radius: at least 0.

    Returns:
        Pairs, shape (m, 2), and whether each is a mirrored one, shape (m,). A pair that is close both ways occurs
        twice.
    """
    plain = candidate_pairs(hashes, radius)
    if flipped is None:
        return plain, np.zeros(len(plain), dtype=np.bool_)
    crossed = cross_pairs(hashes, flipped, radius)
    crossed = crossed[crossed[:, 0] != crossed[:, 1]]  # a symmetric image is no duplicate of itself
    crossed = np.unique(np.sort(crossed, axis=1), axis=0)
    return np.concatenate([plain, crossed]), np.arange(len(plain) + len(crossed)) >= len(plain)


def cross_pairs(hashes: HashArray, others: HashArray, radius: int) -> Pairs:
    """Pairs of a hash and one of the others at Hamming distance `radius` or less; crowds as in `candidate_pairs`.

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
    """Differing bits of each pair; for mirrored pairs, between one image and the mirror image of the other.

    Args:
        hashes: shape (n,).
        flipped: shape (n,), of the mirror images.
        pairs: shape (m, 2), indices into `hashes`.
        mirrored: shape (m,), or one value for all pairs.

    Returns:
        Shape (m,), 0 to 64.
    """
    a, b = pairs[:, 0], pairs[:, 1]
    plain = np.bitwise_count(hashes[a] ^ hashes[b])
    # each hash has its own median, so the two directions can differ: the smaller one counts
    crossed = np.minimum(np.bitwise_count(hashes[a] ^ flipped[b]), np.bitwise_count(flipped[a] ^ hashes[b]))
    bits: npt.NDArray[np.int64] = np.where(mirrored, crossed, plain).astype(np.int64)
    return bits


def cosine_pairs(vectors: npt.NDArray[np.float32], threshold: float) -> Pairs:
    """All pairs of vectors whose cosine similarity is at least the threshold. Exact; every pair is compared.

    Uses faiss if it is installed, and numpy otherwise. Candidates are computed again in double precision, so both give
    the same pairs. Time grows with n^2 d: a minute for 100,000 vectors of 512 values on two cores. Memory is bounded by
    a copy of the vectors, 200 MB and 16 bytes per pair.

    Args:
        vectors: shape (n, d), of unit length; zero vectors form no pairs.
        threshold: above 0, at most 1.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order.
    """
    chosen = np.flatnonzero(vectors.any(axis=1))  # indices of the nonzero vectors
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
    # single precision with a margin finds the candidates, block by block; double precision decides
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
    """Whether the colour thumbnails of each pair agree: the fine check after the hashes.

    Args:
        thumbnails: shape (n, 768), values 0 to 255: rows, columns and channels of an RGB image with side
            `THUMBNAIL_SIDE`.
        pairs: shape (m, 2), indices into `thumbnails`.
        mean_difference: largest mean absolute difference.
        max_difference: largest absolute difference of any value.
        mirrored: shape (m,), whether to mirror the second thumbnail of the pair; None to mirror none.
        tone: largest change of brightness and contrast, as a share, that is compensated before a second comparison. One
            factor and one shift apply to all channels, so recoloured images stay different.

    Returns:
        Shape (m,), bool.
    """
    verdict = np.empty(len(pairs), dtype=np.bool_)
    for start in range(0, len(pairs), _FINE_CHUNK):
        chunk = pairs[start : start + _FINE_CHUNK]
        second = thumbnails[chunk[:, 1]]
        if mirrored is not None and (turned := mirrored[start : start + len(chunk)]).any():
            square = second[turned].reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
            second[turned] = square[:, :, ::-1].reshape(len(square), -1)
        first = thumbnails[chunk[:, 0]]
        # int16: differences of bytes would wrap around; (c, 768)
        gap = np.abs(first.astype(np.int16) - second.astype(np.int16))
        same = (gap.mean(axis=1) <= mean_difference) & (gap.max(axis=1) <= max_difference)
        if tone:
            rest = np.flatnonzero(~same)
            gap = np.abs(_matched_difference(first[rest], second[rest], tone))
            same[rest] = (gap.mean(axis=1) <= mean_difference) & (gap.max(axis=1) <= max_difference)
        verdict[start : start + len(chunk)] = same
    return verdict


def _matched_difference(
    first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], tone: float
) -> npt.NDArray[np.float32]:
    """Difference of thumbnails after the second is matched to the mean and contrast of the first, within bounds.

    Args:
        first: shape (c, 768).
        second: shape (c, 768).
        tone: bound of the factor, `1 / (1 + tone)` to `1 + tone`, and of the shift, `255 * tone / 2` levels.

    Returns:
        Shape (c, 768), in levels.
    """
    a, b = first.astype(np.float32), second.astype(np.float32)
    # one mean and one deviation per thumbnail over all channels, shape (c, 1): a change of hue is not compensated
    means = [each.mean(axis=1, keepdims=True) for each in (a, b)]
    spreads = [each.std(axis=1, keepdims=True) for each in (a, b)]
    # the floor of 1 level keeps the factor finite on a thumbnail of one colour
    factor = np.clip(spreads[0] / np.maximum(spreads[1], 1.0), 1 / (1 + tone), 1 + tone)
    shift = np.clip(means[0] - factor * means[1], -255 * tone / 2, 255 * tone / 2)
    matched = factor * b + shift
    difference: npt.NDArray[np.float32] = a - matched
    return difference


def equal_pairs(values: pa.Array | pa.ChunkedArray | Digests, chosen: Pairs | None = None) -> Pairs:
    """Pairs of rows that link equal non-empty texts in a chain.

    A chain of n - 1 pairs connects n equal texts, where all pairs would be quadratic. Exact; memory is 40 bytes per
    row, and that of the texts that occur several times.

    Args:
        values: texts, such as digests; empty ones and nulls form no pairs.
        chosen: rows to consider, ascending, shape (c,); None for all.

    Returns:
        Shape (m, 2), a row and the next one with an equal text.
    """
    if isinstance(values, Digests):
        sums, filled = values.sums(), values.filled()
    else:
        chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
        sums = np.concatenate([np.empty(0, dtype=np.uint64), *map(_sums, chunks)])
        filled = np.concatenate([np.empty(0, dtype=np.bool_), *map(_filled, chunks)])
    rows = np.flatnonzero(filled)
    if chosen is not None:
        rows = np.intersect1d(rows, chosen, assume_unique=True)
    # texts with unlike sums are unlike; the others are compared
    by_sum = np.argsort(sums[rows], kind="stable")
    ordered = sums[rows[by_sum]]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    rows = rows[np.unique(by_sum[np.concatenate([same, same + 1])])]
    taken = values.take(pa.array(rows))
    taken = taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken
    codes = taken.dictionary_encode().indices.to_numpy()
    by_code = np.argsort(codes, kind="stable")
    linked = codes[by_code[1:]] == codes[by_code[:-1]]
    pairs: Pairs = np.stack([rows[by_code[:-1][linked]], rows[by_code[1:][linked]]], axis=1).astype(np.int64)
    return pairs


def _filled(values: pa.Array) -> npt.NDArray[np.bool_]:
    """Which texts are not empty, shape (n,)."""
    found = pc.greater(pc.binary_length(values), 0).fill_null(False).to_numpy(zero_copy_only=False)
    return cast("npt.NDArray[np.bool_]", found)


def _sums(values: pa.Array) -> HashArray:
    """A number for each text, shape (n,): equal texts have equal numbers, and few others do."""
    found = np.zeros(len(values), dtype=np.uint64)
    for start in range(0, len(values), _SUMMED):
        some = values.slice(start, _SUMMED).cast(pa.large_binary()).fill_null(b"")
        ends = np.frombuffer(some.buffers()[1], dtype=np.int64)[some.offset : some.offset + len(some) + 1]
        content = some.buffers()[2]
        letters = np.frombuffer(content or b"", dtype=np.uint8)[ends[0] : ends[-1]].astype(np.uint64)
        firsts, lengths = ends[:-1] - ends[0], np.diff(ends)
        # a polynomial modulo 2^64 in an odd number, with the letters as coefficients
        powers = np.cumprod(np.full(max(1, int(lengths.max())), _FACTOR, dtype=np.uint64))
        letters += np.uint64(1)
        letters *= powers[np.arange(len(letters)) - np.repeat(firsts, lengths)]
        totals = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(letters)])
        found[start : start + len(some)] = totals[firsts + lengths] - totals[firsts]
    return found


def rows_of(values: pa.Array, wanted: Iterable[str], among: npt.NDArray[np.bool_] | None = None) -> dict[str, int]:
    """The row of each wanted text that a column has; of several rows, the last.

    Args:
        values: n texts.
        wanted: the texts.
        among: which rows count, shape (n,); None for all.
    """
    names = pa.array(sorted(set(wanted)), values.type)
    found = pc.index_in(values, value_set=names) if len(names) else pa.nulls(len(values), pa.int32())
    there = found.is_valid().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(there if among is None else there & among)
    texts, places = names.to_pylist(), found.take(pa.array(rows)).to_pylist()
    return {texts[place]: row for place, row in zip(places, rows.tolist(), strict=True)}


def components(n: int, pair_sets: Iterable[Pairs]) -> npt.NDArray[np.int64]:
    """Connected components.

    Args:
        n: number of nodes.
        pair_sets: edges, each of shape (m, 2).

    Returns:
        Shape (n,), for each node the smallest node of its component.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([np.empty((0, 2), dtype=np.int64), *pair_sets])
    graph = coo_array((np.ones(len(pairs), dtype=np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, names = connected_components(graph, directed=False)
    smallest = np.unique(names, return_index=True)[1]
    named: npt.NDArray[np.int64] = smallest.astype(np.int64)[names]
    return named
