"""Features of an image from one pass over its pixels: perceptual hashes, thumbnail and quality figures.

The compiled pass is `_pixels.c`. If it was not compiled at installation, or the installed Pillow resamples differently
from what the pass assumes, `animesion.images.hashing` and `animesion.images.quality` compute the same features, bit for
bit, in three times the time or more.
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

_LANES = 8  # the compiled pass adds each pixel to this many adjacent results
_LARGEST = 128  # largest factor of reduction that the compiled pass supports


class ImageFeatures(NamedTuple):
    """Features of an image.

    Attributes:
        phash: 64-bit perceptual hash, see `hashing.phashes`.
        phash_flip: the hash of the mirror image.
        thumbnail: 16 x 16 x 3 bytes, see `hashing.thumbnail`.
        figures: quality figures, see `quality.measure`.
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
    """The reason why the compiled pass is not used; empty if it is used."""
    if hashing.compiled is None:
        return "it was not compiled at installation"
    return "" if _compiled() is not None else f"Pillow {PIL.__version__} resamples differently"


@functools.cache
def _compiled() -> ModuleType | None:
    """The compiled module, if it gives what the portable code gives on images of several shapes."""
    if hashing.compiled is None:
        return None
    rng = np.random.default_rng(0)
    for width, height in ((64, 96), (97, 70), (300, 290), (1030, 1100), (1540, 1100)):
        # black and white pixels make Lanczos overshoot, which exposes another order of axes; 7 rows form a plain bar
        hard = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
        hard[:7, :, :] = 9
        image = Image.fromarray(hard)
        # without the hashes, which follow from the grey levels: imagehash takes half a second to import
        look = _compiled_look(hashing.compiled, image)
        if look is None or look[2:] != _portable_look(image, image.convert("L")) or not _shrinks_as_pillow(image):
            return None
    return hashing.compiled


def _shrinks_as_pillow(image: Image.Image) -> bool:
    """Whether the 32 x 32 grey levels equal Pillow's; equal hashes alone could be a coincidence."""
    plan = _plan(image.size)
    if plan is None or hashing.compiled is None:
        return False
    shrunk = hashing.compiled.look(image.tobytes(), 3, *plan)[2]
    side = lanczos.SIDE
    return bool(shrunk == image.convert("L").resize((side, side), Image.Resampling.LANCZOS).tobytes())


def _portable(image: Image.Image) -> ImageFeatures:
    grey = image.convert("L")
    return ImageFeatures(*hashing.phashes(grey), *_portable_look(image, grey))


def _portable_look(image: Image.Image, grey: Image.Image) -> tuple[bytes, quality.Figures]:
    small = quality.reduced(image)
    return hashing.thumbnail(image, small), quality.figures(small, grey if small is image else small.convert("L"))


