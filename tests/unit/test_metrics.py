from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from animesion.errors import AnimesionError
from animesion_training.eval.metrics import Evaluation, bootstrap, evaluate
from animesion_training.eval.report import as_json, confusions_csv, mistakes_csv, per_class_csv, tables
from animesion_training.eval.scores import Scored, Scores


def scored(logits: Tensor, targets: Tensor, **options: Any) -> Scores:
    scores = Scores(logits.shape[1])
    scores.add(logits, targets, torch.arange(len(targets)), **options)
    return scores


def predicting(targets: Sequence[int], predictions: Sequence[int], classes: int, **options: Any) -> Evaluation:
    """An evaluation of one-hot probabilities."""
    chances = functional.one_hot(torch.tensor(predictions), classes).float()
    return evaluate(scored(chances, torch.tensor(targets), probabilities=True), **options)


def random_split(samples: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    return logits + 2 * functional.one_hot(targets, classes), targets


# -- expected values -------------------------------------------------------------------------------------------------

TARGETS = [0, 0, 0, 0, 1, 1, 2, 2, 2]
PREDICTED = [0, 0, 0, 1, 1, 0, 0, 0, 3]
NAMES = ["[red]miku[/red]", 'a,"b"', "line\nbreak\x1b[31m", "=3", "unseen"]
COUNTS = [101, 100, 20, 19, 0]


@pytest.fixture(scope="module")
def by_hand() -> Evaluation:
    return predicting(TARGETS, PREDICTED, 5, names=NAMES, train_counts=COUNTS, expected=9)


def test_accuracies_by_hand(by_hand: Evaluation) -> None:
    assert (by_hand.samples, by_hand.classes, by_hand.k) == (9, 5, 5)
    assert by_hand.top_1 == pytest.approx(4 / 9)
    assert by_hand.top_5 == 1
    assert by_hand.macro_accuracy == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert by_hand.macro_f1 == pytest.approx((6 / (4 + 6) + 2 / (2 + 2) + 0) / 3)
    assert by_hand.untested == (3, 4)


def test_bands_by_hand(by_hand: Evaluation) -> None:
    assert by_hand.bands is not None
    many, medium, few = by_hand.bands.many, by_hand.bands.medium, by_hand.bands.few
    assert (many.classes, many.tested, many.samples, many.top_1, many.macro_accuracy) == (1, 1, 4, 0.75, 0.75)
    assert (medium.classes, medium.tested, medium.samples) == (2, 2, 5)
    assert medium.top_1 == pytest.approx(1 / 5)
    assert medium.macro_accuracy == pytest.approx(1 / 4)
    assert (few.classes, few.tested, few.samples, few.top_1, few.macro_accuracy) == (2, 0, 0, None, None)
    assert predicting(TARGETS, PREDICTED, 5).bands is None


def test_confusions_by_hand(by_hand: Evaluation) -> None:
    found: list[Any] = [
        (c.true_id, c.predicted_id, c.images, c.share_of_class, c.share_of_errors) for c in by_hand.confusions
    ]
    assert found == [
        (2, 0, 2, pytest.approx(2 / 3), pytest.approx(2 / 5)),
        (0, 1, 1, pytest.approx(1 / 4), pytest.approx(1 / 5)),
        (1, 0, 1, pytest.approx(1 / 2), pytest.approx(1 / 5)),
        (2, 3, 1, pytest.approx(1 / 3), pytest.approx(1 / 5)),
    ]
    rows = [(c.train_images, c.test_images, c.accuracy, c.confused_with, c.confusions) for c in by_hand.per_class]
    assert rows == [(101, 4, 0.75, 1, 1), (100, 2, 0.5, 0, 1), (20, 3, 0, 0, 2), (19, 0, None, None, 0),
                    (0, 0, None, None, 0)]  # fmt: skip
    assert [c.f1 for c in by_hand.per_class] == [pytest.approx(0.6), pytest.approx(0.5), 0, None, None]


def test_calibration_by_hand() -> None:
    # 0.9 falls into bin (13/15, 14/15], 0.6 into (8/15, 9/15]
    chances = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]], dtype=torch.float64)
    found = evaluate(scored(chances, torch.tensor([0, 1, 1, 1]), probabilities=True)).calibration
    assert found.error == pytest.approx(2 / 4 * abs(0.5 - 0.9) + 2 / 4 * abs(0.5 - 0.6), abs=1e-6)
    assert found.mean_confidence == pytest.approx(0.75)
    assert found.nll == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.4]).mean(), abs=1e-6)
    assert found.brier == pytest.approx(2 * np.mean([0.1**2, 0.9**2, 0.4**2, 0.6**2]), abs=1e-6)
    assert sum(each.samples for each in found.bins) == 4
    assert found.bins[0].accuracy is None


