"""Digests of bytes and pixels, perceptual hashes and colour thumbnails.

Hashes and thumbnails here are the portable implementation behind `animesion.images.features`, which the rest of the
package calls. `animesion.dedup.search` compares them.
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

#: The compiled `_pixels.c`; None if it was not compiled at installation.
compiled: ModuleType | None
try:
    compiled = importlib.import_module("animesion.images._pixels")
except ImportError:
    compiled = None

#: Side of the block of low frequencies whose 64 coefficients give the bits of a perceptual hash.
_PHASH_LOW = 8

#: Minimum side in pixels, on the reduced copy, of the area that becomes one pixel of the thumbnail.
_FINE = 16

#: Bytes of pixels that are digested at once: fits the processor's cache.
_PIECE = 1 << 18

#: Factor of each horizontal frequency when an image is mirrored, shape (8,).
_MIRROR = np.where(np.arange(_PHASH_LOW) % 2, -1.0, 1.0)


@dataclass(frozen=True)
class ByteDigests:
    """Digests of a file's bytes, as hex."""

    md5: str
    sha256: str


def of_bytes(content: bytes, known: str = "") -> ByteDigests:
    """MD5 and SHA-256 of bytes. MD5 is the key of files on boorus; it serves no security purpose.

    Args:
        content: the bytes.
        known: one of the two digests that is already verified, with its kind, such as `md5:0123...`. It is not computed
            again, because hashing is the most expensive step for a file that is only fetched.
    """
    kind, _, digest = known.partition(":")
    return ByteDigests(
        digest if kind == "md5" else hashlib.md5(content, usedforsecurity=False).hexdigest(),
        digest if kind == "sha256" else hashlib.sha256(content).hexdigest(),
    )


def of_pixels(image: Image.Image) -> bytes:
    """BLAKE3 of the RGB values and the size: equal for the same decoded pixels, independent of the file format.

    The input is red, green and blue of each pixel, row by row, then width and height as little-endian integers of four
    bytes. On large images this takes a seventh of the time of decoding, where SHA-256 would take half of it.

    Args:
        image: mode RGB.

    Returns:
        32 bytes.
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
    """Pillow's pixels without a copy: four bytes each, of which the fourth is undefined.

    Returns:
        None if Pillow stores the image in several blocks, which it does above about four million pixels.
    """
    try:
        return pa.array(image).buffers()[-1]
    except ValueError:
        return None


def phashes(image: Image.Image) -> tuple[int, int]:
    """The 64-bit perceptual hashes of an image and of its mirror image, first bit highest.

    The first one equals `imagehash.phash`, bit for bit. The second one is computed from the same DCT: mirroring only
    changes the sign of the coefficients of odd horizontal frequency.

    Args:
        image: mode RGB, or L if it was already converted.
    """
    return phashes_of(lanczos.shrunk(image if image.mode == "L" else image.convert("L")))


def phashes_of(shrunk: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """The hashes of `phashes` from the 32 x 32 grey levels of `lanczos.shrunk`."""
    from scipy.fftpack import dct  # the DCT of imagehash: another one may round differently

    # only the 8 lowest of 32 frequencies are needed, so the second transform runs on 8 rows: (8, 8)
    low = dct(dct(shrunk, axis=0)[:_PHASH_LOW], axis=1)[:, :_PHASH_LOW]
    return _above_median(low), _above_median(low * _MIRROR)


def _above_median(coefficients: npt.NDArray[np.float64]) -> int:
    """A bit for each of the 64 coefficients, set if it exceeds their median; row by row, the first one highest."""
    ranked = np.sort(coefficients, axis=None)  # a fifth of the time of np.median
    half = ranked.size // 2
    return int.from_bytes(np.packbits(coefficients > (ranked[half - 1] + ranked[half]) / 2).tobytes(), "big")


def thumbnail(image: Image.Image, small: Image.Image | None = None) -> bytes:
    """Area-averaged thumbnail of an RGB image.

    Args:
        image: mode RGB.
        small: the copy of `quality.reduced`; computed if None.

    Returns:
        16 x 16 x 3 bytes, row by row.
    """
    small = reduced(image) if small is None else small
    factor = reduction(image.size)
    if not from_reduced(image.size):
        small, factor = image, 1
    # the last block of the reduced copy may cover fewer pixels: the box ends within it
    box = (0, 0, image.width / factor, image.height / factor)
    return small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX, box=box).tobytes()


def from_reduced(size: tuple[int, int]) -> bool:
    """Whether the thumbnail of an image of this size is made from the reduced copy; false for long strips."""
    factor = reduction(size)
    return factor == 1 or -(-min(size) // factor) >= _FINE * THUMBNAIL_SIDE
