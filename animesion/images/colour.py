"""Bring every mode, depth, profile and transparency to 8-bit sRGB.

- An embedded ICC profile is applied. One that is sRGB leaves the values as they are, and one that is broken or of
  another colour space than the pixels is ignored.
- Grey levels of more than 8 bits are scaled by their range, never clipped.
- Transparency is composited on white; on black if the ink is as white as that.
"""

from __future__ import annotations

import functools
import io
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from animesion.images.formats import RejectedImageError
from animesion.schemas import DropReason

#: Modes of Pillow with an alpha channel.
_ALPHA = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})

#: Colour space in the header of a profile -> the mode of Pillow whose pixels it describes.
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}

_SAME = 3
"""A profile is sRGB if it changes no value of the probe by more than this, in levels."""

_WHITE_INK = 240
"""Mean luminance, weighted by opacity, from which ink is as light as a white ground."""

_FAINT = 8.0
"""Standard deviation of the grey levels below which light ink cannot be seen on white."""

_PALE = 224
"""If no pixel is darker than this level on white, ink that is lighter than mid-grey is seen better on black."""

_MIDDLE = 128

_BLANK = 2
"""Largest range of levels, in each channel, of a composited image that counts as blank."""

BITS, _PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO = 0
_UNSIGNED = 1

_Grey = npt.NDArray[np.uint8]


def is_transparent(image: Image.Image) -> bool:
    """Whether the image has an alpha channel or a transparent colour."""
    return image.mode in _ALPHA or "transparency" in image.info


def to_srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Convert a loaded image to sRGB.

    Returns:
        The image in mode RGB, without metadata; and whether a profile changed its values.

    Raises:
        RejectedImageError: blank: one colour once transparency is composited, or no range of values.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "RGB" and not profile and "transparency" not in image.info:
        return _bare(image), False
    alpha = None
    if image.mode[0] in "IF":
        colours, alpha = _eight_bits(image)
    elif is_transparent(image):
        colours, alpha = _split(image)
    else:
        colours = image.convert("RGB") if image.mode in {"P", "YCbCr", "RGBX"} else image
        colours = colours.convert("L") if colours.mode == "1" else colours
    transform = _transform(profile, colours.mode) if isinstance(profile, bytes) and profile else None
    if transform is None and colours.mode == "LAB":
        transform = _from_lab()
    rgb = colours.convert("RGB") if transform is None else _applied(colours, transform)
    return _bare(rgb if alpha is None else _composite(rgb, alpha)), transform is not None


def _bare(image: Image.Image) -> Image.Image:
    """The image without metadata, which encoders would write into the next file."""
    image.info = {}
    return image


# -- profiles --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)  # CMYK profiles take half a megabyte each
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile to sRGB for pixels of a mode; None if the values are to be left as they are.

    The intent is perceptual, as in browsers and in Pillow's own `profileToProfile`: it is the one table that every
    printer's profile has. Profiles of displays and cameras are matrices, for which all intents agree.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = _built(source, mode)
        if mode == "CMYK":
            return transform
        changed = np.asarray(_applied(_probe(mode), transform), dtype=np.int16)
    except Exception:  # ImageCms raises several kinds of errors on malformed profiles
        return None
    same = np.abs(changed - np.asarray(_probe(mode).convert("RGB"))).max() <= _SAME
    return None if same else transform


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    if image.mode == "L":  # 256 colours: a table is exact and fast
        table = ImageCms.applyTransform(_probe("L"), transform)
        assert table is not None
        return Image.merge("RGB", [image.point(list(band.tobytes())) for band in table.split()])
    found = ImageCms.applyTransform(image, transform)
    assert found is not None  # None is returned for transforms in place only
    return found


def _built(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    target = ImageCms.createProfile("sRGB")
    # littlecms would interpolate a curve of grey levels between 33 points: 10 levels off in the shadows of linear ones
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    return ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags)


