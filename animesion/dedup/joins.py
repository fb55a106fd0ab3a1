"""Candidate search for copies: which pairs of images are worth a comparison of their pixels.

`window_pairs` finds crops by the hashes of windows. `vote_pairs` finds turned, mirrored and covered copies by the codes
of local features. Neither decides anything: the pairs are verified by whoever calls.

Both run in the compiled `_joins.c`. If it was not compiled at installation, the code here finds the same pairs, and
takes longer.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from animesion.dedup.near import HashArray, Pairs, band_keys
from animesion.dedup.search import CROWD, CROWD_NEIGHBOURS
from animesion.executors.shared import Shared, StoredArray, values

#: The compiled `_joins.c`; None if it was not compiled at installation.
compiled: ModuleType | None
try:
    compiled = importlib.import_module("animesion.dedup._joins")
except ImportError:
    compiled = None

#: Bits of a code that are the key of a table, lowest first: three draws of 19 by `default_rng(1).choice`.
TABLES = (
    (1, 5, 7, 13, 15, 17, 21, 24, 34, 36, 39, 42, 46, 48, 50, 56, 58, 59, 60),
    (0, 3, 5, 6, 9, 12, 14, 17, 23, 26, 33, 37, 42, 43, 53, 54, 55, 58, 63),
    (3, 12, 15, 18, 20, 22, 23, 24, 32, 33, 36, 41, 43, 46, 51, 52, 53, 56, 57),
)

#: If a bucket of a table has more entries than the first number, a point is compared with the second number only.
CROWDED, FOLLOWED = 1000, 64

#: Resolution of logarithms of sizes, per octave, and bits of an angle.
_OCTAVE, _TURN = 1024, 16

#: The bins of a vote: 1/16 turn and half an octave.
_TURN_BIN, _RATIO_BIN = 12, 9

#: Points that are looked up at once by the portable code.
_BLOCK = 4096


#: Bits of the key of a bucket, hence the largest table of buckets: 16 MB.
_MOST_KEY = 22

#: Estimated seconds of the compiled code to sort a hash, to look a window up, and to compare it with a hash.
_SORT_COST, _LOOK_COST, _COMPARE_COST = 2e-8, 1e-8, 9e-10

#: Windows that the portable code looks up at once, and comparisons that it makes at once.
_WINDOWS, _COMPARED = 1 << 16, 1 << 20

#: Windows below which workers are not worth the start of a job, and fewest windows of a job.
SHARED_FROM, JOB_WINDOWS = 1 << 23, 1 << 23


def window_pairs(
    hashes: HashArray, windows: HashArray, radius: int = 8, shared: Shared | None = None
) -> tuple[Pairs, npt.NDArray[np.uint8]]:
    """Pairs of an image and one that shows it in a window: hash and hash of the window differ in `radius` bits or less.

    Exact, without comparing every pair, and asymmetric: windows are not compared with each other. As in
    `animesion.dedup.near.near_pairs`, the bits are cut into `radius + k` bands, the hashes are sorted by each choice
    of k of them, and each window is looked up in each order. k is chosen by an estimate of the work.

    A hash that more than 256 images share belongs to images without structure, as in `search.candidate_pairs`. The
    first of them is compared with the windows of all images. Each is compared with the windows of the 64 before and
    the 64 after it.

    Time of the compiled code is linear in the number of windows plus the pairs within buckets. Memory is 12 bytes per
    hash, at most 17 MB, and up to 40 bytes per pair found. Workers divide the images of the windows among them, and
    each needs 28 bytes per hash.

    Args:
        hashes: shape (n,), n below 2^32 - 1; of the whole images.
        windows: shape (n, w), w from 1 to 256; of windows of the same images.
        radius: 0 to 64.
        shared: workers; None to search in this process.

    Returns:
        Pairs, shape (m, 2), rows `i, j` in ascending order, `i != j`, where the hash of i is near a window of j; and
        the nearest window of each, the lowest on ties, shape (m,).

    Raises:
        ValueError: shapes do not fit together, or the radius is out of its range.
    """
    if windows.ndim != 2 or hashes.shape != windows.shape[:1] or not 1 <= windows.shape[1] <= 256:
        raise ValueError("hashes need shape (n,), windows (n, 1 to 256)")
    if not 0 <= radius <= 64:
        raise ValueError(f"64-bit hashes do not differ in {radius} bits")
    hashes, windows = (np.ascontiguousarray(each, dtype=np.uint64) for each in (hashes, windows))
    rows, crowds = _without_crowds(hashes)
    if shared is None or windows.size < SHARED_FROM:
        found = [WindowJob(hashes[rows], rows, windows, radius, (0, len(windows))).run()]
    else:
        with shared.stored(hashes[rows], rows, windows) as stored:
            # at least as many windows as hashes: each job sorts all hashes, which is then less work than looking up
            step = -(-max(JOB_WINDOWS, len(rows)) // windows.shape[1])
            spans = [(first, min(first + step, len(windows))) for first in range(0, len(windows), step)]
            found = shared.run([WindowJob(stored[0], stored[1], stored[2], radius, span) for span in spans])
    for members in crowds:
        for step in range(1, CROWD_NEIGHBOURS + 1):
            first, second = members[:-step], members[step:]
            # the first member has been compared with all
            ways = np.concatenate([np.stack([first, second], axis=1)[1:], np.stack([second, first], axis=1)])
            found.append(_nearest(hashes, windows, ways, radius))
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[:, :2].astype(np.int64), pairs[:, 2].astype(np.uint8)


@dataclass(frozen=True)
class WindowJob:
    """Look up the windows of some images among the hashes of all.

    Attributes:
        hashes: shape (t,).
        rows: shape (t,), the image of each hash.
        windows: shape (n, w), of all images.
        radius: largest number of differing bits.
        images: the first image whose windows are looked up, and their end.
    """

    hashes: StoredArray | HashArray
    rows: StoredArray | npt.NDArray[np.uint32]
    windows: StoredArray | HashArray
    radius: int
    images: tuple[int, int]

    @property
    def name(self) -> str:
        """Name of the job in messages."""
        return f"the search for windows of images {self.images[0]} to {self.images[1]}"

    def run(self) -> npt.NDArray[np.uint32]:
        """Rows of the image of a hash, the image of windows and the nearest window, in any order; shape (m, 3)."""
        hashes, rows, windows = (values(each) for each in (self.hashes, self.rows, self.windows))
        first, end = self.images
        some = windows[first:end]
        agreeing = _agreeing_bands(len(rows), some.size, self.radius)
        # images are numbered from the first one on, modulo 2^32
        found = _looked_up(hashes, rows - np.uint32(first), some, self.radius, agreeing).copy()
        found[:, :2] += np.uint32(first)
        return found


def _without_crowds(hashes: HashArray) -> tuple[npt.NDArray[np.uint32], list[npt.NDArray[np.int64]]]:
    """Rows to compare with all windows, ascending; and the rows of each hash that too many share, ascending."""
    order = np.argsort(hashes, kind="stable")
    _, starts, sizes = np.unique(hashes[order], return_index=True, return_counts=True)
    crowds = [order[starts[at] : starts[at] + sizes[at]] for at in np.flatnonzero(sizes > CROWD).tolist()]
    alone = np.ones(len(hashes), dtype=np.bool_)
    for members in crowds:
        alone[members[1:]] = False
    return np.flatnonzero(alone).astype(np.uint32), crowds


def _nearest(hashes: HashArray, windows: HashArray, pairs: Pairs, radius: int) -> npt.NDArray[np.uint32]:
    """The given pairs that are within the radius, with the nearest window; shape (m, 3)."""
    found = [np.empty((0, 3), dtype=np.uint32)]
    size = max(1, _COMPARED // windows.shape[1])
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        gaps = np.bitwise_count(hashes[some[:, 0], None] ^ windows[some[:, 1]])
        window = gaps.argmin(axis=1)
        near = np.take_along_axis(gaps, window[:, None], axis=1)[:, 0] <= radius
        found.append(np.concatenate([some, window[:, None]], axis=1)[near].astype(np.uint32))
    return np.concatenate(found)


def _agreeing_bands(hashes: int, windows: int, radius: int) -> int:
    """The number of bands that must agree, by an estimate of the work; 0 to compare all hashes with all windows."""
    costs = {}
    for agreeing in range(5):
        bands = radius + agreeing
        if agreeing and bands > 64:
            break
        # on evenly distributed hashes, a key of b bits puts one pair in 2^b into the same bucket
        bits = min(_MOST_KEY, agreeing * 64 // bands) if agreeing else 0
        each = hashes * _SORT_COST + windows * (_LOOK_COST + hashes / 2.0**bits * _COMPARE_COST)
        costs[agreeing] = math.comb(bands, agreeing) * each
    return min(costs, key=lambda agreeing: costs[agreeing])


def _looked_up(
    hashes: HashArray, rows: npt.NDArray[np.uint32], windows: HashArray, radius: int, agreeing: int
) -> npt.NDArray[np.uint32]:
    """Rows of the image of a hash, the image of windows and the nearest window, in any order; shape (m, 3).

    Args:
        hashes: shape (t,).
        rows: shape (t,), the image of each hash.
        windows: shape (n, w).
        radius: largest number of differing bits.
        agreeing: number of bands of a key.
    """
    if compiled is not None:
        found = compiled.window_pairs(hashes, rows, windows, windows.shape[1], radius, agreeing)
        return np.frombuffer(found, dtype=np.uint32).reshape(-1, 3)
    bands = radius + agreeing if agreeing else 0
    edges = [64 * band // bands for band in range(bands + 1)] if bands else []
    spans = [(low, high - low) for low, high in itertools.pairwise(edges)]
    flat, columns = windows.reshape(-1), np.uint64(windows.shape[1])
    pairs, nearest = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)
    for chosen in itertools.combinations(spans, agreeing):
        keys = band_keys(hashes, chosen)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        found = [(pairs, nearest)]
        for start in range(0, len(flat), _WINDOWS):
            wanted = band_keys(flat[start : start + _WINDOWS], chosen)
            starts, ends = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, side="right")
            for first, last in _shares(ends - starts):
                at, owner = _expanded(starts[first:last], ends[first:last])
                entry, window = order[at], owner + (start + first)
                gaps = np.bitwise_count(hashes[entry] ^ flat[window])
                near = np.flatnonzero(gaps <= radius)
                place = window[near].astype(np.uint64)
                pair = rows[entry[near]].astype(np.uint64) << np.uint64(32) | place // columns
                found.append((pair, gaps[near].astype(np.uint64) << np.uint64(8) | place % columns))
        pairs, nearest = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.lexsort((nearest, pairs))
        pairs, nearest = pairs[order], nearest[order]
        leading = np.flatnonzero(np.diff(pairs, prepend=~pairs[:1]))
        pairs, nearest = pairs[leading], nearest[leading]
    images = [pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)]
    table = np.stack([*images, nearest & np.uint64(255)], axis=1).astype(np.uint32)
    others: npt.NDArray[np.uint32] = table[table[:, 0] != table[:, 1]]
    return others


def _shares(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges whose counts sum to `_COMPARED` at most, or of one with a larger count; counts have shape (q,)."""
    sums = np.cumsum(counts)
    at, below = 0, 0
    while at < len(sums):
        until = max(at + 1, int(np.searchsorted(sums, below + _COMPARED, side="right")))
        yield at, until
        at, below = until, int(sums[until - 1])


