"""How good a classifier is on a split, honest about the long tail: every number of an evaluation, from its scores.

Scores are gathered in `scoring`; an `Evaluation` is shown and written by `evaluation_report`. Running a model is left
to others. Definitions are stated with each number; a number that is not defined, such as the accuracy of a class
without a test image, is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from animesion.errors import AnimesionError
from animesion.stats.long_tail import FEW_BELOW, MANY_ABOVE
from animesion_training.eval.scores import BoolArray, IntArray, Scored, Scores

FloatArray = npt.NDArray[np.float64]

#: Equal-width bins of the confidence in the calibration error.
BINS = 15


@dataclass(frozen=True)
class Interval:
    """A 95% bootstrap interval: the 2.5 and 97.5 percentiles."""

    low: float
    high: float


@dataclass(frozen=True)
class BandAccuracy:
    """One band of classes by their training images, as in `animesion.stats.long_tail`.

    Attributes:
        classes: classes of the band.
        tested: those with test images.
        samples: their test images.
        top_1: share of these that are right.
        macro_accuracy: mean of the classes' accuracies, as Liu et al., CVPR 2019 (arXiv 1904.05160), report it.
    """

    classes: int
    tested: int
    samples: int
    top_1: float | None
    macro_accuracy: float | None


@dataclass(frozen=True)
class BandAccuracies:
    """The many, medium and few classes."""

    many: BandAccuracy
    medium: BandAccuracy
    few: BandAccuracy


@dataclass(frozen=True)
class ClassResult:
    """One class.

    Attributes:
        class_id: its id.
        name: its name.
        train_images: its training images where known.
        test_images: its test images.
        accuracy: share of these that are right (recall).
        f1: 2 TP / (2 TP + FP + FN).
        confused_with: id of the class that most of its wrong ones are taken for, the lowest among equals.
        confusions: how many.
    """

    class_id: int
    name: str
    train_images: int | None
    test_images: int
    accuracy: float | None
    f1: float | None
    confused_with: int | None
    confusions: int


@dataclass(frozen=True)
class Confusion:
    """Test images of one class that are taken for another; shares of that class's images and of all errors."""

    true_id: int
    true_name: str
    predicted_id: int
    predicted_name: str
    images: int
    share_of_class: float
    share_of_errors: float


@dataclass(frozen=True)
class ConfidenceBin:
    """The samples whose confidence is in (low, high]; the first bin holds 0 too."""

    low: float
    high: float
    samples: int
    accuracy: float | None
    confidence: float | None


@dataclass(frozen=True)
class Calibration:
    """How far confidences can be believed.

    Attributes:
        error: expected calibration error over `BINS` equal-width bins: mean over the samples of |accuracy - mean
            confidence| of their bin; Guo et al., ICML 2017 (arXiv 1706.04599), eq. 3.
        mean_confidence: of the predictions.
        nll: mean negative log-likelihood, in nats.
        brier: mean squared distance of the probabilities from the truth, summed over the classes, 0..2.
        bins: the reliability diagram.
    """

    error: float
    mean_confidence: float
    nll: float
    brier: float
    bins: tuple[ConfidenceBin, ...]


@dataclass(frozen=True)
class Evaluation:
    """A model on a split; accuracies are shares, 0..1.

    Attributes:
        samples: test images.
        classes: classes of the model.
        k: guesses that count in `top_5`: 5, or the number of classes where that is smaller.
        top_1: share of images whose largest output is right.
        top_5: share of images whose class is among the k largest outputs.
        macro_accuracy: mean accuracy of the classes that have test images.
        macro_f1: mean F1 of the classes that have test images; a guess of another class counts as the miss that it is.
        top_1_interval: bootstrap over images; images of one post or artist are not independent, which it cannot know.
        macro_accuracy_interval: the same; a resample averages over the classes that it holds.
        bands: by training images, where these are known.
        calibration: of the probabilities.
        untested: ids of the classes without a test image.
        per_class: every class, in the order of the ids.
        confusions: the largest confusions, largest first.
    """

    samples: int
    classes: int
    k: int
    top_1: float
    top_5: float
    macro_accuracy: float
    macro_f1: float
    top_1_interval: Interval
    macro_accuracy_interval: Interval
    bands: BandAccuracies | None
    calibration: Calibration
    untested: tuple[int, ...]
    per_class: tuple[ClassResult, ...]
    confusions: tuple[Confusion, ...]


