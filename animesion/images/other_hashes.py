"""Perceptual hashes other than the default, by name: those of the library `imagehash`, and PDQ.

`animesion.images.hashing` computes the default, pHash, which is always stored. A recipe that sets `duplicates.hash`
stores one of these as well. `animesion.dedup.hashes` compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
from PIL import Image

from animesion.errors import UsageError

#: Bytes of a hash; an image has one hash, except by `crop-resistant`.
WIDTHS = {"dhash": 8, "whash": 8, "colorhash": 8, "crop-resistant": 8, "pdq": 32}

#: Most segments that `crop-resistant` finds: 300 x 300 pixels in pieces of 500 or more.
MOST_SEGMENTS = 180

_WAVELET_SIDE = 1024  # largest image that wavelets are taken of: memory grows with its square
_COLOUR_BITS = 42


def require(kind: str) -> None:
    """Check that a hash can be computed here.

    Raises:
        UsageError: its library is not installed.
    """
    if kind == "pdq":
        _pdq()


def library(kind: str) -> str:
    """Name and version of the library that computes a hash.

    Raises:
        UsageError: it is not installed.
    """
    require(kind)
    names = {"pdq": ("pdqhash",), "whash": ("imagehash", "PyWavelets")}.get(kind, ("imagehash",))
    return "/".join(f"{name}-{version(name)}" for name in names)


def compute(kind: str, image: Image.Image) -> bytes:
    """The hash of an image.

    Args:
        kind: a key of `WIDTHS`.
        image: mode RGB, any size.

    Returns:
        `WIDTHS[kind]` bytes, first bit highest; for `crop-resistant`, that many for each segment.

    Raises:
        UsageError: the library of the hash is not installed.
    """
    return _FUNCTIONS[kind](image)


def _dhash(image: Image.Image) -> bytes:
    import imagehash

    return _packed(imagehash.dhash(image).hash)


def _whash(image: Image.Image) -> bytes:
    """The library's own scale, the largest power of two within the shorter side, but at most `_WAVELET_SIDE`."""
    import imagehash

    scale = max(8, 1 << min(min(image.size), _WAVELET_SIDE).bit_length() - 1)
    return _packed(imagehash.whash(image, image_scale=scale).hash)


def _colorhash(image: Image.Image) -> bytes:
    """42 bits, spread over 64: a search that cuts the word into bands finds some in each."""
    import imagehash

    bits = np.zeros(64, dtype=np.bool_)
    bits[np.arange(_COLOUR_BITS) * 64 // _COLOUR_BITS] = imagehash.colorhash(image).hash.ravel()
    return _packed(bits)


def _crop_resistant(image: Image.Image) -> bytes:
    import imagehash

    segments = imagehash.crop_resistant_hash(image).segment_hashes
    return b"".join(sorted({_packed(segment.hash) for segment in segments}))


def _pdq_hash(image: Image.Image) -> bytes:
    bits, _ = _pdq()(np.asarray(image))
    return _packed(bits)


def _pdq() -> Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[np.int64], int]]:
    try:
        from pdqhash import compute as found
    except ImportError:
        raise UsageError('duplicates.hash = "pdq" needs pdqhash: install it with `pip install pdqhash`') from None
    return found  # type: ignore[no-any-return]


def _packed(bits: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> bytes:
    return np.packbits(np.ravel(bits).astype(np.bool_)).tobytes()


_FUNCTIONS: dict[str, Callable[[Image.Image], bytes]] = {
    "dhash": _dhash,
    "whash": _whash,
    "colorhash": _colorhash,
    "crop-resistant": _crop_resistant,
    "pdq": _pdq_hash,
}
