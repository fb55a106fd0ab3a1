"""Decode untrusted bytes to an upright RGB image, and crop, resize and encode images.

This is the only module that calls an image decoder. Quality figures are computed in `animesion.images.quality`; the
pipeline decides what happens to a bad image.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from animesion.images import colour, damage
from animesion.images.formats import RejectedImageError, plugin_of, sniff
from animesion.images.quality import jpeg_quality
from animesion.schemas import Box, DropReason

__all__ = [
    "LONGEST_SIDE",
    "DecodedImage",
    "Limits",
    "RejectedImageError",
    "crop_pixels",
    "decode",
    "encode",
    "resized",
    "sniff",
    "target_size",
]

_UPRIGHT = 1  # value of the EXIF orientation
_PNG_DEPTH = 24  # offset of the bits per channel in the header of a PNG
_ORIENTATION = 0x0112  # EXIF tag
_COMPRESSION, _PLANAR, _DNG_VERSION = 259, 284, 50_706  # TIFF tags
_SEPARATE = 2  # value of the planar configuration: one plane per channel
_SAMPLES = {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex"}

#: EXIF orientation -> how the stored pixels become upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _silence_libtiff() -> None:
    """Switch off libtiff's own messages on the terminal; Pillow raises errors of its own."""
    package = Path(PIL.__file__).parent
    bundled = [*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")]
    for name in [str(path) for path in sorted(bundled)] or ["libtiff.so.6", "libtiff.so.5"]:
        with contextlib.suppress(OSError, AttributeError):
            # Pillow has loaded it: another copy would not be the one that prints.
            library = ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.DEFAULT_MODE)
            for function in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
                function(None)


_silence_libtiff()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without any handler, errors would go to the terminal


