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
    arguments = [good.codes, good.image.astype(np.uint32), good.size, good.angle, joins._logarithms(), bits, MASK, 8, 1]
    assert np.frombuffer(joins.compiled.vote_pairs(*arguments), np.uint32).tolist() == [0, 1, 0]
    wrong: dict[int, list[object]] = {
        0: [good.codes[:1], good.codes.tobytes()[:9]],
        1: [np.array([0, 2], np.uint32), np.array([1, 1], np.uint32), np.array([1, 0], np.uint32), good.image],
        2: [good.size[:1], b""],
        3: [good.angle.astype(np.uint32)],
        4: [joins._logarithms()[:-1], joins._logarithms() - 1, np.full(1 << 16, 20_000, np.int16)],
        5: [bits[:2], bits + 1],
        8: [0, 20_000],
    }
    for at, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="points of images in order"):
                joins.compiled.vote_pairs(*arguments[:at], value, *arguments[at + 1 :])
    with pytest.raises(TypeError):
        joins.compiled.vote_pairs(*arguments[:3])
