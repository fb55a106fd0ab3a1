"""Metrics of a classifier on a split, with metrics for long-tailed data: every number of an evaluation.

Scores are accumulated in `scores`; `report` formats an `Evaluation`; `evaluate` runs the model. Each definition is
stated with its attribute. Undefined metrics, such as the accuracy of a class without test images, are None.
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
    """A 95% bootstrap interval: the 2.5th and 97.5th percentiles."""

    low: float
    high: float


@dataclass(frozen=True)
class BandAccuracy:
    """Accuracy in one band of classes, grouped by number of training images as in `animesion.stats.long_tail`.

    Attributes:
        classes: number of classes in the band.
        tested: number of them with test images.
        samples: number of their test images.
        top_1: share of these images that are correct.
        macro_accuracy: mean accuracy of the classes, as in Liu et al., CVPR 2019 (arXiv 1904.05160).
    """

    classes: int
    tested: int
    samples: int
    top_1: float | None
    macro_accuracy: float | None


@dataclass(frozen=True)
class BandAccuracies:
    """Accuracies of the many, medium and few bands."""

    many: BandAccuracy
    medium: BandAccuracy
    few: BandAccuracy


@dataclass(frozen=True)
class ClassResult:
    """Results of one class.

    Attributes:
        class_id: id of the class.
        name: name of the class.
        train_images: number of its training images, if known.
        test_images: number of its test images.
        accuracy: share of these that are correct (recall).
        f1: 2 TP / (2 TP + FP + FN).
        confused_with: id of the class that it is most often confused with; the lowest among equals.
        confusions: number of these confusions.
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
    """Test images of one class that are predicted as another; shares of the class's images and of all errors."""

    true_id: int
    true_name: str
    predicted_id: int
    predicted_name: str
    images: int
    share_of_class: float
    share_of_errors: float


@dataclass(frozen=True)
class ConfidenceBin:
    """The samples with a confidence in (low, high]; the first bin includes 0."""

    low: float
    high: float
    samples: int
    accuracy: float | None
    confidence: float | None


