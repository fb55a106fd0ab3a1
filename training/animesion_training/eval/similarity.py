"""Metrics of embeddings: retrieval, verification and open-set identification, also of classes that were not trained on.

All compare images by the cosine of their embeddings. An image is never compared with itself, nor with an image of its
own group (a post, a family, a cluster of duplicates): those are found by their pixels and not by their class. `embed`
computes embeddings, `animesion eval --task` prints the results.

Thresholds are fitted on one split and applied to another: `Threshold` states on what it was fitted, and by which rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from animesion.errors import UsageError
from animesion.splits import hashed_order

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

#: Similarities are counted in bins of this width over -1..1; figures of verification are exact to one bin.
BIN = 1e-4
_BINS = round(2 / BIN)
#: Rows that are compared with all others at once.
_ROWS = 512


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of a split.

    Attributes:
        vectors: (N, D), float32, rows of length 1.
        labels: class ids, (N,).
        groups: number of the group of each image, (N,); images of a group are not compared with each other.
        keys: of the samples, N of them.
        classes: names by class id.
    """

    vectors: FloatArray
    labels: IntArray
    groups: IntArray
    keys: Sequence[str]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: IntArray) -> Embedded:
        """Return some of the images, (M,)."""
        keys = [self.keys[i] for i in chosen.tolist()]
        return Embedded(self.vectors[chosen], self.labels[chosen], self.groups[chosen], keys, self.classes)


@dataclass(frozen=True)
class BandRetrieval:
    """Retrieval of the classes of one band, by their number of images in the split that is searched.

    Attributes:
        band: `few`, `medium` or `many`, with its limits.
        classes: classes in the band that have queries.
        queries: their queries.
        r_at_1: as in `Retrieval`.
        map_at_r: as in `Retrieval`.
    """

    band: str
    classes: int
    queries: int
    r_at_1: float
    map_at_r: float


@dataclass(frozen=True)
class Shots:
    """Identification from a few images of each class, without training.

    Attributes:
        shots: images of each class that are known; the others are queries.
        draws: random choices of these images.
        classes: classes with more images than `shots`.
        r_at_1: mean over the draws of the share of queries whose nearest class is right.
        deviation: its standard deviation over the draws.
        lowest: the lowest of the draws.
    """

    shots: int
    draws: int
    classes: int
    r_at_1: float
    deviation: float
    lowest: float


@dataclass(frozen=True)
class Retrieval:
    """Search for images of the same class; each image of the split is a query for all others.

    Attributes:
        queries: images with at least one other image of their class to find.
        skipped: images without one.
        classes: classes with queries.
        r_at_1: share of queries whose most similar image is of their class.
        map_at_r: mean average precision at R, where R is the number of images to find: the mean of `1/R sum_{i <= R}
            P(i) [the i-th is right]`; Musgrave et al., ECCV 2020 (arXiv 2003.08505), eq. 6.
        macro_r_at_1: mean of `r_at_1` over classes.
        few_shot: identification from a few images.
        bands: by the number of images of the class in the split.
    """

    queries: int
    skipped: int
    classes: int
    r_at_1: float
    map_at_r: float
    macro_r_at_1: float
    few_shot: tuple[Shots, ...]
    bands: tuple[BandRetrieval, ...]


@dataclass(frozen=True)
class Threshold:
    """A limit of the similarity, and where it is from.

    Attributes:
        value: similarities of at least this value count as the same class, or as known.
        rule: how it was chosen, in words.
        split: what it was fitted on.
    """

    value: float
    rule: str
    split: str


