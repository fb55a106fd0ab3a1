"""Tell a copy from an alternate: align two images, even out their tones, and look at what is left.

A copy differs from its original by noise: blur, blocks of JPEG, an edge that is half a pixel off. All of these grow
with the contrast of the drawing at a place and are much alike everywhere. An alternate (another mouth, other colours,
other clothes) differs in places by far more than the pair differs elsewhere. The noise of each pair is therefore
measured on the pair itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from animesion.dedup.geometry import Match
from animesion.dedup.verdict import Verdict

#: Images are compared at the area of a square of this side; the longer side is at most the second number.
_SIDE, _LONGEST = 128, 256

#: Fewer pixels in common cannot be compared.
_FEWEST = 256

#: Share of the image that is covered more that both must have in common; below, they are two parts of one image.
_COMMON = 0.65

#: Difference beyond the noise, in levels, that counts as a change; the largest connected change in pixels, and the
#: largest share of all changes, that a copy may have.
LEVELS, _SPECK, _SPECKS = 12.0, 12, 0.004

#: Rounds of the finer alignment, the largest change of scale that it makes, and the largest shift in pixels.
_ROUNDS, _STRETCH, _SHIFT = 30, 0.1, 16.0

#: Correlation of the details of two images that are aligned as a whole, below which they are different drawings, and
#: the standard deviation in pixels of the blur that takes away what is no detail.
_ALIKE, _DETAIL = 0.5, 4.0

#: The same, above which they are alternates, where too few local features agree.
_SURELY_ALIKE = 0.9

#: Share of an image that is drawn on in a full image; with less, fewer changes are noise.
_DRAWN = 0.25

#: A sticker has this share of all changes, covers its outline by the second, and of the image one between the last two.
_ALL, _SOLID = 0.95, 0.8
_STICKER = (0.025, 0.3)

#: A line of text: width by height at least, height as a share of the image at most; half the width of its strokes in
#: pixels (shadows and blushes are wider); parts of a tiled watermark.
_WIDE, _LOW, _STROKE, _TILED = 2.5, 0.15, 3.0, 24

#: Levels (0 to 255) of one bin of a tone curve, and pixels that a bin needs.
_BIN, _BIN_PIXELS = 8, 30

#: Share of the pixels by which two tone curves are compared, and levels from either end that count as clipped.
_MOST, _CLIPPED = 0.7, 4

#: From the position of a pixel in an image of one, whose centre is 0, to a share of its side, and back.
_CENTRE = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
_FROM_CENTRE = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])

Pixels = npt.NDArray[np.float32]
Levels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """The outcome for one pair.

    Attributes:
        verdict: the verdict.
        residual: largest difference beyond the noise of the pair, in levels (0 to 255).
        how: text: what was done to the second image, and where the difference is, such as
            `mirrored; turned 90°; shows 0.00 0.10 1.00 0.95; overlay 0.70 0.80 0.95 0.92`, boxes as shares of the first
            image (left, top, right, bottom).
        transform: see `shares`.
        alike: correlation of the details of the aligned images, -1 to 1.
    """

    verdict: Verdict
    residual: float
    how: str
    transform: tuple[float, ...]
    alike: float


@dataclass(frozen=True)
class Aligned:
    """Two images in the first one's frame.

    Attributes:
        first: shape (h, w, 3), levels.
        second: shape (h, w, 3), levels, with tones matched to the first.
        inside: shape (h, w), where both have pixels.
        common: share of the image that is covered more by the other, 0 to 1.
        transform: shape (3, 3), from pixels of the second image (mirrored first, if so) to pixels of this frame.
    """

    first: Pixels
    second: Pixels
    inside: Mask
    common: float
    transform: npt.NDArray[np.float64]

    @cached_property
    def contrast(self) -> Pixels:
        """The largest gradient near each pixel in either image, in levels per pixel, shape (h, w)."""
        steepest = np.maximum(_gradient(self.first), _gradient(self.second))
        nearby: Pixels = cv2.dilate(steepest, np.ones((3, 3), np.uint8)).astype(np.float32)
        return nearby


def reduced(image: Image.Image, side: int) -> Image.Image:
    """An image reduced to at most the area of a square of this side; smaller ones as they are."""
    scale = side / (image.width * image.height) ** 0.5
    if scale >= 1:
        return image
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return image.resize(size, Image.Resampling.BOX)


def frame(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels at which an image of this size is compared."""
    width, height = size
    scale = min(_SIDE / (width * height) ** 0.5, _LONGEST / max(width, height))
    return max(8, round(scale * width)), max(8, round(scale * height))


