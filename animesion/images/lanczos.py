"""Lanczos resampling of a grey image to 32 x 32 pixels, bit for bit equal to Pillow's and faster.

Pillow weights 8-bit pixels with integers (multiples of 2^-22), one axis after the other, and rounds in between. Here
each axis is a matrix product in single precision. The product is exact: weights are split into a high and a low part,
so that all sums are integers below 2^24, whatever the order of summation. If Pillow processes the axes in the other
order, or resamples differently from this module, Pillow itself is called.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Side of the reduced image in pixels.
SIDE = 32

#: Longest side in pixels that this module handles; Pillow resamples larger images.
LONGEST = 8192

#: Weights are whole multiples of 2^-22.
BITS = 22

_REACH = 3.0  # support of the filter to each side, in pixels of the reduced image
_LOW_BITS = 7  # bits of the low part of a weight
_EXACT = 1 << 24  # integers below are exact in single precision
_UNSURE = 1e-6  # within this distance of a half, the rounding of a weight is uncertain
_WHOLE = 160  # up to this length all columns are one product; longer ones are split, because most weights are zero
_CUT = 8  # columns per product in that case
_CHUNK = 1 << 18  # pixels per product: fits the processor's cache
_MANY = 1024  # up to this length the weights of many lengths are cached: 40 MB at most, and as much for longer ones

_Grey = npt.NDArray[np.uint8]


class _Block(NamedTuple):
    """Weights of some columns of the result.

    Attributes:
        columns: columns of the result.
        counted: pixels with a weight in any of them.
        weights: shape (pixels, 2, columns), high and low parts.
    """

    columns: slice
    counted: slice
    weights: npt.NDArray[np.float32]


def shrunk(grey: Image.Image) -> _Grey:
    """The image resized to 32 x 32 pixels, equal to `grey.resize((32, 32), Image.Resampling.LANCZOS)`.

    Args:
        grey: mode L.

    Returns:
        Shape (32, 32), grey levels row by row.
    """
    if columns_first(grey.size, SIDE) and max(grey.size) <= LONGEST and as_pillow():
        found = _shrunk(np.asarray(grey))
        if found is not None:
            return found
    return _pillow(grey)


def columns_first(size: tuple[int, int], side: int) -> bool:
    """Whether Pillow shrinks an image of this width and height to side x side pixels with the columns first.

    Pillow 13 resamples the rows first if that is less work.
    """
    width, height = size
    return side < width and side < height <= 2 * width - side


def _pillow(grey: Image.Image) -> _Grey:
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


@functools.cache
def as_pillow() -> bool:
    """Whether the installed Pillow gives the same results as this module, tested once on images of several shapes."""
    rng = np.random.default_rng(0)
    for width, height in ((64, 96), (97, 70), (129, 226), (300, 40), (300, 290)):
        # black and white pixels make Lanczos overshoot, which exposes another order of axes
        hard = rng.integers(0, 2, (height, width), dtype=np.uint8) * np.uint8(255)
        found = _shrunk(hard)
        if found is not None and not np.array_equal(found, _pillow(Image.fromarray(hard))):
            return False
    return True


def _shrunk(pixels: _Grey) -> _Grey | None:
    """Resample the columns, then the rows; None if the rounding of a weight is uncertain.

    Args:
        pixels: shape (height, width).

    Returns:
        Shape (32, 32).
    """
    across, down = _blocks(pixels.shape[1]), _blocks(pixels.shape[0])
    if across is None or down is None:
        return None
    return _reduced(_reduced(pixels, across).T, down).T


def _reduced(pixels: _Grey, blocks: Sequence[_Block]) -> _Grey:
    """Resample the last axis: shape (rows, length) to (rows, 32)."""
    rows, length = pixels.shape
    found = np.empty((rows, 2, SIDE), dtype=np.float32)  # sums of the high and of the low parts of the weights
    step = min(rows, max(1, _CHUNK // length))
    room = np.empty(step * max(len(weights) for _, _, weights in blocks), dtype=np.float32)
    for start in range(0, rows, step):
        part = pixels[start : start + step]
        for columns, counted, weights in blocks:
            chosen = part[:, counted]
            floats = room[: chosen.size].reshape(chosen.shape)
            np.copyto(floats, chosen)
            product = floats @ weights.reshape(len(weights), -1)  # (part, pixels) @ (pixels, 2 * columns)
            found[start : start + step, :, columns] = product.reshape(len(part), 2, -1)
    # (high * 2^7 + low) / 2^22 + 1/2, then truncated, as Pillow rounds; double precision holds it exactly
    sums = found[:, 0].astype(np.float64)
    sums *= 1 << _LOW_BITS
    sums += found[:, 1]
    sums *= 2.0**-BITS
    sums += 0.5
    return np.clip(sums, 0, 255, out=sums).astype(np.uint8)


def _blocks(length: int) -> tuple[_Block, ...] | None:
    """Weights for a length, cached: computing them takes as long as using them."""
    return _few(length) if length > _MANY else _many(length)


def weights(length: int) -> npt.NDArray[np.int64] | None:
    """Pillow's weights for a length above 32 pixels.

    Returns:
        Shape (length, 32), the weight of each pixel in each pixel of the result, in multiples of 2^-22; None if the
        rounding of a weight is uncertain.
    """
    scale = length / SIDE
    # the arithmetic of Pillow's precompute_coeffs, step by step: bounds of each result's support, then its weights
    center = (np.arange(SIDE) + 0.5) * scale
    lows = np.maximum((center - _REACH * scale + 0.5).astype(np.int64), 0)
    highs = np.minimum((center + _REACH * scale + 0.5).astype(np.int64), length)
    at = lows[:, None] + np.arange(int((highs - lows).max()))  # (32, taps), pixel of each tap
    away = (at - center[:, None] + 0.5) * (1.0 / scale)  # its distance from the center, in pixels of the result
    inside = (away >= -_REACH) & (away < _REACH) & (at < highs[:, None])
    taps = np.where(inside, np.sinc(away) * np.sinc(away / _REACH), 0.0)
    taps *= (1 << BITS) / taps.sum(axis=1, keepdims=True)
    whole = np.rint(taps)
    # sine and sum may differ from Pillow's in their last bits, which matters only next to a half
    if (np.abs(taps - whole) > 0.5 - _UNSURE).any():
        return None
    found = np.zeros((length, SIDE), dtype=np.int64)
    column, tap = np.nonzero(inside)
    found[at[column, tap], column] = whole[column, tap]
    return found


def _blocks_of(length: int) -> tuple[_Block, ...] | None:
    """Weights of a length in high and low parts; None if their rounding is uncertain or sums would not be exact."""
    whole = weights(length)
    if whole is None:
        return None
    high = np.rint(whole * 2.0**-_LOW_BITS)
    parts = np.stack([high, whole - high * 2.0**_LOW_BITS], axis=1)  # (length, 2, 32)
    if np.abs(parts).sum(axis=0).max() * 255 >= _EXACT:  # bound of every partial sum, in any order
        return None
    matrix = parts.astype(np.float32)
    step = SIDE if length <= _WHOLE else _CUT
    blocks = []
    for first in range(0, SIDE, step):
        columns = slice(first, first + step)
        used = np.flatnonzero(whole[:, columns].any(axis=1))
        counted = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append(_Block(columns, counted, np.ascontiguousarray(matrix[counted, :, columns])))
    return tuple(blocks)


_many = functools.lru_cache(maxsize=512)(_blocks_of)
_few = functools.lru_cache(maxsize=48)(_blocks_of)
