"""Candidate search for copies: the compiled code, the portable code and exhaustive comparison find the same pairs."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion.dedup import joins, search

needs_compiled = pytest.mark.skipif(joins.compiled is None, reason="animesion/dedup/_joins.c was not compiled here")
both_codes = pytest.mark.parametrize("portable", [pytest.param(False, marks=needs_compiled), True])

MASK = 0xFFFFFFFF00000000


def looked_up(
    monkeypatch: pytest.MonkeyPatch,
    hashes: search.HashArray,
    windows: search.HashArray,
    portable: bool,
    radius: int = 8,
) -> list[tuple[int, int, int]]:
    with monkeypatch.context() as patch:
        if portable:
            patch.setattr(joins, "compiled", None)
        pairs, window = joins.window_pairs(hashes, windows, radius)
    assert pairs.dtype == np.int64
    assert window.dtype == np.uint8
    return [(int(i), int(j), int(w)) for (i, j), w in zip(pairs, window, strict=True)]


def nearest_windows(hashes: search.HashArray, windows: search.HashArray, radius: int) -> list[tuple[int, int, int]]:
    """The definition of `window_pairs` without crowds: every hash with every window."""
    found = []
    for i, one in enumerate(hashes):
        gaps = np.bitwise_count(one ^ windows)
        found += [(i, j, int(gaps[j].argmin())) for j in np.flatnonzero(gaps.min(axis=1) <= radius).tolist() if j != i]
    return found


def windowed(rng: np.random.Generator, n: int, columns: int, noise: int) -> tuple[search.HashArray, search.HashArray]:
    """Hashes around a few centres, and windows like hashes of some other image."""
    centres = rng.integers(0, 1 << 64, max(1, n // 8), dtype=np.uint64)
    hashes = centres[rng.integers(0, len(centres), n)] ^ flips(rng, n, noise)
    windows = centres[rng.integers(0, len(centres), (n, columns))]
    windows ^= flips(rng, windows.size, noise).reshape(windows.shape)
    return hashes, windows


@both_codes
@pytest.mark.parametrize(
    ("radius", "agreeing"), [*itertools.product((0, 1, 4, 8, 12), (None, 0, 1, 2, 3, 4)), (30, None), (30, 1), (63, 1)]
)
def test_all_windows_within_the_radius_are_found(
    monkeypatch: pytest.MonkeyPatch, portable: bool, radius: int, agreeing: int | None
) -> None:
    if agreeing is not None:
        monkeypatch.setattr(joins, "_agreeing_bands", lambda *sizes: agreeing)
    hashes, windows = windowed(np.random.default_rng(radius), 120, 7, max(1, radius // 2))
    expected = nearest_windows(hashes, windows, radius)
    assert len(expected) > 50
    assert looked_up(monkeypatch, hashes, windows, portable, radius) == expected


@both_codes
def test_windows_are_not_compared_with_each_other_and_no_image_with_itself(
    monkeypatch: pytest.MonkeyPatch, portable: bool
) -> None:
    hashes = np.array([0, 2**64 - 1, 0xFFFFFFFF], np.uint64)
    windows = np.array([[0xFF00FF00FF00FF00, 0], [0xFF00FF00FF00FF00, 1 << 63], [0xFF00FF00FF00FF00, 7]], np.uint64)
    assert looked_up(monkeypatch, hashes, windows, portable) == [(0, 1, 1), (0, 2, 1)]


@both_codes
def test_the_lowest_window_wins_a_tie(monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    hashes = np.array([0, 1 << 40], np.uint64)
    windows = np.array([[7, 3, 5, 1 << 13 | 1]] * 2, np.uint64)
    assert looked_up(monkeypatch, hashes, windows, portable) == [(0, 1, 1), (1, 0, 1)]


@both_codes
def test_images_that_share_a_hash_are_a_crowd(monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    rng = np.random.default_rng(7)
    n = 700
    hashes = rng.integers(0, 1 << 64, n, dtype=np.uint64)
    windows = rng.integers(0, 1 << 64, (n, 5), dtype=np.uint64)
    crowd = np.sort(rng.choice(n, 300, replace=False))
    hashes[crowd], windows[crowd, 2] = 5, 4
    windows[crowd[::3], 4] = 5  # a nearer one
    windows[crowd[200], 2:] = 2**64 - 1  # looks unlike its hash in every window
    other = int(np.setdiff1d(np.arange(n), crowd)[0])
    windows[other, 3] = 5
    expected = []
    for at, i in enumerate(crowd.tolist()):
        others = range(300) if at == 0 else range(max(0, at - 64), min(300, at + 65))
        expected += [(i, int(crowd[b]), 4 if b % 3 == 0 else 2) for b in others if b not in (at, 200)]
    expected.append((int(crowd[0]), other, 3))
    assert looked_up(monkeypatch, hashes, windows, portable) == sorted(expected)


@needs_compiled
def test_compiled_and_portable_joins_of_windows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, windows = windowed(np.random.default_rng(8), 2000, 91, 6)
    found = looked_up(monkeypatch, hashes, windows, portable=False)
    assert len(found) > 5000
    assert found == looked_up(monkeypatch, hashes, windows, portable=True)


@both_codes
@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_have_no_pairs(monkeypatch: pytest.MonkeyPatch, portable: bool, n: int) -> None:
    assert looked_up(monkeypatch, np.zeros(n, np.uint64), np.zeros((n, 91), np.uint64), portable) == []
    assert looked_up(monkeypatch, np.zeros(n, np.uint64), np.zeros((n, 91), np.uint64), portable, radius=64) == []


@both_codes
def test_every_image_is_within_64_bits(monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    hashes = np.array([0, 2**64 - 1, 5], np.uint64)
    found = looked_up(monkeypatch, hashes, np.zeros((3, 2), np.uint64), portable, radius=64)
    assert found == [(i, j, 0) for i in range(3) for j in range(3) if i != j]


@needs_compiled
def test_the_compiled_join_of_windows_checks_its_buffers() -> None:
    assert joins.compiled is not None
    hashes, rows, windows = np.zeros(2, np.uint64), np.arange(2, dtype=np.uint32), np.zeros((2, 3), np.uint64)
    good = [hashes, rows, windows, 3, 8, 2]
    assert len(joins.compiled.window_pairs(*good)) == 2 * 12
    wrong: dict[int, list[object]] = {
        0: [hashes[:1], b"123"],
        1: [rows[:1], rows.astype(np.int64)],
        2: [windows.ravel()[:5], b"1"],
        3: [0, 4, 257, 2**32 - 1],
        4: [65, 63],
        5: [5, 2**32 - 1],
    }
    for at, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="hashes of images and of their windows"):
                joins.compiled.window_pairs(*good[:at], value, *good[at + 1 :])
    with pytest.raises(ValueError, match="shape"):
        joins.window_pairs(hashes, windows[:1])
    with pytest.raises(ValueError, match="bits"):
        joins.window_pairs(hashes, windows, 65)


class Points(NamedTuple):
    codes: search.HashArray
    image: npt.NDArray[np.int64]
    size: npt.NDArray[np.uint16]
    angle: npt.NDArray[np.uint16]


def points(rows: list[tuple[int, int, int, int]]) -> Points:
    """Points of rows of image, code, size and angle."""
    image, codes, size, angle = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    return Points(
        np.array(codes, np.uint64), np.array(image, np.int64), np.array(size, np.uint16), np.array(angle, np.uint16)
    )


def exhaustive(given: Points, limit: int, votes: int) -> list[tuple[int, int, bool]]:
    """The definition of `vote_pairs`, read aloud."""
    rows = [tuple(map(int, row)) for row in zip(*given, strict=True)]
    keyed: dict[tuple[int, int], list[int]] = defaultdict(list)  # points of each bucket
    keys = [[sum((code >> bit & 1) << i for i, bit in enumerate(bits)) for bits in joins.TABLES] for code, *_ in rows]
    for p, three in enumerate(keys):
        for table, key in enumerate(three):
            keyed[table, key].append(p)
    seen: dict[tuple[int, int, bool, object], tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    for q, (code, image, size, angle) in enumerate(rows):
        for mirrored in (False, True):
            other = code ^ MASK if mirrored else code
            towards = (32768 - angle) % 65536 if mirrored else angle
            for table, bits in enumerate(joins.TABLES):
                bucket = keyed.get((table, sum((other >> bit & 1) << i for i, bit in enumerate(bits))), [])
                earlier = [p for p in bucket if rows[p][1] < image]
                for p in earlier[-64:] if len(bucket) > 1000 else earlier:
                    if (rows[p][0] ^ other).bit_count() > limit:
                        continue
                    turn = (rows[p][3] - towards) % 65536
                    ratio = round(1024 * math.log2(max(1, rows[p][2]))) - round(1024 * math.log2(max(1, size)))
                    for a, b in itertools.product((0, 2048), (0, 256)):
                        where = (a, b, (turn + a) % 65536 // 4096, (ratio + b) // 512)
                        mine, others = seen[rows[p][1], image, mirrored, where]
                        mine.add(p)
                        others.add(q)
    enough = {key[:3] for key, sides in seen.items() if min(map(len, sides)) >= votes}
    return sorted(enough)


def voted(
    monkeypatch: pytest.MonkeyPatch, given: Points, portable: bool, limit: int = 8, votes: int = 3
) -> list[tuple[int, int, bool]]:
    with monkeypatch.context() as patch:
        if portable:
            patch.setattr(joins, "compiled", None)
        pairs, mirrored = joins.vote_pairs(*given, MASK, limit, votes)
    assert pairs.dtype == np.int64
    assert pairs.shape == (len(mirrored), 2)
    return [(int(i), int(j), bool(flag)) for (i, j), flag in zip(pairs, mirrored, strict=True)]


def described(rng: np.random.Generator, count: int) -> Points:
    """Points of an image 0, the codes around a few centres as those of real images are."""
    centres = rng.integers(0, 1 << 64, 12, dtype=np.uint64)
    codes = centres[rng.integers(0, len(centres), count)] ^ flips(rng, count, 12)
    sizes = rng.integers(400, 6000, count).astype(np.uint16)
    return Points(codes, np.zeros(count, np.int64), sizes, rng.integers(0, 65536, count).astype(np.uint16))


def flips(rng: np.random.Generator, count: int, bits: int) -> search.HashArray:
    found = np.zeros(count, np.uint64)
    for _ in range(bits):
        found ^= np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
    return found


def copy(rng: np.random.Generator, given: Points, turn: float, scale: float, mirrored: bool) -> Points:
    """Points of a copy that is mirrored, then turned, with noise in codes, sizes and angles and a third of it lost."""
    kept = np.sort(rng.choice(len(given.codes), len(given.codes) * 2 // 3, replace=False))
    codes = given.codes[kept] ^ flips(rng, len(kept), 3) ^ np.uint64(MASK if mirrored else 0)
    angle = given.angle[kept].astype(np.int64)
    angle = (32768 - angle if mirrored else angle) + round(turn * 65536) + rng.integers(-400, 400, len(kept))
    size = given.size[kept] * scale * rng.uniform(0.95, 1.05, len(kept))
    return Points(codes, given.image[kept], size.astype(np.uint16), (angle % 65536).astype(np.uint16))


def listed(images: list[Points]) -> Points:
    """Points of several images, numbered by threes."""
    numbers = np.repeat(np.arange(len(images)) * 3, [len(each.codes) for each in images]).astype(np.int64)
    joined = [np.concatenate([each[i] for each in images]) for i in range(4)]
    return Points(joined[0], numbers, joined[2], joined[3])


@both_codes
def test_copies_are_found_however_turned_scaled_and_mirrored(monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    rng = np.random.default_rng(3)
    images = [described(rng, int(rng.integers(40, 200))) for _ in range(120)]
    copies = [
        copy(rng, images[i], turn, scale, mirrored)
        for i, (turn, scale, mirrored) in enumerate(
            itertools.product((0, 0.03, 0.25, 0.7), (0.55, 1, 1.8), (False, True))
        )
    ]
    expected = [(3 * i, 3 * (i + 120), bool(i % 2)) for i in range(len(copies))]
    assert voted(monkeypatch, listed(images + copies), portable, votes=5) == expected


@both_codes
@pytest.mark.parametrize(("limit", "votes"), [(8, 2), (3, 3), (0, 1), (64, 2)])
def test_the_same_pairs_as_the_definition(
    monkeypatch: pytest.MonkeyPatch, portable: bool, limit: int, votes: int
) -> None:
    rng = np.random.default_rng(4)
    centres = described(rng, 6).codes
    images = []
    for _ in range(40):
        one = described(rng, int(rng.integers(1, 30)))
        codes = centres[rng.integers(0, 6, len(one.codes))] ^ flips(rng, len(one.codes), 1 if limit < 8 else 5)
        codes ^= np.uint64(MASK) * rng.integers(0, 2, len(codes), dtype=np.uint64)
        images.append(
            one._replace(codes=codes, size=rng.choice([0, 1, 700, 1000, 65535], len(codes)).astype(np.uint16))
        )
    given = listed(images)
    expected = exhaustive(given, limit, votes)
    assert len(expected) > 20
    assert {flag for *_, flag in expected} == {False, True}
    assert voted(monkeypatch, given, portable, limit, votes) == expected


@both_codes
def test_in_a_crowded_bucket_a_point_is_compared_with_the_last_ones(
    monkeypatch: pytest.MonkeyPatch, portable: bool
) -> None:
    rng = np.random.default_rng(5)
    # three points of one code in each of 340 images, of which the first 100 have the same angle
    rows = [
        (image, 77, 1000, 5000 if image < 100 else int(rng.integers(0, 65536)))
        for image in range(340)
        for _ in range(3)
    ]
    given = points(rows)
    found = voted(monkeypatch, given, portable)
    assert found == exhaustive(given, 8, 3)
    near = {j - i for i, j, mirrored in found if j < 100 and not mirrored}
    assert near == set(range(1, 22))  # 64 points are those of 21 images and one more


@needs_compiled
def test_compiled_and_portable_agree_on_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    centres = rng.integers(0, 1 << 64, 2000, dtype=np.uint64)
    images = []
    for _ in range(150):
        one = described(rng, int(rng.choice([1, 30, 150])))
        codes = centres[np.minimum(rng.zipf(1.2, len(one.codes)), 2000) - 1] ^ flips(rng, len(one.codes), 4)
        images.append(one._replace(codes=codes))
    images.append(described(rng, 5000))  # more points than the portable code looks up at once
    given = listed(images)
    found = voted(monkeypatch, given, portable=False)
    assert found == voted(monkeypatch, given, portable=True)
    assert len(found) > 100


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 6),
            st.sampled_from([0, 1, 3, MASK, MASK | 3, 2**64 - 1, 0xFF]),
            st.sampled_from([0, 1, 2, 300, 420, 65535]),
            st.sampled_from([0, 2047, 2048, 4095, 4096, 32768, 65535]),
        ),
        max_size=60,
    ),
    st.integers(0, 64),
    st.integers(1, 4),
)
def test_any_points(rows: list[tuple[int, int, int, int]], limit: int, votes: int) -> None:
    given = points(sorted(rows, key=lambda row: row[0]))
    expected = exhaustive(given, limit, votes)
    with pytest.MonkeyPatch.context() as patch:
        for portable in {joins.compiled is None, True}:
            assert voted(patch, given, portable, limit, votes) == expected


def updated(given: Points, is_new: npt.NDArray[np.bool_], limit: int = 8, votes: int = 3) -> tuple[int, int]:
    """Check a search with an earlier one against a search without; returns the pairs that were kept and lost.

    Args:
        given: points of images.
        is_new: shape (p,), whether the earlier search did not have the image of a point.
    """
    old = Points(given.codes[~is_new], given.image[~is_new], given.size[~is_new], given.angle[~is_new])
    before = joins.vote_pairs(*old, MASK, limit, votes)
    earlier = joins.EarlierVotes(np.unique(given.image[is_new]), *before)
    pairs, mirrored = joins.vote_pairs(*given, MASK, limit, votes, earlier)
    expected = joins.vote_pairs(*given, MASK, limit, votes)
    assert pairs.tolist() == expected[0].tolist()
    assert mirrored.tolist() == expected[1].tolist()
    was = {(*pair, flag) for pair, flag in zip(before[0].tolist(), before[1].tolist(), strict=True)}
    now = {(*pair, flag) for pair, flag in zip(pairs.tolist(), mirrored.tolist(), strict=True)}
    return len(was & now), len(was - now)


@needs_compiled
@pytest.mark.parametrize(("codes", "votes"), [((77, 77, 77), 3), ((77, 77, 77, 77 ^ MASK), 2)])
@pytest.mark.parametrize(("images", "new"), [(340, 0), (340, 8), (500, 60)])
def test_an_update_of_a_crowded_bucket_finds_what_a_search_among_all_finds(
    images: int, new: int, codes: tuple[int, ...], votes: int
) -> None:
    rng = np.random.default_rng(images + new)
    angles = [5000 if rng.random() < 0.1 else int(rng.integers(0, 65536)) for _ in range(images)]
    given = points([(image, code, 1000, angles[image]) for image in range(images) for code in codes])
    is_new = np.isin(given.image, rng.choice(images, new, replace=False))
    kept, lost = updated(given, is_new, votes=votes)
    assert kept
    assert bool(lost) == bool(new)


@needs_compiled
def test_an_update_finds_what_a_search_among_all_finds() -> None:
    rng = np.random.default_rng(9)
    centres = rng.integers(0, 1 << 64, 60, dtype=np.uint64)
    images = []
    for _ in range(400):
        one = described(rng, int(rng.choice([1, 30, 60])))
        codes = centres[np.minimum(rng.zipf(1.3, len(one.codes)), 60) - 1] ^ flips(rng, len(one.codes), 2)
        images.append(one._replace(codes=codes))
        if rng.random() < 0.2:
            images.append(copy(rng, images[-1], rng.random(), 1.3, mirrored=rng.random() < 0.5))
    given = listed(images)
    totals = [0, 0]
    for share in (0.01, 0.3):
        new = rng.choice(np.unique(given.image), round(share * len(images)), replace=False)
        found = updated(given, np.isin(given.image, new))
        totals = [a + b for a, b in zip(totals, found, strict=True)]
    assert min(totals) > 20


@both_codes
def test_earlier_pairs_of_other_images_are_ignored(monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    given = points([(image, 5, 1000, 100) for image in (0, 2, 4)])
    with monkeypatch.context() as patch:
        if portable:
            patch.setattr(joins, "compiled", None)
        pairs = np.array([[0, 2], [0, 1], [2, 0], [2, 2], [2, 4], [9, 11]])
        earlier = joins.EarlierVotes(np.array([4]), pairs, np.zeros(len(pairs), np.bool_))
        found, _ = joins.vote_pairs(*given, MASK, votes=1, earlier=earlier)
    assert found.tolist() == [[0, 2], [0, 4], [2, 4]]


@both_codes
def test_no_points_and_one_point(monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    assert voted(monkeypatch, points([]), portable) == []
    assert voted(monkeypatch, points([(2**40, 1, 1, 1)]), portable) == []
    assert voted(monkeypatch, points([(-5, 1, 1, 1), (2**40, 1, 1, 1)]), portable, votes=1) == [(-5, 2**40, False)]


def test_points_that_do_not_fit_together_are_refused() -> None:
    given = points([(0, 1, 1, 1), (1, 1, 1, 1)])
    with pytest.raises(ValueError, match="one value per point"):
        joins.vote_pairs(*given._replace(size=given.size[:1]), MASK)
    with pytest.raises(ValueError, match="order of their images"):
        joins.vote_pairs(*given._replace(image=given.image[::-1]), MASK)
    for limit, votes in ((-1, 3), (65, 3), (8, 0), (8, 1 << 15)):
        with pytest.raises(ValueError, match="no search"):
            joins.vote_pairs(*given, MASK, limit, votes)


@needs_compiled
def test_the_compiled_code_checks_its_buffers() -> None:
    assert joins.compiled is not None
    good = points([(0, 1, 1, 1), (1, 1, 1, 1)])
    bits = np.array(joins.TABLES, np.uint8)
    image = good.image.astype(np.uint32)
    arguments = [good.codes, image, good.size, good.angle, joins._logarithms(), bits, MASK, 8, 1, b"", b""]
    assert np.frombuffer(joins.compiled.vote_pairs(*arguments), np.uint32).tolist() == [0, 1, 0]
    wrong: dict[int, list[object]] = {
        0: [good.codes[:1], good.codes.tobytes()[:9]],
        1: [np.array([0, 2], np.uint32), np.array([1, 1], np.uint32), np.array([1, 0], np.uint32), good.image],
        2: [good.size[:1], b""],
        3: [good.angle.astype(np.uint32)],
        4: [joins._logarithms()[:-1], joins._logarithms() - 1, np.full(1 << 16, 20_000, np.int16)],
        5: [bits[:2], bits + 1],
        8: [0, 20_000],
        9: [np.zeros(1, np.bool_), np.zeros(3, np.bool_)],
        10: [np.array([0, 1, 0], np.uint32)],  # known pairs, although all images are new
    }
    for at, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="points of images in order"):
                joins.compiled.vote_pairs(*arguments[:at], value, *arguments[at + 1 :])
    old = np.zeros(2, np.bool_)
    assert np.frombuffer(
        joins.compiled.vote_pairs(*arguments[:9], old, np.array([0, 1, 0], np.uint32)), np.uint32
    ).tolist() == [0, 1, 0]
    for is_new, known in (
        (old, [0, 1]), (old, [1, 0, 0]), (old, [0, 0, 0]), (old, [0, 2, 0]), (old, [0, 1, 2]), (~old, [0, 1, 0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="points of images in order"):
            joins.compiled.vote_pairs(*arguments[:9], is_new, np.array(known, np.uint32))
    with pytest.raises(TypeError):
        joins.compiled.vote_pairs(*arguments[:3])
