"""Hashes of windows: those of the crops, in the stated order, the same in any arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from animesion.images import hashing, windows

#: Upper left corner and side of each window, in 1/25.
BOXES = [(x, y, side) for side in range(25, 19, -1) for y in range(26 - side) for x in range(26 - side)]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Blurred blocks with a few hard edges."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for _ in range(5):
        x, y = (int(rng.integers(0, side)) for side in size)
        image.paste(int(rng.integers(0, 256)), (x, y, x + size[0] // 5, y + size[1] // 3))
    return image


def crop(image: Image.Image, box: tuple[int, int, int]) -> Image.Image:
    x, y, side = box
    width, height = image.size
    return image.crop(
        (round(x * width / 25), round(y * height / 25), round((x + side) * width / 25), round((y + side) * height / 25))
    )


def distances(first: npt.NDArray[np.uint64], second: list[int]) -> npt.NDArray[np.int64]:
    return np.bitwise_count(first ^ np.array(second, np.uint64)).astype(np.int64)


@pytest.mark.parametrize("size", [(500, 500), (600, 250), (125, 1000), (2000, 1500)])
def test_windows_have_the_hashes_of_the_crops(size: tuple[int, int]) -> None:
    gaps = []
    for seed in range(3):
        image = picture(seed, size)
        found = windows.window_phashes(image)
        assert found.shape == (windows.COUNT,) == (91,)
        assert found.dtype == np.uint64
        own = [hashing.phashes(crop(image, box))[0] for box in BOXES]
        gaps.append(distances(found, own))
        # no other window is nearer to a crop than its own
        nearest = np.array([distances(found, [each] * 91).min() for each in own])
        assert (distances(found, own) <= nearest + 2).all()
    assert np.concatenate(gaps).max() <= 4
    assert np.concatenate(gaps).mean() < 1


def test_small_images_are_hashed_too() -> None:
    for size in ((1, 1), (3, 40), (32, 32), (64, 64)):
        image = picture(1, size)
        assert distances(windows.window_phashes(image)[:1], [hashing.phashes(image)[0]])[0] <= 6


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_a_blank_image_has_one_hash_in_all_windows(level: int) -> None:
    found = windows.window_phashes(Image.new("L", (130, 90), level))
    assert set(found.tolist()) == {(level > 0) << 63}


def test_the_sums_are_exact() -> None:
    # black and white pixels give the largest sums; Python's integers have no rounding
    levels = np.random.default_rng(0).integers(0, 2, (64, 64)) * 255
    levels[:32, :32] = 255
    expected = []
    for weights in windows._weights():
        assert np.array_equal(weights, np.rint(weights))
        assert np.abs(weights).sum(axis=1).max() ** 2 * 255 * 2 < 2**53
        for rows in weights.reshape(-1, 8, 64):
            for columns in weights.reshape(-1, 8, 64):
                block = rows.astype(int).astype(object) @ levels.astype(object) @ columns.astype(int).astype(object).T
                low = sorted(block.ravel())
                bits = [2 * value > low[31] + low[32] for value in block.ravel()]
                expected.append(sum(1 << 63 - at for at, bit in enumerate(bits) if bit))
    image = Image.fromarray(levels.astype(np.uint8))
    assert windows.window_phashes(image).tolist() == expected


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="mode RGB"):
        windows.window_phashes(Image.new("RGB", (9, 9)))
