"""All pairs of 64-bit hashes within a Hamming distance, by sorting on bands of their bits.

The work is cut into jobs: a job has the hashes whose key is in one range, and finds the pairs that agree in this key.
Without workers, the jobs run in this process, one after the other. With workers, ranges are narrow enough for a job to
stay within its memory. The pairs are the same, as each is found by exactly one job.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from animesion.executors.shared import Shared, StoredArray, values

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

#: Most bands of a key: no number of hashes pays for the choices of more.
_MOST_AGREEING = 8

#: Bands of a key by which jobs are divided: their values are fine enough for ranges, and their choices few enough that
#: reading all hashes for each of them takes less time than sorting.
_FIRST = 2

#: Hashes below which workers are not worth the start of a job, and hashes of a job, which take about 60 bytes each.
SHARED_FROM, JOB_HASHES = 200_000, 1 << 22

#: Hashes that are looked at to divide the keys into ranges of equal size.
_SAMPLED = 1 << 16


def near_pairs(hashes: HashArray, radius: int, shared: Shared | None = None) -> Pairs:
    """All pairs of 64-bit hashes at Hamming distance `radius` or less. Exact, without comparing every pair.

    The bits are cut into `radius + k` bands. Two hashes within the radius differ in at most `radius` bands, so at least
    k bands agree, and sorting by each choice of k bands makes them neighbours. A pair is taken from the first k bands
    that agree, so it is found once. k is chosen by an estimate of the work, which depends on the radius and the number
    of hashes. If an exhaustive comparison is less work, it is used instead (with faiss if it is installed).

    Time is nearly linear in the number of hashes while buckets are small: a million evenly distributed hashes take
    seconds at radius 4. Memory is bounded by about 60 bytes per hash, a working set of 200 MB and 16 bytes per pair.
    With workers, this process needs 8 bytes per hash and 24 per pair, and a worker 60 bytes for each of about
    `JOB_HASHES` hashes, or for those under one key if these are more.

    Args:
        hashes: shape (n,), n below 2^32.
        radius: at least 0.
        shared: workers; None to search in this process.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order, no repeats.
    """
    n = len(hashes)
    agreeing, banded = _plan(n, radius)
    if not banded:
        found = [_scanned(hashes, radius)]
    elif shared is None or n < SHARED_FROM:
        found = [job.run() for job in near_jobs(hashes, hashes, radius, agreeing, n)]
    else:
        with shared.stored(hashes) as [stored]:
            found = shared.run(near_jobs(stored, hashes, radius, agreeing, JOB_HASHES))
    codes = np.concatenate([np.empty(0, dtype=np.uint64), *found])
    del found
    # a pair is one integer, i * n + j, until here: sorting the codes sorts the pairs, in half the memory
    codes.sort()
    divisor = np.uint64(max(1, n))
    pairs = np.empty((len(codes), 2), dtype=np.int64)
    np.floor_divide(codes, divisor, out=pairs[:, 0], casting="unsafe")
    np.remainder(codes, divisor, out=pairs[:, 1], casting="unsafe")
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
    for agreeing in range(1, _MOST_AGREEING + 1):
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


@dataclass(frozen=True)
class NearJob:
    """Find the pairs that agree in some bands, among the hashes whose bits of the first of them are in a range.

    Attributes:
        hashes: all hashes, shape (n,).
        radius: Hamming distance.
        agreeing: number of bands of a choice, k; there are `radius + k` bands.
        first: the first bands of the choices; the job makes every choice that begins with them.
        keys: the first key of the range, and its end; see `band_keys`.
    """

    hashes: StoredArray | HashArray
    radius: int
    agreeing: int
    first: tuple[int, ...]
    keys: tuple[int, int]

    @property
    def name(self) -> str:
        """Name of the job in messages."""
        return f"the search for near hashes by bands {self.first}, keys {self.keys[0]} to {self.keys[1]}"

    def run(self) -> HashArray:
        """Codes `i * n + j` of the pairs, unsorted; shape (m,)."""
        every = values(self.hashes)
        n = np.uint64(len(every))
        spans = _spans(self.radius + self.agreeing)
        masks = [np.uint64(((1 << width) - 1) << low) for low, width in spans]
        hashes, rows = self._in_range(every, [spans[band] for band in self.first])
        places = np.arange(len(hashes), dtype=np.uint64)
        found = [np.empty(0, dtype=np.uint64)]
        for rest in itertools.combinations(range(self.first[-1] + 1, len(spans)), self.agreeing - len(self.first)):
            chosen = (*self.first, *rest)
            # key in the high half, place in the low half: one in-place sort of words instead of an argsort
            keys = band_keys(hashes, [spans[band] for band in chosen])
            keys <<= np.uint64(_KEY_BITS)
            keys |= places
            keys.sort()
            order = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
            keys >>= np.uint64(_KEY_BITS)
            ordered = hashes[order]
            if rows is not None:
                order = rows[order]
            # a pair that agrees in one of these bands too was found by an earlier choice
            earlier = [masks[band] for band in range(chosen[-1]) if band not in chosen]
            for start in range(0, len(keys), _CHUNK):  # bounds the size of temporaries
                span = start, min(start + _CHUNK, len(keys))
                found += _in_buckets(keys, ordered, order, span, self.radius, earlier, n)
            if len(found) > 1000:  # merge many small arrays, each of which has its overhead
                found = [np.concatenate(found)]
        return np.concatenate(found)

    def _in_range(
        self, every: HashArray, spans: Sequence[tuple[int, int]]
    ) -> tuple[HashArray, npt.NDArray[np.uint32] | None]:
        """The hashes whose key is in the range, and their rows; None if they are all hashes."""
        low, high = self.keys
        if low == 0 and high >= 1 << min(_KEY_BITS, sum(width for _, width in spans)):
            return np.asarray(every), None
        found, rows = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint32)]
        for start in range(0, len(every), _CHUNK):
            some = np.asarray(every[start : start + _CHUNK])
            keys = band_keys(some, spans)
            at = np.flatnonzero((keys >= np.uint64(low)) & (keys < np.uint64(high)))
            found.append(some[at])
            rows.append((at + start).astype(np.uint32))
        return np.concatenate(found), np.concatenate(rows)


def near_jobs(
    given: StoredArray | HashArray, hashes: HashArray, radius: int, agreeing: int, most: int
) -> list[NearJob]:
    """The jobs that find all pairs, each once; those with most choices of bands come first.

    Args:
        given: the hashes, for the jobs.
        hashes: the same, shape (n,).
        radius: Hamming distance.
        agreeing: number of bands that must agree.
        most: number of hashes in a range of keys, approximately.
    """
    spans = _spans(radius + agreeing)
    length = min(_FIRST, agreeing)
    firsts = itertools.combinations(range(len(spans) - (agreeing - length)), length)
    jobs = []
    for first in sorted(firsts, key=lambda bands: bands[-1]):
        chosen = [spans[band] for band in first]
        end = 1 << min(_KEY_BITS, sum(width for _, width in chosen))
        edges = [0, *_edges(hashes, chosen, -(-len(hashes) // max(1, most))), end]
        jobs += [NearJob(given, radius, agreeing, first, keys) for keys in itertools.pairwise(edges)]
    return jobs


def _edges(hashes: HashArray, spans: Sequence[tuple[int, int]], ranges: int) -> Iterator[int]:
    """The keys at which to cut, ascending, so that each range has about as many hashes."""
    if ranges < 2:
        return
    keys = np.sort(band_keys(np.asarray(hashes[:: max(1, len(hashes) // _SAMPLED)]), spans))
    cuts = keys[np.arange(1, ranges) * len(keys) // ranges]
    yield from (cut for cut in np.unique(cuts).tolist() if cut)


def _spans(bands: int) -> list[tuple[int, int]]:
    """Lowest bit and width of each band."""
    edges = [_BITS * band // bands for band in range(bands + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


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
    n: np.uint64,
) -> list[HashArray]:
    """Compare each entry of a span with the entries that follow it in its bucket.

    Args:
        keys: shape (m,), sorted; entries with equal keys are a bucket.
        ordered: shape (m,), the hashes in the order of the keys.
        order: shape (m,), the row of each entry.
        span: first entry and end.
        radius: Hamming distance.
        earlier: masks of the bands by which a pair would have been found before.
        n: number of rows.

    Returns:
        Arrays of codes `i * n + j` of the pairs within the radius.
    """
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