def evaluate(
    scores: Scores,
    *,
    names: Sequence[str] | None = None,
    train_counts: npt.ArrayLike | None = None,
    expected: int | None = None,
    pairs: int = 50,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Compute every metric.

    Args:
        scores: of the whole split, each sample once.
        names: of the C classes; their ids when not given.
        train_counts: training images of the C classes, for the bands.
        expected: number of samples that the split has.
        pairs: how many confusions to list.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        AnimesionError: no sample, a sample scored twice, or not as many as expected.
        ValueError: names or counts for another number of classes.
    """
    scored = scores.collect()
    check_once(scored.indices, expected)
    names = [str(i) for i in range(scores.classes)] if names is None else names
    counts = None if train_counts is None else np.asarray(train_counts).astype(np.int64)
    if len(names) != scores.classes or (counts is not None and counts.shape != (scores.classes,)):
        raise ValueError(f"names and training counts must be those of the model's {scores.classes} classes")
    right = scored.predictions == scored.targets
    tested = np.bincount(scored.targets, minlength=scores.classes)
    hits = np.bincount(scored.targets[right], minlength=scores.classes)
    guessed = np.bincount(scored.predictions, minlength=scores.classes)
    present = tested > 0
    recall = _ratio(hits, tested)
    f1 = np.where(present, _ratio(2 * hits, tested + guessed), np.nan)
    top_1_interval, macro_interval = bootstrap(hits, tested, resamples, seed)
    confusions = _confusions(scored, tested, names)
    return Evaluation(
        samples=len(scored),
        classes=scores.classes,
        k=scores.k,
        top_1=float(right.mean()),
        top_5=float(scored.in_top.mean()),
        macro_accuracy=float(recall[present].mean()),
        macro_f1=float(f1[present].mean()),
        top_1_interval=top_1_interval,
        macro_accuracy_interval=macro_interval,
        bands=None if counts is None else _bands(counts, hits, tested),
        calibration=_calibration(scored, right),
        untested=tuple(np.flatnonzero(~present).tolist()),
        per_class=_per_class(names, counts, tested, recall, f1, confusions),
        confusions=tuple(confusions[:pairs]),
    )


def check_once(indices: IntArray, expected: int | None = None) -> None:
    """Check that each sample was seen once, and all of them when their number is given.

    Raises:
        AnimesionError: none at all, one seen again, or not as many as expected.
    """
    if not len(indices):
        raise AnimesionError("there is no sample to evaluate; choose a split that has images")
    seen, times = np.unique(indices, return_counts=True)
    if (times > 1).any():
        again = seen[times > 1]
        raise AnimesionError(
            f"{len(again):,} of {len(seen):,} samples were scored more than once, the first is sample {again[0]}; "
            "an evaluation has to see each sample once"
        )
    if expected is not None and len(seen) != expected:
        raise AnimesionError(f"{len(seen):,} samples were scored, the split has {expected:,}")


def bootstrap(hits: IntArray, tested: IntArray, resamples: int = 1000, seed: int = 0) -> tuple[Interval, Interval]:
    """95% percentile intervals of top-1 and macro accuracy over resampled images (Efron, 1979).

    Both depend only on how many right and wrong images of each class a resample holds, so these numbers are drawn from
    their multinomial distribution instead of the images one by one: the same distribution at a cost of the classes.

    Args:
        hits: test images of each class that are right, (C,).
        tested: test images of each class, (C,), at least one in all.
        resamples: how many.
        seed: same seed, same intervals.
    """
    random = np.random.default_rng(seed)
    present = tested > 0
    cells = np.concatenate([hits[present], (tested - hits)[present]])
    total, classes = int(cells.sum()), int(present.sum())
    top_1, macro = np.empty(resamples), np.empty(resamples)
    at_once = max(1, 2_000_000 // len(cells))
    for start in range(0, resamples, at_once):
        rows = slice(start, min(resamples, start + at_once))
        drawn = random.multinomial(total, cells / total, size=rows.stop - rows.start)
        right, size = drawn[:, :classes], drawn[:, :classes] + drawn[:, classes:]
        top_1[rows] = right.sum(1) / total
        macro[rows] = (right / np.maximum(size, 1)).sum(1) / (size > 0).sum(1)
    low, high = np.percentile([top_1, macro], [2.5, 97.5], axis=1)
    return Interval(float(low[0]), float(high[0])), Interval(float(low[1]), float(high[1]))


def _bands(counts: IntArray, hits: IntArray, tested: IntArray) -> BandAccuracies:
    def band(chosen: BoolArray) -> BandAccuracy:
        present = chosen & (tested > 0)
        samples = int(tested[present].sum())
        return BandAccuracy(
            classes=int(chosen.sum()),
            tested=int(present.sum()),
            samples=samples,
            top_1=int(hits[present].sum()) / samples if samples else None,
            macro_accuracy=float((hits[present] / tested[present]).mean()) if samples else None,
        )

    many, few = counts > MANY_ABOVE, counts < FEW_BELOW
    return BandAccuracies(band(many), band(~many & ~few), band(few))


def _calibration(scored: Scored, right: BoolArray) -> Calibration:
    confidences = scored.confidences.astype(np.float64)
    edges = np.linspace(0, 1, BINS + 1)
    places = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, BINS - 1)
    sizes = np.bincount(places, minlength=BINS)
    accuracies = _ratio(np.bincount(places, weights=right, minlength=BINS), sizes)
    means = _ratio(np.bincount(places, weights=confidences, minlength=BINS), sizes)
    gaps = np.where(sizes > 0, np.abs(accuracies - means), 0.0)
    return Calibration(
        error=float((sizes * gaps).sum() / len(scored)),
        mean_confidence=float(confidences.mean()),
        nll=float(scored.nlls.mean(dtype=np.float64)),
        brier=float(scored.briers.mean(dtype=np.float64)),
        bins=tuple(
            ConfidenceBin(float(edges[i]), float(edges[i + 1]), int(sizes[i]), _known(accuracies[i]), _known(means[i]))
            for i in range(BINS)
        ),
    )


def _confusions(scored: Scored, tested: IntArray, names: Sequence[str]) -> list[Confusion]:
    """Every pair that was confused, largest first, equals by the ids."""
    classes = len(tested)
    wrong = scored.predictions != scored.targets
    pairs, images = np.unique(scored.targets[wrong] * classes + scored.predictions[wrong], return_counts=True)
    errors = max(1, int(images.sum()))
    found = []
    for i in np.argsort(-images, kind="stable").tolist():
        (true, predicted), count = divmod(int(pairs[i]), classes), int(images[i])
        found.append(
            Confusion(true, names[true], predicted, names[predicted], count, count / int(tested[true]), count / errors)
        )
    return found


def _per_class(
    names: Sequence[str],
    counts: IntArray | None,
    tested: IntArray,
    recall: FloatArray,
    f1: FloatArray,
    confusions: Sequence[Confusion],
) -> tuple[ClassResult, ...]:
    largest: dict[int, Confusion] = {}
    for pair in confusions:
        largest.setdefault(pair.true_id, pair)
    return tuple(
        ClassResult(
            class_id=i,
            name=name,
            train_images=None if counts is None else int(counts[i]),
            test_images=int(tested[i]),
            accuracy=_known(recall[i]),
            f1=_known(f1[i]),
            confused_with=largest[i].predicted_id if i in largest else None,
            confusions=largest[i].images if i in largest else 0,
        )
        for i, name in enumerate(names)
    )


def _ratio(part: npt.NDArray[np.generic], whole: IntArray) -> FloatArray:
    """Part over whole, NaN where there is no whole."""
    ratio = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _known(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