def compare(first: Image.Image, second: Image.Image, match: Match) -> Comparison:
    """Compare two images that are aligned by a match.

    Args:
        first: mode RGB.
        second: mode RGB.
        match: how the second maps to the first.
    """
    rough = align(first, second, match)
    outcome = _verdict(rough, second.size, match)
    if outcome.verdict in (Verdict.OVERLAY, Verdict.ALTERNATE):
        # a copy may be stretched a little, as a whole number of pixels on each side is a ratio of its own
        finer = _finer(rough, first, second, match)
        if finer is not None:
            outcome = min(outcome, _verdict(finer, second.size, match), key=lambda each: each.verdict.rank)
    return outcome


def _verdict(aligned: Aligned, size: tuple[int, int], match: Match) -> Comparison:
    how, transform, alike = _described(aligned, size, match), shares(aligned, size), _correlation(aligned)
    if aligned.inside.sum() < _FEWEST:
        return Comparison(Verdict.PART if match.inliers else Verdict.DIFFERENT, 0.0, how, transform, alike)
    excess = beyond_noise(aligned)
    changed = excess > LEVELS
    if not match.inliers and alike < _ALIKE:
        verdict = Verdict.DIFFERENT
    elif aligned.common < _COMMON:
        verdict = Verdict.PART
    elif _is_noise(aligned, changed):
        verdict = Verdict.COPY
    elif not match.inliers and alike < _SURELY_ALIKE:
        verdict = Verdict.DIFFERENT
    elif _is_overlay(aligned, changed):
        verdict = Verdict.OVERLAY
        how = "; ".join(filter(None, [how, f"overlay {_box(changed)}"]))
    else:
        verdict = Verdict.ALTERNATE
    return Comparison(verdict, float(excess.max()), how, transform, alike)


def shares(aligned: Aligned, size: tuple[int, int]) -> tuple[float, ...]:
    """The transform of an alignment, whatever the size of the images.

    Args:
        aligned: the alignment.
        size: width and height in pixels of the second image.

    Returns:
        a, b, c, d, e, f: what is at the shares (x, y) of the second image's width and height, mirrored first if it is,
        is at (ax + by + c, dx + ey + f) of the first.
    """
    height, width = aligned.inside.shape
    unit = _CENTRE @ _scaling((width, height), (1, 1)) @ aligned.transform @ _scaling((1, 1), size) @ _FROM_CENTRE
    return tuple(unit[:2].ravel().tolist())


def laid(first: Image.Image, second: Image.Image, transform: Sequence[float], *, mirrored: bool) -> Aligned:
    """Two images in the first one's frame, by a known transform.

    Args:
        first: mode RGB.
        second: mode RGB.
        transform: see `shares`.
        mirrored: whether the second image is mirrored first.
    """
    unit = np.vstack([np.reshape(np.array(transform, dtype=np.float64), (2, 3)), [0.0, 0.0, 1.0]])
    in_frame = _scaling((1, 1), frame(first.size)) @ _FROM_CENTRE @ unit @ _CENTRE @ _scaling(second.size, (1, 1))
    return _aligned(first, second, in_frame, mirrored=mirrored)


def _is_noise(aligned: Aligned, changed: Mask) -> bool:
    """Whether changes are so small and few that the images are copies, measured by how much there is to see in them.

    A letter on a plain ground may differ from another one in a few pixels.
    """
    drawn = int((aligned.inside & (aligned.contrast > LEVELS / 2)).sum())
    share = min(1.0, drawn / (_DRAWN * int(aligned.inside.sum())))
    # a misplaced edge leaves lines of one pixel; so does another shape, where there is little else
    regions = changed if share < 1 else _without_lines(changed)
    few = int(regions.sum()) <= share * _SPECKS * int(aligned.inside.sum())
    return few and largest_region(regions) <= share * _SPECK