@dataclass(frozen=True)
class Limits:
    """Limits of the decoder.

    Attributes:
        max_side: maximum of width and height in pixels.
        max_pixels: maximum number of pixels.
    """

    max_side: int = 32_768
    max_pixels: int = 100_000_000


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        image: upright, mode RGB, values of sRGB, without metadata; transparency composited, see
            `animesion.images.colour`.
        format: sniffed extension.
        mode: Pillow's mode of the file before conversion.
        plain: any reader decodes the bytes to the same RGB values (no rotation, palette, alpha, CMYK, 16 bit, other
            profile than sRGB or damage).
        jpeg_quality: 1 to 100, estimated from the quantisation table; -1 for other formats.
    """

    image: Image.Image
    format: str
    mode: str
    plain: bool
    jpeg_quality: int = -1


def decode(content: bytes, limits: Limits, *, known: bool = False) -> DecodedImage:
    """Decode a still image.

    Args:
        content: the bytes of the file.
        limits: limits of the decoder.
        known: the same bytes were decoded before: a JPEG is not checked for an early end again.

    Raises:
        RejectedImageError: empty, unknown, too large, truncated, corrupt, animated, or blank once its transparency is
            composited.
    """
    if not content:
        raise RejectedImageError(DropReason.EMPTY_FILE)
    extension = sniff(content)
    if not extension:
        raise RejectedImageError(DropReason.NOT_AN_IMAGE)
    kind = plugin_of(extension)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_load` checks the number of pixels; broken metadata does not matter
        try:
            return _opened(content, extension, kind, limits, known=known)
        except RejectedImageError:
            raise
        except Image.DecompressionBombError:
            raise RejectedImageError(DropReason.TOO_MANY_PIXELS) from None
        except MemoryError:
            raise
        except UnidentifiedImageError:
            if extension == "tif" and (pixels := _tiff_kind(content)):
                raise RejectedImageError(DropReason.UNSUPPORTED_FORMAT, f"tif: {pixels}") from None
            error: Exception = ValueError("unreadable header")
        except Exception as raised:  # decoders raise nearly anything on malformed input
            error = raised
        return _salvaged(error, content, extension, kind, limits)


def _opened(content: bytes, extension: str, kind: str, limits: Limits, *, known: bool) -> DecodedImage:
    with Image.open(io.BytesIO(content), formats=(kind,)) as image:
        return _load(image, content, extension, limits, known=known)


def _salvaged(error: Exception, content: bytes, extension: str, kind: str, limits: Limits) -> DecodedImage:
    """The image of a file that only lacks its end marker, or whose metadata are broken.

    Raises:
        RejectedImageError: the pixels cannot be decoded; for the reason that the first attempt gave.
    """
    candidates = list(damage.without_metadata(content, extension))
    if extension == "jpg" and damage.is_whole(candidates[-1]):
        candidates = [damage.with_end(each) for each in candidates]
    for candidate in candidates:
        try:
            found = _opened(candidate, extension, kind, limits, known=False)
        except (RejectedImageError, MemoryError):
            raise
        except Exception:  # the first error is the one to report
            continue
        return replace(found, plain=False)  # other readers may refuse the file
    raise _rejection(error, content, extension) from None


def _rejection(error: Exception, content: bytes, extension: str) -> RejectedImageError:
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    if extension == "webp" and len(content) < int.from_bytes(content[4:8], "little"):
        return RejectedImageError(DropReason.TRUNCATED_IMAGE, detail)
    unfinished = {"jpg": b"\xff\xd9", "png": b"IEND", "gif": b"\x00;"}.get(extension)
    if "truncated" in detail.lower() and (unfinished is None or unfinished not in content[-64:]):
        return RejectedImageError(DropReason.TRUNCATED_IMAGE, detail)
    if unfinished is not None and (unfinished not in content[-4096:] or damage.lacks_scans(content)):
        return RejectedImageError(DropReason.TRUNCATED_IMAGE, detail)
    return RejectedImageError(DropReason.CORRUPT_IMAGE, detail)


def _load(image: Image.Image, content: bytes, extension: str, limits: Limits, *, known: bool) -> DecodedImage:
    width, height = image.size
    if width < 1 or height < 1:
        raise RejectedImageError(DropReason.CORRUPT_IMAGE, "no pixels")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise RejectedImageError(DropReason.TOO_MANY_PIXELS, f"{width}x{height}")
    # a JPEG with several frames (MPO) is a still with previews
    if extension != "jpg" and getattr(image, "is_animated", False):
        raise RejectedImageError(DropReason.ANIMATED)
    if extension == "tif":
        _check_tiff(image)
    mode = image.mode
    tables: Mapping[int, Sequence[int]] = getattr(image, "quantization", {}) if extension == "jpg" else {}
    image.load()
    whole = True
    if extension == "jpg":
        if not known and damage.is_suspicious(image, content) and not damage.is_whole(content, image.tobytes()):
            raise RejectedImageError(DropReason.TRUNCATED_IMAGE, "a scan ends early")
        # Pillow may have all rows before it misses the end marker; other readers may refuse the file
        whole = damage.has_end(content)
    elif extension == "png":
        # Pillow silently reads 16-bit colour as 8 bits, other readers do not: such a file is never copied
        whole = content[_PNG_DEPTH] != 16 and damage.is_terminated(content)
    turn = _TURNS.get(_orientation(image))
    transparent = colour.is_transparent(image)
    rgb, converted = colour.to_srgb(image)
    plain = mode == "RGB" and turn is None and not transparent and not converted and whole
    upright = rgb if turn is None else rgb.transpose(turn)
    return DecodedImage(upright, extension, mode, plain, jpeg_quality(tables))


def _check_tiff(image: Image.Image) -> None:
    """Refuse the TIFFs that Pillow opens and reads wrongly."""
    tags: Any = getattr(image, "tag_v2", {})
    bits, samples = set(tags.get(colour.BITS, (1,))), tags.get(colour.SAMPLE_FORMAT, (1,))
    fault = ""
    if _DNG_VERSION in tags:
        fault = "dng"  # its first image is a preview
    elif tags.get(_PLANAR) == _SEPARATE and max(bits) > 8:
        fault = "tif: planes of more than 8 bits"
    elif max(bits) <= 8 and 2 in samples:
        fault = "tif: 8 bits, signed"
    elif image.mode in {"I", "F"} and tags.prefix == TiffImagePlugin.MM and tags.get(_COMPRESSION, 1) != 1:
        fault = "tif: big-endian, compressed, more than 16 bits or signed"  # Pillow swaps what libtiff has swapped
    if fault:
        raise RejectedImageError(DropReason.UNSUPPORTED_FORMAT, fault)


def _tiff_kind(content: bytes) -> str:
    """The pixels of a TIFF whose directory can be read, such as `64 bits, float`; empty if it cannot."""
    if content.startswith(b"MM\0+"):
        return "big-endian BigTIFF"
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if content[2] == 43 else 8])  # 43: BigTIFF
        file = io.BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
        bits, samples = tags[colour.BITS], tags.get(colour.SAMPLE_FORMAT, (1,))
    except Exception:  # broken tags raise nearly anything
        return ""
    return f"{'/'.join(map(str, bits))} bits, {_SAMPLES.get(samples[0], 'unknown values')}"


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # broken EXIF is no reason to lose the image
        return _UPRIGHT
    return value if isinstance(value, int) and 1 <= value <= 8 else _UPRIGHT


def crop_pixels(
    box: Box, width: int, height: int, margin: float, *, square: bool, clip: bool = True
) -> tuple[int, int, int, int] | None:
    """The crop for a relative box, in pixels of the upright image.

    Args:
        box: relative to the image.
        width: of the image in pixels.
        height: of the image in pixels.
        margin: added on each side, as a share of that side of the box.
        square: widen the shorter side to the longer one.
        clip: clip to the image; a widened side is shifted first. Otherwise the crop may extend beyond the image.

    Returns:
        left, top, right, bottom; None if the box is entirely outside the image.
    """
    left, right = sorted((box.left * width, box.right * width))
    top, bottom = sorted((box.top * height, box.bottom * height))
    left, right = left - margin * (right - left), right + margin * (right - left)
    top, bottom = top - margin * (bottom - top), bottom + margin * (bottom - top)
    if square:
        side = max(right - left, bottom - top)
        left, right = _widened(left, right, side, width if clip else None)
        top, bottom = _widened(top, bottom, side, height if clip else None)
    # tables hold float32: rounding must not push a boundary that is meant to be whole to the next pixel
    x0, y0 = math.floor(left + 1e-3), math.floor(top + 1e-3)
    x1, y1 = math.ceil(right - 1e-3), math.ceil(bottom - 1e-3)
    inner = max(0, x0), max(0, y0), min(width, x1), min(height, y1)
    if inner[2] <= inner[0] or inner[3] <= inner[1]:
        return None
    if clip:
        return inner
    if square:  # both sides were equal before rounding: make them equal again
        x1, y1 = x0 + max(x1 - x0, y1 - y0), y0 + max(x1 - x0, y1 - y0)
    return x0, y0, x1, y1


def _widened(low: float, high: float, side: float, limit: int | None) -> tuple[float, float]:
    middle = (low + high) / 2
    low, high = middle - side / 2, middle + side / 2
    if limit is None:
        return low, high
    if low < 0:
        low, high = 0.0, min(float(limit), side)
    elif high > limit:
        low, high = max(0.0, limit - side), float(limit)
    return low, high


#: Longest side that each encoder writes, in pixels.
LONGEST_SIDE = {"jpg": 65_500, "png": 2_147_483_647, "webp": 16_383}


def target_size(width: int, height: int, size: int, fit: str) -> tuple[int, int]:
    """Width and height of a packed image, in pixels.

    Args:
        width: of the crop in pixels.
        height: of the crop in pixels.
        size: target side in pixels; 0 keeps the size.
        fit: `stretch` resizes to size x size, `short-side` and `inside` (long side) resize that side to size and keep
            the aspect ratio.
    """
    if size == 0:
        return width, height
    if fit == "stretch":
        return size, size
    side = min(width, height) if fit == "short-side" else max(width, height)
    # integer division with halves rounded up: the size must not depend on float rounding
    return max(1, (2 * width * size + side) // (2 * side)), max(1, (2 * height * size + side) // (2 * side))


def resized(image: Image.Image, crop: tuple[int, int, int, int] | None, size: int, fit: str) -> Image.Image:
    """Crop and resize with Lanczos.

    Args:
        image: RGB image.
        crop: left, top, right, bottom in pixels; None for the whole image.
        size: as for `target_size`.
        fit: as for `target_size`.
    """
    # crop first: resampling with a box would blend in pixels around it
    cut = image if crop is None else image.crop(crop)
    target = target_size(*cut.size, size, fit)
    return cut if target == cut.size else cut.resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0)


def encode(image: Image.Image, extension: str, quality: int) -> bytes:
    """Encode an RGB image. The same pixels give the same bytes with the same library versions.

    Nothing but pixels is written: no profile, EXIF, comment or text.

    Args:
        image: RGB image.
        extension: `jpg`, `png` or `webp`.
        quality: of JPEG and WebP; 100 makes WebP lossless.
    """
    out = io.BytesIO()
    if image.info:  # encoders write parts of it into the file
        image = image.copy()
        image.info = {}
    if extension == "jpg":
        # full chroma: at the size of face crops, subsampling loses more quality than its bytes are worth
        image.save(out, "JPEG", quality=quality, subsampling="4:4:4" if quality >= 90 else "4:2:0")
    elif extension == "png":
        image.save(out, "PNG", compress_level=6)
    else:
        image.save(out, "WEBP", quality=quality, lossless=quality == 100, method=4)
    return out.getvalue()