@dataclass(frozen=True)
class PairScores:
    """Precision, recall and F1 of "same class" at a threshold."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class BandPairs:
    """F1 of the pairs of one band, by the smaller class of the pair; balanced, at the same threshold."""

    band: str
    same: int
    different: int
    f1: float | None


@dataclass(frozen=True)
class Verification:
    """Do two images show the same class? All pairs of a split.

    Attributes:
        same: pairs of one class.
        different: pairs of two classes.
        eer: error rate at the threshold where as many pairs of two classes are accepted as pairs of one are rejected.
        auroc: probability that a pair of one class is more similar than a pair of two.
        accepted_at_1: share of the pairs of one class that are accepted where 1% of the other pairs are.
        threshold: fitted, see `fit_pairs`.
        balanced: scores at the threshold, if both kinds of pairs weigh the same.
        natural: scores at the threshold, if each pair weighs the same.
        best_f1: balanced F1 at the best threshold for this very split: an upper limit, no result.
        bands: by the smaller class of the pair.
    """

    same: int
    different: int
    eer: float
    auroc: float
    accepted_at_1: float
    threshold: Threshold
    balanced: PairScores
    natural: PairScores
    best_f1: float
    bands: tuple[BandPairs, ...]


@dataclass(frozen=True)
class OpenSet:
    """Identification where half of the classes are unknown: means over random choices of classes and shots.

    Attributes:
        shots: images of each known class.
        draws: random choices.
        known: known classes.
        unknown: unknown classes.
        auroc: probability that the similarity of an image of a known class to the nearest class is higher than that of
            an image of an unknown class.
        threshold: fitted, see `fit_open_set`.
        accepted_unknown: share of images of unknown classes that get a name at the threshold.
        named: share of images of known classes that get their right name at the threshold.
        misnamed: share of images of known classes that get a wrong name at the threshold.
    """

    shots: int
    draws: int
    known: int
    unknown: int
    auroc: float
    threshold: Threshold
    accepted_unknown: float
    named: float
    misnamed: float


# -- retrieval -------------------------------------------------------------------------------------------------------


def retrieval(data: Embedded, *, shots: Sequence[int] = (1, 5), draws: int = 20, seed: int = 0) -> Retrieval:
    """Compute the metrics of retrieval.

    Args:
        data: the split.
        shots: numbers of known images for `few_shot`; those that no two classes have are left out.
        draws: random choices of the known images.
        seed: of the choices.

    Raises:
        UsageError: no image has another one of its class.
    """
    first, average = np.zeros(len(data)), np.zeros(len(data))
    asked = np.zeros(len(data), dtype=np.bool_)
    for rows, similarities in _compared(data):
        same = (data.labels[rows][:, None] == data.labels[None]) & (similarities > -np.inf)
        relevant = same.sum(1)  # R of each query
        most = int(relevant.max(initial=0))
        if not most:
            continue
        # the R most similar ones, best first; ties in the order of the split
        part = np.argpartition(-similarities, most - 1, axis=1)[:, :most] if most < len(data) else None
        candidates = np.sort(part, axis=1) if part is not None else np.tile(np.arange(len(data)), (len(rows), 1))
        values = np.take_along_axis(similarities, candidates, 1)
        order = np.take_along_axis(candidates, np.argsort(-values, axis=1, kind="stable"), 1)[:, :most]
        right = np.take_along_axis(same, order, 1)
        places = np.arange(1, most + 1)
        counted = places <= relevant[:, None]
        precision = np.cumsum(right, 1) / places
        asked[rows] = relevant > 0
        first[rows] = right[:, 0]
        average[rows] = (precision * right * counted).sum(1) / np.maximum(relevant, 1)
    if not asked.any():
        raise UsageError("no image has another one of its class to find: give a split with two images of a class")
    classes = np.unique(data.labels[asked])
    by_class = {c: first[asked & (data.labels == c)].mean() for c in classes.tolist()}
    few = [each for k in shots if (each := few_shot(data, k, draws=draws, seed=seed)) is not None]
    return Retrieval(
        queries=int(asked.sum()),
        skipped=int((~asked).sum()),
        classes=len(classes),
        r_at_1=float(first[asked].mean()),
        map_at_r=float(average[asked].mean()),
        macro_r_at_1=float(np.mean(list(by_class.values()))),
        few_shot=tuple(few),
        bands=_retrieval_bands(data, asked, first, average),
    )


def _retrieval_bands(
    data: Embedded, asked: npt.NDArray[np.bool_], first: npt.NDArray[np.float64], average: npt.NDArray[np.float64]
) -> tuple[BandRetrieval, ...]:
    band_of = band_numbers(np.bincount(data.labels, minlength=len(data.classes)))[data.labels]
    bands = []
    for i, name in enumerate(BANDS):
        rows = asked & (band_of == i)
        if rows.any():
            classes = len(np.unique(data.labels[rows]))
            bands.append(
                BandRetrieval(name, classes, int(rows.sum()), float(first[rows].mean()), float(average[rows].mean()))
            )
    return tuple(bands)


#: Bands of classes by their number of images, see `band_numbers`.
BANDS = ("few (2..5)", "medium (6..20)", "many (> 20)")


def band_numbers(counts: IntArray) -> IntArray:
    """Return the band of each class by its number of images in the split, (C,); bands are `BANDS`.

    The bands of `animesion.stats.long_tail` are of training images, which classes that are not trained on do not have.
    """
    return np.digitize(counts, (6, 21)).astype(np.int64)


def few_shot(data: Embedded, shots: int, *, draws: int = 20, seed: int = 0) -> Shots | None:
    """Identify images from `shots` images of each class: the class whose mean embedding is most similar.

    Queries of a group of which an image is known are left out.

    Returns:
        None if fewer than two classes have more than `shots` images.
    """
    counts = np.bincount(data.labels, minlength=len(data.classes))
    able = np.flatnonzero(counts > shots)
    if len(able) < 2:
        return None
    results = []
    for draw in range(draws):
        known, queries = _divide(data, able, shots, f"{seed} {draw}")
        similarities = data.vectors[queries] @ prototypes(data.vectors[known], data.labels[known], able).T
        results.append(float((able[similarities.argmax(1)] == data.labels[queries]).mean()) if len(queries) else 0.0)
    return Shots(shots, draws, len(able), float(np.mean(results)), float(np.std(results)), min(results))


def _divide(data: Embedded, classes: IntArray, shots: int, name: str) -> tuple[IntArray, IntArray]:
    """Choose known images of classes by hash, and the queries of these classes: rows (S,) and (Q,)."""
    chosen = np.isin(data.labels, classes)
    order = np.array(
        sorted(np.flatnonzero(chosen).tolist(), key=lambda i: hashed_order(0, f"{name} {data.keys[i]}")), dtype=np.int64
    )
    of_class = data.labels[order]
    by_class = np.argsort(of_class, kind="stable")
    sizes = np.bincount(of_class)
    rank = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[of_class[by_class]]
    known = np.sort(order[by_class[rank < shots]])
    queries = np.setdiff1d(np.flatnonzero(chosen), known)
    return known, queries[~np.isin(data.groups[queries], data.groups[known])]


def prototypes(vectors: FloatArray, labels: IntArray, classes: IntArray) -> FloatArray:
    """Return the mean of the vectors of each class, of length 1, (C, D), from (S, D) and (S,); classes ascend."""
    place = np.searchsorted(classes, labels)
    sums = np.zeros((len(classes), vectors.shape[1]), dtype=np.float64)
    np.add.at(sums, place, vectors)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    means: FloatArray = (sums / np.maximum(lengths, 1e-12)).astype(np.float32)
    return means


# -- verification ----------------------------------------------------------------------------------------------------


def verification(data: Embedded, threshold: Threshold) -> Verification:
    """Compute the metrics of all pairs of a split at a threshold, see `fit_pairs`.

    Raises:
        UsageError: the split has no pairs of one class, or none of two.
    """
    bands = _pair_counts(data)
    curves = _summed(bands)
    at = curves.place(threshold.value)
    strict = np.searchsorted(curves.false_accept, 0.01, side="right") - 1
    band_results = []
    for name, (same, different) in bands.items():
        if same.sum() + different.sum():
            both = bool(same.sum() and different.sum())
            f1 = _Curves(same, different).scores(at, balanced=True).f1 if both else None
            band_results.append(BandPairs(name, int(same.sum()), int(different.sum()), f1))
    return Verification(
        same=int(curves.same),
        different=int(curves.different),
        eer=curves.eer(),
        auroc=curves.auroc(),
        accepted_at_1=float(curves.accept[strict]),
        threshold=threshold,
        balanced=curves.scores(at, balanced=True),
        natural=curves.scores(at, balanced=False),
        best_f1=float(curves.f1().max()),
        bands=tuple(band_results),
    )


def fit_pairs(data: Embedded, split: str) -> Threshold:
    """Choose the threshold with the best F1 of the pairs of a split, where both kinds of pairs weigh the same.

    Raises:
        UsageError: the split has no pairs of one class, or none of two.
    """
    curves = _summed(_pair_counts(data))
    best = curves.f1()
    # the middle of the best values: the ends of a plateau are next to pairs that decide it
    places = np.flatnonzero(best >= best.max() - 1e-12)
    value = curves.value(int(places[len(places) // 2]))
    return Threshold(value, "best F1 of pairs, both kinds weighing the same", split)


class _Curves:
    """Rates by threshold, from counts of similarities in bins of width `BIN`, lowest first.

    The i-th value of a curve is that of accepting the i highest bins.
    """

    def __init__(self, same: IntArray, different: IntArray) -> None:
        self.same, self.different = int(same.sum()), int(different.sum())
        if not self.same or not self.different:
            which = "one class" if not self.same else "two classes"
            raise UsageError(
                f"no pairs of {which} can be compared (images of a group are not): give a split with two classes and "
                "two images of a class"
            )
        self.accept = np.concatenate(([0.0], np.cumsum(same[::-1]) / self.same))
        self.false_accept = np.concatenate(([0.0], np.cumsum(different[::-1]) / self.different))

    def value(self, place: int) -> float:
        """The lowest similarity that is accepted at a place of the curves."""
        return round(1 - place * BIN, 6)

    def place(self, value: float) -> int:
        """The place of a threshold."""
        return int(np.clip(round((1 - value) / BIN), 0, _BINS))

    def f1(self, *, balanced: bool = True) -> npt.NDArray[np.float64]:
        """F1 by threshold."""
        weight = 1.0 if balanced else self.different / self.same
        scores: npt.NDArray[np.float64] = 2 * self.accept / (self.accept + weight * self.false_accept + 1)
        return scores

    def scores(self, place: int, *, balanced: bool) -> PairScores:
        weight = 1.0 if balanced else self.different / self.same
        accepted = self.accept[place] + weight * self.false_accept[place]
        precision = float(self.accept[place] / accepted) if accepted else 0.0
        return PairScores(precision, float(self.accept[place]), float(self.f1(balanced=balanced)[place]))

    def eer(self) -> float:
        reject = 1 - self.accept
        i = int(np.argmax(self.false_accept >= reject))
        # between the two places around the crossing
        before, after = reject[i - 1] - self.false_accept[i - 1], reject[i] - self.false_accept[i]
        share = before / (before - after) if before > after else 0.0
        return float(self.false_accept[i - 1] + share * (self.false_accept[i] - self.false_accept[i - 1]))

    def auroc(self) -> float:
        return float(np.trapezoid(self.accept, self.false_accept))


def _pair_counts(data: Embedded) -> dict[str, tuple[IntArray, IntArray]]:
    """Similarities of all pairs of one class and of two by band of the smaller class, in bins, lowest first."""
    band_of = band_numbers(np.bincount(data.labels, minlength=len(data.classes)))[data.labels]
    present = np.unique(band_of).tolist()
    counts = np.zeros((len(BANDS), 2, _BINS), dtype=np.int64)
    for rows, similarities in _compared(data):
        usable = (np.arange(len(data))[None] > rows[:, None]) & (similarities > -np.inf)
        alike = data.labels[rows][:, None] == data.labels[None]
        band = np.minimum(band_of[rows][:, None], band_of[None])
        for i in present:
            chosen = usable & (band == i) if len(present) > 1 else usable
            counts[i, 0] += _binned(similarities[chosen & alike])
            counts[i, 1] += _binned(similarities[chosen & ~alike])
    return {BANDS[i]: (counts[i, 0], counts[i, 1]) for i in present}


def _summed(bands: dict[str, tuple[IntArray, IntArray]]) -> _Curves:
    same, different = (np.sum(kind, axis=0) for kind in zip(*bands.values(), strict=True))
    return _Curves(same, different)


def _binned(similarities: FloatArray) -> IntArray:
    places = np.clip(np.floor((similarities.astype(np.float64) + 1) / BIN), 0, _BINS - 1).astype(np.int64)
    return np.bincount(places, minlength=_BINS).astype(np.int64)


def _compared(data: Embedded) -> Iterator[tuple[IntArray, FloatArray]]:
    """Yield rows (B,) and their similarities to all images (B, N); -inf to themselves and to those of their group."""
    for start in range(0, len(data), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(data)))
        similarities = data.vectors[rows] @ data.vectors.T
        similarities[data.groups[rows][:, None] == data.groups[None]] = -np.inf
        yield rows, similarities


# -- open set --------------------------------------------------------------------------------------------------------


def open_set(data: Embedded, threshold: Threshold, *, shots: int = 5, draws: int = 20, seed: int = 0) -> OpenSet:
    """Compute the metrics of identification with unknown classes, at a threshold, see `fit_open_set`.

    Raises:
        UsageError: fewer than two classes have more than `shots` images.
    """
    aurocs, accepted, named, misnamed = [], [], [], []
    known = unknown = 0
    for draw in range(draws):
        trial = _trial(data, shots, f"{seed} {draw}")
        known, unknown = len(trial.classes), trial.unknown_classes
        aurocs.append(area(trial.scores, trial.others))
        accepted.append(float((trial.others >= threshold.value).mean()))
        taken = trial.scores >= threshold.value
        named.append(float((taken & trial.right).mean()))
        misnamed.append(float((taken & ~trial.right).mean()))
    return OpenSet(
        shots,
        draws,
        known,
        unknown,
        float(np.mean(aurocs)),
        threshold,
        float(np.mean(accepted)),
        float(np.mean(named)),
        float(np.mean(misnamed)),
    )


def fit_open_set(
    data: Embedded, split: str, *, false_accept: float, shots: int = 5, draws: int = 20, seed: int = 0
) -> Threshold:
    """Choose the threshold at which a share of the images of unknown classes gets a name, on average over the draws.

    Args:
        data: the split; half of its classes are unknown in turn.
        split: its name.
        false_accept: the share, 0..1.
        shots: images of each known class.
        draws: random choices.
        seed: of the choices.

    Raises:
        UsageError: fewer than two classes have more than `shots` images.
    """
    scores = np.concatenate([_trial(data, shots, f"{seed} {draw}").others for draw in range(draws)])
    return Threshold(quantile_above(scores, false_accept), f"{false_accept:.1%} of unknown images get a name", split)


def quantile_above(scores: npt.NDArray[np.floating], share: float) -> float:
    """Return a value that at most a share of the scores reach: halfway between two of them; scores (N,), N > 0."""
    ordered = np.sort(scores.astype(np.float64))[::-1]
    allowed = int(share * len(ordered))
    if allowed == len(ordered):
        return -1.0
    # not at a score itself: rounding differs between ways to compute it
    above = ordered[allowed - 1] if allowed else 1.0
    if above > ordered[allowed]:
        return float((above + ordered[allowed]) / 2)
    higher = ordered[ordered > ordered[allowed]]
    return float(((higher[-1] if len(higher) else 1.0) + ordered[allowed]) / 2)


@dataclass(frozen=True)
class _Trial:
    """One choice of known classes, (K,), and shots.

    Attributes:
        classes: known classes.
        unknown_classes: number of the others.
        scores: similarity of the queries of known classes to the nearest class, (Q,).
        right: whether that is their class, (Q,).
        others: similarity of the images of unknown classes to the nearest class, (U,).
    """

    classes: IntArray
    unknown_classes: int
    scores: FloatArray
    right: npt.NDArray[np.bool_]
    others: FloatArray


def _trial(data: Embedded, shots: int, name: str) -> _Trial:
    counts = np.bincount(data.labels, minlength=len(data.classes))
    able = np.flatnonzero(counts > shots)
    if len(able) < 2:
        raise UsageError(
            f"an open set needs a known and an unknown class with more than {shots} images, and the split has "
            f"{len(able)} of them: give fewer --shots or another split"
        )
    order = sorted(able.tolist(), key=lambda c: hashed_order(0, f"{name} {data.classes[c]}"))
    classes = np.array(sorted(order[: (len(order) + 1) // 2]), dtype=np.int64)
    known, queries = _divide(data, classes, shots, name)
    centres = prototypes(data.vectors[known], data.labels[known], classes)
    strangers = np.flatnonzero((counts[data.labels] > 0) & ~np.isin(data.labels, classes))
    strangers = strangers[~np.isin(data.groups[strangers], data.groups[known])]
    if not len(queries) or not len(strangers):
        raise UsageError("no images are left to ask for: all are in groups of known images; give another split")
    own = data.vectors[queries] @ centres.T
    return _Trial(
        classes,
        len(np.unique(data.labels[strangers])),
        own.max(1),
        classes[own.argmax(1)] == data.labels[queries],
        (data.vectors[strangers] @ centres.T).max(1),
    )


def area(higher: npt.NDArray[np.floating], lower: npt.NDArray[np.floating]) -> float:
    """Return the area under the ROC curve: the probability that a score of the first exceeds one of the second."""
    both = np.concatenate((higher, lower)).astype(np.float64)
    _, places, sizes = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[places]  # equal scores share the mean of their ranks, from 1
    wins = ranks[: len(higher)].sum() - len(higher) * (len(higher) + 1) / 2
    return float(wins / (len(higher) * len(lower)))