@dataclass(frozen=True)
class Calibration:
    """Calibration of the confidences.

    Attributes:
        error: expected calibration error over `BINS` equal-width bins: mean over the samples of |accuracy - mean
            confidence| of their bin; Guo et al., ICML 2017 (arXiv 1706.04599), eq. 3.
        mean_confidence: mean confidence of the predictions.
        nll: mean negative log-likelihood, in nats.
        brier: mean squared distance between probabilities and one-hot labels, summed over the classes, 0..2.
        bins: the reliability diagram.
    """

    error: float
    mean_confidence: float
    nll: float
    brier: float
    bins: tuple[ConfidenceBin, ...]


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a model on a split; accuracies are shares, 0..1.

    Attributes:
        samples: number of test images.
        classes: number of classes of the model.
        k: number of guesses in `top_5`: 5, or the number of classes if that is smaller.
        top_1: share of images whose largest output is correct.
        top_5: share of images whose class is among the k largest outputs.
        macro_accuracy: mean accuracy of the classes that have test images.
        macro_f1: mean F1 of the classes that have test images; predictions of other classes count as misses.
        top_1_interval: bootstrap over images; it ignores that images of one post or artist are not independent.
        macro_accuracy_interval: the same; each resample averages over the classes that it contains.
        bands: by training images, if these are known.
        calibration: of the probabilities.
        untested: ids of the classes without test images.
        per_class: every class, by id.
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
        scores: scores of the whole split, each sample once.
        names: names of the C classes; by default their ids.
        train_counts: training images of each class, (C,), for the bands.
        expected: number of samples in the split.
        pairs: number of confusions to list.
        resamples: number of bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        AnimesionError: no samples, a sample scored twice, or an unexpected number of samples.
        ValueError: names or counts for another number of classes.
    """
    scored = scores.collect()  # arrays (N,)
    check_once(scored.indices, expected)
    names = [str(i) for i in range(scores.classes)] if names is None else names
    counts = None if train_counts is None else np.asarray(train_counts).astype(np.int64)
    if len(names) != scores.classes or (counts is not None and counts.shape != (scores.classes,)):
        raise ValueError(f"names and training counts must be of the model's {scores.classes} classes")
    correct = scored.predictions == scored.targets
    # per class, (C,): test images, correct ones, and predictions
    tested = np.bincount(scored.targets, minlength=scores.classes)
    hits = np.bincount(scored.targets[correct], minlength=scores.classes)
    predicted_counts = np.bincount(scored.predictions, minlength=scores.classes)
    present = tested > 0
    recall = _ratio(hits, tested)
    # 2 TP / (2 TP + FN + FP); NaN, not 0, for classes without test images
    f1 = np.where(present, _ratio(2 * hits, tested + predicted_counts), np.nan)
    top_1_interval, macro_interval = bootstrap(hits, tested, resamples, seed)
    confusions = _confusions(scored, tested, names)
    return Evaluation(
        samples=len(scored),
        classes=scores.classes,
        k=scores.k,
        top_1=float(correct.mean()),
        top_5=float(scored.in_top.mean()),
        macro_accuracy=float(recall[present].mean()),
        macro_f1=float(f1[present].mean()),
        top_1_interval=top_1_interval,
        macro_accuracy_interval=macro_interval,
        bands=None if counts is None else _bands(counts, hits, tested),
        calibration=_calibration(scored, correct),
        untested=tuple(np.flatnonzero(~present).tolist()),
        per_class=_per_class(names, counts, tested, recall, f1, confusions),
        confusions=tuple(confusions[:pairs]),
    )


def check_once(indices: IntArray, expected: int | None = None) -> None:
    """Check that each sample was scored once, and their number if `expected` is given.

    Raises:
        AnimesionError: no samples, a sample scored twice, or an unexpected number of samples.
    """
    if not len(indices):
        raise AnimesionError("there is no sample to evaluate: choose a split that has images")
    seen, times = np.unique(indices, return_counts=True)
    if (times > 1).any():
        again = seen[times > 1]
        raise AnimesionError(
            f"{len(again):,} of {len(seen):,} samples were scored more than once, the first is sample {again[0]}; "
            "an evaluation must score each sample once"
        )
    if expected is not None and len(seen) != expected:
        raise AnimesionError(f"{len(seen):,} samples were scored, the split has {expected:,}")


def bootstrap(hits: IntArray, tested: IntArray, resamples: int = 1000, seed: int = 0) -> tuple[Interval, Interval]:
    """Compute 95% percentile intervals of top-1 and macro accuracy over resampled images (Efron, 1979).

    Both depend only on the numbers of correct and wrong images of each class in a resample. These numbers are drawn
    from their multinomial distribution instead of image by image: the same distribution, at a cost per class.

    Args:
        hits: correct test images of each class, (C,).
        tested: test images of each class, (C,), at least one in total.
        resamples: number of resamples.
        seed: of the random generator.
    """
    rng = np.random.default_rng(seed)
    present = tested > 0
    cells = np.concatenate([hits[present], (tested - hits)[present]])  # (2 P,), P classes with test images
    total, classes = int(cells.sum()), int(present.sum())
    top_1, macro = np.empty(resamples), np.empty(resamples)
    at_once = max(1, 2_000_000 // len(cells))  # resamples per draw, to limit memory
    for start in range(0, resamples, at_once):
        rows = slice(start, min(resamples, start + at_once))
        drawn = rng.multinomial(total, cells / total, size=rows.stop - rows.start)
        correct, size = drawn[:, :classes], drawn[:, :classes] + drawn[:, classes:]  # (rows, P)
        top_1[rows] = correct.sum(1) / total
        macro[rows] = (correct / np.maximum(size, 1)).sum(1) / (size > 0).sum(1)
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


def _calibration(scored: Scored, correct: BoolArray) -> Calibration:
    confidences = scored.confidences.astype(np.float64)
    edges = np.linspace(0, 1, BINS + 1)
    # bins are (low, high], and the first includes 0
    bin_of = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, BINS - 1)
    sizes = np.bincount(bin_of, minlength=BINS)
    accuracies = _ratio(np.bincount(bin_of, weights=correct, minlength=BINS), sizes)
    means = _ratio(np.bincount(bin_of, weights=confidences, minlength=BINS), sizes)
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
    """Every confused pair, largest first, equals by id."""
    classes = len(tested)
    wrong = scored.predictions != scored.targets
    # one number per (true, predicted) pair
    pairs, images = np.unique(scored.targets[wrong] * classes + scored.predictions[wrong], return_counts=True)
    errors = max(1, int(images.sum()))
    confusions = []
    for i in np.argsort(-images, kind="stable").tolist():
        (true, predicted), count = divmod(int(pairs[i]), classes), int(images[i])
        confusions.append(
            Confusion(true, names[true], predicted, names[predicted], count, count / int(tested[true]), count / errors)
        )
    return confusions


def _per_class(
    names: Sequence[str],
    counts: IntArray | None,
    tested: IntArray,
    recall: FloatArray,
    f1: FloatArray,
    confusions: Sequence[Confusion],
) -> tuple[ClassResult, ...]:
    largest: dict[int, Confusion] = {}
    for pair in confusions:  # sorted, so the first of each class is its largest
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
    """Part divided by whole, NaN where whole is 0."""
    ratio = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _known(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
