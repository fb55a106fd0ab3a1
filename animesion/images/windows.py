"""Perceptual hashes of windows of an image, to find images that others were cut from.

The low frequencies of a window are a linear function of the image's grey levels: `A_y G A_x^T`, where G is a small grey
copy and A resamples an interval of one axis to 32 levels and takes their cosine transform. So a window costs two small
products, not a crop, a resampling and a transform. `animesion.images.hashing.phashes` is what they approximate.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image

from animesion.images import lanczos

#: Side of the grey copy in pixels.
SIDE = 64

#: Sides of the windows in 1/25 of the image's side; they also move by 1/25.
SCALES = (25, 24, 23, 22, 21, 20)
_STEPS = 25

#: Windows of an image: 1 + 4 + 9 + 16 + 25 + 36.
COUNT = sum((_STEPS - scale + 1) ** 2 for scale in SCALES)

_LOW = 8  # frequencies per axis in a hash
_REACH = 3.0  # support of the Lanczos filter to each side
_BITS = 15  # weights are multiples of 2^-15: all sums are whole numbers below 2^53, exact in any order


def window_phashes(grey: Image.Image) -> npt.NDArray[np.uint64]:
    """64-bit perceptual hashes of 91 windows of an image.

    The windows have 1, 0.96, 0.92, 0.88, 0.84 and 0.8 of both sides and lie on a grid of 4 % of the side: scale by
    scale, row by row from the upper left. The first is the whole image. The hashes have the bits of
    `hashing.phashes`, but for other rounding in between: of faces of 128 and 500 px, the first differs from it in 0.2
    bits of 64 on average and 2 at most, and a window from the crop of whole pixels in 1.0 and 0.2 bits, 4 at most. The
    same on every machine for one Pillow version.

    Args:
        grey: mode L, any size.

    Returns:
        Shape (91,).

    Raises:
        ValueError: the image has another mode.
    """
    if grey.mode != "L":
        raise ValueError(f"an image of mode {grey.mode} is not grey")
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0), dtype=np.float64)
    blocks = []
    for rows in _weights():
        count = len(rows) // _LOW
        both = (rows @ small @ rows.T).reshape(count, _LOW, count, _LOW)
        blocks.append(both.transpose(0, 2, 1, 3).reshape(-1, _LOW * _LOW))
    low = np.concatenate(blocks)
    # np.median of an even number: the mean of the two in the middle, here without rounding
    middle = np.partition(low, (31, 32), axis=1)[:, 31:33].sum(axis=1, keepdims=True)
    bits = np.packbits(2 * low > middle, axis=1)
    found: npt.NDArray[np.uint64] = bits.view(">u8").ravel().astype(np.uint64)
    return found


@functools.cache
def _weights() -> tuple[npt.NDArray[np.float64], ...]:
    """For each scale, the low cosine transform of each interval of an axis; whole numbers, (8 intervals, 64)."""
    found = []
    for scale in SCALES:
        intervals = [_transform(at / _STEPS, scale / _STEPS) for at in range(_STEPS - scale + 1)]
        weights = np.rint(np.stack(intervals) * 2**_BITS)
        # all but the first frequency of a window of one level are zero, without a remainder from rounding
        weights[:, 1:, SIDE // 2] -= weights[:, 1:].sum(axis=2)
        found.append(weights.reshape(-1, SIDE))
    return tuple(found)


def _transform(start: float, length: float) -> npt.NDArray[np.float64]:
    """Resampling of an interval to 32 levels and their eight lowest frequencies, as one matrix of shape (8, 64).

    Args:
        start: of the interval, as a share of the side.
        length: of the interval.
    """
    low, high = start * SIDE, (start + length) * SIDE
    scale = (high - low) / lanczos.SIDE
    centres = low + (np.arange(lanczos.SIDE) + 0.5) * scale
    pixels = np.arange(SIDE)
    away = (pixels + 0.5 - centres[:, None]) / scale
    taps = np.where(np.abs(away) < _REACH, np.sinc(away) * np.sinc(away / _REACH), 0.0)
    # as if the image ended where the window does: a pixel that is partly inside counts in part
    taps *= np.clip(np.minimum(pixels + 1, high) - np.maximum(pixels, low), 0, 1)
    taps /= taps.sum(axis=1, keepdims=True)
    position = np.arange(lanczos.SIDE)
    cosines = 2 * np.cos(np.pi * np.arange(_LOW)[:, None] * (2 * position + 1) / (2 * lanczos.SIDE))
    found: npt.NDArray[np.float64] = cosines @ taps
    return found