class EarlierVotes(NamedTuple):
    """What `vote_pairs` found among some of the images: their points and their order must be the same.

    Attributes:
        new: shape (k,), the images that it did not have.
        pairs: shape (m, 2), what it found.
        mirrored: shape (m,), likewise.
    """

    new: npt.NDArray[np.int64]
    pairs: Pairs
    mirrored: npt.NDArray[np.bool_]


def vote_pairs(
    codes: HashArray,
    image: npt.NDArray[np.int64],
    size: npt.NDArray[np.uint16],
    angle: npt.NDArray[np.uint16],
    mirror_mask: int,
    limit: int = 8,
    votes: int = 3,
    earlier: EarlierVotes | None = None,
) -> tuple[Pairs, npt.NDArray[np.bool_]]:
    """Pairs of images with local features that agree in code, in turn and in scale.

    A *hit* is a point of an image and one of an earlier image whose codes agree in the 20 bits of one of `TABLES` at
    least and differ in at most `limit` bits. A pair of images is found if `votes` different points of the earlier one
    have hits that agree in the difference of angles (within a bin of 1/16 turn) and in the ratio of sizes (half an
    octave). There are four grids of bins, shifted by half a bin in either or both, so a copy does not fall between.

    A second search finds mirrored copies: the codes of the later image are combined with `mirror_mask` by exclusive or,
    and its angles become half a turn minus the angle.

    Where more than 1,000 points have one key, a point is compared with the last 64 of them in earlier images only.

    Time is linear in the number of points plus the pairs within buckets, which grow with the square of it. Memory of
    the compiled code is 44 bytes per point beside the arrays, 25 MB, and 12 bytes per pair found; it raises MemoryError
    beyond what the machine has.

    With an earlier search among some of the images, the compiled code finds the same pairs in less time: it looks up
    new images only, among the images before them and among those after them. Of the others, no two become a pair that
    were none, but new points may have taken the place of theirs in a bucket of more than 1,000: known pairs are
    compared again by their points.

    Args:
        codes: shape (p,), p below 2^32 - 1.
        image: shape (p,), the image of each point, ascending.
        size: shape (p,), in any unit; 0 counts as 1.
        angle: shape (p,), in 1/65536 turn.
        mirror_mask: bits of a code that differ between a point and its mirror image.
        limit: largest number of differing bits.
        votes: smallest number of points, 1 to 16384.
        earlier: what a search with the same mask, limit and votes found; None if there was none.

    Returns:
        Pairs, shape (m, 2), rows `i < j` of numbers of images in ascending order; and whether each is a mirrored one,
        shape (m,). A pair that is found both ways occurs twice, first the plain one.

    Raises:
        ValueError: the arrays have different lengths, images are not ascending, or a number is out of its range.
    """
    if any(each.shape != codes.shape or each.ndim != 1 for each in (codes, image, size, angle)):
        raise ValueError("codes, images, sizes and angles need one value per point")
    if not 0 <= limit <= 64 or not 1 <= votes <= 1 << 14 or not 0 <= mirror_mask < 1 << 64:
        raise ValueError(f"no search has the limit {limit}, {votes} votes and the mask {mirror_mask:#x}")
    if (image[1:] < image[:-1]).any():
        raise ValueError("the points are not in the order of their images")
    firsts = np.flatnonzero(np.concatenate([np.ones(min(1, len(image)), dtype=np.bool_), image[1:] != image[:-1]]))
    points = _Points(
        np.ascontiguousarray(codes, dtype=np.uint64),
        np.repeat(np.arange(len(firsts), dtype=np.uint32), np.diff(firsts, append=len(image))),
        np.ascontiguousarray(size, dtype=np.uint16),
        np.ascontiguousarray(angle, dtype=np.uint16),
    )
    found = _votes(points, mirror_mask, limit, votes, _without_gaps(earlier, image[firsts]) if earlier else None)
    found = found[np.lexsort((found[:, 2], found[:, 1], found[:, 0]))]
    return image[firsts[found[:, :2]]].astype(np.int64), found[:, 2] == 1


