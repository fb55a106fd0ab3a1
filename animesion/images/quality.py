"""Quality figures of an image: sharpness, exposure, colour, compression, borders, comic and text pages.

All figures are computed from one reduced copy of the decoded image. The limits are part of the recipe (`[quality]`) and
are applied by `animesion.pipeline.curate`, so a changed limit does not decode any image again.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from animesion.schemas import DropReason

if TYPE_CHECKING:
    from animesion.config.recipe import QualitySection

_LONGEST = 512
"""An image is reduced by an integer so that its longest side is at least this and below twice this, in pixels."""

COLOURED = 64
"""For chroma the copy is reduced once more, so that its longest side is at least this and below twice this."""

FLAT = 12
"""Largest range of grey levels within a row that counts as plain; JPEG artefacts reach as much."""

_COLOUR = 10
"""Levels by which the pixels of a border may differ from its colour, in each channel."""

_LINE = 0.06
"""Maximum height of a line of text, as a share of the image's height."""

_PANEL = 0.12
"""Minimum side of a comic's panel, as a share of the image's side."""

_DEPTH = 4
"""Maximum depth of the recursive cuts of a page: rows, columns within a row, and so on."""

#: The luminance table of the JPEG standard, annex K, which encoders scale by their quality. Its order does not matter.
_STANDARD = np.array(
    [
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
        51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121,
        120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ],
    dtype=np.int64,
)  # fmt: skip

#: Powers 0, 1 and 2 of each grey level, shape (256, 3).
_MOMENTS = np.arange(256, dtype=np.int64)[:, None] ** np.arange(3)

#: Weights of red, green and blue in Cb and in Cr (ITU-R BT.601), in millionths.
_TINTS = ((-168_736, -331_264, 500_000), (500_000, -418_688, -81_312))

_PAIRS = tuple(itertools.combinations_with_replacement(range(3), 2))

#: Weight of the covariance of each pair of channels in the summed variances of Cb and Cr, in 10^-12.
_RR, _RG, _RB, _GG, _GB, _BB = ((1 if a == b else 2) * sum(tint[a] * tint[b] for tint in _TINTS) for a, b in _PAIRS)

_Grey = npt.NDArray[np.uint8]
_Extremes = tuple[_Grey, _Grey]