def _finer(rough: Aligned, first: Image.Image, second: Image.Image, match: Match) -> Aligned | None:
    """The images aligned by the affine transform of best correlation (Evangelidis and Psarakis, 2008).

    Returns:
        None if the iteration does not settle, or leaves the rough transform by far.
    """
    greys = [cv2.cvtColor(each.astype(np.uint8), cv2.COLOR_RGB2GRAY) for each in (rough.first, rough.second)]
    start = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _ROUNDS, 1e-4)
    try:
        # from the frame of the first to that of the second, where the second's pixels are looked up
        _, found = cv2.findTransformECC(
            greys[0], greys[1], start, cv2.MOTION_AFFINE, stop, rough.inside.astype(np.uint8) * 255, 5
        )
    except cv2.error:  # no texture, or no overlap
        return None
    if np.abs(found[:, :2] - np.eye(2)).max() > _STRETCH or np.abs(found[:, 2]).max() > _SHIFT:
        return None
    correction = np.linalg.inv(np.vstack([found.astype(np.float64), [0.0, 0.0, 1.0]]))
    return _aligned(first, second, correction @ rough.transform, mirrored=match.mirrored)


def align(first: Image.Image, second: Image.Image, match: Match) -> Aligned:
    """Bring the second image into the first one's frame, and its tones to those of the first."""
    at_first, at_second = match.frames
    similarity = np.vstack([match.transform, [0.0, 0.0, 1.0]])
    transform = _scaling(at_first, frame(first.size)) @ similarity @ _scaling(second.size, at_second)
    return _aligned(first, second, transform, mirrored=match.mirrored)


