"""Metrics of embeddings: by hand on few images, and against scikit-learn on many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

from animesion.errors import UsageError
from animesion_training.eval import similarity
from animesion_training.eval.similarity import Embedded, Threshold
from animesion_training.eval.similarity_report import Settings, as_json, measure, tables


def embedded(vectors: Any, labels: list[int], groups: list[int] | None = None) -> Embedded:
    array = np.asarray(vectors, np.float32)
    array = array / np.linalg.norm(array, axis=1, keepdims=True)
    count = len(labels)
    numbers = np.arange(count) if groups is None else np.array(groups)
    names = tuple(f"class {c}" for c in range(max(labels) + 1))
    return Embedded(array, np.array(labels), numbers, [f"k{i}" for i in range(count)], names)


def at(*degrees: float) -> list[list[float]]:
    return [[math.cos(math.radians(each)), math.sin(math.radians(each))] for each in degrees]


def drawn(classes: int = 6, images: int = 12, spread: float = 0.6, seed: int = 0) -> Embedded:
    """Classes around random centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, 16))
    labels = np.repeat(np.arange(classes), images)
    return embedded(centres[labels] + spread * rng.normal(size=(len(labels), 16)) * 2, labels.tolist())


def test_retrieval_by_hand() -> None:
    # image 0 finds 1 (right), then 3 (wrong) before 2; image 5 is alone
    data = embedded(at(0, 10, 60, 35, 38, 180), [0, 0, 0, 1, 1, 2])
    found = similarity.retrieval(data, shots=(1,), draws=3)
    assert (found.queries, found.skipped, found.classes) == (5, 1, 2)
    assert found.r_at_1 == pytest.approx(4 / 5)  # image 2 finds image 4
    # R = 2 for class 0: queries 0 and 1 find one first and a wrong one second, 2 finds none; R = 1 for class 1
    assert found.map_at_r == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5)
    assert found.macro_r_at_1 == pytest.approx((2 / 3 + 1) / 2)
    assert [(band.classes, band.queries) for band in found.bands] == [(2, 5)]
    assert found.bands[0].r_at_1 == found.r_at_1


def test_an_image_is_not_compared_with_those_of_its_group() -> None:
    data = embedded(at(0, 1, 50, 45), [0, 0, 0, 1], groups=[7, 7, 8, 9])
    found = similarity.retrieval(data, shots=())
    assert (found.queries, found.r_at_1) == (3, 0.0)  # 0 and 1 are one post: the nearest other image is of class 1
    assert similarity.verification(data, Threshold(0.5, "given", "")).same == 2


def test_average_precision_of_many_images_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    data = drawn()
    expected, first = [], []
    for i in range(len(data)):
        scores = data.vectors @ data.vectors[i]
        scores[i] = -2
        order = np.argsort(-scores, kind="stable")
        right = data.labels[order] == data.labels[i]
        count = 11
        precision = np.cumsum(right[:count]) / np.arange(1, count + 1)
        expected.append((precision * right[:count]).sum() / count)
        first.append(right[0])
    monkeypatch.setattr(similarity, "_ROWS", 7)
    found = similarity.retrieval(data, shots=())
    assert found.map_at_r == pytest.approx(np.mean(expected))
    assert found.r_at_1 == pytest.approx(np.mean(first))


def test_verification_agrees_with_scikit_learn() -> None:
    data = drawn()
    upper = np.triu_indices(len(data), 1)
    scores = (data.vectors @ data.vectors.T)[upper]
    same = (data.labels[:, None] == data.labels[None])[upper]
    found = similarity.verification(data, Threshold(0.45, "given", ""))
    assert (found.same, found.different) == (same.sum(), (~same).sum())
    assert found.auroc == pytest.approx(sklearn_metrics.roc_auc_score(same, scores), abs=1e-4)
    false_accept, accept, _ = sklearn_metrics.roc_curve(same, scores)
    i = np.argmin(np.abs(false_accept - (1 - accept)))
    assert found.eer == pytest.approx((false_accept[i] + 1 - accept[i]) / 2, abs=3e-3)
    assert found.accepted_at_1 == pytest.approx(accept[false_accept <= 0.01].max(), abs=1e-2)
    said = scores >= 0.45
    weights = np.where(same, 1 / same.sum(), 1 / (~same).sum())
    for got, weight in ((found.balanced, weights), (found.natural, None)):
        options: dict[str, Any] = {"sample_weight": weight}
        assert got.f1 == pytest.approx(sklearn_metrics.f1_score(same, said, **options), abs=2e-3)
        assert got.precision == pytest.approx(sklearn_metrics.precision_score(same, said, **options), abs=2e-3)
        assert got.recall == pytest.approx(sklearn_metrics.recall_score(same, said, **options), abs=2e-3)
    best = max(
        sklearn_metrics.f1_score(same, scores >= value, sample_weight=weights) for value in np.linspace(-1, 1, 401)
    )
    assert found.best_f1 == pytest.approx(best, abs=2e-3)