@functools.cache
def _from_lab() -> ImageCms.ImageCmsTransform:
    return _built(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")


@functools.cache
def _probe(mode: str) -> Image.Image:
    """All greys and, in mode RGB, a lattice of colours, to compare a profile with sRGB."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    lattice = list(itertools.product(range(0, 256, 15), repeat=3))  # (5832, 3)
    greys = [(level, level, level) for level in range(256)]
    return Image.fromarray(np.array([lattice + greys], dtype=np.uint8))


# -- depth -----------------------------------------------------------------------------------------------------------


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey levels of more than 8 bits as mode L, and the alpha channel of a transparent level, if there is one."""
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = _first(tags.get(BITS)) or 16
        grey = _scaled(np.arange(1 << 16), 0, (1 << min(bits, 16)) - 1)[values]
    else:
        if image.mode == "I" and _first(tags.get(SAMPLE_FORMAT, _UNSIGNED)) == _UNSIGNED:
            values = values.view(np.uint32)  # Pillow reads them as signed
        grey = _stretched(values.astype(np.float64))
    if _first(tags.get(_PHOTOMETRIC)) == _WHITE_IS_ZERO and image.format == "TIFF":
        grey = np.uint8(255) - grey  # Pillow inverts 8 bits and fewer only
    key = image.info.get("transparency")
    alpha = None if not isinstance(key, int) else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _scaled(values: npt.NDArray[Any], low: float, high: float) -> _Grey:
    """Values from low to high as levels from 0 to 255, rounded; those outside are clipped."""
    levels = np.rint((values - low) * (255 / (high - low)))
    return levels.clip(0, 255).astype(np.uint8)


def _stretched(values: npt.NDArray[np.float64]) -> _Grey:
    """Values without a nominal range: 0 to 1 is taken as such, any other range is stretched to 0 to 255.

    32-bit integers always are stretched, floats unless all are within 0 to 1. What is not finite becomes 0.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise RejectedImageError(DropReason.BLANK, "no finite value")
    low, high = float(values[finite].min()), float(values[finite].max())
    if low == high:
        raise RejectedImageError(DropReason.BLANK, f"every value is {low:g}")
    unit = low >= 0 and high <= 1
    low, high = (0.0, 1.0) if unit else (low, high)
    return _scaled(np.where(finite, values, low), low, high)


# -- transparency ----------------------------------------------------------------------------------------------------


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The colours, mode L or RGB, and the alpha channel."""
    if image.mode in {"LA", "La"} or (image.mode in {"L", "1"} and isinstance(image.info.get("transparency"), int)):
        grey = image.convert("LA")
        return grey.getchannel("L"), grey.getchannel("A")
    rgba = image.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _composite(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """Composite on white, or on black if the drawing cannot be seen on white and is nearly white itself.

    Raises:
        RejectedImageError: blank: one colour is left.
    """
    if alpha.getextrema()[0] == 255:
        return rgb
    rgba = rgb.convert("RGBA")
    rgba.putalpha(alpha)
    found = _on(rgba, 255)
    if _lost_on_white(found, alpha):
        found = _on(rgba, 0)
    ranges: Any = found.getextrema()
    if all(high - low <= _BLANK for low, high in ranges):
        raise RejectedImageError(DropReason.BLANK, "one colour once its transparency is composited")
    return found


def _on(rgba: Image.Image, level: int) -> Image.Image:
    ground = Image.new("RGBA", rgba.size, (level, level, level, 255))
    return Image.alpha_composite(ground, rgba).convert("RGB")


def _lost_on_white(composited: Image.Image, alpha: Image.Image) -> bool:
    """Whether ink and a white ground coincide.

    Args:
        composited: the image on white, mode RGB.
        alpha: its alpha channel.
    """
    levels = np.arange(256)
    counts = np.array(composited.convert("L").histogram())
    mean = float(counts @ levels / counts.sum())
    deviation = float(counts @ (levels - mean) ** 2 / counts.sum()) ** 0.5
    opacity = float(np.array(alpha.histogram()) @ levels) / (255 * counts.sum())  # mean of the alpha channel, 0 to 1
    if not opacity:
        return False
    ink = 255 - (255 - mean) / opacity  # on white, ink of luminance l and opacity a has the level 255 - a (255 - l)
    if deviation < _FAINT and ink >= _WHITE_INK:
        return True
    return bool(ink >= _MIDDLE and np.flatnonzero(counts)[0] >= _PALE)
