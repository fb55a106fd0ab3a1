"""Pillow's Lanczos resampling for the compiled pass: its weights, and which axis comes first.

Pillow weights 8-bit pixels with integers (multiples of 2^-22), one axis after the other, and rounds in between.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Side of the reduced image in pixels.
SIDE = 32

#: Longest side in pixels that the compiled pass resamples.
LONGEST = 8192

#: Weights are multiples of 2^-22.
BITS = 22

_REACH = 3.0  # support of the filter to each side, in pixels of the reduced image
_UNSURE = 1e-6  # within this distance of a half, the rounding of a weight is uncertain


def columns_first(size: tuple[int, int], side: int) -> bool:
    """Whether Pillow shrinks an image of this width and height to side x side pixels with the columns first.

    Pillow 13 resamples the rows first if that is less work.
    """
    width, height = size
    return side < width and side < height <= 2 * width - side


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
