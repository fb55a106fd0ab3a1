"""Metrics of a tagger on a split, and thresholds that are fitted on another one.

`TagScores` has the probability of every tag and image: 4 bytes each, so 920 MB for 46,000 images and 5,000 tags. Each
definition is stated with its attribute; what is undefined, such as the precision of a tag without images, is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from animesion.dataset.tags import Assigned
from animesion.errors import AnimesionError
from animesion.stats.long_tail import FEW_BELOW, MANY_ABOVE
from animesion_training.data.seeds import IntArray
from animesion_training.eval.metrics import check_once

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

#: Threshold of tags where none was fitted.
DEFAULT_THRESHOLD = 0.5
#: Thresholds of a whole category are multiples of 1 / _STEPS.
_STEPS = 200


class TagScores:
    """Probabilities of the tags of a split, in any order and from any number of processes.

    Attributes:
        tags: T, number of tags of the model.
    """

    def __init__(self, tags: int) -> None:
        self.tags = tags
        self._parts: list[tuple[IntArray, FloatArray]] = []

    @torch.no_grad()
    def add(self, probabilities: Tensor, indices: Tensor) -> None:
        """Add a batch.

        Args:
            probabilities: (B, T), 0..1.
            indices: positions of the samples in their split, integers (B,).

        Raises:
            AnimesionError: values that are not finite.
        """
        values = probabilities.float().cpu().numpy()
        if not np.isfinite(values).all():
            bad = int(indices[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])])
            raise AnimesionError(
                f"the model's outputs are not finite for sample {bad}: evaluate earlier weights, or use "
                "--precision fp32"
            )
        self._parts.append((indices.cpu().numpy().astype(np.int64), values))

    def extend(self, others: Iterable[TagScores]) -> None:
        """Add the scores of other processes."""
        for other in others:
            self._parts += other._parts

    def collect(self, expected: int | None = None) -> tuple[IntArray, FloatArray]:
        """Return the positions of the samples, ascending (N,), and their probabilities (N, T).

        Args:
            expected: number of samples in the split.

        Raises:
            AnimesionError: no samples, a sample scored twice, or an unexpected number of samples.
        """
        indices = np.concatenate([np.empty(0, np.int64), *(part[0] for part in self._parts)])
        order = np.argsort(indices, kind="stable")
        check_once(indices[order], expected)
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        values = np.empty((len(order), self.tags), dtype=np.float32)
        start = 0
        for i, (own, part) in enumerate(self._parts):
            values[places[start : start + len(own)]] = part
            start += len(own)
            self._parts[i] = (own, np.empty((0, self.tags), np.float32))  # freed as it is copied
        indices = indices[order]
        self._parts = [(indices, values)]
        return indices, values


@dataclass(frozen=True)
class TagGroup:
    """Metrics of some tags, such as those of a category.

    Attributes:
        tags: number of tags.
        tested: number of them that an image of the split has; all means are over these.
        positives: number of pairs of an image and a tag that it has.
        map: mean of the average precisions of the tags.
        base_rate: mean share of the images that have the tag: the expected `map` of a random order.
        macro_f1: mean F1 of the tags, at their thresholds.
        micro_f1: 2 TP / (2 TP + FP + FN), summed over the tags.
        precision: TP / (TP + FP), summed over the tags.
        recall: TP / (TP + FN), summed over the tags.
    """

    tags: int
    tested: int
    positives: int
    map: float | None
    base_rate: float | None
    macro_f1: float | None
    micro_f1: float | None
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class TagResult:
    """Results of one tag.

    Attributes:
        name: name of the tag.
        category: its category.
        train_images: number of its training images, if known.
        test_images: number of images of the split that have it.
        average_precision: sum over the distinct scores of the gain in recall times the precision there, from the
            largest on; images of equal score count together. Without interpolation.
        threshold: probability from which on the tag is predicted.
        f1: 2 TP / (2 TP + FP + FN).
        precision: TP / (TP + FP).
        recall: TP / (TP + FN).
    """

    name: str
    category: str
    train_images: int | None
    test_images: int
    average_precision: float | None
    threshold: float
    f1: float | None
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class TagEvaluation:
    """Evaluation of a tagger on a split.

    Attributes:
        samples: number of images.
        overall: of all tags.
        categories: of the tags of each category.
        bands: of the tags with many (> 100), medium (20 to 100) and few (< 20) training images, if these are known.
        fitted: whether the thresholds are those of the weights, and not 0.5 for every tag.
        per_tag: every tag, in the order of the outputs.
    """

    samples: int
    overall: TagGroup
    categories: dict[str, TagGroup]
    bands: dict[str, TagGroup]
    fitted: bool
    per_tag: tuple[TagResult, ...]


def evaluate_tags(
    scores: TagScores,
    assigned: Assigned,
    names: Sequence[str],
    categories: Sequence[str],
    *,
    thresholds: Sequence[float] = (),
    train_counts: npt.ArrayLike | None = None,
    expected: int | None = None,
) -> TagEvaluation:
    """Compute every metric.

    Args:
        scores: of the split.
        assigned: tags of its samples.
        names: of the T tags.
        categories: of the T tags.
        thresholds: probability from which on each tag is predicted, (T,); empty for 0.5.
        train_counts: training images of each tag, (T,).
        expected: number of samples in the split.

    Raises:
        AnimesionError: no samples, a sample scored twice, or an unexpected number of samples.
    """
    indices, values = scores.collect(expected)
    truth = _truth(assigned, indices, scores.tags)
    limits = np.array(thresholds or [DEFAULT_THRESHOLD] * scores.tags, dtype=np.float32)
    counts = None if train_counts is None else np.asarray(train_counts, dtype=np.int64)
    predicted = values >= limits
    hits = (predicted & truth).sum(axis=0)
    said, positives = predicted.sum(axis=0), truth.sum(axis=0)
    precisions = np.array([average_precision(values[:, i], truth[:, i]) for i in range(scores.tags)])
    table = _Table(precisions, hits, said, positives, len(values))
    group_of = np.array(categories)
    per_tag = tuple(
        TagResult(
            name,
            category,
            None if counts is None else int(counts[i]),
            int(positives[i]),
            None if np.isnan(precisions[i]) else float(precisions[i]),
            float(limits[i]),
            _f1(int(hits[i]), int(said[i]), int(positives[i])) if positives[i] else None,
            _share(int(hits[i]), int(said[i])),
            _share(int(hits[i]), int(positives[i])),
        )
        for i, (name, category) in enumerate(zip(names, categories, strict=True))
    )
    bands = {}
    if counts is not None:
        many, few = counts > MANY_ABOVE, counts < FEW_BELOW
        bands = {"many": table.group(many), "medium": table.group(~many & ~few), "few": table.group(few)}
    return TagEvaluation(
        len(values),
        table.group(np.ones(scores.tags, dtype=np.bool_)),
        {name: table.group(group_of == name) for name in dict.fromkeys(categories)},
        bands,
        bool(thresholds),
        per_tag,
    )


def average_precision(scores: FloatArray, truth: BoolArray) -> float:
    """Compute the average precision of one tag, see `TagResult`.

    Args:
        scores: (N,).
        truth: which images have the tag, (N,).

    Returns:
        0..1; NaN if no image has the tag.
    """
    total = int(truth.sum())
    if not total:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.diff(ordered, append=-np.inf))  # the last image of each distinct score
    hits = np.cumsum(truth[order])[ends]
    precisions = hits / (ends + 1)
    return float((np.diff(hits, prepend=0) * precisions).sum() / total)


def fit_thresholds(
    scores: TagScores, assigned: Assigned, categories: Sequence[str], *, least: int, expected: int | None = None
) -> list[float]:
    """Fit the thresholds that maximise the F1 of each tag.

    A threshold is half-way between the last score that is predicted and the next one, and the highest of several with
    the same F1. Tags with fewer than `least` positive images would follow noise: they get the threshold that maximises
    the micro F1 of their category, a multiple of 1/200.

    Args:
        scores: of the split to fit on.
        assigned: tags of its samples.
        categories: of the T tags.
        least: positive images from which on a tag has a threshold of its own.
        expected: number of samples in the split.

    Returns:
        Probabilities, (T,).

    Raises:
        AnimesionError: no samples, a sample scored twice, or an unexpected number of samples.
    """
    indices, values = scores.collect(expected)
    truth = _truth(assigned, indices, scores.tags)
    positives = truth.sum(axis=0)
    group_of = np.array(categories)
    shared = {name: _shared(values[:, group_of == name], truth[:, group_of == name]) for name in set(categories)}
    return [
        _best(values[:, i], truth[:, i]) if positives[i] >= least else shared[categories[i]] for i in range(scores.tags)
    ]


def _best(scores: FloatArray, truth: BoolArray) -> float:
    """The threshold of one tag."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    ends = np.flatnonzero(np.diff(ordered, append=-np.inf))
    hits = np.cumsum(truth[order])[ends]
    best = int(np.argmax(2 * hits / (ends + 1 + hits[-1])))  # the first of equals
    last = ordered[ends[best]]
    following = ordered[ends[best] + 1] if ends[best] + 1 < len(ordered) else 0.0
    middle = np.float32((last + following) / 2)
    # neighbours of float32 have no number between them
    return float(middle if middle > following else np.float32(last))


