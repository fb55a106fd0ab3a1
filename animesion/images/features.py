"""All that is told of an image's pixels, from one pass over them: hashes, thumbnail, figures.

The compiled pass is `_pixels.c`. Where it is missing (nothing compiled it at installation), or something it takes for
granted of Pillow does not hold, `animesion.images.hashing` and `animesion.images.quality` give the same, bit for bit, in three times
the time or more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from animesion.images import hashing, lanczos, quality
from animesion.schemas import THUMBNAIL_SIDE

_LANES = 8  # results that one pixel may count for, in the compiled pass
_LARGEST = 128  # whole number to reduce by, there


class ImageFeatures(NamedTuple):
    """What is told of an image.

    Attributes:
        phash: as `digests.phashes` gives it.
        phash_flip: of the mirror image.
        thumbnail: as `digests.thumbnail` gives it.
        figures: as `quality.measure` gives them.
    """

    phash: int
    phash_flip: int
    thumbnail: bytes
    figures: quality.Figures


def compute_features(image: Image.Image) -> ImageFeatures:
    """Hashes, thumbnail and figures of an image.

    Args:
        image: upright, mode RGB.
    """
    module = _compiled()
    found = None if module is None else _compiled_look(module, image)
    return _portable(image) if found is None else found


def lacking() -> str:
    """Why the compiled pass is not used; empty where it is."""
    if hashing.compiled is None:
        return "nothing compiled it at installation"
    return "" if _compiled() is not None else f"Pillow {PIL.__version__} resamples otherwise than it does"


@functools.cache
def _compiled() -> ModuleType | None:
    """The compiled module, once it gave what the portable code gives, on images of several shapes."""
    if hashing.compiled is None or not lanczos.as_pillow():
        return None
    rng = np.random.default_rng(0)
    for width, height in ((64, 96), (97, 70), (300, 290), (1030, 1100), (1540, 1100)):
        # overshoots, so that order tells, and bars
        hard = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
        hard[:7, :, :] = 9
        image = Image.fromarray(hard)
        if _compiled_look(hashing.compiled, image) != _portable(image):
            return None
    return hashing.compiled


def _portable(image: Image.Image) -> ImageFeatures:
    grey = image.convert("L")
    small = quality.reduced(image)
    return ImageFeatures(
        *hashing.phashes(grey),
        hashing.thumbnail(image, small),
        quality.figures(small, grey if small is image else small.convert("L")),
    )


def _compiled_look(module: ModuleType, image: Image.Image) -> ImageFeatures | None:
    """None where the image is not one for the compiled pass: tiny, huge, or a tall strip."""
    plan = _plan(image.size)
    if plan is None:
        return None
    words = hashing.words_of(image)
    phash, phash_flip, shrunk, thumbnail, light, dark, levels, edges, tints, grey = module.look(
        image.tobytes() if words is None else words, 3 if words is None else 4, *plan
    )
    if phash is None or phash_flip is None:  # too close to tell from one DCT to another
        side = lanczos.SIDE
        phash, phash_flip = hashing.phashes_of(np.frombuffer(shrunk, dtype=np.uint8).reshape(side, side))
    figures = quality.Figures(
        quality.variance(*edges),
        light,
        dark,
        quality.variance(*levels) ** 0.5,
        quality.chroma(tints[0], tints[1:4], tints[4:]),
        *((0.0, 1, 0) if grey is None else _layout(grey, image.size)),
    )
    return ImageFeatures(phash, phash_flip, hashing.thumbnail(image) if thumbnail is None else thumbnail, figures)


def _layout(grey: bytes, size: tuple[int, int]) -> tuple[float, int, int]:
    return quality.layout(np.frombuffer(grey, dtype=np.uint8).reshape(_small(size)[::-1]))


def _small(size: tuple[int, int]) -> tuple[int, int]:
    """Size of the reduced copy."""
    factor = quality.reduction(size)
    return -(-size[0] // factor), -(-size[1] // factor)


class _Plan(NamedTuple):
    """What the compiled pass is told of an image's size, in its order."""

    width: int
    height: int
    across: bytes
    down: bytes
    factor: int
    fine: int
    flat: int
    wide: bytes | None
    tall: bytes | None


@functools.lru_cache(maxsize=128)  # it keeps weights alive: a quarter of a megabyte for the longest side
def _plan(size: tuple[int, int]) -> _Plan | None:
    width, height = size
    factor, small = quality.reduction(size), _small(size)
    if not lanczos.columns_first(size, lanczos.SIDE) or max(size) > lanczos.LONGEST or factor > _LARGEST:
        return None
    across, down = _axis(width), _axis(height)
    if across is None or down is None:
        return None
    fine = quality.reduction(small, quality.COLOURED)
    fits = hashing.from_reduced(size) and lanczos.columns_first(small, THUMBNAIL_SIDE)
    wide, tall = (_areas(width, factor), _areas(height, factor)) if fits else (None, None)
    return _Plan(width, height, across, down, factor, fine, quality.FLAT, wide, tall)


def _axis(length: int) -> bytes | None:
    """Weights of Pillow's Lanczos for the compiled pass; None where they cannot be told."""
    return _few(length) if length > 1024 else _many(length)


def _axis_of(length: int) -> bytes | None:
    """Number of runs; first result, first pixel and end of each; then what each pixel counts for in eight results."""
    weights = lanczos.weights(length)
    if weights is None:
        return None
    counts = weights != 0
    firsts = np.minimum(counts.argmax(axis=1), lanczos.SIDE - _LANES)
    window = firsts[:, None] + np.arange(_LANES)
    chosen = np.take_along_axis(weights, window, axis=1)
    if np.count_nonzero(chosen) != np.count_nonzero(counts):
        return None
    starts = np.flatnonzero(np.diff(firsts, prepend=-1))
    bounds = np.stack([firsts[starts], starts, np.append(starts[1:], length)], axis=1)
    return np.concatenate([[len(starts)], bounds.ravel(), chosen.ravel()]).astype(np.int32).tobytes()


# short ones are many, as crops have all sizes; 33 bytes a pixel
_many = functools.lru_cache(maxsize=1024)(_axis_of)
_few = functools.lru_cache(maxsize=64)(_axis_of)


@functools.lru_cache(maxsize=2048)
def _areas(length: int, factor: int) -> bytes:
    """What Pillow's box filter takes of a reduced side for each pixel of the thumbnail: first, number, weight."""
    side = -(-length // factor)
    scale = float(np.float32(length / factor)) / THUMBNAIL_SIDE  # Pillow's boxes are of single precision

    def areas() -> Iterator[tuple[int, int, int]]:
        for i in range(THUMBNAIL_SIDE):
            center = (i + 0.5) * scale
            low, high = max(int(center - scale / 2 + 0.5), 0), min(int(center + scale / 2 + 0.5), side)
            inside = [at for at in range(low, high) if -0.5 < (at - center + 0.5) * (1.0 / scale) <= 0.5]
            yield inside[0], len(inside), int(0.5 + (1 << lanczos.BITS) / len(inside))

    return np.array(list(areas()), dtype=np.int32).tobytes()