def test_perfect_calibration_has_no_error() -> None:
    assert predicting([0, 1, 2], [0, 1, 2], 3).calibration.error == 0
    # 60% sure and right in 60 of 100
    chances = torch.tensor([[0.6, 0.4]]).expand(100, 2)
    targets = torch.tensor([0] * 60 + [1] * 40)
    assert evaluate(scored(chances, targets, probabilities=True)).calibration.error == pytest.approx(0, abs=1e-6)


def test_a_certain_mistake_has_a_finite_likelihood() -> None:
    found = predicting([0, 1], [1, 0], 2)
    assert found.calibration.nll == pytest.approx(-np.log(np.finfo(np.float32).tiny))
    assert (found.calibration.error, found.calibration.brier, found.top_1, found.macro_f1) == (1, 2, 0, 0)


def test_top_5_of_few_classes_and_of_equals() -> None:
    assert predicting([0, 1], [1, 0], 3).k == 3
    # all equal: ranked by class id, the prediction is class 0
    scores = scored(torch.zeros(8, 8), torch.arange(8))
    assert scores.collect().predictions.tolist() == [0] * 8
    assert scores.collect().in_top.tolist() == [True] * 5 + [False] * 3


# -- against others --------------------------------------------------------------------------------------------------


def test_top_1_and_top_5_are_those_of_torch() -> None:
    logits, targets = random_split(500, 40)
    hit = logits.topk(5).indices == targets[:, None]
    found = evaluate(scored(logits, targets))
    assert found.top_1 == pytest.approx(float(hit[:, 0].float().mean()))
    assert found.top_5 == pytest.approx(float(hit.any(1).float().mean()))
    assert found.calibration.nll == pytest.approx(float(functional.cross_entropy(logits, targets)), rel=1e-5)
    chances = evaluate(scored(torch.softmax(logits, 1), targets, probabilities=True))
    assert (chances.top_1, chances.top_5) == (found.top_1, found.top_5)
    assert chances.calibration.error == pytest.approx(found.calibration.error, abs=1e-5)
    assert chances.calibration.brier == pytest.approx(found.calibration.brier, rel=1e-5)


def test_macro_scores_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, targets = random_split(300, 60)
    targets[targets > 50] = 3  # classes without a test image, which are guessed at times
    predictions, present = logits.argmax(1), np.unique(targets)
    found = evaluate(scored(logits, targets))
    assert len(found.untested) == 60 - len(present)
    f1 = sklearn.f1_score(targets, predictions, labels=present, average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(f1)
    recall = sklearn.recall_score(targets, predictions, labels=present, average="macro", zero_division=0)
    assert found.macro_accuracy == pytest.approx(recall)
    matrix = sklearn.confusion_matrix(targets, predictions, labels=range(60))
    np.fill_diagonal(matrix, 0)
    everything = evaluate(scored(logits, targets), pairs=10_000).confusions
    assert sum(c.images for c in everything) == matrix.sum()
    assert all(matrix[c.true_id, c.predicted_id] == c.images for c in everything)
    brier = sklearn.brier_score_loss(targets == 3, torch.softmax(logits, 1)[:, 3])
    two = torch.stack([1 - torch.softmax(logits, 1)[:, 3], torch.softmax(logits, 1)[:, 3]], 1)
    both = evaluate(scored(two, (targets == 3).long(), probabilities=True)).calibration.brier
    assert both == pytest.approx(2 * brier, rel=1e-5)


# -- gathering -------------------------------------------------------------------------------------------------------


def test_the_order_of_batches_and_processes_does_not_matter() -> None:
    logits, targets = random_split(100, 7)
    whole = evaluate(scored(logits, targets))
    ranks = [Scores(7), Scores(7)]
    for start in range(90, -1, -10):
        rows = torch.arange(start, start + 10)
        ranks[start // 10 % 2].add(logits[rows], targets[rows], rows)
    gathered = Scores(7)
    gathered.extend(ranks)
    assert len(gathered) == 100
    assert evaluate(gathered, expected=100) == whole
    with pytest.raises(ValueError, match="cannot join"):
        gathered.extend([Scores(8)])


def test_each_sample_counts_once() -> None:
    logits, targets = random_split(10, 3)
    scores = scored(logits, targets)
    with pytest.raises(AnimesionError, match="10 samples were scored, the split has 11"):
        evaluate(scores, expected=11)
    scores.add(logits[3:5], targets[3:5], torch.tensor([3, 4]))
    with pytest.raises(AnimesionError, match="2 of 10 samples were scored more than once, the first is sample 3"):
        evaluate(scores)
    with pytest.raises(AnimesionError, match="no sample to evaluate"):
        evaluate(Scores(3))


def test_mistakes() -> None:
    logits, targets = random_split(4, 3)
    places = torch.arange(4)
    for wrong in ((logits[:, :2], targets, places), (logits, targets[:2], places), (logits, targets, places.float())):
        with pytest.raises(ValueError, match="must be"):
            Scores(3).add(*wrong)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=r"class ids 0\.\.2"):
            Scores(3).add(logits, torch.full((4,), bad), places)
    with pytest.raises(ValueError, match="sum to 1"):
        Scores(3).add(logits, targets, places, probabilities=True)
    logits[2, 1] = np.nan
    with pytest.raises(AnimesionError, match="not finite for sample 12"):
        Scores(3).add(logits, targets, places + 10)
    with pytest.raises(ValueError, match="3 classes"):
        evaluate(scored(*random_split(4, 3)), names=["a"])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=60))
