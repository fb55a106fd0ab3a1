"""Decode one image into a square of uint8 pixels, and the transforms that choose its crop and size.

libjpeg-turbo decodes JPEGs without a rotation at the smallest of 1/1, 1/2, 3/8, 1/4, 1/8 of their size that still
covers the requested resolution (other fractions have no fast inverse DCT and are slower than the next larger one).
OpenCV then resizes into the batch; both release the interpreter lock. Other files, and JPEGs that the fast decoder
warns about, are decoded by `animesion.images.codec`, which also decides what counts as an image. `augment` flips,
jitters and normalises whole batches.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg  # type: ignore[import-untyped]

from animesion.images import codec

Pixels = npt.NDArray[np.uint8]
Content = bytes | memoryview

_LIMITS = codec.Limits()

# factor of shrinkage above which two-tap interpolation visibly skips pixels
_SHARP = 2.0


def _before_fork() -> None:
    """Leave OpenCV in a state that a forked process can use: without threads, and known to the calling thread.

    A process forked while OpenCV has threads of its own waits for ever when it stops them, and a thread that is new to
    OpenCV waits for a lock that another one may have held at the fork.
    """
    global _threads
    _threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    cv2.resize(_PIXEL, (2, 2))


def _after_fork() -> None:
    cv2.setNumThreads(_threads)


_threads = 1
_PIXEL = np.zeros((1, 1, 3), dtype=np.uint8)
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)


class View(NamedTuple):
    """A box of an image, the size it is resized to, and the square that is cropped from the result; all in pixels.

    Attributes:
        left: left edge of the box.
        top: top edge of the box.
        width: width of the box.
        height: height of the box.
        to_width: width of the box after resizing.
        to_height: height of the box after resizing.
        x: left edge of the final square in the resized box.
        y: top edge of the final square in the resized box.
    """

    left: int
    top: int
    width: int
    height: int
    to_width: int
    to_height: int
    x: int
    y: int


class Transform(Protocol):
    """Chooses the view of an image."""

    @property
    def size(self) -> int:
        """Side of the resulting square, in pixels."""

    @property
    def numbers(self) -> int:
        """How many random numbers `view` needs."""

    @property
    def smooth(self) -> bool:
        """Whether to average over all pixels when shrinking (slower), instead of interpolating up to a factor of 2."""

    def view(self, width: int, height: int, u: Sequence[float]) -> View:
        """Choose the view of an image of `width` x `height` pixels, from `numbers` random numbers in [0, 1)."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect, resized to a square; torchvision's distribution and defaults.

    Attributes:
        size: side in pixels.
        scale: smallest and largest area, as a share of the image.
        ratio: smallest and largest width / height.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    smooth: bool = False

    _tries = 10

    @property
    def numbers(self) -> int:
        """Area and aspect for each try, then the position."""
        return 2 * self._tries + 2

    def view(self, width: int, height: int, u: Sequence[float]) -> View:
        """See `Transform.view`."""
        least, most = math.log(self.ratio[0]), math.log(self.ratio[1])
        w = h = 0
        for i in range(self._tries):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[2 * i])
            ratio = math.exp(least + (most - least) * u[2 * i + 1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int((width - w + 1) * u[-2]), int((height - h + 1) * u[-1])
                return View(left, top, w, h, self.size, self.size, 0, 0)
        # no try fits: the largest centred box with an allowed aspect
        w, h = width, height
        if width < self.ratio[0] * height:
            h = round(width / self.ratio[0])
        elif width > self.ratio[1] * height:
            w = round(height * self.ratio[1])
        return View((width - w) // 2, (height - h) // 2, w, h, self.size, self.size, 0, 0)


@dataclass(frozen=True)
class ResizeRandomCrop:
    """Resize to a slightly larger square, then crop a random square: the training transform of DAF:re.

    Attributes:
        size: side in pixels.
        margin: difference between the two sides, in pixels.
    """

    size: int
    margin: int = 32
    smooth: bool = False
    numbers: int = 2

    def view(self, width: int, height: int, u: Sequence[float]) -> View:
        """See `Transform.view`."""
        side = self.size + self.margin
        return View(0, 0, width, height, side, side, int((self.margin + 1) * u[0]), int((self.margin + 1) * u[1]))


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resize the shorter side, then crop the centre square.

    Attributes:
        size: side in pixels.
        share: side of the square as a share of the resized shorter side, in (0, 1].
    """

    size: int
    share: float = 0.875
    smooth: bool = True
    numbers: int = 0

    def view(self, width: int, height: int, u: Sequence[float]) -> View:
        """See `Transform.view`."""
        short = max(self.size, math.floor(self.size / self.share))
        to_width = max(short, short * width // height)
        to_height = max(short, short * height // width)
        x, y = round((to_width - self.size) / 2), round((to_height - self.size) / 2)
        return View(0, 0, width, height, to_width, to_height, x, y)


@dataclass(frozen=True)
class Resize:
    """Resize the whole image to a square, ignoring its aspect, and crop the centre.

    Attributes:
        size: side of the result in pixels.
        crop_pct: its share of the resized square's side, in (0, 1]: timm's `crop_pct` with its mode `squash`.
    """

    size: int
    crop_pct: float = 1.0
    smooth: bool = True
    numbers: int = 0

    def view(self, width: int, height: int, u: Sequence[float]) -> View:
        """See `Transform.view`."""
        side = max(self.size, int(self.size / self.crop_pct))
        offset = (side - self.size) // 2
        return View(0, 0, width, height, side, side, offset, offset)


@dataclass(frozen=True)
class Within:
    """Apply another transform inside a box of the image, such as a face.

    Attributes:
        inner: the transform inside the box.
        box: left, top, right, bottom in pixels of the upright image.
    """

    inner: Transform
    box: tuple[int, int, int, int]

    @property
    def size(self) -> int:
        """See `Transform.size`."""
        return self.inner.size

    @property
    def numbers(self) -> int:
        """See `Transform.numbers`."""
        return self.inner.numbers

    @property
    def smooth(self) -> bool:
        """See `Transform.smooth`."""
        return self.inner.smooth

    def view(self, width: int, height: int, u: Sequence[float]) -> View:
        """See `Transform.view`."""
        left, top, right, bottom = self.box
        view = self.inner.view(right - left, bottom - top, u)
        return view._replace(left=view.left + left, top=view.top + top)


def decode_into(
    out: Pixels,
    content: Content,
    transform: Transform,
    u: Sequence[float],
    plain: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Decode an image and write the view that the transform chooses.

    Args:
        out: shape (S, S, 3), contiguous; S is the size of the transform.
        content: content of the file.
        transform: chooses crop and size.
        u: random numbers for the transform.
        plain: what `plain_jpeg` returns for the content, if it is known.

    Returns:
        Width and height of the whole upright image in pixels.

    Raises:
        animesion.images.codec.RejectedImageError: the bytes are not a usable image.
    """
    pixels, view, width, height = decode_view(content, transform, u, plain)
    resize_view(out, pixels, view, width, height, transform.smooth)
    return width, height


def decode_view(
    content: Content, transform: Transform, u: Sequence[float], plain: tuple[int, int] | None = None
) -> tuple[Pixels, View, int, int]:
    """Decode an image as large as its view needs; arguments and errors are those of `decode_into`.

    Returns:
        Pixels of the upright image, whole or at a fraction of its size; the view; width and height of the whole image.
    """
    plain = plain or plain_jpeg(content)
    if plain is not None:
        width, height = plain
        view = transform.view(width, height, u)
        with contextlib.suppress(ValueError):  # then the general decoder decides
            pixels: Pixels = simplejpeg.decode_jpeg(
                content,
                "rgb",
                # the size at which the box still has the requested resolution
                min_height=min(height, -(-height * view.to_height // view.height)),
                min_width=min(width, -(-width * view.to_width // view.width)),
                min_factor=2,
            )
            return pixels, view, width, height
    pixels = np.asarray(codec.decode(bytes(content), _LIMITS).image)
    height, width = pixels.shape[:2]
    return pixels, transform.view(width, height, u), width, height


def resize_view(out: Pixels, pixels: Pixels, view: View, width: int, height: int, smooth: bool) -> None:
    """Write the view of an image that may have been decoded at a fraction of its `width` x `height`."""
    left, top, right, bottom = view.left, view.top, view.left + view.width, view.top + view.height
    rows, columns = pixels.shape[:2]
    if columns != width or rows != height:
        # from pixels of the full image to pixels of the decoded fraction; never empty
        left, right = left * columns // width, max(1, round(right * columns / width))
        top, bottom = top * rows // height, max(1, round(bottom * rows / height))
        left, top = min(left, right - 1), min(top, bottom - 1)
    part = pixels[top:bottom, left:right]
    shrinkage = max((right - left) / view.to_width, (bottom - top) / view.to_height)
    how = cv2.INTER_AREA if shrinkage > (1.0 if smooth else _SHARP) else cv2.INTER_LINEAR
    size = out.shape[0]
    if (view.to_width, view.to_height) == (size, size):
        cv2.resize(part, (size, size), out, interpolation=how)
    else:
        whole = cv2.resize(part, (view.to_width, view.to_height), interpolation=how)
        out[...] = whole[view.y : view.y + size, view.x : view.x + size]


def plain_jpeg(content: Content) -> tuple[int, int] | None:
    """Return width and height of a JPEG that is RGB or grey, not rotated and within limits; None for anything else.

    Only the header is read.
    """
    if content[:3] != b"\xff\xd8\xff" or _has_exif(content):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK") or max(width, height) > _LIMITS.max_side or width * height > _LIMITS.max_pixels:
        return None
    return width, height


def _has_exif(content: Content) -> bool:
    """Whether a JPEG has an EXIF segment, which may contain a rotation, before its tables."""
    place = 2  # behind the start-of-image marker
    while content[place : place + 1] == b"\xff" and 0xE0 <= content[place + 1] <= 0xFE:
        if content[place + 1] == 0xE1 and content[place + 4 : place + 8] == b"Exif":
            return True
        # marker, then the length of the segment, which includes itself
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if place + 4 > len(content):
            break
    return False
