"""Fingerprints of bytes and of pixels: sha256, md5, pixel digest, perceptual hash, colour thumbnail.

What counts as the same picture is decided in `animesion.duplicates`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

from animesion.records import THUMBNAIL_SIDE

#: Side of the grey picture that is transformed, and of the block of low frequencies that gives the bits.
_PHASH_SIDE, _PHASH_LOW = 32, 8


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
    """The 64-bit perceptual hashes of an RGB picture and of its mirror image, first bit highest.

    The first is bit for bit `imagehash.phash`. The second is that of the pixels in mirrored order, from the same DCT:
    mirroring changes the sign of the coefficients of odd horizontal frequency, and nothing else.
    """
    from scipy.fftpack import dct  # what imagehash calls: another DCT may round otherwise

    pixels = np.asarray(image.convert("L").resize((_PHASH_SIDE, _PHASH_SIDE), Image.Resampling.LANCZOS))
    low = dct(dct(pixels, axis=0), axis=1)[:_PHASH_LOW, :_PHASH_LOW]
    mirrored = low * np.where(np.arange(_PHASH_LOW) % 2, -1.0, 1.0)
    plain, flipped = (int(str(imagehash.ImageHash(each > np.median(each))), 16) for each in (low, mirrored))
    return plain, flipped


def thumbnail(image: Image.Image, crop: tuple[int, int, int, int] | None = None) -> bytes:
    """Area-averaged RGB thumbnail of a picture or of its crop, 16 x 16 x 3 bytes row by row."""
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    if crop and (min(crop[:2]) < 0 or crop[2] > image.width or crop[3] > image.height):  # a crop with padding
        image, crop = image.crop(crop), None
    return image.resize(size, Image.Resampling.BOX, box=crop or (0, 0, *image.size)).tobytes()
