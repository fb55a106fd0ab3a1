from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.losses import objectives
from animesion_training.losses.classification import (
    LDAM,
    Objective,
    SoftmaxObjective,
    class_balanced_weights,
    log_prior,
)
from animesion_training.losses.objectives import (
    create_objective,
    objective_names,
    objective_options,
    register_objective,
)

COUNTS = [500, 120, 40, 7, 1]
SOFT = ["balanced-softmax", "class-balanced", "cross-entropy", "focal", "logit-adjustment"]
ALL = [*SOFT, "ldam", "ldam-drw"]


def batch(size: int = 16, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (size,), generator=generator)


def make(name: str, **options: object) -> Objective:
    objective = create_objective(name, COUNTS, epochs=10, **options)
    objective.set_epoch(9)
    return objective


# -- against references --------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch_and_timm(smoothing: float) -> None:
    logits, targets = batch()
    found = create_objective("cross-entropy", label_smoothing=smoothing)(logits, targets)
    torch.testing.assert_close(found, functional.cross_entropy(logits, targets, label_smoothing=smoothing))
    torch.testing.assert_close(found, LabelSmoothingCrossEntropy(smoothing)(logits, targets))


def test_soft_cross_entropy_is_that_of_torch_and_timm() -> None:
    logits, _ = batch()
    soft = torch.softmax(batch(scale=1.0)[0].flip(0), 1)
    torch.testing.assert_close(create_objective("cross-entropy")(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    found = create_objective("cross-entropy", label_smoothing=0.2)(logits, soft)
    torch.testing.assert_close(found, functional.cross_entropy(logits, soft, label_smoothing=0.2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_balanced_is_the_weighted_cross_entropy_of_torch(smoothing: float) -> None:
    logits, targets = batch()
    found = create_objective("class-balanced", COUNTS, beta=0.99, label_smoothing=smoothing, reduction="none")
    weights = torch.tensor(class_balanced_weights(COUNTS, 0.99))
    losses = functional.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found(logits, targets), losses, rtol=1e-6, atol=1e-6)


def test_class_balanced_weights_by_hand() -> None:
    raw = np.array([0.1 / (1 - 0.9**n) for n in (1, 2, 3)])
    assert class_balanced_weights([1, 2, 3], 0.9) == pytest.approx(raw / raw.mean())
    assert class_balanced_weights([1, 2, 3], 0.0).tolist() == [1, 1, 1]
    inverse = 1 / np.array([1000, 10, 1])
    assert class_balanced_weights([1000, 10, 1], 1 - 1e-12) == pytest.approx(inverse / inverse.mean(), rel=1e-4)


def test_focal_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])
    found = create_objective("focal", gamma=2.0)
    assert float(found(logits, torch.tensor([0]))) == pytest.approx(-(0.25**2) * math.log(0.75))
    assert float(found(logits, torch.tensor([1]))) == pytest.approx(-(0.75**2) * math.log(0.25))


def test_balanced_softmax_by_hand() -> None:
    logits, targets = torch.tensor([[0.0, math.log(2.0)]]), torch.tensor([0])
    # 8 e^0 / (8 e^0 + 2 e^log 2)
    assert float(create_objective("balanced-softmax", [8, 2])(logits, targets)) == pytest.approx(-math.log(8 / 12))
    # 8^2 e^0 / (8^2 e^0 + 2^2 e^log 2)
    adjusted = create_objective("logit-adjustment", [8, 2], tau=2.0)
    assert float(adjusted(logits, targets)) == pytest.approx(-math.log(64 / 72))
    assert np.exp(log_prior([8, 2])) == pytest.approx([0.8, 0.2])


def test_ldam_by_hand() -> None:
    objective = create_objective("ldam", [16, 1], max_m=0.5, scale=2.0)
    assert isinstance(objective, LDAM)
    assert objective.margins.tolist() == [0.25, 0.5]
    logits = torch.tensor([[0.4, 0.1], [0.4, 0.1]])
    first = -math.log(math.exp(2 * 0.15) / (math.exp(2 * 0.15) + math.exp(2 * 0.1)))
    second = -math.log(math.exp(2 * -0.4) / (math.exp(2 * -0.4) + math.exp(2 * 0.4)))
    assert float(objective(logits, torch.tensor([0, 1]))) == pytest.approx((first + second) / 2)


def test_deferred_weights_start_at_their_epoch() -> None:
    logits, targets = batch()
    plain = create_objective("ldam", COUNTS, reduction="none")(logits, targets)
    objective = create_objective("ldam-drw", COUNTS, drw_epoch=3, beta=0.9, reduction="none")
    weights = torch.tensor(class_balanced_weights(COUNTS, 0.9))[targets]
    for epoch, expected in ((0, plain), (2, plain), (3, weights * plain), (4, weights * plain), (1, plain)):
        objective.set_epoch(epoch)
        torch.testing.assert_close(objective(logits, targets), expected, rtol=1e-6, atol=1e-6)
    by_default = create_objective("ldam-drw", COUNTS, epochs=200)
    assert isinstance(by_default, LDAM)
    assert by_default.drw_epoch == 160


# -- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "counts", "options"),
    [
        ("balanced-softmax", [9] * 5, {}),
        ("logit-adjustment", COUNTS, {"tau": 0.0}),
        ("focal", None, {"gamma": 0.0}),
        ("class-balanced", COUNTS, {"beta": 0.0}),
        ("class-balanced", [9] * 5, {}),
        ("ldam", COUNTS, {"max_m": 0.0, "scale": 1.0}),
        ("ldam-drw", [9] * 5, {"max_m": 0.0, "scale": 1.0, "drw_epoch": 0}),
    ],
)
def test_limits_that_are_cross_entropy(name: str, counts: list[int] | None, options: dict[str, Any]) -> None:
    logits, targets = batch()
    objective = create_objective(name, counts, **options)
    torch.testing.assert_close(
        objective(logits, targets), functional.cross_entropy(logits, targets), rtol=1e-6, atol=1e-6
    )


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=20), st.floats(0, 1 - 1e-9))
@settings(deadline=None)
def test_class_balanced_weights_fall_with_the_count(counts: list[int], beta: float) -> None:
    weights = class_balanced_weights(sorted(counts), beta)
    assert weights.mean() == pytest.approx(1)
    assert (weights > 0).all()
    assert (np.diff(weights) <= 1e-12 * weights.max()).all()