class _Points(NamedTuple):
    """Points of all images; see `vote_pairs`. Images are numbered from 0 on without gaps; uint32 of shape (p,)."""

    codes: HashArray
    image: npt.NDArray[np.uint32]
    size: npt.NDArray[np.uint16]
    angle: npt.NDArray[np.uint16]


class _Earlier(NamedTuple):
    """An earlier search, with images numbered as in `_Points`.

    Attributes:
        is_new: shape (n,), whether it did not have an image.
        rows: shape (m, 3), what it found, as `_votes` returns it.
    """

    is_new: npt.NDArray[np.bool_]
    rows: npt.NDArray[np.uint32]


def _without_gaps(earlier: EarlierVotes, images: npt.NDArray[np.int64]) -> _Earlier:
    """An earlier search, with images numbered by their place in `images`, shape (n,), which have points."""
    is_new = np.isin(images, earlier.new)
    proper = np.isin(earlier.pairs, images[~is_new]).all(axis=1) & (earlier.pairs[:, 0] < earlier.pairs[:, 1])
    places = np.searchsorted(images, earlier.pairs[proper])
    rows = np.column_stack([places, earlier.mirrored[proper]]).astype(np.uint32)
    return _Earlier(is_new, rows[np.lexsort(rows.T[::-1])])