def _sums() -> npt.NDArray[np.int64]:
    """Sum of the standard table at each quality from 1 to 100, scaled as in the IJG library; shape (100,)."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    found: npt.NDArray[np.int64] = ((_STANDARD[None] * scale[:, None] + 50) // 100).clip(1, 255).sum(1)
    return found


_SUMS = _sums()


class Figures(NamedTuple):
    """Quality figures of an image; columns of `animesion.schemas.FEATURES`.

    Attributes:
        sharpness: variance of the Laplacian of the grey copy, in squared levels; 0 for a plain image.
        light: 99% of the pixels have at most this grey level, 0 to 255.
        dark: 95% of the pixels have at least this grey level, 0 to 255.
        contrast: standard deviation of the grey levels, 0 to 127.5.
        chroma: root of the summed variances of Cb and Cr, in levels; 0 for grey and for any single tint.
        border: share of the image that plain bars along its edges take, 0 to 1.
        panels: number of parts that plain gutters divide the image into; 1 for an image that is not a comic page.
        lines: number of runs of rows that look like a line of text: short, and plain above and below.
    """

    sharpness: float
    light: int
    dark: int
    contrast: float
    chroma: float
    border: float
    panels: int
    lines: int


#: Columns of `animesion.schemas.FEATURES` that have limits.
COLUMNS = ("jpeg_quality", *Figures._fields)


def reduction(size: tuple[int, int], longest: int = _LONGEST) -> int:
    """The largest integer k that leaves at least `longest` pixels of the longest side when it is divided by k, or 1."""
    return max(1, max(size) // longest)


def reduced(image: Image.Image, longest: int = _LONGEST) -> Image.Image:
    """The image averaged over blocks of k x k pixels, with k from `reduction`; the image itself if k is 1."""
    factor = reduction(image.size, longest)
    return image.reduce(factor) if factor > 1 else image


def measure(image: Image.Image) -> Figures:
    """All figures of an image.

    They are measured on the `reduced` copy with a longest side of 512 px or just above, and chroma on one of 64 px or
    just above. Smaller images are not resized. Integer arithmetic makes the figures the same on every machine.

    Args:
        image: upright, mode RGB.
    """
    small = reduced(image)
    return figures(small, small.convert("L"))


def figures(small: Image.Image, grey: Image.Image) -> Figures:
    """The figures of `measure`, from the reduced copy.

    Args:
        small: the copy of `reduced`, mode RGB.
        grey: the same in mode L.
    """
    luma = np.asarray(grey)
    counts = grey.histogram()
    below = list(itertools.accumulate(counts))  # pixels at or below each level
    n = below[-1]
    return Figures(
        variance(*_edges(luma)),
        bisect.bisect_left(below, -(-99 * n // 100)),
        bisect.bisect_left(below, n // 20 + 1),
        variance(*(np.array(counts, dtype=np.int64) @ _MOMENTS).tolist()) ** 0.5,
        chroma(*_tints(reduced(small, COLOURED))),
        *layout(luma),
    )


def layout(luma: _Grey) -> tuple[float, int, int]:
    """The figures `border`, `panels` and `lines` of grey levels; 0, 1 and 0 if no row and no column is plain.

    Args:
        luma: shape (height, width).
    """
    rows, columns = _extremes(luma, 1), _extremes(luma, 0)
    flat_rows, flat_columns = _flat(rows), _flat(columns)
    height, width = luma.shape
    left, top, right, bottom = _inside(luma, rows, columns) or (0, 0, width, height)
    border = 1 - (right - left) * (bottom - top) / luma.size
    return border, _panels(luma, flat_rows, flat_columns), _lines(flat_rows)


def jpeg_quality(tables: Mapping[int, Sequence[int]]) -> int:
    """The quality, 1 to 100, whose standard luminance table has the nearest sum; -1 without a usable table.

    Args:
        tables: quantisation tables by id, as in Pillow; 0 is the one of luminance.
    """
    luminance = tables.get(0)
    if luminance is None or len(luminance) != 64:
        return -1
    return _nearest(sum(luminance))


@functools.lru_cache(maxsize=1024)  # files share tables: the search takes longer than a look-up
def _nearest(total: int) -> int:
    """The quality whose standard table has the sum nearest to `total`."""
    return int(np.abs(_SUMS - total).argmin()) + 1


def trimmed(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The part of an image inside the plain bars along its edges.

    A bar is a run of whole rows or columns of one colour, up to JPEG artefacts. The search has two steps: it finds the
    bars on the reduced copy, then locates their edges on the full image.

    Returns:
        left, top, right, bottom in pixels; None if there are no bars, or if bars cover the whole image.
    """
    width, height = image.size
    factor = reduction(image.size)
    small = reduced(image)
    grey = np.asarray(small.convert("L"))
    rough = _inside(grey, _extremes(grey, 1), _extremes(grey, 0))
    if rough is None:
        return None
    pixels = np.asarray(image)
    # a block that a bar shares with the image is not plain, so the true edge is at most one block beyond the rough one
    far = small.width - rough[2], small.height - rough[3]  # blocks of the right and the bottom bar
    last = width % factor or factor, height % factor or factor  # pixels of the last, possibly partial block
    top = _bar(pixels, rough[1] * factor, factor)
    bottom = height - _bar(pixels[::-1], last[1] + (far[1] - 1) * factor if far[1] else 0, factor)
    if bottom <= top:
        return None
    columns = pixels[top:bottom].transpose(1, 0, 2)
    left = _bar(columns, rough[0] * factor, factor)
    right = width - _bar(columns[::-1], last[0] + (far[0] - 1) * factor if far[0] else 0, factor)
    found = (left, top, right, bottom)
    return found if right > left and found != (0, 0, width, height) else None


def reason(figures: Mapping[str, Any], limits: QualitySection) -> tuple[str, str]:
    """The first drop reason for the figures, with the value as its detail; two empty strings if there is none.

    Args:
        figures: columns of `animesion.schemas.FEATURES`; a figure that is None was not measured and drops nothing.
        limits: limits of the recipe; 0 switches a limit off.
    """
    for check in checks(limits):
        value = figures.get(check.column)
        if value is not None and check.beyond(value):
            return check.reason, f"{check.column} {value:.4g}"
    return "", ""