@pytest.mark.parametrize("name", SOFT)
def test_the_loss_of_a_mixed_label_is_the_mixture(name: str) -> None:
    logits, targets = batch()
    others, objective = targets.roll(1), make(name, reduction="none")
    one, two = (functional.one_hot(t, 5).double() for t in (targets, others))
    torch.testing.assert_close(objective(logits, one), objective(logits, targets))
    mixed = 0.3 * objective(logits, targets) + 0.7 * objective(logits, others)
    torch.testing.assert_close(objective(logits, 0.3 * one + 0.7 * two), mixed)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str) -> None:
    logits, targets = batch(size=6, scale=0.7 if name.startswith("ldam") else 2.0)
    objective = make(name)
    assert torch.autograd.gradcheck(lambda z: objective(z, targets), (logits.requires_grad_(),))


def test_gradients_with_every_option() -> None:
    logits, targets = batch(size=6)
    soft = torch.softmax(logits.roll(1, 0), 1)
    objective = SoftmaxObjective(
        weights=[1.0, 2, 3, 4, 5], shift=[0.5, 0, 0, 1, -1], gamma=0.5, label_smoothing=0.1, reduction="sum"
    )
    for labels in (targets, soft):
        assert torch.autograd.gradcheck(lambda z, q=labels: objective(z, q), (logits.requires_grad_(),))


@pytest.mark.parametrize("name", ALL)
def test_reductions_and_parts_of_a_batch(name: str) -> None:
    logits, targets = batch()
    each = make(name, reduction="none")(logits, targets)
    assert each.shape == (16,)
    torch.testing.assert_close(make(name, reduction="sum")(logits, targets), each.sum())
    mean = make(name)
    torch.testing.assert_close(mean(logits, targets), each.mean())
    parts = [mean(logits[rows], targets[rows]) for rows in (slice(0, 8), slice(8, 16))]
    torch.testing.assert_close(torch.stack(parts).mean(), each.mean())
    assert float(mean(logits[:0], targets[:0])) == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_are_finite(name: str, size: float) -> None:
    logits = (size * torch.eye(5) - size * torch.eye(5).roll(1, 0)).requires_grad_()
    for targets in (torch.arange(5), (torch.arange(5) + 1) % 5):
        loss = make(name)(logits, targets)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 3.0])
def test_focal_is_finite_where_all_is_certain(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    for target in range(3):
        loss = create_objective("focal", gamma=gamma)(logits, torch.tensor([target]))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ALL)
def test_a_class_without_training_images_is_one_with_a_single_image(name: str) -> None:
    logits, _ = batch()
    targets = torch.arange(16) % 5
    empty = create_objective(name, [500, 120, 40, 7, 0], epochs=1, reduction="none")
    assert torch.isfinite(empty(logits, targets)).all()
    weights = class_balanced_weights([10, 10, 0], 0.9)
    assert weights[:2].mean() == pytest.approx(1)
    assert weights[2] / weights[0] == pytest.approx(1 / ((1 - 0.9) / (1 - 0.9**10)))
    assert log_prior([10, 10, 0])[2] == pytest.approx(math.log(1 / 20))
    assert LDAM([16, 16, 0]).margins.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ALL)