@settings(deadline=None, max_examples=40)
def test_numbers_fit_each_other(pairs: list[tuple[int, int]]) -> None:
    found = predicting(
        [t for t, _ in pairs], [p for _, p in pairs], 21, train_counts=range(0, 210, 10), pairs=999, resamples=50
    )
    wrong = sum(c.images for c in found.confusions)
    assert found.top_1 == pytest.approx(1 - wrong / len(pairs))
    assert found.top_1 <= found.top_5
    assert found.bands is not None
    bands = (found.bands.many, found.bands.medium, found.bands.few)
    assert sum(b.samples for b in bands) == len(pairs)
    assert sum((b.top_1 or 0) * b.samples for b in bands) == pytest.approx(found.top_1 * len(pairs))
    total = sum((b.macro_accuracy or 0) * b.tested for b in bands)
    assert total / (21 - len(found.untested)) == pytest.approx(found.macro_accuracy)
    json.dumps(as_json(found, per_class=True), allow_nan=False)


# -- bootstrap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_estimate_and_repeats(seed: int) -> None:
    logits, targets = random_split(400, 12, seed)
    found = evaluate(scored(logits, targets), seed=seed)
    assert found.top_1_interval.low < found.top_1 < found.top_1_interval.high
    assert found.macro_accuracy_interval.low < found.macro_accuracy < found.macro_accuracy_interval.high
    assert evaluate(scored(logits, targets), seed=seed) == found
    assert evaluate(scored(logits, targets), seed=seed + 1).top_1_interval != found.top_1_interval
    # a share of 400 independent samples, by its normal approximation
    spread = 1.96 * np.sqrt(found.top_1 * (1 - found.top_1) / 400)
    assert found.top_1_interval.high - found.top_1_interval.low == pytest.approx(2 * spread, rel=0.12)


def test_drawing_counts_is_drawing_samples() -> None:
    hits, tested = np.array([3, 0, 30, 50]), np.array([4, 1, 60, 50])
    targets = np.repeat(np.arange(4), tested)
    right = np.concatenate([np.arange(n) < h for h, n in zip(hits, tested, strict=True)])

    def accuracies(rows: npt.NDArray[np.int64]) -> tuple[float, float]:
        held = np.bincount(targets[rows], minlength=4)
        sums = np.bincount(targets[rows], weights=right[rows], minlength=4)
        return right[rows].mean(), (sums[held > 0] / held[held > 0]).mean()

    random = np.random.default_rng(1)
    slow = np.percentile([accuracies(random.integers(115, size=115)) for _ in range(4000)], [2.5, 97.5], axis=0)
    top_1, macro = bootstrap(hits, tested, resamples=4000)
    assert [top_1.low, top_1.high] == pytest.approx(slow[:, 0], abs=0.012)
    assert [macro.low, macro.high] == pytest.approx(slow[:, 1], abs=0.02)


