"""Pairs by hash are exact, the fine check is what it says, components connect."""

from __future__ import annotations

import itertools

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from animesion import digests, duplicates


def brute(hashes: np.ndarray, radius: int) -> set[tuple[int, int]]:
    pairs = itertools.combinations(range(len(hashes)), 2)
    return {(i, j) for i, j in pairs if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= radius}


def planted(n: int, seed: int, most: int) -> np.ndarray:
    lot = np.random.default_rng(seed)
    hashes = lot.integers(0, 2**64, n, dtype=np.uint64)
    for i in range(0, n, 3):  # every third is a neighbour of another
        flips = lot.choice(64, lot.integers(0, most + 1), replace=False)
        hashes[i] = hashes[lot.integers(0, n)] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    return hashes


@pytest.mark.parametrize("radius", [0, 1, 2, 4, 6, 8, 10])
def test_pairs_are_those_of_all_against_all(radius: int) -> None:
    hashes = planted(600, radius, radius + 2)
    found = duplicates.near_pairs(hashes, radius)
    assert {tuple(pair) for pair in found.tolist()} == brute(hashes, radius)
    assert len(found) == len({tuple(pair) for pair in found.tolist()})


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 255), max_size=40), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_pairs_of_any_hashes(values: list[int], radius: int) -> None:
    hashes = np.array(values, dtype=np.uint64)
    assert {tuple(pair) for pair in duplicates.near_pairs(hashes, radius).tolist()} == brute(hashes, radius)


def test_phash_is_that_of_imagehash() -> None:
    lot = np.random.default_rng(1)
    for size in [(64, 64), (31, 200), (300, 17), (8, 8), (1, 1)]:
        for pixels in (lot.integers(0, 256, (*size, 3), dtype=np.uint8), np.full((*size, 3), 90, dtype=np.uint8)):
            image = Image.fromarray(pixels)
            assert f"{digests.phash(image):016x}" == str(imagehash.phash(image))


def test_pixel_digest_sees_size_and_pixels_only() -> None:
    red = Image.new("RGB", (4, 6), "red")
    assert digests.of_pixels(red) == digests.of_pixels(red.copy())
    assert digests.of_pixels(red) != digests.of_pixels(Image.new("RGB", (6, 4), "red"))
    assert digests.of_pixels(red) != digests.of_pixels(Image.new("RGB", (4, 6), "blue"))


def test_the_fine_check_tells_an_alternate_from_a_duplicate() -> None:
    base = np.full((3, 768), 100, dtype=np.uint8)
    base[1] += 2  # the whole picture a little brighter, as another encoder makes it
    base[2, 30:60] += 60  # one spot quite different, as another mouth makes it
    pairs = np.array([[0, 1], [0, 2]])
    assert duplicates.same_thumbnail(base, pairs, 6.0, 32).tolist() == [True, False]


def test_components_are_named_by_their_smallest_node() -> None:
    sets = [np.array([[4, 2], [2, 7]]), np.empty((0, 2), dtype=np.int64), np.array([[0, 1]])]
    assert duplicates.components(8, sets).tolist() == [0, 0, 2, 3, 2, 5, 6, 2]


def test_equal_values_are_chained_and_empty_ones_are_not() -> None:
    assert duplicates.equal_pairs(["a", "", "b", "a", "", "a"]).tolist() == [[0, 3], [3, 5]]


def test_many_pictures_under_one_hash_do_not_pair_n_by_n() -> None:
    hashes = np.concatenate([np.zeros(2000, dtype=np.uint64), planted(200, 3, 4)])
    pairs = duplicates.candidate_pairs(hashes, 4)
    assert len(pairs) < 2000 * 70
    # all of the crowd hang together, and pairs of the rest are exact
    assert len(set(duplicates.components(len(hashes), [pairs])[:2000].tolist())) == 1
    rest = {(i, j) for i, j in pairs.tolist() if i >= 2000}
    assert rest == {(i + 2000, j + 2000) for i, j in brute(hashes[2000:], 4)}
