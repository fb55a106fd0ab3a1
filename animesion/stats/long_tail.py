"""Long-tail statistics: pure functions of the number of images of each class.

`animesion.dataset.label_files` reads counts from files, and `animesion.stats.plots` draws them. The tests check the
statistics against the published DAF:re label files (463,437 images, 3,263 classes, Gini 0.6597, imbalance factor
534.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: A class with more training images than this is a "many" class (ImageNet-LT, arXiv 1904.05160).
MANY_ABOVE = 100
#: A class with fewer training images than this is a "few" class; those between are "medium".
FEW_BELOW = 20


@dataclass(frozen=True)
class Band:
    """Number of classes in a frequency band, and of the images in them."""

    classes: int
    images: int


@dataclass(frozen=True)
class Bands:
    """Many (> 100 images), medium (20 to 100) and few (< 20, empty classes included); meant for training counts."""

    many: Band
    medium: Band
    few: Band


@dataclass(frozen=True)
class TopShares:
    """Share of all images, 0 to 1, in the largest 1, 10 and 100 classes and in the largest tenth of the classes."""

    top_1: float
    top_10: float
    top_100: float
    top_tenth: float


@dataclass(frozen=True)
class ClassSize:
    """One class and its number of images."""

    class_id: int
    name: str
    images: int


@dataclass(frozen=True)
class LongTail:
    """Statistics of a class distribution. Order statistics and moments include empty classes.

    Attributes:
        images: number of images in all classes.
        classes: number of classes in the class map.
        empty_classes: number of classes without an image.
        min: images in the smallest class, 0 if a class is empty.
        max: images in the largest class.
        mean: images per class.
        median: median of images per class; like the percentiles, linearly interpolated.
        p25: first quartile of images per class.
        p75: third quartile.
        p90: ninth decile.
        p99: 99th percentile.
        std: sample standard deviation (n - 1); 0 for a single class.
        gini: Gini coefficient; 0 if all classes are equal, close to 1 if one class has all images.
        imbalance_factor: largest class divided by the smallest one that is not empty; 0 without images.
        effective_classes: perplexity of the class distribution, exp(entropy); 0 without images.
        bands: many, medium and few, by these counts.
        top: shares of the largest classes.
        head: the largest classes, largest first.
        tail: the smallest classes, smallest first.
    """

    images: int
    classes: int
    empty_classes: int
    min: int
    max: int
    mean: float
    median: float
    p25: float
    p75: float
    p90: float
    p99: float
    std: float
    gini: float
    imbalance_factor: float
    effective_classes: float
    bands: Bands
    top: TopShares
    head: tuple[ClassSize, ...]
    tail: tuple[ClassSize, ...]

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain dicts, lists and numbers, ready for JSON; floats are rounded to six places."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def describe(
    counts: npt.ArrayLike, ids: Sequence[int] | None = None, names: Sequence[str] | None = None, shown: int = 10
) -> LongTail:
    """Describe a class distribution.

    Args:
        counts: images of each class, shape (classes,), non-negative integers.
        ids: class id of each entry; its position if None.
        names: class name of each entry; its id if None.
        shown: length of `head` and of `tail`.

    Raises:
        ValueError: no class, a negative or fractional count, or ids or names of another length.
    """
    sizes = _sizes(counts)
    ids = range(len(sizes)) if ids is None else ids
    names = [str(i) for i in ids] if names is None else names
    if not len(sizes) == len(ids) == len(names):
        raise ValueError(f"{len(sizes)} counts, {len(ids)} ids and {len(names)} names")
    images = int(sizes.sum())
    filled = sizes[sizes > 0]
    p25, median, p75, p90, p99 = (float(q) for q in np.percentile(sizes, [25, 50, 75, 90, 99]))

    # class ids break ties, so that head and tail do not depend on the order of the counts
    def size_of(i: int) -> ClassSize:
        return ClassSize(int(ids[i]), names[i], int(sizes[i]))

    key = np.asarray(ids, dtype=np.int64)
    return LongTail(
        images=images,
        classes=len(sizes),
        empty_classes=len(sizes) - len(filled),
        min=int(sizes.min()),
        max=int(sizes.max()),
        mean=images / len(sizes),
        median=median,
        p25=p25,
        p75=p75,
        p90=p90,
        p99=p99,
        std=float(sizes.std(ddof=1)) if len(sizes) > 1 else 0.0,
        gini=gini(sizes),
        imbalance_factor=float(filled.max() / filled.min()) if images else 0.0,
        effective_classes=effective_classes(sizes),
        bands=bands(sizes),
        top=_top_shares(sizes),
        head=tuple(size_of(i) for i in np.lexsort((key, -sizes))[:shown].tolist()),
        tail=tuple(size_of(i) for i in np.lexsort((key, sizes))[:shown].tolist()),
    )


def bands(counts: npt.ArrayLike) -> Bands:
    """Classes and images in the many, medium and few bands, from counts of shape (classes,)."""
    sizes = _sizes(counts)
    many, few = sizes > MANY_ABOVE, sizes < FEW_BELOW

    def band(chosen: npt.NDArray[np.bool_]) -> Band:
        return Band(int(chosen.sum()), int(sizes[chosen].sum()))

    return Bands(band(many), band(~many & ~few), band(few))


def gini(counts: npt.ArrayLike) -> float:
    """The Gini coefficient of counts of shape (classes,), 0 to 1; 0 without images."""
    sizes = np.sort(_sizes(counts)).astype(np.float64)
    n, total = len(sizes), float(sizes.sum())
    if total == 0:
        return 0.0
    # G = 2 sum(i x_i) / (n sum(x)) - (n + 1) / n with sizes in ascending order and ranks i from 1
    ranks = np.arange(1, n + 1, dtype=np.float64)
    # rounding can make the result slightly negative if all classes are equal
    return max(0.0, float(2 * (ranks @ sizes) / (n * total) - (n + 1) / n))


def effective_classes(counts: npt.ArrayLike) -> float:
    """The number of equally large classes with the same entropy; 0 without images."""
    sizes = _sizes(counts)
    shares = sizes[sizes > 0] / max(1, int(sizes.sum()))
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def lorenz(counts: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """The Lorenz curve: cumulative share of the classes, smallest first, and of their images.

    Args:
        counts: images of each class, shape (classes,).

    Returns:
        Two arrays of shape (classes + 1,), both increasing from 0 to 1; without images the second is all 0.
    """
    sizes = np.sort(_sizes(counts))
    held = np.concatenate([[0.0], np.cumsum(sizes, dtype=np.float64)])
    return np.linspace(0.0, 1.0, len(sizes) + 1), held / max(1.0, float(held[-1]))


def _sizes(counts: npt.ArrayLike) -> IntArray:
    """Validated counts, shape (classes,)."""
    given = np.asarray(counts)
    if given.ndim != 1 or given.size == 0:
        raise ValueError("counts must be a list of at least one class")
    sizes = given.astype(np.int64)
    if (sizes != given).any() or (sizes < 0).any():
        raise ValueError("counts must be non-negative integers")
    return sizes


def _top_shares(sizes: IntArray) -> TopShares:
    held = np.cumsum(np.sort(sizes)[::-1])  # images in the k + 1 largest classes
    total = max(1, int(held[-1]))

    def share(classes: int) -> float:
        return int(held[min(classes, len(held)) - 1]) / total

    return TopShares(share(1), share(10), share(100), share(max(1, len(held) // 10)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