def test_certain_results_have_a_narrow_interval() -> None:
    found = predicting([0, 1, 2, 2], [0, 1, 2, 2], 3)
    assert (found.top_1_interval.low, found.top_1_interval.high) == (1, 1)
    assert (found.macro_accuracy_interval.low, found.macro_accuracy_interval.high) == (1, 1)


def test_as_many_classes_and_images_as_daf_re() -> None:
    random = np.random.default_rng(0)
    classes, samples = 3_263, 94_440
    tested = random.multinomial(samples, random.dirichlet(np.full(classes, 0.3)))
    targets = np.repeat(np.arange(classes), tested)
    predictions = np.where(random.random(samples) < 0.8, targets, random.integers(classes, size=samples))
    scores = Scores(classes)
    # outputs of one batch only, the rest is put in as gathered: what is timed here is not the softmax
    part = scored(torch.randn(64, classes), torch.from_numpy(targets[:64])).collect()
    repeated = {name: np.resize(getattr(part, name), samples) for name in ("in_top", "confidences", "nlls", "briers")}
    scores.add_scored(Scored(np.arange(samples), targets, predictions, **repeated))
    found = evaluate(scores, train_counts=7 * tested, expected=samples)
    assert found.top_1_interval.low < found.top_1 < found.top_1_interval.high
    assert len(per_class_csv(found).splitlines()) == 1 + classes


# -- reports ---------------------------------------------------------------------------------------------------------


def test_json(by_hand: Evaluation) -> None:
    report = json.loads(json.dumps(as_json(by_hand), allow_nan=False))
    assert report["top_1"] == pytest.approx(4 / 9, abs=1e-6)
    assert report["bands"]["few"]["top_1"] is None
    assert report["untested"] == [3, 4]
    assert report["confusions"][0]["true_name"] == NAMES[2]
    assert "per_class" not in report
    assert len(as_json(by_hand, per_class=True)["per_class"]) == 5


def test_csv(by_hand: Evaluation) -> None:
    rows = list(csv.DictReader(io.StringIO(per_class_csv(by_hand))))
    assert [row["name"] for row in rows] == NAMES
    assert rows[2]["confused_with_name"] == NAMES[0]
    assert rows[0]["accuracy"] == "0.750000"
    assert (rows[4]["accuracy"], rows[4]["confused_with"], rows[4]["train_images"]) == ("", "", "0")
    pairs = list(csv.DictReader(io.StringIO(confusions_csv(by_hand))))
    assert [(row["true_id"], row["predicted_name"]) for row in pairs][:2] == [("2", NAMES[0]), ("0", NAMES[1])]


def test_mistakes_are_the_surest_first_and_those_of_the_right_images() -> None:
    scores = Scores(3)
    outputs = torch.tensor([[0.1, 0.7, 0.2], [0.9, 0.05, 0.05], [0.2, 0.2, 0.6], [0.0, 0.95, 0.05]])
    scores.add(outputs, torch.tensor([0, 0, 1, 2]), torch.tensor([3, 1, 2, 0]), probabilities=True)
    names = ["a", '"b, c"', "=d"]
    rows = list(csv.DictReader(io.StringIO(mistakes_csv(scores, ["p0", "p1", "p2", "p3"], names))))
    assert [(row["key"], row["true_name"], row["predicted_name"], row["confidence"]) for row in rows] == [
        ("p0", "=d", '"b, c"', "0.950000"),
        ("p3", "a", '"b, c"', "0.700000"),
        ("p2", '"b, c"', "=d", "0.600000"),
    ]
    assert mistakes_csv(scores, ["p0", "p1", "p2", "p3"], names, most=1).count("\n") == 2


def test_tables(by_hand: Evaluation) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    for each in tables(by_hand):
        console.print(each)
    shown = out.getvalue()
    assert "[red]miku[/red]" in shown
    assert "line?break?[31m" in shown
    assert "\x1b[31m" not in shown
    assert "2 of 5 classes have no test image" in shown
    for text in ("top-1", "44.44%", "many (> 100)", "75.00%", "Worst classes", "Largest confusions", "66.67%"):
        assert text in shown
    assert len(tables(by_hand, shown=0)) == 3