def _votes(
    points: _Points, mirror_mask: int, limit: int, votes: int, earlier: _Earlier | None
) -> npt.NDArray[np.uint32]:
    """Rows of earlier image, later image and 1 for a mirrored pair, in any order; shape (m, 3)."""
    if compiled is None:  # without the earlier search, of which nothing but the time depends
        return _portable_votes(points, np.uint64(mirror_mask), limit, votes)
    bits = np.array(TABLES, dtype=np.uint8)
    known = earlier or (b"", b"")
    found = compiled.vote_pairs(*points, _logarithms(), bits, mirror_mask, limit, votes, *known)
    return np.frombuffer(found, dtype=np.uint32).reshape(-1, 3)


@functools.cache
def _logarithms() -> npt.NDArray[np.int16]:
    """Logarithms of the sizes 0 to 65535 in 1/1024 octave; shape (65536,).

    None is so close to a half that another C library could round it differently.
    """
    sizes = np.maximum(np.arange(1 << 16), 1)
    found: npt.NDArray[np.int16] = np.rint(np.log2(sizes) * _OCTAVE).astype(np.int16)
    return found


def _portable_votes(points: _Points, mirror_mask: np.uint64, limit: int, votes: int) -> npt.NDArray[np.uint32]:
    """What the compiled `vote_pairs` returns, in blocks of whole images."""
    codes, image = points.codes, points.image
    # entries of a table: key in the high half, point in the low half, so that they are in the order of points
    tables = [_keys(codes, bits) << np.uint64(32) | np.arange(len(codes), dtype=np.uint64) for bits in TABLES]
    for table in tables:
        table.sort()
    firsts = np.searchsorted(image, np.arange(int(image[-1]) + 2 if len(image) else 1))
    found = [np.empty((0, 3), dtype=np.uint32)]
    for start, stop in _blocks(firsts):
        for mirrored in (0, 1):
            turned = codes[start:stop] ^ (mirror_mask if mirrored else np.uint64(0))
            hits = [np.empty((0, 2), dtype=np.int64)]
            for table, bits in zip(tables, TABLES, strict=True):
                for at in range(0, stop - start, _BLOCK):
                    some = turned[at : at + _BLOCK]
                    earlier = firsts[image[start + at : start + at + len(some)]]
                    p, q = _near_entries(table, _keys(some, bits), earlier)
                    close = np.bitwise_count(codes[p] ^ some[q]) <= limit
                    hits.append(np.stack([p, q + (start + at)], axis=1)[close])
            pairs = _agreeing(points, np.concatenate(hits), mirrored, votes)
            found.append(np.concatenate([pairs, np.full((len(pairs), 1), mirrored)], axis=1).astype(np.uint32))
    return np.concatenate(found)


