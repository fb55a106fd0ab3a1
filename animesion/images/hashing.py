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
from PIL import Image, ImageOps

from animesion.images import lanczos
from animesion.images.quality import reduced, reduction
from animesion.schemas import THUMBNAIL_SIDE

#: The compiled `_pixels.c`; None if it was not compiled at installation.
compiled: ModuleType | None
try:
    compiled = importlib.import_module("animesion.images._pixels")
except ImportError:
    compiled = None

#: Minimum side in pixels, on the reduced copy, of the area that becomes one pixel of the thumbnail.
_FINE = 16

#: Bytes of pixels that are digested at once: fits the processor's cache.
_PIECE = 1 << 18


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
    """The 64-bit perceptual hashes of an image and of its mirror image by `imagehash.phash`, first bit highest.

    The second one mirrors the 32 x 32 grey levels that the first one is computed from.

    Args:
        image: mode RGB, or L if it was already converted.
    """
    import imagehash

    grey = image if image.mode == "L" else image.convert("L")
    # imagehash resizes to 32 x 32 itself, which leaves an image of that size unchanged
    small = grey.resize((lanczos.SIDE, lanczos.SIDE), Image.Resampling.LANCZOS)
    found, mirrored = (imagehash.phash(each) for each in (small, ImageOps.mirror(small)))
    return _as_int(found.hash), _as_int(mirrored.hash)


def _as_int(bits: npt.NDArray[np.bool_]) -> int:
    """Bits of shape (8, 8), row by row, as an integer whose highest bit is the first one."""
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


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
