"""Local features of an image: up to 200 SIFT points, each with a binary code of its neighbourhood.

Two images show the same drawing where many of their points have similar codes and one similarity transform maps the
points of one onto those of the other, whatever was cropped, turned, mirrored or laid over. `animesion.dedup.geometry`
verifies a pair of images, `animesion.dedup.joins` finds candidates among many.

The 128 values of a SIFT descriptor (Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", 2004), as square
roots (Arandjelović and Zisserman, "Three things everyone should know to improve object retrieval", 2012), are projected
on 64 directions, and a code has the sign of each. Half of the directions are even and half are odd under mirroring: the
code of a mirrored point is the code with its odd bits flipped, so mirror images need no features of their own.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:  # loading OpenCV takes longer than most commands
    import cv2

#: A point: its code, position and diameter in 1/256 pixel of the reduced copy, and direction in 1/65536 turn.
POINT = np.dtype([("code", "<u8"), ("x", "<u2"), ("y", "<u2"), ("size", "<u2"), ("angle", "<u2")])

Points = npt.NDArray[np.void]

#: Units of positions and diameters per pixel.
UNIT = 256

#: Bits of a code that mirroring flips.
MIRRORED_BITS = np.uint64(0xFFFFFFFF00000000)

#: The reduced copy has the area of a square of this side, and its longer side is at most `_LONGEST` pixels.
_SIDE, _LONGEST = 160, 240

#: Points per image: those with the strongest response.
_POINTS = 200

#: Descriptor value -> 16 times its square root.
_ROOTS = np.rint(16 * np.sqrt(np.arange(256))).astype(np.float64)


def version() -> str:
    """Version of the features, with that of OpenCV, on which they depend."""
    try:
        return f"local-1/opencv-{installed('opencv-python-headless')}"
    except PackageNotFoundError:  # another package has the module
        import cv2

        return f"local-1/opencv-{cv2.__version__}"


def frame(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels of the reduced copy, in which the points of an image are measured.

    Args:
        size: width and height of the image.
    """
    width, height = size
    scale = min(_SIDE / (width * height) ** 0.5, _LONGEST / max(width, height))
    return max(16, round(scale * width)), max(16, round(scale * height))


def extract(image: Image.Image) -> Points:
    """The local features of an image, strongest response first.

    The same version of OpenCV gives the same features, whatever the number of threads or workers.

    Args:
        image: upright, mode RGB or L.

    Returns:
        Shape (n,) of dtype `POINT`, n at most 200. A plain image has none.
    """
    import cv2

    size = frame(image.size)
    smaller = size[0] * size[1] < image.width * image.height
    kind = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
    grey = np.asarray(image.convert("L").resize(size, kind))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # a process per core already uses every core
    try:
        found, descriptors = _detector().detectAndCompute(grey, None)
    finally:
        cv2.setNumThreads(threads)
    if descriptors is None:
        return np.empty(0, dtype=POINT)
    # OpenCV keeps ties of the last response: any order of them is as good, but it must be the same one everywhere
    order = sorted(range(len(found)), key=lambda i: (-found[i].response, *found[i].pt, found[i].size, found[i].angle))
    order = order[:_POINTS]
    chosen = [found[i] for i in order]
    points = np.empty(len(chosen), dtype=POINT)
    points["code"] = _codes(descriptors[order].astype(np.uint8))
    for name, values in (
        ("x", [point.pt[0] * UNIT for point in chosen]),
        ("y", [point.pt[1] * UNIT for point in chosen]),
        ("size", [point.size * UNIT for point in chosen]),
    ):
        points[name] = np.clip(np.rint(values), 0, 65535)
    points["angle"] = np.rint(np.array([point.angle for point in chosen]) / 360 * 65536).astype(np.int64) % 65536
    return points


@functools.cache
def _detector() -> cv2.SIFT:
    import cv2

    # `enable_precise_upscale`: positions are otherwise off by a quarter of a pixel, to one side
    return cv2.SIFT.create(_POINTS, 3, 0.02, 10, 1.6, True)


@functools.cache
def _basis() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The directions, whole numbers of shape (128, 64), and the threshold of each for a descriptor of unit length."""
    with importlib.resources.files("animesion.images").joinpath("local_basis.npz").open("rb") as file:
        loaded = np.load(file)
        return loaded["directions"].astype(np.float64), loaded["thresholds"]


def _codes(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The codes of descriptors of shape (n, 128), shape (n,)."""
    directions, thresholds = _basis()
    # whole numbers below 2^53: the sums are exact, in whatever order a library takes them
    projected = _ROOTS[values] @ directions  # (n, 64)
    # the square roots of a descriptor have a length of the root of its sum: compared without dividing
    length = np.sqrt(values.sum(axis=1, dtype=np.float64, keepdims=True))
    bits = projected > length * thresholds
    codes: npt.NDArray[np.uint64] = np.packbits(bits, axis=1, bitorder="little").view("<u8").ravel()
    return codes


def from_bytes(content: bytes) -> Points:
    """The points in a row of a table, shape (n,)."""
    return np.frombuffer(content, dtype=POINT)


@dataclass(frozen=True)
class PointSets:
    """The local features of n images, one after another.

    Attributes:
        points: shape (p,).
        ends: shape (n,), where those of each image end.
        known: shape (n,), whether the features of an image are known; one without features has none that are.
    """

    points: Points
    ends: npt.NDArray[np.int64]
    known: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, sets: Sequence[Points]) -> PointSets:
        """Known features of some images."""
        ends = np.cumsum([len(each) for each in sets], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, POINT), *sets]), ends, np.ones(len(sets), dtype=np.bool_))

    @classmethod
    def empty(cls, lengths: npt.NDArray[np.int64], known: npt.NDArray[np.bool_]) -> PointSets:
        """Room for features, which are set afterwards.

        Args:
            lengths: shape (n,), the number of features of each image.
            known: shape (n,).
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(np.empty(int(ends[-1]) if len(ends) else 0, POINT), ends, known)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> Points | None:
        """The features of an image; None if they are not known."""
        return self.points[self.ends[row - 1] if row else 0 : self.ends[row]] if self.known[row] else None

    def set(self, rows: Iterable[int], contents: Iterable[bytes | None]) -> None:
        """Set the features of some images, as tables have them."""
        for row, content in zip(rows, contents, strict=True):
            if content:
                self.points[self.ends[row] - len(content) // POINT.itemsize : self.ends[row]] = from_bytes(content)


def mirrored(points: Points, width: int) -> Points:
    """The points of the mirror image.

    Args:
        points: shape (n,).
        width: of the reduced copy, see `frame`.
    """
    turned = points.copy()
    last = (width - 1) * UNIT
    turned["x"] = np.clip(last - points["x"].astype(np.int64), 0, 65535)
    turned["angle"] = (32768 - points["angle"].astype(np.int64)) % 65536
    turned["code"] = points["code"] ^ MIRRORED_BITS
    return turned
