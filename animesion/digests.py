"""Fingerprints of bytes and of pixels: sha256, md5, pixel digest, perceptual hash, colour thumbnail.

What counts as the same picture is decided in `animesion.duplicates`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from animesion import lanczos
from animesion.quality import reduced, reduction
from animesion.records import THUMBNAIL_SIDE

#: Side of the block of low frequencies that gives the bits of a perceptual hash.
_PHASH_LOW = 8

#: Least side in pixels, on the reduced copy, of what becomes one pixel of the thumbnail.
_FINE = 16

#: Signs that mirroring gives to horizontal frequencies.
_MIRROR = np.where(np.arange(_PHASH_LOW) % 2, -1.0, 1.0)


@dataclass(frozen=True)
class ByteDigests:
    """Digests of a file's bytes, as hex."""

    md5: str
    sha256: str


def of_bytes(content: bytes, known: str = "") -> ByteDigests:
    """MD5 (what boorus name a file by; not for security) and SHA-256 of bytes.

    Args:
        content: The bytes.
        known: One of the two with its kind, such as `md5:0123...`, when somebody has checked it: hashing costs more
            than anything else that is done to a file that is merely fetched.
    """
    kind, _, digest = known.partition(":")
    return ByteDigests(
        digest if kind == "md5" else hashlib.md5(content, usedforsecurity=False).hexdigest(),
        digest if kind == "sha256" else hashlib.sha256(content).hexdigest(),
    )


def of_pixels(image: Image.Image) -> bytes:
    """SHA-256 over size and RGB bytes: equal for the same decoded pixels, whatever the file format. 32 bytes."""
    digest = hashlib.sha256(f"{image.width}x{image.height}\0".encode())
    digest.update(image.tobytes())
    return digest.digest()


def phashes(image: Image.Image) -> tuple[int, int]:
    """The 64-bit perceptual hashes of a picture and of its mirror image, first bit highest.

    The first is bit for bit `imagehash.phash`. The second is that of the pixels in mirrored order, from the same DCT:
    mirroring changes the sign of the coefficients of odd horizontal frequency, and nothing else.

    Args:
        image: mode RGB, or L for what its `convert("L")` gave.
    """
    from scipy.fftpack import dct  # what imagehash calls: another DCT may round otherwise

    grey = image if image.mode == "L" else image.convert("L")
    low = dct(dct(lanczos.shrunk(grey), axis=0)[:_PHASH_LOW], axis=1)[:, :_PHASH_LOW]
    return _above_median(low), _above_median(low * _MIRROR)


def _above_median(coefficients: npt.NDArray[np.float64]) -> int:
    """Which of the 64 coefficients exceed their median, row by row, the first in the highest bit."""
    ranked = np.sort(coefficients, axis=None)  # a fifth of the time of np.median
    half = ranked.size // 2
    return int.from_bytes(np.packbits(coefficients > (ranked[half - 1] + ranked[half]) / 2).tobytes(), "big")


def thumbnail(image: Image.Image, small: Image.Image | None = None) -> bytes:
    """Area-averaged thumbnail of an RGB picture.

    Args:
        image: mode RGB.
        small: what `quality.reduced` gives of it, where that is at hand.

    Returns:
        16 x 16 x 3 bytes row by row.
    """
    small = reduced(image) if small is None else small
    factor = reduction(image.size)
    if min(small.size) < _FINE * THUMBNAIL_SIDE:  # a long strip
        small, factor = image, 1
    # the last block of the reduced copy may stand for less than a block
    box = (0, 0, image.width / factor, image.height / factor)
    return small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX, box=box).tobytes()
