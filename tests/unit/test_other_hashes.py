"""Other hashes than pHash: they are those of their libraries, pairs by them are exact, limits follow the hash."""

from __future__ import annotations

import itertools
import sys

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from animesion.config import recipe
from animesion.config.recipe import HASHES, DuplicatesSection
from animesion.dedup import candidates
from animesion.dedup.hashes import ImageHashes, are_valid
from animesion.errors import UsageError
from animesion.images import features, hashing, other_hashes
from animesion.verification import leaks
from tests.unit.test_copies import cut, scene

SIZES = [(96, 96), (31, 200), (300, 17), (7, 5), (1, 1)]


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["dhash", "whash"])
def test_hashes_are_those_of_imagehash(kind: str) -> None:
    for image in (*map(noise, SIZES), scene(1), Image.new("RGB", (40, 30), "white")):
        assert other_hashes.compute(kind, image).hex() == str(getattr(imagehash, kind)(image))


def test_wavelets_of_a_large_image_are_taken_of_a_smaller_copy() -> None:
    image = scene(1).resize((2300, 2100))
    assert other_hashes.compute("whash", image).hex() == str(imagehash.whash(image, image_scale=1024))


def test_the_distances_of_colour_hashes_are_those_of_imagehash() -> None:
    images = [scene(seed) for seed in range(12)]
    words = ImageHashes.of_kind("colorhash", *[[other_hashes.compute("colorhash", image) for image in images]] * 2)
    pairs = np.array(list(itertools.combinations(range(12), 2)))
    theirs = [imagehash.colorhash(image) for image in images]
    due = [theirs[a] - theirs[b] for a, b in pairs.tolist()]
    assert words.distances(pairs, np.zeros(len(pairs), dtype=np.bool_)).tolist() == due
    assert len(set(due)) > 3


def test_segments_are_those_of_imagehash() -> None:
    found = other_hashes.compute("crop-resistant", scene(2))
    segments = {str(each) for each in imagehash.crop_resistant_hash(scene(2)).segment_hashes}
    assert {found[i : i + 8].hex() for i in range(0, len(found), 8)} == segments
    assert len(segments) > 1


def test_pdq_is_that_of_pdqhash() -> None:
    pdqhash = pytest.importorskip("pdqhash", reason="pdqhash is not installed")
    bits, _ = pdqhash.compute(np.asarray(scene(2)))
    assert "".join(f"{byte:08b}" for byte in other_hashes.compute("pdq", scene(2))) == "".join(map(str, bits))


def test_pdq_without_its_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pdqhash", None)
    with pytest.raises(UsageError, match="needs pdqhash: install it with `pip install pdqhash`"):
        other_hashes.compute("pdq", scene(0))


def planted(words: int, counts: list[int], bits: int) -> list[bytes]:
    """Hashes of images, every third near another; `counts` hashes of one image each."""
    rng = np.random.default_rng(len(counts))
    rows = rng.integers(0, 256, (sum(counts), 8 * words), dtype=np.uint8)
    for i in range(0, len(rows), 3):
        flips = np.zeros(64 * words, dtype=np.uint8)
        flips[rng.choice(64 * words, rng.integers(0, bits + 1), replace=False)] = 1
        rows[i] = rows[rng.integers(0, len(rows))] ^ np.packbits(flips)
    ends = np.cumsum([0, *counts])
    return [rows[a:b].tobytes() for a, b in itertools.pairwise(ends)]


def closest(a: bytes, b: bytes, width: int) -> int:
    parts = [[int.from_bytes(each[i : i + width]) for i in range(0, len(each), width)] for each in (a, b)]
    return min((x ^ y).bit_count() for x, y in itertools.product(*parts))


@pytest.mark.parametrize(
    ("kind", "counts", "radius"),
    [("dhash", [1] * 150, 4), ("pdq", [1] * 150, 31), ("crop-resistant", [1, 3, 2, 5] * 30, 4)],
)
def test_pairs_and_distances_are_those_of_all_against_all(kind: str, counts: list[int], radius: int) -> None:
    width = other_hashes.WIDTHS[kind]
    values = planted(width // 8, counts, radius + 3)
    mirrored = [*values[7:], *values[:7]]
    hashes = ImageHashes.of_kind(kind, values, mirrored)
    found, flipped = hashes.pairs(radius, flip=True)
    n = len(values)
    due = {(i, j) for i, j in itertools.combinations(range(n), 2) if closest(values[i], values[j], width) <= radius}
    crossed = {
        (min(i, j), max(i, j))
        for i, j in itertools.product(range(n), repeat=2)
        if i != j and closest(values[i], mirrored[j], width) <= radius
    }
    assert len(due) > 20
    assert {tuple(pair) for pair in found[~flipped].tolist()} == due
    assert {tuple(pair) for pair in found[flipped].tolist()} == crossed
    assert hashes.distances(found, flipped).tolist() == [
        min(closest(values[i], mirrored[j], width), closest(mirrored[i], values[j], width))
        if flip
        else closest(values[i], values[j], width)
        for (i, j), flip in zip(found.tolist(), flipped.tolist(), strict=True)
    ]
    assert hashes.pairs(radius, flip=False)[0].tolist() == sorted(map(list, due))
    # a selection and a concatenation have the same distances
    rows = np.array([5, 2, 9, 9])
    assert hashes.take(rows).plain.words.tobytes() == b"".join(
        np.frombuffer(values[i], dtype=">u8").astype(np.uint64).tobytes() for i in rows
    )
    both = hashes.take(np.arange(40)) + hashes.take(np.arange(40, n))
    assert both.pairs(radius, flip=False)[0].tolist() == sorted(map(list, due))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("dhash", None),
        ("dhash", b""),
        ("dhash", b"1234567"),
        ("dhash", b"1" * 16),
        ("pdq", b"1" * 8),
        ("crop-resistant", b""),
        ("crop-resistant", b"1" * 12),
        ("crop-resistant", b"1" * 8 * 181),
    ],
)
def test_hashes_of_another_length_are_not_valid(kind: str, value: bytes | None) -> None:
    good = other_hashes.WIDTHS[kind] * b"1"
    assert are_valid(kind, [good, good])
    assert not are_valid(kind, [good, value])


