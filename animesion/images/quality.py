"""What an image is worth, in figures: sharpness, exposure, colour, compression, borders, comic and text pages.

One reduced copy of the decoded image gives them all; nothing is decoded twice. What is too little or too much is the
recipe's business (`[quality]`): `animesion.pipeline.curate` compares, so that a changed limit
asks nothing of the images.
"""

from __future__ import annotations

import bisect
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
"""An image is reduced by a whole number until its longest side is below twice this, in pixels: see `measure`."""

COLOURED = 64
"""For chroma the copy is reduced once more, until its longest side is below twice this."""

FLAT = 12
"""Grey levels between the lightest and the darkest pixel of a row that is called plain; JPEG adds as much."""

_COLOUR = 10
"""Levels by which the pixels of a border may differ from its colour, channel by channel."""

_LINE = 0.06
"""Tallest line of text, as a share of the image's height."""

_PANEL = 0.12
"""Least side of a comic's panel, as a share of the image's side."""

_DEPTH = 4
"""Cuts of a page, one within another: rows, columns within a row, and so on."""

#: The luminance table of the JPEG standard, annex K, whose scaling encoders call quality; only its multiset matters.
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

#: Weights of red, green and blue in Cb and in Cr, in millionths.
_TINTS = ((-168_736, -331_264, 500_000), (500_000, -418_688, -81_312))

_PAIRS = tuple(itertools.combinations_with_replacement(range(3), 2))

#: What the covariance of each pair of channels weighs in the summed variances of Cb and Cr.
_RR, _RG, _RB, _GG, _GB, _BB = ((1 if a == b else 2) * sum(tint[a] * tint[b] for tint in _TINTS) for a, b in _PAIRS)

_Grey = npt.NDArray[np.uint8]
_Extremes = tuple[_Grey, _Grey]


