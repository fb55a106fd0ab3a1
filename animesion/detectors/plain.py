"""Detectors without a trained model: the centre of an image, and a leaf on a plain background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from animesion.config.settings import Section
from animesion.schemas import Box

_LONGEST = 512
"""Longest side in pixels, roughly; a larger image is reduced by a whole factor."""

_LEAST = 0.005
"""Least share of the image that a leaf covers; less is dust."""


class CenterOptions(Section):
    """Options of the detector `center`."""

    share: float = Field(1.0, gt=0, le=1, strict=False, description="side of the box as a share of the image's")
    square: bool = Field(True, description="a square whose side is a share of the short side")


class Center:
    """One box in the middle, with score 1."""

    summary = "the centre of the image, a square by default"
    Options = CenterOptions

    def __init__(self, options: CenterOptions | None = None) -> None:
        self._options = options or CenterOptions()

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Return one box per image."""
        return [[self._box(*image.size)] for image in images]

    def _box(self, width: int, height: int) -> Box:
        share, short = self._options.share, min(width, height)
        wide, tall = (short, short) if self._options.square else (width, height)
        # whole pixels, so that rounding cannot make a square one pixel wider than tall
        wide, tall = max(1, int(wide * share)), max(1, int(tall * share))
        left, top = (width - wide) // 2, (height - tall) // 2
        return Box(left / width, top / height, (left + wide) / width, (top + tall) / height, 1.0)


class LeafOptions(Section):
    """Options of the detector `leaf`."""

    difference: int = Field(
        0,
        ge=0,
        le=255,
        description="least difference between leaf and background in grey levels; 0 for Otsu's threshold",
    )


class Leaf:
    """One box around everything that differs from the background.

    The background is the median colour of the image's border pixels. A pixel's difference from it is the largest of
    its three channels; the threshold is Otsu's unless it is given. A morphological opening removes stray pixels. The
    box covers the parts that are at least a tenth as large as the largest one, so that a leaf in several parts gives
    one box and dust gives none.

    The score is `1 - (mean difference of the background) / (mean difference of the leaf)`, 0 to 1: near 1 for a leaf
    on a plain background, about 0.5 and below if the background is not plain.
    """

    summary = "a leaf (or another single object) on a plain background"
    Options = LeafOptions

    def __init__(self, options: LeafOptions | None = None) -> None:
        self._options = options or LeafOptions()

    def __call__(self, images: Sequence[Image.Image], given: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """One box per image; none for an image that is all background."""
        return [self._boxes(image) for image in images]

    def _boxes(self, image: Image.Image) -> list[Box]:
        factor = max(1, max(image.size) // _LONGEST)
        small = image.reduce(factor) if factor > 1 else image
        pixels = np.asarray(small).astype(np.int16)
        rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        ground = np.median(rim, axis=0).astype(np.int16)
        away = np.abs(pixels - ground).max(2)  # (height, width), 0 to 255
        counts = np.bincount(away.reshape(-1), minlength=256)
        threshold = self._options.difference or otsu(counts)
        found = _components(_open(away >= threshold)) if threshold else []
        if not found or sum(size for size, _ in found) < _LEAST * away.size:
            return []
        largest = found[0][0]
        boxes = np.array([box for size, box in found if 10 * size >= largest])
        left, top = boxes[:, :2].min(0).tolist()
        right, bottom = boxes[:, 2:].max(0).tolist()
        inner, outer = away[away >= threshold].mean(), away[away < threshold]
        score = 1 - float(outer.mean() if outer.size else 0.0) / float(inner)
        width, height = image.size
        # the last block of a reduced image may be cut off
        right, bottom = min(1.0, right * factor / width), min(1.0, bottom * factor / height)
        return [Box(left * factor / width, top * factor / height, right, bottom, score)]


def otsu(counts: npt.NDArray[np.int64]) -> int:
    """Otsu's threshold (IEEE SMC 9, 1979): the level with the largest variance between the two classes.

    Args:
        counts: histogram; `counts[i]` is the number of pixels of level i.

    Returns:
        The lowest level of the upper class; 0 if all pixels have the same level.
    """
    levels = np.arange(len(counts), dtype=np.int64)
    below, n = np.cumsum(counts)[:-1], int(counts.sum())
    weighted = np.cumsum(counts * levels)[:-1]
    both = (below > 0) & (below < n)
    if not both.any():
        return 0
    total = int((counts * levels).sum())
    variance = np.zeros(len(below))  # between the classes, up to a factor
    variance[both] = (total * below[both] / n - weighted[both]) ** 2 / (below[both] * (n - below[both]))
    best = np.flatnonzero(variance == variance.max())
    return int(best[(len(best) - 1) // 2]) + 1  # the middle of the gap between the classes


def _open(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Morphological opening with a 3x3 square: removes parts that are thinner than three pixels."""
    if min(mask.shape) < 3:
        return mask
    return _dilate(~_dilate(~mask))


def _dilate(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Morphological dilation with a 3x3 square, first along the rows and then along the columns."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    found = wide.copy()
    found[:, 1:] |= wide[:, :-1]
    found[:, :-1] |= wide[:, 1:]
    return found


def _components(mask: npt.NDArray[np.bool_]) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Connected components (8-neighbourhood) as number of pixels and box (left, top, right, bottom), largest first.

    Union-find over runs: horizontal stretches of set pixels, in row order.
    """
    # 1 where a run starts, -1 one pixel after its end
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    above = 0  # the first run of the previous row that may still touch the current run
    for i, (row, start, end) in enumerate(runs):
        while above < i and (runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] < start)):
            above += 1
        j = above
        while j < i and runs[j][0] == row - 1 and runs[j][1] <= end:  # diagonal neighbours count
            parent[root(j)] = root(i)
            j += 1
    parts: dict[int, list[int]] = {}
    for i, (row, start, end) in enumerate(runs):
        part = parts.setdefault(root(i), [0, start, row, end, row + 1])
        part[0] += end - start
        part[1], part[3], part[4] = min(part[1], start), max(part[3], end), row + 1
    return sorted(((size, (a, b, c, d)) for size, a, b, c, d in parts.values()), reverse=True)