def test_a_threshold_is_fitted_on_one_split_and_applied_to_another() -> None:
    fit, data = drawn(seed=1), drawn(seed=2)
    threshold = similarity.fit_pairs(fit, "val")
    assert (threshold.split, threshold.rule) == ("val", "best F1 of pairs, both kinds weighing the same")
    own = similarity.verification(fit, threshold)
    assert own.balanced.f1 == pytest.approx(own.best_f1)
    other = similarity.verification(data, threshold)
    assert other.threshold == threshold
    assert other.balanced.f1 <= other.best_f1


def test_pairs_by_the_band_of_the_smaller_class() -> None:
    data = embedded(at(*range(30), 90, 91, 92), [0] * 30 + [1] * 3)
    found = similarity.verification(data, Threshold(0.9, "given", ""))
    assert [(band.band, band.same, band.different) for band in found.bands] == [
        ("few (2..5)", 3, 90),
        ("many (> 20)", 435, 0),
    ]
    assert found.bands[0].f1 == 1
    assert found.bands[1].f1 is None


def test_few_images_identify_classes_that_are_apart() -> None:
    clear, mixed = drawn(spread=0.05), drawn(spread=3.0)
    assert similarity.few_shot(clear, 5).r_at_1 == 1
    blurred = similarity.few_shot(mixed, 5, draws=10)
    assert blurred is not None
    assert 0.1 < blurred.r_at_1 < 0.6
    assert blurred.lowest < blurred.r_at_1
    assert blurred == similarity.few_shot(mixed.rows(np.arange(len(mixed))), 5, draws=10)
    backwards = mixed.rows(np.arange(len(mixed))[::-1])
    assert similarity.few_shot(backwards, 5, draws=10).r_at_1 == pytest.approx(blurred.r_at_1)
    assert similarity.few_shot(clear, 12) is None


def test_unknown_classes_are_told_apart_as_well_as_the_fitted_share_says() -> None:
    fit, data = drawn(40, 10, 0.4, seed=3), drawn(40, 10, 0.4, seed=4)
    threshold = similarity.fit_open_set(fit, "val", false_accept=0.1, draws=10)
    found = similarity.open_set(data, threshold, draws=10)
    assert (found.known, found.unknown) == (20, 20)
    assert found.accepted_unknown == pytest.approx(0.1, abs=0.04)
    assert found.auroc > 0.9
    assert found.named + found.misnamed <= 1


def test_the_quantile_lets_no_more_through_than_its_share() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    for share, passed in ((0.0, 0), (0.25, 1), (0.3, 1), (1.0, 4)):
        assert (scores >= similarity.quantile_above(scores, share)).sum() == passed


def test_area_counts_equal_scores_half() -> None:
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(0, 9, 50) / 10, rng.integers(0, 7, 70) / 10
    truth = [1] * 50 + [0] * 70
    expected = sklearn_metrics.roc_auc_score(truth, [*higher, *lower])
    assert similarity.area(higher, lower) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        ([0, 1, 2], "retrieval", "no image has another one of its class to find"),
        ([0, 1, 2], "verification", "no pairs of one class can be compared"),
        ([0, 0, 0], "verification", "no pairs of two classes can be compared"),
        ([0, 0, 1], "open-set", "the split has 0 of them: give fewer --shots"),
    ],
)
def test_splits_that_do_not_allow_a_task_are_refused(labels: list[int], task: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure(embedded(at(0, 50, 100), labels), [task], Settings(threshold=0.5))


def test_a_task_needs_a_threshold_of_another_split() -> None:
    with pytest.raises(UsageError, match="name a split to fit it on with --fit-split"):
        measure(drawn(), ["verification"], Settings())
    with pytest.raises(UsageError, match="no threshold can be fitted on the split 'val': no pairs of two classes"):
        measure(drawn(), ["verification"], Settings(), drawn(1), "val")


def test_results_as_json_and_as_tables() -> None:
    result = measure(drawn(), ["retrieval", "verification", "open-set"], Settings(draws=3), drawn(seed=5), "val")
    values = as_json(result)
    assert set(values) == {"images", "classes", "retrieval", "verification", "open_set"}
    assert values["verification"]["threshold"]["split"] == "val"
    assert [few["shots"] for few in values["retrieval"]["few_shot"]] == [1, 5]
    assert len(tables(result)) == 7
    assert set(as_json(measure(drawn(), ["retrieval"], Settings(draws=1)))) == {"images", "classes", "retrieval"}