def _compiled_look(module: ModuleType, image: Image.Image) -> ImageFeatures | None:
    """Features from the compiled pass; None for images that it does not support: tiny, huge, or a tall strip."""
    plan = _plan(image.size)
    if plan is None:
        return None
    words = hashing.words_of(image)
    phash, phash_flip, shrunk, thumbnail, light, dark, levels, edges, tints, grey = module.look(
        image.tobytes() if words is None else words, 3 if words is None else 4, *plan
    )
    # the two middle coefficients are so close that another DCT may order them differently: imagehash decides
    if phash is None or phash_flip is None:
        phash, phash_flip = hashing.phashes(Image.frombytes("L", (lanczos.SIDE, lanczos.SIDE), shrunk))
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
    """Width and height of the reduced copy, in pixels; a partial block at the edge counts as one."""
    factor = quality.reduction(size)
    return -(-size[0] // factor), -(-size[1] // factor)


class _Plan(NamedTuple):
    """Arguments of the compiled pass that depend on the image's size alone, in its order.

    Attributes:
        width: in pixels.
        height: in pixels.
        across: Lanczos weights of the width, see `_axis_of`.
        down: Lanczos weights of the height.
        factor: side of the blocks that the copy for the figures is averaged over.
        fine: further reduction of that copy, for chroma.
        flat: range of grey levels of a plain row.
        wide: areas of the thumbnail along the width, see `_areas`; None if Pillow makes the thumbnail.
        tall: the same along the height.
    """

    width: int
    height: int
    across: bytes
    down: bytes
    factor: int
    fine: int
    flat: int
    wide: bytes | None
    tall: bytes | None


@functools.lru_cache(maxsize=128)  # an entry keeps its weights alive: 256 KB for the longest side
def _plan(size: tuple[int, int]) -> _Plan | None:
    """Arguments of the compiled pass for an image's width and height; None if the pass does not support the size."""
    width, height = size
    factor, small = quality.reduction(size), _small(size)
    if not lanczos.columns_first(size, lanczos.SIDE) or max(size) > lanczos.LONGEST or factor > _LARGEST:
        return None
    across, down = _axis(width), _axis(height)
    if across is None or down is None:
        return None
    fine = quality.reduction(small, quality.COLOURED)
    # the pass averages columns before rows: Pillow makes the thumbnails for which it takes the rows first
    fits = hashing.from_reduced(size) and lanczos.columns_first(small, THUMBNAIL_SIDE)
    wide, tall = (_areas(width, factor), _areas(height, factor)) if fits else (None, None)
    return _Plan(width, height, across, down, factor, fine, quality.FLAT, wide, tall)


def _axis(length: int) -> bytes | None:
    """Weights of Pillow's Lanczos for the compiled pass; None if their rounding is uncertain."""
    return _few(length) if length > 1024 else _many(length)


def _axis_of(length: int) -> bytes | None:
    """Lanczos weights of one axis in the layout of the compiled pass, int32.

    The number of runs r; then (r, 3): first result, first pixel and end of each run; then (length, 8): the weight of
    each pixel in eight adjacent results. A run is a range of pixels with the same first result.
    """
    weights = lanczos.weights(length)  # (length, 32)
    if weights is None:
        return None
    counts = weights != 0
    # first of the eight results that a pixel contributes to, moved left at the end so that all eight exist
    firsts = np.minimum(counts.argmax(axis=1), lanczos.SIDE - _LANES)
    window = firsts[:, None] + np.arange(_LANES)
    chosen = np.take_along_axis(weights, window, axis=1)
    if np.count_nonzero(chosen) != np.count_nonzero(counts):  # a pixel contributes to more than eight results
        return None
    starts = np.flatnonzero(np.diff(firsts, prepend=-1))
    bounds = np.stack([firsts[starts], starts, np.append(starts[1:], length)], axis=1)
    return np.concatenate([[len(starts)], bounds.ravel(), chosen.ravel()]).astype(np.int32).tobytes()


# crops have many different short sides, so more of them are cached; about 33 bytes per pixel
_many = functools.lru_cache(maxsize=1024)(_axis_of)
_few = functools.lru_cache(maxsize=64)(_axis_of)


@functools.lru_cache(maxsize=2048)
def _areas(length: int, factor: int) -> bytes:
    """Pillow's box filter from a reduced side to the thumbnail, as int32 of shape (16, 3).

    For each pixel of the thumbnail: its first source pixel, the number of source pixels, and the weight of each in
    multiples of 2^-22.
    """
    side = -(-length // factor)
    scale = float(np.float32(length / factor)) / THUMBNAIL_SIDE  # Pillow's boxes have single precision

    def areas() -> Iterator[tuple[int, int, int]]:
        for i in range(THUMBNAIL_SIDE):
            center = (i + 0.5) * scale
            low, high = max(int(center - scale / 2 + 0.5), 0), min(int(center + scale / 2 + 0.5), side)
            inside = [at for at in range(low, high) if -0.5 < (at - center + 0.5) * (1.0 / scale) <= 0.5]
            yield inside[0], len(inside), int(0.5 + (1 << lanczos.BITS) / len(inside))

    return np.array(list(areas()), dtype=np.int32).tobytes()