def _shared(values: FloatArray, truth: BoolArray) -> float:
    """The threshold of a category."""
    bins = np.minimum((values * _STEPS).astype(np.int64), _STEPS - 1)  # bin b has the scores from b / _STEPS on
    positive = np.bincount(bins[truth], minlength=_STEPS)
    every = np.bincount(bins.ravel(), minlength=_STEPS)
    hits, said = (np.cumsum(each[::-1])[::-1] for each in (positive, every))
    scores = 2 * hits / np.maximum(1, said + positive.sum())
    if not scores.any():
        return DEFAULT_THRESHOLD
    return (_STEPS - 1 - int(np.argmax(scores[::-1]))) / _STEPS  # the highest of equals


def _truth(assigned: Assigned, indices: IntArray, tags: int) -> BoolArray:
    """Which tags the images have, (N, T)."""
    chosen = assigned.take(indices)
    truth = np.zeros((len(indices), tags), dtype=np.bool_)
    truth[np.repeat(np.arange(len(chosen)), chosen.counts()), chosen.ids] = True
    return truth


class _Table:
    """Counts of each tag, (T,)."""

    def __init__(
        self, precisions: npt.NDArray[np.float64], hits: IntArray, said: IntArray, positives: IntArray, samples: int
    ) -> None:
        self.precisions, self.hits, self.said, self.positives = precisions, hits, said, positives
        self.samples = samples

    def group(self, chosen: BoolArray) -> TagGroup:
        """Metrics of some tags."""
        tested = chosen & (self.positives > 0)
        if not tested.any():
            return TagGroup(int(chosen.sum()), 0, 0, None, None, None, None, None, None)
        hits, said, positives = self.hits[tested], self.said[tested], self.positives[tested]
        total = [int(each.sum()) for each in (hits, said, positives)]
        return TagGroup(
            int(chosen.sum()),
            int(tested.sum()),
            total[2],
            float(self.precisions[tested].mean()),
            float((positives / self.samples).mean()),
            float((2 * hits / (said + positives)).mean()),
            _f1(*total),
            _share(total[0], total[1]),
            _share(total[0], total[2]),
        )


def _f1(hits: int, said: int, positives: int) -> float:
    return 2 * hits / (said + positives)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
