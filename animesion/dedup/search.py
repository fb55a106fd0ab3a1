"""Search for duplicates: equal values, hashes within a Hamming distance, similar thumbnails, similar embeddings.

A *duplicate* shows the same image. An *alternate* (recoloured, other expression) passes the hash but not the check of
the thumbnails, and is kept. All functions work on arrays; `animesion.dedup.clusters` decides which images are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.dedup import near
from animesion.dedup.digests import Digests
from animesion.executors.shared import Shared
from animesion.schemas import THUMBNAIL_SIDE

HashArray = near.HashArray
Pairs = near.Pairs

#: Upper bound of the rounding error of a cosine in single precision.
_ROUNDING = 1e-4

#: Pairs whose thumbnails are compared at once: about 100 MB.
_FINE_CHUNK = 16_384

#: Texts that are summed at once, and the base of their sums.
_SUMMED, _FACTOR = 1 << 16, 0x9E3779B97F4A7C15

#: If more different images than the first share one hash, each is compared with the second number of neighbours only.
CROWD, CROWD_NEIGHBOURS = 256, 64


def candidate_pairs(hashes: HashArray, radius: int, shared: Shared | None = None) -> Pairs:
    """Like `near.near_pairs`, in bounded memory when very many images share one hash.

    A hash that is shared by more than 256 different images belongs to images without structure (blank or nearly so).
    Each of these images is paired with the 64 that follow it, instead of with all. Only the first one is compared with
    the rest of the images.

    Args:
        hashes: shape (n,), of images with different pixels.
        radius: at least 0.
        shared: workers; None to search in this process.

    Returns:
        Shape (m, 2), rows `i < j` in ascending order.
    """
    order = np.argsort(hashes, kind="stable")
    _, starts, sizes = np.unique(hashes[order], return_index=True, return_counts=True)
    crowded = np.flatnonzero(sizes > CROWD)
    if not len(crowded):
        return near.near_pairs(hashes, radius, shared)
    left_out = np.zeros(len(hashes), dtype=np.bool_)
    found = []
    for start, size in zip(starts[crowded].tolist(), sizes[crowded].tolist(), strict=True):
        members = order[start : start + size]
        left_out[members[1:]] = True  # the first one represents the crowd in the search below
        found += [np.stack([members[:-step], members[step:]], axis=1) for step in range(1, CROWD_NEIGHBOURS + 1)]
    rest = np.flatnonzero(~left_out)
    pairs = np.sort(np.concatenate([rest[near.near_pairs(hashes[rest], radius, shared)], *found]), axis=1)
    return np.unique(pairs, axis=0).astype(np.int64)


def found_pairs(
    hashes: HashArray, flipped: HashArray | None, radius: int, shared: Shared | None = None
) -> tuple[Pairs, npt.NDArray[np.bool_]]:
    """The pairs of `candidate_pairs`, followed by the pairs of one image with the mirror image of another.

    Args:
        hashes: shape (n,), of images with different pixels.
        flipped: shape (n,), of their mirror images; None skips mirrored pairs.
        radius: at least 0.
        shared: workers; None to search in this process.

    Returns:
        Pairs, shape (m, 2), and whether each is a mirrored one, shape (m,). A pair that is close both ways occurs
        twice.
    """
    plain = candidate_pairs(hashes, radius, shared)
    if flipped is None:
        return plain, np.zeros(len(plain), dtype=np.bool_)
    crossed = cross_pairs(hashes, flipped, radius, shared)
    crossed = crossed[crossed[:, 0] != crossed[:, 1]]  # a symmetric image is no duplicate of itself
    # a pair is one integer: unique rows would be sorted as bytes
    n = max(1, len(hashes))
    codes = np.unique(crossed.min(axis=1) * n + crossed.max(axis=1))
    crossed = np.stack([codes // n, codes % n], axis=1)
    return np.concatenate([plain, crossed]), np.arange(len(plain) + len(crossed)) >= len(plain)


def cross_pairs(hashes: HashArray, others: HashArray, radius: int, shared: Shared | None = None) -> Pairs:
    """Pairs of a hash and one of the others at Hamming distance `radius` or less; crowds as in `candidate_pairs`.

    Args:
        hashes: shape (n,).
        others: shape (k,).
        radius: at least 0.
        shared: workers; None to search in this process.

    Returns:
        Shape (m, 2), indices into `hashes` and into `others`.
    """
    n = len(hashes)
    pairs = candidate_pairs(np.concatenate([hashes, others]), radius, shared)
    pairs = pairs[(pairs[:, 0] < n) & (pairs[:, 1] >= n)]
    pairs[:, 1] -= n
    return pairs


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
    row.

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
    # texts with unlike sums are unlike; neighbours by sum are compared
    sums = sums[rows]
    by_sum = np.argsort(sums, kind="stable")
    sums = sums[by_sum]
    same = np.flatnonzero(sums[1:] == sums[:-1])
    del sums
    first, second = rows[by_sum[same]], rows[by_sum[same + 1]]
    del rows, by_sum, same
    for start in range(0, len(first), _SUMMED):
        pair = (values.take(pa.array(side[start : start + _SUMMED])) for side in (first, second))
        if not pc.all(pc.equal(*pair)).as_py():
            return _linked(values, np.unique(np.concatenate([first, second])))
    # chains in the order of their first rows
    begins = np.flatnonzero(np.concatenate([[True], first[1:] != second[:-1]])) if len(first) else first
    chain = np.repeat(first[begins], np.diff(begins, append=len(first)))
    order = np.argsort(chain, kind="stable")
    pairs: Pairs = np.stack([first[order], second[order]], axis=1).astype(np.int64)
    return pairs


def _linked(values: pa.Array | pa.ChunkedArray | Digests, rows: npt.NDArray[np.int64]) -> Pairs:
    """What `equal_pairs` returns, if unlike texts have equal sums; `rows` are those with the sum of another."""
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
    pairs = np.concatenate([np.empty((0, 2), dtype=np.int64), *pair_sets])
    named = np.arange(n)
    # the graph has the nodes of pairs only, numbered in their order; most images have no duplicate
    is_paired = np.zeros(n, dtype=np.bool_)
    is_paired[pairs.ravel()] = True
    nodes = np.flatnonzero(is_paired)
    numbers = np.cumsum(is_paired, dtype=np.int32 if n < 1 << 31 else np.int64) - 1
    pairs = numbers[pairs]
    del numbers
    smallest = np.arange(len(nodes), dtype=pairs.dtype)
    # in each round, every tree is hung onto the smallest one that it has a pair with
    while len(pairs := pairs[pairs[:, 0] != pairs[:, 1]]):
        np.minimum.at(smallest, pairs.max(axis=1), pairs.min(axis=1))
        while not np.array_equal(further := smallest[smallest], smallest):
            smallest = further
        pairs = smallest[pairs]
    named[nodes] = nodes[smallest]
    return named