class Check(NamedTuple):
    """A limit on a figure.

    Attributes:
        reason: drop reason of an image beyond the limit.
        column: the figure.
        limit: the limit, not 0.
        sign: 1 for a largest figure, -1 for a smallest one.
    """

    reason: DropReason
    column: str
    limit: float
    sign: int

    def beyond(self, value: Any) -> Any:
        """Whether a figure, or each of an array of them in double precision, is beyond the limit."""
        # tables hold float32: a figure that equals its limit must pass
        beyond = self.sign * (value - self.limit) > 1e-6 * max(1.0, abs(self.limit))
        return beyond & (value >= 0) if self.column == "jpeg_quality" else beyond


def checks(limits: QualitySection) -> list[Check]:
    """The limits of a recipe, in the order in which they are checked; without those that are switched off."""
    every = (
        Check(DropReason.TOO_DARK, "light", limits.min_light, -1),
        Check(DropReason.TOO_BRIGHT, "dark", limits.max_dark, 1),
        Check(DropReason.BLANK, "contrast", limits.min_contrast, -1),
        Check(DropReason.BLURRED, "sharpness", limits.min_sharpness, -1),
        Check(DropReason.GREYSCALE, "chroma", limits.min_chroma, -1),
        Check(DropReason.HEAVY_COMPRESSION, "jpeg_quality", limits.min_jpeg_quality, -1),
        Check(DropReason.BORDERS, "border", limits.max_border, 1),
        Check(DropReason.COMIC_PAGE, "panels", limits.max_panels, 1),
        Check(DropReason.TEXT_PAGE, "lines", limits.max_lines, 1),
    )
    return [check for check in every if check.limit]


def variance(n: int, total: int, squares: int) -> float:
    """Variance from a number of values, their sum and the sum of their squares; 0 if there are none.

    Exact up to the final division.
    """
    return (n * squares - total * total) / (n * n) if n else 0.0


def chroma(n: int, totals: Sequence[int], products: Sequence[int]) -> float:
    """Root of the summed variances of Cb and Cr (ITU-R BT.601, as in JPEG), in levels.

    Cb and Cr are linear in red, green and blue, so their variances follow from the covariances of the channels.

    Args:
        n: number of pixels.
        totals: sums of red, green and blue.
        products: sums of their products, in the order rr rg rb gg gb bb.
    """
    rr, rg, rb, gg, gb, bb = products
    red, green, blue = totals
    # integers of any size: n^2 times the variance is exact, and only the last line rounds
    within = _RR * rr + _RG * rg + _RB * rb + _GG * gg + _GB * gb + _BB * bb
    means = red * (_RR * red + _RG * green + _RB * blue) + green * (_GG * green + _GB * blue) + _BB * blue * blue
    spread = n * within - means
    return float((spread / (n * n)) ** 0.5 / 1_000_000)


def _tints(image: Image.Image) -> tuple[int, list[int], list[int]]:
    """The arguments of `chroma`: number of pixels, sums of the channels, sums of their products."""
    channels = np.asarray(image).reshape(-1, 3).T.astype(np.float64, order="C")  # (3, pixels)
    # integers below 2^53: exact in any order of summation
    products = [int(channels[a] @ channels[b]) for a, b in _PAIRS]
    return channels.shape[1], [int(total) for total in channels.sum(axis=1)], products


def _edges(grey: _Grey) -> tuple[int, int, int]:
    """Number of pixels, sum and sum of squares of the Laplacian, without the pixels on the image's edge."""
    height, width = grey.shape
    if min(height, width) < 3:
        return 0, 0, 0
    # the image as one row of height * width pixels, which is faster; values that wrap around an edge are removed below
    line = grey.astype(np.int16).ravel()
    size = (height - 2) * width - 2  # from the first inner pixel to the last one
    first = width + 1
    around = line[first - width :][:size] + line[first + width :][:size]
    around += line[first - 1 :][:size]
    around += line[first + 1 :][:size]
    around -= line[first:][:size] << 2
    # starting at column 1, the two columns that wrap around are the last two of each row; float64 for the dot product
    square = np.empty((height - 2) * width)
    square[:size] = around
    inside = square.reshape(height - 2, width)[:, : width - 2].ravel()
    # integers below 2^53: exact in any order of summation
    return inside.size, int(inside.sum()), int(inside @ inside)