def _blocks(firsts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of points: as many whole images as have `_BLOCK` points, at least one."""
    at = 0
    while at < len(firsts) - 1:
        until = max(at + 1, int(np.searchsorted(firsts, firsts[at] + _BLOCK, side="right")) - 1)
        yield int(firsts[at]), int(firsts[until])
        at = until


def _keys(codes: HashArray, bits: tuple[int, ...]) -> HashArray:
    """The given bits of each code, lowest first; shape (p,)."""
    keys = np.zeros(len(codes), dtype=np.uint64)
    for position, bit in enumerate(bits):
        keys |= (codes >> np.uint64(bit) & np.uint64(1)) << np.uint64(position)
    return keys


def _near_entries(
    table: HashArray, keys: HashArray, earlier: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Points in the buckets of some keys.

    Args:
        table: shape (p,), sorted.
        keys: shape (q,).
        earlier: shape (q,), the first point that a key must not be compared with.

    Returns:
        A point of the table and a position in `keys` for each comparison to make, each of shape (c,).
    """
    high = keys << np.uint64(32)
    starts, stops = np.searchsorted(table, high), np.searchsorted(table, high + np.uint64(1 << 32))
    ends = np.searchsorted(table, high | earlier.astype(np.uint64))
    starts = np.where(stops - starts > CROWDED, np.maximum(starts, ends - FOLLOWED), starts)
    at, owner = _expanded(starts, ends)
    return (table[at] & np.uint64(0xFFFFFFFF)).astype(np.int64), owner


def _expanded(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All positions of some ranges, and the range of each; starts and ends have shape (q,)."""
    counts = ends - starts
    owner = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(owner)) + (starts - (np.cumsum(counts) - counts))[owner], owner


def _agreeing(points: _Points, hits: npt.NDArray[np.int64], mirrored: int, votes: int) -> npt.NDArray[np.uint32]:
    """Pairs of images with enough hits in one bin.

    Args:
        points: of all images.
        hits: shape (h, 2), earlier point and later point; a hit may occur several times.
        mirrored: 1 to mirror the later point.
        votes: number of different earlier points.

    Returns:
        Shape (m, 2), earlier image and later image.
    """
    images = int(points.image[-1]) + 1 if len(points.image) else 1
    # a pair needs as many hits at least, which few pairs have
    hit = np.unique(hits[:, 0] << 32 | hits[:, 1])
    p, q = hit >> 32, hit & 0xFFFFFFFF
    pair = points.image[p].astype(np.int64) * images + points.image[q]
    names, owner, counts = np.unique(pair, return_inverse=True, return_counts=True)
    likely = counts[owner] >= votes
    p, q, owner = p[likely], q[likely], owner[likely]
    logs = _logarithms().astype(np.int64)
    angle = points.angle.astype(np.int64)
    turn = angle[p] - ((1 << _TURN - 1) - angle[q] if mirrored else angle[q])
    ratio = logs[points.size[p]] - logs[points.size[q]] + (_OCTAVE << 4)  # at least 0
    found = []
    for turned in (0, 1 << _TURN_BIN - 1):
        for scaled in (0, 1 << _RATIO_BIN - 1):
            bins = ((turn + turned) % (1 << _TURN) >> _TURN_BIN) << 8 | ratio + scaled >> _RATIO_BIN
            groups, group = np.unique(owner << 12 | bins, return_inverse=True)  # a pair and a bin are a group
            enough = [_members(group, each, len(groups)) >= votes for each in (p, q)]
            found.append(names[groups[enough[0] & enough[1]] >> 12])
    pair = np.unique(np.concatenate(found))
    return np.stack([pair // images, pair % images], axis=1).astype(np.uint32)


def _members(group: npt.NDArray[np.int64], point: npt.NDArray[np.int64], groups: int) -> npt.NDArray[np.int64]:
    """Number of different points in each group; shapes (h,), (h,) and (groups,)."""
    return np.bincount(np.unique(group << 32 | point) >> 32, minlength=groups)