@pytest.mark.parametrize(("kind", "radius"), [(kind, limits.radius) for kind, limits in HASHES.items()])
def test_the_radius_follows_the_hash(kind: str, radius: int) -> None:
    chosen = recipe.load("folder", ["source.path=x", f"duplicates.hash={kind}"])
    assert chosen.duplicates.radius == radius
    assert (
        recipe.load("folder", ["source.path=x", f"duplicates.hash={kind}", "duplicates.radius=2"]).duplicates.radius
        == 2
    )
    assert f"radius = {radius}\n" in chosen.to_toml()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["duplicates.hash=md5"], "duplicates.hash: there is no 'md5'"),
        (["duplicates.hash=colorhash", "duplicates.radius=9"], "at most 8 bits for hash 'colorhash'"),
        (["duplicates.hash=crop-resistant", "duplicates.copies=off"], "only a comparison of their pixels confirms"),
    ],
)
def test_a_hash_that_does_not_fit_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        recipe.load("folder", ["source.path=x", *overrides])


def test_a_search_that_would_find_a_share_of_all_pairs_is_refused() -> None:
    settings = DuplicatesSection(hash="colorhash")
    assert settings.for_images(10_000).hash == "colorhash"
    with pytest.raises(UsageError, match=r"it is for 10,000 images at most, not for 10,001: choose another hash"):
        settings.for_images(10_001)
    hashes = ImageHashes.of_kind("colorhash", [bytes(8)] * 10_001, [bytes(8)] * 10_001)
    with pytest.raises(UsageError, match="not for 10,001"):
        hashes.pairs(1, flip=False)


def test_hashes_of_two_kinds_are_not_joined() -> None:
    hashes = [ImageHashes.of_kind(kind, [bytes(8)], [bytes(8)]) for kind in ("dhash", "whash")]
    with pytest.raises(ValueError, match="by dhash and by whash cannot be compared"):
        hashes[0] + hashes[1]


def signatures(images: list[Image.Image], kind: str) -> candidates.Signatures:
    both = np.array([hashing.phashes(image) for image in images], dtype=np.uint64)
    turned = [ImageOps.mirror(image) for image in images]
    other = ImageHashes.of_kind(
        kind, *([other_hashes.compute(kind, each) for each in side] for side in (images, turned))
    )
    thumbnails = [features.compute_features(image).thumbnail for image in images]
    return candidates.Signatures(candidates.Hashes(both[:, 0].copy(), both[:, 1].copy(), thumbnails, other))


def test_a_crop_is_a_candidate_by_one_segment_that_it_shares() -> None:
    images = [scene(0), scene(1), cut(0.25, 0.0, 1.0, 0.75)(scene(0))]
    by_parts = candidates.find(signatures(images, "crop-resistant"), DuplicatesSection(hash="crop-resistant"))
    assert by_parts.pairs.tolist() == [[0, 2]]
    assert by_parts.plain.tolist() == [False]  # as a whole the two differ, so they are not laid over each other
    assert not len(candidates.find(signatures(images, "dhash"), DuplicatesSection(hash="dhash")).pairs)


def test_a_leak_is_found_and_named_by_the_hash_of_the_recipe() -> None:
    images = [scene(0), scene(0).resize((70, 70), Image.Resampling.BICUBIC), scene(1)]
    found = {}
    for kind in ("dhash", "whash"):
        given = signatures(images, kind).sample
        assert given.other is not None
        pixels = leaks.PixelColumns(
            np.ones(3, dtype=np.bool_),
            [hashing.of_pixels(each) for each in images],
            given.other,
            np.stack([np.frombuffer(each, dtype=np.uint8) for each in given.thumbnails]),
        )
        settings = DuplicatesSection(hash=kind, copies="off")
        found[kind] = leaks.find(["train", "test", "val"], [""] * 3, [""] * 3, [b"a", b"b", b"c"], pixels, settings)
    assert [[(leak.first, leak.second) for leak in each] for each in found.values()] == [[(0, 1)]] * 2
    assert "dhash distance" in found["dhash"][0].why[0]