def _extremes(grey: _Grey, axis: int) -> _Extremes:
    """Minimum and maximum level of each row (axis 1) or column (axis 0)."""
    return grey.min(axis), grey.max(axis)


def _flat(levels: _Extremes) -> npt.NDArray[np.bool_]:
    """Which rows or columns are plain, from their extremes."""
    found: npt.NDArray[np.bool_] = levels[1] - levels[0] <= FLAT
    return found


def _runs(busy: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and end of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], busy, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _inside(grey: _Grey, rows: _Extremes, columns: _Extremes) -> tuple[int, int, int, int] | None:
    """The part inside the plain bars: left, top, right, bottom; None if nothing is left."""
    top, bottom = _span(rows)
    if bottom == top:
        return None
    # columns are judged between the bars at top and bottom: these would make every column look busy
    left, right = _span(columns if (top, bottom) == (0, len(grey)) else _extremes(grey[top:bottom], 0))
    return (left, top, right, bottom) if right > left else None


def _span(levels: _Extremes) -> tuple[int, int]:
    """Range of the rows or columns that are not part of a bar of one level, as start and end."""
    plain = _flat(levels)
    start, end = 0, len(plain)
    if not plain[0] and not plain[-1]:
        return start, end
    middle = (levels[1].astype(np.int16) + levels[0]) // 2
    while start < end and plain[start] and abs(int(middle[start]) - int(middle[0])) <= _COLOUR:
        start += 1
    while end > start and plain[end - 1] and abs(int(middle[end - 1]) - int(middle[-1])) <= _COLOUR:
        end -= 1
    return start, end


def _bar(pixels: npt.NDArray[np.uint8], known: int, more: int) -> int:
    """Number of rows of one colour at the start.

    Args:
        pixels: shape (rows, pixels, 3).
        known: rows that are already known to belong to the bar.
        more: maximum number of further rows to check.
    """
    colour = np.median(pixels[0], axis=0).astype(np.int16)
    for row in range(known, min(known + more, len(pixels))):
        if (np.abs(pixels[row].astype(np.int16) - colour) > _COLOUR).any():
            return row
    return min(known + more, len(pixels))


def _panels(grey: _Grey, rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]) -> int:
    """Number of parts of a page, cut recursively along plain gutters; thin slivers do not count.

    Args:
        grey: the page, shape (height, width).
        rows: which of its rows are plain, shape (height,).
        columns: which of its columns are plain, shape (width,).
    """
    if not rows.any() and not columns.any():
        return 1
    height, width = grey.shape
    return _parts(grey, (max(8, int(_PANEL * height)), max(8, int(_PANEL * width))), 1, 0, _DEPTH)


def _parts(page: _Grey, least: tuple[int, int], axis: int, failed: int, depth: int) -> int:
    """Number of parts of a piece of a page.

    Args:
        page: the piece, shape (height, width).
        least: minimum height and width of a part.
        axis: 1 to cut into rows, 0 to cut into columns.
        failed: number of axes tried without a cut; after both, the piece is one part.
        depth: remaining depth of the recursion.
    """
    if depth == 0 or failed == 2:
        return 1
    plain = _flat(_extremes(page, axis))
    runs = [run for run in _runs(~plain) if run[1] - run[0] >= least[1 - axis]]
    if len(runs) < 2:
        return _parts(page, least, 1 - axis, failed + 1, depth)
    pieces = (page[start:end] if axis else page[:, start:end] for start, end in runs)
    return sum(_parts(piece, least, 1 - axis, 0, depth - 1) for piece in pieces)


def _lines(plain: npt.NDArray[np.bool_]) -> int:
    """Number of short runs of rows with plain rows above and below.

    Args:
        plain: which rows are plain, shape (height,).
    """
    if not plain.any():
        return 0
    most = max(2, int(_LINE * len(plain)))
    return sum(start > 0 and end < len(plain) and 2 <= end - start <= most for start, end in _runs(~plain))
