"""Pairs by hash are exact, the fine check is what it says, components connect."""

from __future__ import annotations

import itertools
import random
import sys

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from animesion.config.recipe import DuplicatesSection
from animesion.dedup import near, search
from animesion.dedup.hashes import ImageHashes
from animesion.images import hashing, quality
from animesion.verification import leaks


def brute(hashes: np.ndarray, radius: int) -> set[tuple[int, int]]:
    pairs = itertools.combinations(range(len(hashes)), 2)
    return {(i, j) for i, j in pairs if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= radius}


def planted(n: int, seed: int, most: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    for i in range(0, n, 3):  # every third is a neighbour of another
        flips = rng.choice(64, rng.integers(0, most + 1), replace=False)
        hashes[i] = hashes[rng.integers(0, n)] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    return hashes


@pytest.mark.parametrize("radius", [0, 1, 2, 4, 6, 8, 10])
def test_pairs_are_those_of_all_against_all(radius: int) -> None:
    hashes = planted(600, radius, radius + 2)
    found = near.near_pairs(hashes, radius)
    assert {tuple(pair) for pair in found.tolist()} == brute(hashes, radius)
    assert len(found) == len({tuple(pair) for pair in found.tolist()})


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 255), max_size=40), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_pairs_of_any_hashes(values: list[int], radius: int) -> None:
    hashes = np.array(values, dtype=np.uint64)
    assert {tuple(pair) for pair in near.near_pairs(hashes, radius).tolist()} == brute(hashes, radius)


def test_phash_is_that_of_imagehash() -> None:
    rng = np.random.default_rng(1)
    for size in [(64, 64), (31, 200), (300, 17), (8, 8), (1, 1)]:
        for pixels in (rng.integers(0, 256, (*size, 3), dtype=np.uint8), np.full((*size, 3), 90, dtype=np.uint8)):
            image = Image.fromarray(pixels)
            assert f"{hashing.phashes(image)[0]:016x}" == str(imagehash.phash(image))


def levels(image: Image.Image) -> np.ndarray:
    return np.frombuffer(hashing.thumbnail(image), dtype=np.uint8).astype(int)


@pytest.mark.parametrize("size", [(1535, 1100), (2999, 40), (1024, 1024), (700, 513), (16, 9)])
def test_thumbnails_are_averages_of_areas(size: tuple[int, int]) -> None:
    image = soft(2, *size)
    averaged = np.frombuffer(image.resize((16, 16), Image.Resampling.BOX).tobytes(), dtype=np.uint8)
    assert np.abs(levels(image) - averaged).max() <= 4
    assert hashing.thumbnail(image, quality.reduced(image)) == hashing.thumbnail(image)


@pytest.mark.parametrize("share", [0.3, 0.55, 0.9])
def test_thumbnails_of_an_image_and_of_a_smaller_copy_are_alike(share: float) -> None:
    image = soft(2, 2203, 1537)
    copy = image.resize((round(share * 2203), round(share * 1537)), Image.Resampling.LANCZOS)
    gap = np.abs(levels(image) - levels(copy))
    assert gap.mean() < 1.5
    assert gap.max() < 12