def _sums() -> npt.NDArray[np.int64]:
    """Sum of the scaled standard table at each quality from 1 to 100, as the IJG library scales it."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    found: npt.NDArray[np.int64] = ((_STANDARD[None] * scale[:, None] + 50) // 100).clip(1, 255).sum(1)
    return found


_SUMS = _sums()


class Figures(NamedTuple):
    """What is measured of an image; columns of `animesion.schemas.FEATURES`.

    Attributes:
        sharpness: variance of the Laplacian of the grey copy, in squared levels; 0 for a plain image.
        light: grey level that 99% of the pixels do not exceed, 0 to 255.
        dark: grey level that 95% of the pixels reach or exceed, 0 to 255.
        contrast: standard deviation of the grey levels, 0 to 127.5.
        chroma: root of the summed variances of Cb and Cr, in levels: 0 for grey and for any one tint.
        border: share of the image that plain bars along its edges take, 0 to 1.
        panels: parts that plain gutters cut the image into; 1 for an image that is not a comic page.
        lines: rows of the image that look like a line of text: short, and plain above and below.
    """

    sharpness: float
    light: int
    dark: int
    contrast: float
    chroma: float
    border: float
    panels: int
    lines: int


#: Columns of `animesion.schemas.FEATURES` that the limits look at.
COLUMNS = ("jpeg_quality", *Figures._fields)


def reduction(size: tuple[int, int], longest: int = _LONGEST) -> int:
    """The whole number k, at least 1, by which images are reduced so that the longest side is `longest` or above."""
    return max(1, max(size) // longest)


def reduced(image: Image.Image, longest: int = _LONGEST) -> Image.Image:
    """The image averaged over blocks of k x k pixels, k as `reduction` gives it; itself where that is 1."""
    factor = reduction(image.size, longest)
    return image.reduce(factor) if factor > 1 else image


def measure(image: Image.Image) -> Figures:
    """All figures of an image.

    Measured on the `reduced` copy, whose longest side is brought to 512 px or just above, and chroma on one of 64 px or
    just above; smaller images are taken as they are. Arithmetic is on whole numbers, so the figures are the same on
    every machine.

    Args:
        image: upright, mode RGB.
    """
    small = reduced(image)
    return figures(small, small.convert("L"))


def figures(small: Image.Image, grey: Image.Image) -> Figures:
    """What `measure` gives, from the copy that `reduced` gives.

    Args:
        small: mode RGB.
        grey: the same in mode L.
    """
    luma = np.asarray(grey)
    counts = grey.histogram()
    below = list(itertools.accumulate(counts))
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
    """The figures `border`, `panels` and `lines` of grey levels; 0, 1 and 0 where no row and no column is `FLAT`."""
    rows, columns = _extremes(luma, 1), _extremes(luma, 0)
    flat_rows, flat_columns = _flat(rows), _flat(columns)
    height, width = luma.shape
    left, top, right, bottom = _inside(luma, rows, columns) or (0, 0, width, height)
    border = 1 - (right - left) * (bottom - top) / luma.size
    return border, _panels(luma, flat_rows, flat_columns), _lines(flat_rows)


def jpeg_quality(tables: Mapping[int, Sequence[int]]) -> int:
    """The quality, 1 to 100, whose standard luminance table is nearest by its sum; -1 without a usable table.

    Args:
        tables: quantisation tables by id as Pillow gives them; 0 is that of luminance.
    """
    luminance = tables.get(0)
    if luminance is None or len(luminance) != 64:
        return -1
    return int(np.abs(_SUMS - sum(luminance)).argmin()) + 1


def trimmed(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The image without the plain bars along its edges: left, top, right, bottom in pixels; None if there are none.

    A bar is a run of whole rows or columns of one colour that JPEG may have disturbed a little. An image that is
    nothing but bar is left as it is.
    """
    width, height = image.size
    factor = reduction(image.size)
    small = reduced(image)
    grey = np.asarray(small.convert("L"))
    rough = _inside(grey, _extremes(grey, 1), _extremes(grey, 0))
    if rough is None:
        return None
    pixels = np.asarray(image)
    # a block that a bar shares with the image is not plain, so the true edge lies within one block of the rough one
    far = small.width - rough[2], small.height - rough[3]
    last = width % factor or factor, height % factor or factor  # pixels of the last block
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
    """The first drop reason that the figures give and the value as its detail, or two empty strings.

    Args:
        figures: columns of `animesion.schemas.FEATURES`; a figure that is None was not measured and drops nothing.
        limits: the recipe's; 0 switches a limit off.
    """
    checks = (
        (DropReason.TOO_DARK, "light", limits.min_light, -1),
        (DropReason.TOO_BRIGHT, "dark", limits.max_dark, 1),
        (DropReason.BLANK, "contrast", limits.min_contrast, -1),
        (DropReason.BLURRED, "sharpness", limits.min_sharpness, -1),
        (DropReason.GREYSCALE, "chroma", limits.min_chroma, -1),
        (DropReason.HEAVY_COMPRESSION, "jpeg_quality", limits.min_jpeg_quality, -1),
        (DropReason.BORDERS, "border", limits.max_border, 1),
        (DropReason.COMIC_PAGE, "panels", limits.max_panels, 1),
        (DropReason.TEXT_PAGE, "lines", limits.max_lines, 1),
    )
    for name, column, limit, sign in checks:
        value = figures.get(column)
        if not limit or value is None or (column == "jpeg_quality" and value < 0):
            continue
        # tables hold float32: a figure that equals its limit must pass
        if sign * (value - limit) > 1e-6 * max(1.0, abs(limit)):
            return name, f"{column} {value:.4g}"
    return "", ""


def variance(n: int, total: int, squares: int) -> float:
    """Variance from a number of values, their sum and the sum of their squares; 0 of none.

    Exact until the last division.
    """
    return (n * squares - total * total) / (n * n) if n else 0.0


def chroma(n: int, totals: Sequence[int], products: Sequence[int]) -> float:
    """Root of the summed variances of Cb and Cr (of ITU-R BT.601, as JPEG has them), in levels.

    Args:
        n: number of pixels.
        totals: sums of red, green and blue.
        products: sums of their products, in the order rr rg rb gg gb bb.
    """
    rr, rg, rb, gg, gb, bb = products
    red, green, blue = totals
    within = _RR * rr + _RG * rg + _RB * rb + _GG * gg + _GB * gb + _BB * bb
    means = red * (_RR * red + _RG * green + _RB * blue) + green * (_GG * green + _GB * blue) + _BB * blue * blue
    spread = n * within - means
    return float((spread / (n * n)) ** 0.5 / 1_000_000)


