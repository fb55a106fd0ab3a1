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


@dataclass(frozen=True)
class ByteDigests:
    """Digests of a file's bytes, as hex."""

    md5: str
    sha256: str


def of_bytes(content: bytes) -> ByteDigests:
    """MD5 (what boorus name a file by; not for security) and SHA-256 of bytes."""
    return ByteDigests(hashlib.md5(content, usedforsecurity=False).hexdigest(), hashlib.sha256(content).hexdigest())


def of_pixels(image: Image.Image) -> bytes:
    """SHA-256 over size and RGB bytes: equal for the same decoded pixels, whatever the file format. 32 bytes."""
    digest = hashlib.sha256(f"{image.width}x{image.height}\0".encode())
    digest.update(image.tobytes())
    return digest.digest()


def phash(image: Image.Image) -> int:
    """The 64-bit perceptual hash of an RGB picture, bit for bit `imagehash.phash`, first bit highest."""
    bits = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")


def thumbnail(image: Image.Image, crop: tuple[int, int, int, int] | None = None) -> bytes:
    """Area-averaged RGB thumbnail of a picture or of its crop, 16 x 16 x 3 bytes row by row."""
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    if crop and (min(crop[:2]) < 0 or crop[2] > image.width or crop[3] > image.height):  # a crop with padding
        image, crop = image.crop(crop), None
    return image.resize(size, Image.Resampling.BOX, box=crop or (0, 0, *image.size)).tobytes()