def test_autocast_and_low_precision_do_not_matter(name: str) -> None:
    logits, targets = batch()
    logits, objective = logits.bfloat16(), make(name)
    expected = objective(logits.float(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(logits, targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_objectives_leave_no_trace_in_a_checkpoint() -> None:
    for name in ALL:
        assert not make(name).state_dict()
        assert not list(make(name).parameters())


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "counts", "options", "message"),
    [
        ("crossentropy", None, {}, "did you mean 'cross-entropy'"),
        ("focal", None, {"gama": 1}, "did you mean 'gamma'"),
        ("ldam", COUNTS, {"label_smoothing": 0.1}, "it takes max_m, scale"),
        ("focal", None, {"gamma": -1}, "gamma must be a number of at least 0, not -1"),
        ("focal", None, {"gamma": "2"}, "not '2'"),
        ("focal", None, {"gamma": math.nan}, "not nan"),
        ("cross-entropy", None, {"label_smoothing": 1.5}, "at least 0 and at most 1"),
        ("cross-entropy", None, {"reduction": "avg"}, "mean, sum, none"),
        ("class-balanced", COUNTS, {"beta": 1.0}, "below 1"),
        ("class-balanced", None, {}, "needs the training images"),
        ("balanced-softmax", [0, 0], {}, "no class has a training image"),
        ("ldam", COUNTS, {"scale": 0}, "above 0"),
        ("ldam-drw", COUNTS, {}, "needs drw_epoch"),
        ("ldam-drw", COUNTS, {"drw_epoch": 2.5}, "not 2.5"),
        ("ldam-drw", COUNTS, {"drw_epoch": 10, "epochs": 10}, "never reached"),
    ],
)
def test_wrong_options_say_so(name: str, counts: list[int] | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_objective(name, counts, **options)


def test_wrong_calls_say_so() -> None:
    logits, targets = batch()
    soft = functional.one_hot(targets, 5).double()
    with pytest.raises(UsageError, match="switch MixUp and CutMix off"):
        make("ldam")(logits, soft)
    assert not LDAM.takes_soft
    objective = make("cross-entropy")
    for wrong in (targets.int(), targets[:3], soft[:, :3], soft.long()):
        with pytest.raises(ValueError, match="targets must be"):
            objective(logits, wrong)
    with pytest.raises(ValueError, match="logits must be"):
        objective(logits.long(), targets)
    with pytest.raises(ValueError, match="the objective has 5 classes, the logits have 4"):
        make("balanced-softmax")(logits[:, :4], targets)
    with pytest.raises(ValueError, match="non-negative"):
        create_objective("ldam", [3, -1])


# -- names and the teacher -------------------------------------------------------------------------------------------


def test_names_and_options() -> None:
    assert objective_names() == sorted([*ALL, "arcface", "asl", "bce", "cosface", "proxy-anchor", "supcon"])
    assert objective_options("focal") == {"gamma": 2.0, "label_smoothing": 0.0, "reduction": "mean"}
    assert "counts" not in objective_options("ldam-drw")


@pytest.fixture
def distilling() -> Iterator[str]:
    @register_objective("halves")
    class Halves(Objective):
        needs_teacher = True

        def losses(self, logits: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
            # a product that autocast would compute in half precision
            divergence = (torch.softmax(teacher[0], 1) @ -torch.log_softmax(logits, 1).T).diagonal()
            return (functional.cross_entropy(logits, targets, reduction="none") + divergence) / 2

    yield "halves"
    del objectives._FACTORIES["halves"]


def test_a_distillation_objective_gets_the_teacher(distilling: str) -> None:
    logits, targets = batch()
    teacher = logits.roll(1, 1)
    objective = create_objective(distilling)
    soft = (torch.softmax(teacher, 1) + functional.one_hot(targets, 5)) / 2
    torch.testing.assert_close(objective(logits, targets, teacher), functional.cross_entropy(logits, soft))
    expected = objective(logits.bfloat16().float(), targets, teacher.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(logits.bfloat16(), targets, teacher.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="needs a teacher"):
        objective(logits, targets)
    with pytest.raises(ValueError, match="does not take a teacher"):
        make("focal")(logits, targets, teacher)
    with pytest.raises(ValueError, match="the teacher's logits"):
        objective(logits, targets, teacher[:, :3])
    with pytest.raises(ValueError, match="already"):
        register_objective("focal")(Objective)
