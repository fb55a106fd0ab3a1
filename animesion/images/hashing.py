"""Fingerprints of bytes and of pixels: sha256, md5, pixel digest, perceptual hash, colour thumbnail.

Hash and thumbnail are the portable way of `animesion.images.features`, which is what the rest of the package calls.

What counts as the same image is decided in `animesion.dedup.search`.
"""

from __future__ import annotations

import hashlib
import importlib
import struct
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from blake3 import blake3
from PIL import Image

from animesion.images import lanczos
from animesion.images.quality import reduced, reduction
from animesion.schemas import THUMBNAIL_SIDE

#: `_pixels.c`, where it was compiled.
compiled: ModuleType | None
try:
    compiled = importlib.import_module("animesion.images._pixels")
except ImportError:
    compiled = None

#: Side of the block of low frequencies that gives the bits of a perceptual hash.
_PHASH_LOW = 8

#: Least side in pixels, on the reduced copy, of what becomes one pixel of the thumbnail.
_FINE = 16

#: Bytes of pixels at once: what fits a cache.
_PIECE = 1 << 18

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
    """BLAKE3 over RGB bytes and size: equal for the same decoded pixels, whatever the file format. 32 bytes.

    What is digested is red, green and blue, row by row, then width and height in four bytes each, the lowest first.
    SHA-256 would take half as long as decoding a large image, this a seventh.
    """
    digest = blake3()
    words = words_of(image)
    if words is None or compiled is None:
        digest.update(image.tobytes())
    else:
        for start in range(0, words.size, _PIECE):
            digest.update(compiled.rgb(words[start : start + _PIECE]))
    digest.update(struct.pack("<II", *image.size))
    return digest.digest()


def words_of(image: Image.Image) -> pa.Buffer | None:
    """Pillow's own pixels, four bytes each, of which the fourth says nothing.

    None where they are not in one piece: above some four million.
    """
    try:
        return pa.array(image).buffers()[-1]
    except ValueError:
        return None


def phashes(image: Image.Image) -> tuple[int, int]:
    """The 64-bit perceptual hashes of an image and of its mirror image, first bit highest.

    The first is bit for bit `imagehash.phash`. The second is that of the pixels in mirrored order, from the same DCT:
    mirroring changes the sign of the coefficients of odd horizontal frequency, and nothing else.

    Args:
        image: mode RGB, or L for what its `convert("L")` gave.
    """
    return phashes_of(lanczos.shrunk(image if image.mode == "L" else image.convert("L")))


def phashes_of(shrunk: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """What `phashes` gives, from what `lanczos.shrunk` gives."""
    from scipy.fftpack import dct  # what imagehash calls: another DCT may round otherwise

    low = dct(dct(shrunk, axis=0)[:_PHASH_LOW], axis=1)[:, :_PHASH_LOW]
    return _above_median(low), _above_median(low * _MIRROR)


def _above_median(coefficients: npt.NDArray[np.float64]) -> int:
    """Which of the 64 coefficients exceed their median, row by row, the first in the highest bit."""
    ranked = np.sort(coefficients, axis=None)  # a fifth of the time of np.median
    half = ranked.size // 2
    return int.from_bytes(np.packbits(coefficients > (ranked[half - 1] + ranked[half]) / 2).tobytes(), "big")


def thumbnail(image: Image.Image, small: Image.Image | None = None) -> bytes:
    """Area-averaged thumbnail of an RGB image.

    Args:
        image: mode RGB.
        small: what `quality.reduced` gives of it, where that is at hand.

    Returns:
        16 x 16 x 3 bytes row by row.
    """
    small = reduced(image) if small is None else small
    factor = reduction(image.size)
    if not from_reduced(image.size):
        small, factor = image, 1
    # the last block of the reduced copy may stand for less than a block
    box = (0, 0, image.width / factor, image.height / factor)
    return small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX, box=box).tobytes()


def from_reduced(size: tuple[int, int]) -> bool:
    """Whether the thumbnail of an image of this size is made of the reduced copy; not so for a long strip."""
    factor = reduction(size)
    return factor == 1 or -(-min(size) // factor) >= _FINE * THUMBNAIL_SIDE
