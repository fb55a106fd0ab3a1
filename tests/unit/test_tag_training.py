"""Objectives, targets, metrics and thresholds for tags; every expected value is derived by hand or by the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional

from animesion.dataset.tags import Assigned
from animesion.errors import AnimesionError, UsageError
from animesion_training.data.mixing import Mixing, mix
from animesion_training.data.tags import TagLabels, TagTargets, category_counts
from animesion_training.engine.setup import start_at_prior
from animesion_training.eval.tag_metrics import TagResult, TagScores, average_precision, evaluate_tags, fit_thresholds
from animesion_training.losses.objectives import create_objective, is_on_tags
from animesion_training.weights import WeightsCard


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_the_asymmetric_loss_is_that_of_its_equations() -> None:
    # two tags, present and absent, with p = 0.8 and 0.3: l+ = -(1 - 0.8)^1 log 0.8,
    # p_m = 0.3 - 0.1 = 0.2 and l- = -0.2^2 log(1 - 0.2)
    objective = create_objective("asl", gamma_pos=1.0, gamma_neg=2.0, margin=0.1, reduction="none")
    logits = torch.tensor([[logit(0.8), logit(0.3)]], dtype=torch.float64)
    expected = -0.2 * math.log(0.8) - 0.04 * math.log(0.8)
    torch.testing.assert_close(objective(logits, torch.tensor([[1.0, 0.0]])), torch.tensor([expected]).double())
    # an absent tag below the margin costs nothing and has no gradient
    easy = torch.tensor([[logit(0.09)]], dtype=torch.float64, requires_grad=True)
    loss = objective(easy, torch.zeros(1, 1))
    loss.sum().backward()
    assert (float(loss.detach()), float(easy.grad or 0)) == (0.0, 0.0)


def test_without_focusing_and_margin_it_is_binary_cross_entropy() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = (torch.arange(35).reshape(5, 7) % 3 == 0).double()
    expected = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    for objective in (create_objective("bce"), create_objective("asl", gamma_neg=0.0, margin=0.0)):
        torch.testing.assert_close(objective(logits, targets), expected)


def test_gradients_of_the_asymmetric_loss() -> None:
    objective = create_objective("asl", gamma_pos=1.0, gamma_neg=4.0, margin=0.05)
    logits = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    targets = torch.tensor([[1.0, 0, 1, 0.3], [0, 0, 1, 0.7]])
    assert torch.autograd.gradcheck(lambda x: objective(x, targets), logits)


@pytest.mark.parametrize("name", ["bce", "asl"])
def test_extreme_logits_and_mixtures(name: str) -> None:
    objective = create_objective(name, reduction="none")
    logits = torch.tensor([[1e30, -1e30, 0.0]], requires_grad=True)
    loss = objective(logits, torch.tensor([[0.0, 1.0, 1.0]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # the loss of a mixture is the mixture of the losses, as MixUp needs it
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 1]])
    torch.testing.assert_close(objective(x, 0.3 * a + 0.7 * b), 0.3 * objective(x, a) + 0.7 * objective(x, b))


def test_label_smoothing_and_wrong_targets_and_options() -> None:
    x, y = torch.tensor([[0.4, -1.0]]), torch.tensor([[1.0, 0.0]])
    smoothed = create_objective("bce")(x, torch.tensor([[0.95, 0.05]]))
    torch.testing.assert_close(create_objective("bce", label_smoothing=0.1)(x, y), smoothed)
    with pytest.raises(ValueError, match=r"targets must be floating \(B, T\)"):
        create_objective("bce")(x, torch.tensor([1]))
    rejected: list[dict[str, Any]] = [{"margin": 1.0}, {"gamma_neg": -1.0}, {"gamma_pos": math.nan}]
    for options in rejected:
        with pytest.raises(UsageError, match=next(iter(options))):
            create_objective("asl", **options)
    assert [is_on_tags(name) for name in ("asl", "bce", "focal")] == [True, True, False]


# -- targets ---------------------------------------------------------------------------------------------------------


def labels() -> TagLabels:
    """Three samples with the tags 0 2, none, and 1 2 3."""
    assigned = Assigned(np.array([0, 2, 1, 2, 3], np.int32), np.array([2, 2, 5]))
    return TagLabels(("a", "b", "c", "d"), ("general", "general", "character", "meta"), {"train": assigned})


def test_targets_are_rows_of_zeros_and_ones() -> None:
    tags = labels()
    targets = TagTargets(tags.assigned["train"], len(tags))
    assert targets(torch.tensor([2, 0, 1])).tolist() == [[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert targets(torch.tensor([], dtype=torch.int64)).shape == (0, 4)
    assert tags.counts("train").tolist() == [1, 1, 2, 1]
    assert category_counts(tags.categories) == {"general": 2, "character": 1, "meta": 1}


def test_tags_by_category_and_by_the_names_of_weights() -> None:
    tags = labels()
    some = tags.only(["meta", "character"])
    assert (some.names, some.categories) == (("c", "d"), ("character", "meta"))
    assert [some.assigned["train"].of(i) for i in range(3)] == [[0], [], [0, 1]]
    moved = tags.named(["d", "unknown", "a"])
    assert [moved.assigned["train"].of(i) for i in range(3)] == [[2], [], [0]]
    with pytest.raises(UsageError, match="the data has no tags in artist; it has general, character, meta"):
        tags.only(["artist"])
    with pytest.raises(UsageError, match="none of the tags"):
        tags.named(["x"])


def test_mixup_mixes_tags_as_they_are() -> None:
    images, tags = torch.zeros(2, 3, 4, 4), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    generator = torch.Generator().manual_seed(3)
    found = mix(images, tags, 2, Mixing(mixup_alpha=1.0, label_smoothing=0.5), generator).targets
    share = float(found[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(found, torch.tensor([[share, 1.0], [1 - share, 1.0]]))


def test_a_new_last_layer_starts_at_the_log_odds_of_the_tags() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def get_classifier(self) -> nn.Module:
            return self.fc

    network = Network()
    start_at_prior(network, [0, 49], 99)
    shares = torch.sigmoid(network.fc.bias.detach())
    torch.testing.assert_close(shares, torch.tensor([0.5 / 100, 49.5 / 100]))


# -- metrics ---------------------------------------------------------------------------------------------------------


def scores_of(values: list[list[float]], order: list[int] | None = None) -> TagScores:
    found = TagScores(len(values[0]))
    rows = list(range(len(values))) if order is None else order
    for row in rows:  # one batch each
        found.add(torch.tensor([values[row]]), torch.tensor([row]))
    return found


def test_average_precision_by_hand() -> None:
    # present at ranks 1 and 3: (1/1 + 2/3) / 2
    scores, truth = np.array([0.9, 0.8, 0.7, 0.1], np.float32), np.array([True, False, True, False])
    assert average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    # the two largest are equal: both count at rank 2, with a precision of 1/2
    tied = np.array([0.9, 0.9, 0.7, 0.1], np.float32)
    assert average_precision(tied, truth) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert average_precision(np.full(4, 0.5, np.float32), truth) == 0.5  # a constant score gives the base rate
    assert math.isnan(average_precision(scores, np.zeros(4, bool)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30))
def test_average_precision_is_that_of_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([row[0] / 6 for row in rows], np.float32), np.array([row[1] for row in rows])
    if truth.any():
        assert average_precision(scores, truth) == pytest.approx(average_precision_score(truth, scores))


def numbers(tag: TagResult) -> tuple[float | None, ...]:
    return tag.average_precision, tag.f1, tag.precision, tag.recall


def test_every_number_of_an_evaluation_by_hand() -> None:
    # four images; tags a (general), b (general), c (artist): c is on no image
    values = [[0.9, 0.6, 0.1], [0.8, 0.2, 0.9], [0.3, 0.7, 0.1], [0.6, 0.1, 0.1]]
    assigned = Assigned(np.array([0, 0, 1], np.int32), np.array([1, 1, 3, 3]))  # a on 0 and 2, b on 2
    found = evaluate_tags(
        scores_of(values, [2, 0, 3, 1]), assigned, ["a", "b", "c"], ["general", "general", "artist"],
        thresholds=[0.85, 0.5, 0.5], train_counts=[200, 20, 19], expected=4,
    )  # fmt: skip
    a, b, c = found.per_tag
    # a: order 0.9 (yes), 0.8, 0.6, 0.3 (yes): (1 + 2/4) / 2; predicted for image 0 only
    assert numbers(a) == pytest.approx((0.75, 2 / 3, 1.0, 0.5))
    # b: 0.7 (yes) first; predicted for images 0 and 2
    assert numbers(b) == pytest.approx((1.0, 2 / 3, 0.5, 1.0))
    assert (*numbers(c), c.test_images) == (None, None, 0.0, None, 0)
    every = found.overall
    assert (every.tags, every.tested, every.positives) == (3, 2, 3)
    assert [every.map, every.base_rate] == pytest.approx([0.875, (2 / 4 + 1 / 4) / 2])
    # of the tested tags: 2 hits, 3 predictions, 3 positives
    assert (every.micro_f1, every.precision, every.recall) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found.categories["artist"].map is None
    assert {name: group.tags for name, group in found.bands.items()} == {"many": 1, "medium": 1, "few": 1}
    assert found.fitted


def test_samples_are_scored_once_and_finite() -> None:
    twice = scores_of([[0.1], [0.2]], [0, 1, 1])
    with pytest.raises(AnimesionError, match="scored more than once"):
        twice.collect()
    with pytest.raises(AnimesionError, match=r"2 samples were scored, the split has 3"):
        scores_of([[0.1], [0.2]]).collect(3)
    with pytest.raises(AnimesionError, match="not finite for sample 7"):
        TagScores(1).add(torch.tensor([[math.nan]]), torch.tensor([7]))


def test_thresholds_maximise_f1_and_rare_tags_share_one() -> None:
    # a: positives at 0.9 and 0.7, others at 0.8 and 0.2: F1 of 1, 2, 3 and 4 predictions: 2/3, 1/2, 4/5, 2/3;
    # so three are predicted, down to half-way between 0.7 and 0.2
    values = [[0.9, 0.9], [0.8, 0.5], [0.7, 0.2], [0.2, 0.2]]
    assigned = Assigned(np.array([0, 1, 0], np.int32), np.array([2, 2, 3, 3]))
    a, b = fit_thresholds(scores_of(values), assigned, ["general", "general"], least=2)
    assert a == pytest.approx(0.45)
    # b has one positive, so it gets the threshold of both: 0.9 0.9 0.8 0.7 0.5 ... with positives at 0.9 0.9 0.7:
    # F1 of 2, 3 and 4 predictions: 4/5, 4/6, 6/7; the highest multiple of 1/200 that predicts 0.7 but not 0.5
    assert b == pytest.approx(0.7, abs=0.0051)
    alone = fit_thresholds(scores_of(values), assigned, ["general", "general"], least=1)[1]
    assert alone == pytest.approx(0.7)  # half-way between 0.9 and 0.5


def test_a_threshold_between_equal_and_neighbouring_scores() -> None:
    low = np.float32(0.5)
    high = np.nextafter(low, np.float32(1))
    values = [[float(high)], [float(low)], [float(low)]]
    assigned = Assigned(np.array([0], np.int32), np.array([1, 1, 1]))
    [threshold] = fit_thresholds(scores_of(values), assigned, ["general"], least=1)
    assert low < threshold <= high
    found = evaluate_tags(scores_of(values), assigned, ["a"], ["general"], thresholds=[threshold])
    assert found.per_tag[0].f1 == 1.0


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"tag_categories": {"general": 3}},
        {"tag_categories": {"unknown": 2}},
        {"tag_categories": {"general": 0, "artist": 2}},
        {"tag_categories": {}},
        {"thresholds": (0.5,)},
        {"thresholds": (0.5, 1.5)},
        {"thresholds": (0.5, math.nan)},
        {"classes": ()},
    ],
)
def test_cards_of_taggers_are_checked(change: dict[str, object]) -> None:
    from animesion_training import weights

    card = WeightsCard("resnet18", 2, 32, ("a", "b"), tag_categories={"general": 1, "meta": 1}, thresholds=(0.5, 0.2))
    weights._check(card, "x")
    assert (card.is_tagger, card.categories) == (True, ("general", "meta"))
    with pytest.raises(UsageError):
        weights._check(replace(card, **change), "x")  # type: ignore[arg-type]