def _tints(image: Image.Image) -> tuple[int, list[int], list[int]]:
    """What `chroma` takes."""
    channels = np.asarray(image).reshape(-1, 3).T.astype(np.float64, order="C")
    # whole numbers below 2^53: exact in whatever order they are summed
    products = [int(channels[a] @ channels[b]) for a, b in _PAIRS]
    return channels.shape[1], [int(total) for total in channels.sum(axis=1)], products


def _edges(grey: _Grey) -> tuple[int, int, int]:
    """Of the Laplacian inside: number of pixels, sum, sum of the squares."""
    height, width = grey.shape
    if min(height, width) < 3:
        return 0, 0, 0
    # as one row, which is quicker; what reaches around the image's edge is left out at the end
    line = grey.astype(np.int16).ravel()
    size = (height - 2) * width - 2
    first = width + 1
    around = line[first - width :][:size] + line[first + width :][:size]
    around += line[first - 1 :][:size]
    around += line[first + 1 :][:size]
    around -= line[first:][:size] << 2
    square = np.empty((height - 2) * width)
    square[:size] = around
    inside = square.reshape(height - 2, width)[:, : width - 2].ravel()
    # whole numbers below 2^53: exact in whatever order they are summed
    return inside.size, int(inside.sum()), int(inside @ inside)


def _extremes(grey: _Grey, axis: int) -> _Extremes:
    """Darkest and lightest level of each row (axis 1) or column (axis 0)."""
    return grey.min(axis), grey.max(axis)


def _flat(levels: _Extremes) -> npt.NDArray[np.bool_]:
    """Which rows or columns hold one level only."""
    found: npt.NDArray[np.bool_] = levels[1] - levels[0] <= FLAT
    return found


def _runs(busy: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and end of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], busy, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _inside(grey: _Grey, rows: _Extremes, columns: _Extremes) -> tuple[int, int, int, int] | None:
    """What is left without plain bars: left, top, right, bottom; None where nothing is."""
    top, bottom = _span(rows)
    if bottom == top:
        return None
    left, right = _span(columns if (top, bottom) == (0, len(grey)) else _extremes(grey[top:bottom], 0))
    return (left, top, right, bottom) if right > left else None


def _span(levels: _Extremes) -> tuple[int, int]:
    """First and last row or column that is not part of a bar of one level, as a range."""
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
    """Rows of one colour at the start: `known` of them are seen already, and at most `more` others are looked at."""
    colour = np.median(pixels[0], axis=0).astype(np.int16)
    for row in range(known, min(known + more, len(pixels))):
        if (np.abs(pixels[row].astype(np.int16) - colour) > _COLOUR).any():
            return row
    return min(known + more, len(pixels))


def _panels(grey: _Grey, rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]) -> int:
    """Parts of a page, cut along plain gutters again and again; slivers do not count.

    Args:
        grey: the page.
        rows: which of its rows are plain.
        columns: which of its columns are plain.
    """
    if not rows.any() and not columns.any():
        return 1
    height, width = grey.shape
    return _parts(grey, (max(8, int(_PANEL * height)), max(8, int(_PANEL * width))), 1, 0, _DEPTH)


def _parts(page: _Grey, least: tuple[int, int], axis: int, failed: int, depth: int) -> int:
    """Parts of a piece of a page, cut into rows (axis 1) or columns (0); `failed` counts the axes without a cut."""
    if depth == 0 or failed == 2:
        return 1
    plain = _flat(_extremes(page, axis))
    runs = [run for run in _runs(~plain) if run[1] - run[0] >= least[1 - axis]]
    if len(runs) < 2:
        return _parts(page, least, 1 - axis, failed + 1, depth)
    pieces = (page[start:end] if axis else page[:, start:end] for start, end in runs)
    return sum(_parts(piece, least, 1 - axis, 0, depth - 1) for piece in pieces)


def _lines(plain: npt.NDArray[np.bool_]) -> int:
    """Runs of rows that are short and have plain ground of one level above and below."""
    if not plain.any():
        return 0
    most = max(2, int(_LINE * len(plain)))
    return sum(start > 0 and end < len(plain) and 2 <= end - start <= most for start, end in _runs(~plain))
