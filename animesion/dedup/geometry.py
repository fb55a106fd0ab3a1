"""Whether two images show one drawing, by their local features: the similarity transform that most points agree on.

`animesion.images.local_features` extracts the features. A match names no verdict yet: two drawings from one template
match too. `animesion.dedup.residual` compares the pixels of a match.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from animesion.images import local_features
from animesion.images.local_features import UNIT, Points

#: Points in distinct places that agree on one transform, from which two images match. Of 1,500 pairs of different
#: drawings of one character, none had more than 4; altered copies had 15 or more.
INLIERS = 13

#: Differing bits of two matching codes, and how many fewer than the second best.
_MOST_BITS, _MARGIN = 12, 2

#: Pixels of the reduced copy by which matching points may miss each other, and for the final transform.
_TOLERANCE, _CLOSE = 4.0, 1.5

#: Range of the ratio of scales.
_SMALLEST, _LARGEST = 0.5, 2.0

_NONE = 65  # bits of a code that is no candidate


@dataclass(frozen=True)
class Match:
    """A similarity transform from one image to another.

    Attributes:
        transform: shape (2, 3), from pixels of the second image's reduced copy (mirrored first, if `mirrored`) to
            pixels of the first's; see `local_features.frame`.
        mirrored: whether the second image is mirrored.
        inliers: number of distinct points that agree.
        frames: width and height of the reduced copies.
    """

    transform: npt.NDArray[np.float64]
    mirrored: bool
    inliers: int
    frames: tuple[tuple[int, int], tuple[int, int]]


def match(first: Points, second: Points, sizes: tuple[tuple[int, int], tuple[int, int]]) -> Match | None:
    """The better of the plain and the mirrored match of two images.

    Args:
        first: points of the first image, shape (n,).
        second: points of the second image, shape (m,).
        sizes: width and height in pixels of the images that the points were extracted from.

    Returns:
        None with fewer than `INLIERS` points in agreement.
    """
    frames = local_features.frame(sizes[0]), local_features.frame(sizes[1])
    turned = local_features.mirrored(second, frames[1][0])
    found = _similarity(first, second, frames, mirrored=False), _similarity(first, turned, frames, mirrored=True)
    return max((each for each in found if each is not None), key=lambda each: each.inliers, default=None)


def _similarity(
    first: Points, second: Points, frames: tuple[tuple[int, int], tuple[int, int]], *, mirrored: bool
) -> Match | None:
    pairs = _pairs(first["code"], second["code"])
    if len(pairs) < INLIERS:
        return None
    a, b = (points[pairs[:, side]] for side, points in enumerate((first, second)))
    at_a, at_b = (np.stack([points["x"], points["y"]], axis=1).astype(np.float64) / UNIT for points in (a, b))
    # each pair of points proposes a transform: ratio of diameters, difference of directions, difference of positions
    scale = a["size"].astype(np.float64) / b["size"]
    turn = (a["angle"].astype(np.float64) - b["angle"]) * (2 * np.pi / 65536)
    cos, sin = scale * np.cos(turn), scale * np.sin(turn)
    x = at_a[:, 0] - (cos * at_b[:, 0] - sin * at_b[:, 1])
    y = at_a[:, 1] - (sin * at_b[:, 0] + cos * at_b[:, 1])
    # (proposals, points): where each proposal puts each point of the second image
    miss_x = np.outer(cos, at_b[:, 0]) - np.outer(sin, at_b[:, 1]) + x[:, None] - at_a[:, 0]
    miss_y = np.outer(sin, at_b[:, 0]) + np.outer(cos, at_b[:, 1]) + y[:, None] - at_a[:, 1]
    # twice the tolerance: a proposal of one point is coarse
    agreeing = miss_x**2 + miss_y**2 < (2 * _TOLERANCE) ** 2
    agreeing[(scale < _SMALLEST) | (scale > _LARGEST)] = False
    chosen = agreeing[agreeing.sum(axis=1).argmax()]
    transform = None
    for _ in range(4):  # settles in two or three rounds
        transform = _least_squares(at_b[chosen], at_a[chosen]) if chosen.sum() >= INLIERS else None
        if transform is None:
            return None
        miss = at_b @ transform[:, :2].T + transform[:, 2] - at_a
        agree = (miss**2).sum(axis=1) < _TOLERANCE**2
        if np.array_equal(agree, chosen):
            break
        chosen = agree
    if transform is None or not _SMALLEST <= np.hypot(*transform[:, 0]) <= _LARGEST:
        return None
    # the closest points fix the transform to a fraction of a pixel
    close = chosen & (((at_b @ transform[:, :2].T + transform[:, 2] - at_a) ** 2).sum(axis=1) < _CLOSE**2)
    finer = _least_squares(at_b[close], at_a[close]) if close.sum() >= INLIERS else None
    transform = transform if finer is None else finer
    # SIFT gives a corner several points, one for each direction: they are one witness
    distinct = min(len(np.unique(np.rint(at[chosen] / 2), axis=0)) for at in (at_a, at_b))
    return Match(transform, mirrored, distinct, frames) if distinct >= INLIERS else None


def _pairs(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Pairs of codes that are each other's nearest, clearly so for the first: shape (k, 2)."""
    if not len(first) or len(second) < 2:
        return np.empty((0, 2), dtype=np.int64)
    bits = np.bitwise_count(first[:, None] ^ second[None])  # (n, m)
    rows = np.arange(len(first))
    nearest = bits.argmin(axis=1)
    best = bits[rows, nearest]
    mutual = bits.argmin(axis=0)[nearest] == rows
    bits[rows, nearest] = _NONE
    clear = bits.min(axis=1) >= best + _MARGIN
    good = (best <= _MOST_BITS) & mutual & clear
    return np.stack([rows[good], nearest[good]], axis=1)


def _least_squares(points: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The similarity transform of least squared error, shape (2, 3); None if all points coincide."""
    centre, goal = points.mean(axis=0), targets.mean(axis=0)
    p, t = points - centre, targets - goal
    spread = (p**2).sum()
    if spread < 1e-6:
        return None
    cos = (p * t).sum() / spread
    sin = (p[:, 0] * t[:, 1] - p[:, 1] * t[:, 0]).sum() / spread
    rotation = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([rotation, (goal - rotation @ centre)[:, None]], axis=1)


def stretched(first: tuple[int, int], second: tuple[int, int], *, mirrored: bool) -> Match:
    """The match that lays the whole second image over the whole first, whatever their features are.

    Args:
        first: width and height of the first image.
        second: width and height of the second image.
        mirrored: whether the second image is mirrored.
    """
    frames = local_features.frame(first), local_features.frame(second)
    (width, height), (from_width, from_height) = frames
    x, y = width / from_width, height / from_height
    # positions are those of the centres of pixels
    transform = np.array([[x, 0.0, 0.5 * x - 0.5], [0.0, y, 0.5 * y - 0.5]])
    return Match(transform, mirrored, 0, frames)