def _aligned(first: Image.Image, second: Image.Image, transform: npt.NDArray[np.float64], *, mirrored: bool) -> Aligned:
    size = frame(first.size)
    moved = ImageOps.mirror(second) if mirrored else second
    shrink = float(np.sqrt(abs(np.linalg.det(transform[:2, :2]))))
    from_reduced = transform
    if shrink < 1:  # averages areas, where interpolation would leave out pixels
        smaller = max(8, round(shrink * moved.width)), max(8, round(shrink * moved.height))
        from_reduced = transform @ _scaling(smaller, moved.size)
        moved = moved.resize(smaller, Image.Resampling.BOX)
    pixels = np.asarray(moved)
    kind = Image.Resampling.BOX if first.width * first.height > size[0] * size[1] else Image.Resampling.BICUBIC
    ours = np.asarray(first.resize(size, kind))
    theirs: Levels = np.asarray(
        cv2.warpAffine(pixels, from_reduced[:2], size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    )
    covered = cv2.warpAffine(np.full(pixels.shape[:2], 255, np.uint8), from_reduced[:2], size, flags=cv2.INTER_LINEAR)
    whole = covered > 254
    # the outermost pixels mix with what is beyond them
    inside = cv2.erode(whole.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    area = second.width * second.height * abs(np.linalg.det(transform[:2, :2]))
    common = min(1.0, max(float(whole.mean()), float(whole.sum() / max(area, 1.0))))
    return Aligned(ours.astype(np.float32), _toned(ours, theirs, inside), inside, common, transform)


def _scaling(before: tuple[int, int], after: tuple[int, int]) -> npt.NDArray[np.float64]:
    """The transform of pixel positions that resizing makes; positions are those of the centres of pixels."""
    x, y = after[0] / before[0], after[1] / before[1]
    return np.array([[x, 0, 0.5 * x - 0.5], [0, y, 0.5 * y - 0.5], [0, 0, 1]])


def _toned(first: Levels, second: Levels, inside: Mask) -> Pixels:
    """The second image with the tones of the first: one rising curve for all channels, so hues stay as they are.

    Tones are left as they are if this explains more, as where a sticker has most pixels of a level.
    """
    same = np.arange(256, dtype=np.float64)
    curve = _tone_curve(first[inside].ravel(), second[inside].ravel())
    as_they_are, evened = (_through(first, second, each) for each in (same, curve))
    # medians of the differences do not see what an overlay or an alternate changed
    misses = [np.quantile(np.abs(first - each)[inside], _MOST) for each in (as_they_are, evened)]
    return as_they_are if misses[0] <= misses[1] else evened


def _through(first: Levels, second: Levels, curve: npt.NDArray[np.float64]) -> Pixels:
    """The second image through a curve of 256 levels; where it is clipped, any level of the first beyond that fits."""
    bright = (second > 255 - _CLIPPED) & (first > curve[255 - 2 * _BIN])
    dark = (second < _CLIPPED) & (first < curve[2 * _BIN])
    return np.where(bright | dark, first, curve.astype(np.float32)[second])


def _tone_curve(goals: Levels, levels: Levels) -> npt.NDArray[np.float64]:
    """The rising curve, shape (256,), that brings levels to the medians of their goals.

    Args:
        goals: shape (n,), levels of the first image.
        levels: shape (n,), levels of the second image at the same places.
    """
    same = np.arange(256, dtype=np.float64)
    bins = 256 // _BIN
    pairs = np.bincount(levels.astype(np.intp) * 256 + goals, minlength=256 * 256).reshape(bins, _BIN, 256)
    of_goals = pairs.sum(axis=1)
    count = of_goals.sum(axis=1)
    used = np.flatnonzero(count > max(_BIN_PIXELS, 0.003 * len(levels)))
    if len(used) < 2:
        return same
    sums = (pairs.sum(axis=2) * np.arange(256).reshape(bins, _BIN)).sum(axis=1)
    centre = sums[used] / count[used]
    up_to = np.cumsum(of_goals[used], axis=1)
    # the two in the middle, which are one and the same for an odd number
    middle = [(up_to > place[:, None]).argmax(axis=1) for place in ((count[used] - 1) // 2, count[used] // 2)]
    curve = _rising((middle[0] + middle[1]) / 2, count[used])
    # beyond the levels in use the curve goes on in parallel to equal tones
    low, high = curve[0] - centre[0] - 1, curve[-1] + (256 - centre[-1])
    curve = np.clip(np.concatenate([[low], curve, [high]]), 0, 255)
    full: npt.NDArray[np.float64] = np.interp(same, np.concatenate([[-1], centre, [256]]), curve)
    return full


def _rising(values: npt.NDArray[np.float64], weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The closest rising values, by least squares: pool adjacent violators (Busing, 2022, algorithm 1).

    The same numbers as `scipy.optimize.isotonic_regression`, whose import takes 0.4 s in each process.
    """
    x, w = values.tolist(), weights.astype(np.float64).tolist()
    ends = [0] * len(x)
    block, i = 0, 1
    ends[0] = 1
    while i < len(x):
        block += 1
        mean, weight = x[i], w[i]
        if x[block - 1] >= mean:
            block -= 1
            total = w[block] * x[block] + weight * mean
            weight += w[block]
            mean = total / weight
            while i < len(x) - 1 and mean >= x[i + 1]:
                i += 1
                total += w[i] * x[i]
                weight += w[i]
                mean = total / weight
            while block and x[block - 1] >= mean:
                block -= 1
                total += w[block] * x[block]
                weight += w[block]
                mean = total / weight
        i += 1
        x[block], w[block], ends[block] = mean, weight, i
    lengths = np.diff([0, *ends[: block + 1]])
    return np.repeat(np.array(x[: block + 1]), lengths)


def beyond_noise(aligned: Aligned) -> Pixels:
    """By how much the two images differ beyond the noise of the pair, in levels, shape (h, w).

    Noise is a level that is the same everywhere plus a share of the local contrast; both are measured on the pair.
    """
    first, second, inside = aligned.first, aligned.second, aligned.inside
    contrast = aligned.contrast
    blurred: Pixels = cv2.GaussianBlur(first - second, (0, 0), 1.0).astype(np.float32)
    difference = _of_channels(np.abs(blurred))
    border = float(np.percentile(contrast[inside], 60))
    flat, textured = inside & (contrast <= border), inside & (contrast > max(border, 4.0))
    level = float(np.median(difference[flat])) if flat.sum() > _BIN_PIXELS else 2.0
    share = float(np.percentile(difference[textured] / contrast[textured], 70)) if textured.sum() > _BIN_PIXELS else 0.2
    noise = 1.5 * min(max(share, 0.15), 0.7) * contrast + 3 * min(max(level, 1.0), 8.0)
    excess: Pixels = np.maximum(difference - noise, 0).astype(np.float32)
    excess[~inside] = 0
    return excess


def _gradient(image: Pixels) -> Pixels:
    """The largest gradient of the three channels, in levels per pixel, shape (h, w)."""
    smooth: Pixels = cv2.GaussianBlur(image, (0, 0), 0.8).astype(np.float32)
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *axes) / 8 for axes in ((1, 0), (0, 1)))
    largest: Pixels = np.sqrt(_of_channels((across**2 + down**2).astype(np.float32, copy=False)))
    return largest


def _of_channels(values: Pixels) -> Pixels:
    """The largest of the three channels, shape (h, w): many times faster than NumPy's maximum over so short an axis."""
    red, green, blue = cv2.split(values)
    largest: Pixels = np.asarray(cv2.max(cv2.max(red, green), blue), dtype=np.float32)
    return largest


def _correlation(aligned: Aligned) -> float:
    """Correlation of the details of the two images where both have pixels, -1 to 1; 0 if one of them has none.

    Shapes and grounds are left out: two leaves, or two letters, are alike in those.
    """
    details = (each - cv2.GaussianBlur(each, (0, 0), _DETAIL) for each in (aligned.first, aligned.second))
    a, b = (each[aligned.inside].ravel().astype(np.float64) for each in details)
    length = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length > 1 else 0.0


def _without_lines(changed: Mask) -> Mask:
    """A mask without lines of one pixel, which a misplaced edge leaves."""
    kept: Mask = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8)) > 0
    return kept


def largest_region(changed: Mask) -> int:
    """Pixels of the largest connected region of a mask."""
    count, _, figures, _ = cv2.connectedComponentsWithStats(changed.astype(np.uint8), connectivity=8)
    return int(figures[1:, cv2.CC_STAT_AREA].max()) if count > 1 else 0


def _is_overlay(aligned: Aligned, changed: Mask) -> bool:
    """Whether all that changed is a sticker, a bar, a line of text at the top or bottom, or a tiled watermark.

    These are told from alternates by their shape: a sticker is large and compact, text is thin, lighter or darker all
    over, and not where faces are. What is in doubt is an alternate, which is kept.
    """
    area = float(aligned.inside.sum())
    height, width = changed.shape
    closed = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
    outlines, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return False
    hull = cv2.convexHull(max(outlines, key=cv2.contourArea))
    patch = cv2.fillConvexPoly(np.zeros(changed.shape, np.uint8), hull, 1) > 0
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    box_height, box_width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    at_edge = bool((changed & ~_eroded(aligned.inside, 3)).any())
    filled = (changed & patch).sum()
    is_bar = (box_width > 0.95 * width and box_height < 0.3 * height) or (
        box_height > 0.95 * height and box_width < 0.3 * width
    )
    if (
        filled >= _ALL * changed.sum()
        and filled >= _SOLID * patch.sum()
        and _STICKER[0] * area <= patch.sum() <= _STICKER[1] * area
    ):
        return is_bar or not at_edge
    difference = (aligned.second - aligned.first).mean(axis=2)[changed]
    one_sided = max((difference > 0).mean(), (difference < 0).mean())
    if np.percentile(cv2.distanceTransform(changed.astype(np.uint8), cv2.DIST_L2, 3)[changed], 95) > _STROKE:
        return False
    middle = (rows[0] + rows[-1]) / 2 / height
    if not at_edge and box_width >= _WIDE * box_height and box_height <= _LOW * height and abs(middle - 0.5) > 0.25:
        return bool(one_sided >= 0.7)
    letters, _ = cv2.connectedComponents(changed.astype(np.uint8), connectivity=8)
    spread = box_width > 0.7 * width and box_height > 0.7 * height
    return bool(spread and letters > _TILED and one_sided >= 0.85)


def _eroded(mask: Mask, side: int) -> Mask:
    """A mask without the pixels that are near its edge or that of the image."""
    eroded: Mask = cv2.erode(mask.astype(np.uint8), np.ones((side, side), np.uint8), borderValue=0) > 0
    return eroded


def _described(aligned: Aligned, size: tuple[int, int], match: Match) -> str:
    """What was done to the second image, as text; empty for nothing."""
    said = ["mirrored"] if match.mirrored else []
    degrees = round(float(np.degrees(np.arctan2(aligned.transform[1, 0], aligned.transform[0, 0]))))
    if abs(degrees) > 1:
        said.append(f"turned {degrees}°")
    height, width = aligned.inside.shape
    for name, transform, own, other in (
        ("shows", aligned.transform, size, (width, height)),
        ("shown in", np.linalg.inv(aligned.transform), (width, height), size),
    ):
        corners = np.array([[x, y, 1] for x in (-0.5, own[0] - 0.5) for y in (-0.5, own[1] - 0.5)]) @ transform[:2].T
        share = (corners + 0.5) / other
        box = *share.min(axis=0).clip(0, 1), *share.max(axis=0).clip(0, 1)
        if max(box[0], box[1], 1 - box[2], 1 - box[3]) > 0.015:
            said.append(f"{name} {' '.join(f'{value:.2f}' for value in box)}")
    return "; ".join(said)


def _box(changed: Mask) -> str:
    """The bounding box of a mask, as shares of the image: left, top, right, bottom."""
    height, width = changed.shape
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    values = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return " ".join(f"{value:.2f}" for value in values)