def soft(seed: int, width: int, height: int) -> Image.Image:
    """An image with structure, unlike its own mirror image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_the_hash_of_the_mirror_image_is_that_of_mirrored_pixels() -> None:
    rng = random.Random(5)
    bits = []
    for seed in range(60):
        image = soft(seed, rng.randint(20, 300), rng.randint(20, 300))
        mirrored = int(str(imagehash.phash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))), 16)
        bits.append((hashing.phashes(image)[1] ^ mirrored).bit_count())
    # resampling rounds the mirrored pixels otherwise here and there, which may move a bit next to the median
    assert max(bits) <= 2
    assert sum(bits) <= 6


def test_the_hash_of_the_mirror_image_is_exact_where_nothing_is_resampled() -> None:
    for seed in range(40):
        image = soft(seed, 32, 32).convert("L").convert("RGB")
        mirrored = int(str(imagehash.phash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))), 16)
        assert (hashing.phashes(image)[1] ^ mirrored).bit_count() == 0


def test_mirrored_pairs_are_those_of_each_with_each_mirror_image() -> None:
    hashes = planted(200, 1, 3)
    flipped = planted(200, 2, 3)
    flipped[10], flipped[77] = hashes[150], hashes[77]  # the last is symmetric, and no duplicate of itself
    pairs, mirrored = search.found_pairs(hashes, flipped, 3)
    assert {tuple(pair) for pair in pairs[~mirrored].tolist()} == brute(hashes, 3)
    due = {
        (min(i, j), max(i, j))
        for i, j in itertools.product(range(200), repeat=2)
        if i != j and (int(hashes[i]) ^ int(flipped[j])).bit_count() <= 3
    }
    assert (10, 150) in due
    assert {tuple(pair) for pair in pairs[mirrored].tolist()} == due


def test_the_fine_check_mirrors_what_it_is_told_to() -> None:
    image = soft(3, 96, 80)  # whole pixels to a cell: nothing is rounded
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = np.stack([np.frombuffer(hashing.thumbnail(each), dtype=np.uint8) for each in (image, turned)])
    pairs = np.array([[0, 1], [0, 1]])
    assert search.same_thumbnail(both, pairs, 0.0, 0, np.array([True, False])).tolist() == [True, False]


@pytest.mark.parametrize("flip", [True, False])
def test_a_mirrored_image_in_another_split_is_a_leak_when_the_recipe_says_so(flip: bool) -> None:
    image = soft(3, 96, 80)
    images = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), soft(4, 96, 80)]
    both = np.array([hashing.phashes(each) for each in images], dtype=np.uint64)
    pixels = leaks.PixelColumns(
        np.ones(3, dtype=np.bool_),
        [hashing.of_pixels(each) for each in images],
        ImageHashes.phashes(both[:, 0], both[:, 1]),
        np.stack([np.frombuffer(hashing.thumbnail(each), dtype=np.uint8) for each in images]),
    )
    none = ["", "", ""]
    found = leaks.find(["train", "test", "val"], none, none, [b"a", b"b", b"c"], pixels, DuplicatesSection(flip=flip))
    assert [(leak.first, leak.second) for leak in found] == ([(0, 1)] if flip else [])


def test_the_fine_check_evens_out_light_but_not_colour() -> None:
    image = soft(8, 96, 80)
    darker = image.point(lambda value: round(0.85 * value))
    redder = Image.merge(
        "RGB", [band.point(lambda v, k=k: round(v * k)) for band, k in zip(image.split(), (1, 0.85, 0.7), strict=True)]
    )
    both = np.stack([np.frombuffer(hashing.thumbnail(each), dtype=np.uint8) for each in (image, darker, redder)])
    pairs = np.array([[0, 1], [0, 2]])
    assert search.same_thumbnail(both, pairs, 6.0, 48).tolist() == [False, False]
    assert search.same_thumbnail(both, pairs, 6.0, 48, tone=0.3).tolist() == [True, False]
    assert search.same_thumbnail(both, pairs, 6.0, 48, tone=0.02).tolist() == [False, False]


@pytest.mark.parametrize("installed", [True, False])
def test_all_against_all_finds_the_same_with_and_without_faiss(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    hashes = planted(700, 4, 16)  # at this radius bands are more work
    pairs = near.near_pairs(hashes, 18)
    assert {tuple(pair) for pair in pairs.tolist()} == brute(hashes, 18)


def test_pixel_digest_sees_size_and_pixels_only() -> None:
    red = Image.new("RGB", (4, 6), "red")
    assert hashing.of_pixels(red) == hashing.of_pixels(red.copy())
    assert hashing.of_pixels(red) != hashing.of_pixels(Image.new("RGB", (6, 4), "red"))
    assert hashing.of_pixels(red) != hashing.of_pixels(Image.new("RGB", (4, 6), "blue"))


def test_the_fine_check_tells_an_alternate_from_a_duplicate() -> None:
    base = np.full((3, 768), 100, dtype=np.uint8)
    base[1] += 2  # the whole image a little brighter, as another encoder makes it
    base[2, 30:60] += 60  # one spot quite different, as another mouth makes it
    pairs = np.array([[0, 1], [0, 2]])
    assert search.same_thumbnail(base, pairs, 6.0, 32).tolist() == [True, False]


def test_components_are_named_by_their_smallest_node() -> None:
    sets = [np.array([[4, 2], [2, 7]]), np.empty((0, 2), dtype=np.int64), np.array([[0, 1]])]
    assert search.components(8, sets).tolist() == [0, 0, 2, 3, 2, 5, 6, 2]


def test_equal_values_are_chained_and_empty_ones_are_not() -> None:
    values = pa.array(["a", "", "b", "a", None, "a", "aa", "b"])
    assert search.equal_pairs(values).tolist() == [[0, 3], [3, 5], [2, 7]]
    assert search.equal_pairs(values[1:]).tolist() == [[1, 6], [2, 4]]
    assert search.equal_pairs(values, np.array([0, 2, 5, 6])).tolist() == [[0, 5]]
    assert search.equal_pairs(pa.array(["", None], pa.string())).tolist() == []


@settings(deadline=None)
@given(st.lists(st.text("ab\0", max_size=3), max_size=40))
def test_equal_values_are_found_whatever_they_are(values: list[str]) -> None:
    group = search.components(len(values), [search.equal_pairs(pa.array(values, pa.string()))])
    for i, value in enumerate(values):
        assert group[i] == (values.index(value) if value else i)


def test_values_with_one_sum_are_not_equal() -> None:
    # the sum is a polynomial modulo 2^64, whose Thue-Morse words of 2^11 letters are known to collide
    word = "a"
    for _ in range(11):
        word += word.translate({97: 98, 98: 97})
    other = word.translate({97: 98, 98: 97})
    assert search.equal_pairs(pa.array([word, other, word, other])).tolist() == [[0, 2], [1, 3]]


def test_rows_of_wanted_values() -> None:
    values = pa.array(["a", "b", "a", None])
    assert search.rows_of(values, ["a", "b", "c"]) == {"a": 2, "b": 1}
    assert search.rows_of(values, ["a", "b"], np.array([True, False, False, True])) == {"a": 0}
    assert search.rows_of(values, []) == {}


def test_many_images_under_one_hash_do_not_pair_n_by_n() -> None:
    hashes = np.concatenate([np.zeros(2000, dtype=np.uint64), planted(200, 3, 4)])
    pairs = search.candidate_pairs(hashes, 4)
    assert len(pairs) < 2000 * 70
    # all of the crowd hang together, and pairs of the rest are exact
    assert len(set(search.components(len(hashes), [pairs])[:2000].tolist())) == 1
    rest = {(i, j) for i, j in pairs.tolist() if i >= 2000}
    assert rest == {(i + 2000, j + 2000) for i, j in brute(hashes[2000:], 4)}
