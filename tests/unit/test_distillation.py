from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.analysis.teacher_statistics import TeacherStatistics, margin_12, ratio_12
from animesion_training.losses import distillation as d

SETTINGS = {"temperature": 3.0, "weight": 0.7, "label_weight": 0.4}


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


# -- KL and the composite --------------------------------------------------------------------------------------------


def test_kl_is_that_of_torch_distributions() -> None:
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    taught, learned = (torch.distributions.Categorical(logits=each / 4) for each in (teacher, student))
    expected = torch.distributions.kl_divergence(taught, learned)
    torch.testing.assert_close(d.kl(student, teacher, 4.0, "none"), expected)
    torch.testing.assert_close(d.kl(student, teacher, 4.0), expected.mean())


def test_kl_is_0_for_equal_logits_up_to_a_shift_and_nowhere_negative() -> None:
    teacher = logits(6, 9)
    assert d.kl(teacher + 5, teacher, 2.0).abs() < 1e-6
    assert (d.kl(logits(50, 9, seed=3), logits(50, 9, seed=4), 2.0, "none") > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32_under_autocast_too(dtype: torch.dtype) -> None:
    student, teacher, targets = logits(6, 9).to(dtype), logits(6, 9, seed=1).to(dtype), torch.arange(6)
    expected = d.distillation_loss(student.float(), teacher.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = d.distillation_loss(student, teacher, targets)
        others = [d.auxiliary_loss(name, student, teacher, targets) for name in d.auxiliary_names()]
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-6
    )
    exact = [d.auxiliary_loss(name, student.float(), teacher.float(), targets) for name in d.auxiliary_names()]
    torch.testing.assert_close(torch.stack(others), torch.stack(exact))


def test_the_loss_is_the_sum_of_its_terms_by_hand() -> None:
    student, teacher, targets = logits(4, 6), logits(4, 6, seed=1), torch.tensor([0, 5, 2, 2])
    student_views, teacher_views = logits(8, 6, seed=2), logits(8, 6, seed=3)
    terms = d.distillation_loss(
        student, teacher, targets, student_views, teacher_views, view_weights=(0.2, 0.3, 0.9), **SETTINGS
    )
    crop = d.kl(student_views[:4], teacher_views[:4], 3.0)
    drop = d.kl(student_views[4:], teacher_views[4:], 3.0)
    expected = 0.7 * 9 * (0.2 * d.kl(student, teacher, 3.0) + 0.3 * crop + 0.9 * drop)
    torch.testing.assert_close(terms["distillation"], expected)
    torch.testing.assert_close(terms["label"], 0.4 * functional.cross_entropy(student, targets))


def test_without_views_it_is_plain_distillation_whatever_their_weights() -> None:
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    expected = 9 * d.kl(student, teacher, 3.0)
    assert torch.equal(d.distillation_term(student, teacher, temperature=3.0), expected)
    assert torch.equal(d.distillation_term(student, teacher, temperature=3.0, view_weights=(0, 0, 0)), expected)


def test_labels_may_be_smooth_or_mixed() -> None:
    student, teacher, ids = logits(4, 6), logits(4, 6, seed=1), torch.tensor([0, 5, 2, 2])
    smooth = d.distillation_loss(student, teacher, ids, label_smoothing=0.1)["label"]
    torch.testing.assert_close(smooth, functional.cross_entropy(student, ids, label_smoothing=0.1))
    mixed = torch.lerp(functional.one_hot(ids, 6).float(), functional.one_hot(ids.flip(0), 6).float(), 0.3)
    soft = d.distillation_loss(student, teacher, mixed)["label"]
    torch.testing.assert_close(soft, functional.cross_entropy(student, mixed))


def test_no_gradient_flows_to_the_teacher_and_views_get_their_own() -> None:
    tensors = [logits(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 5), (3, 5), (6, 5), (6, 5)])]
    student, teacher, student_views, teacher_views = tensors
    total(d.distillation_loss(student, teacher, torch.tensor([0, 1, 4]), student_views, teacher_views)).backward()
    assert student.grad is not None
    assert student_views.grad is not None
    assert teacher.grad is None
    assert teacher_views.grad is None


def test_the_gradient_is_the_difference_of_the_softened_probabilities() -> None:
    student, teacher = logits(3, 5).requires_grad_(), logits(3, 5, seed=1)
    d.distillation_term(student, teacher, temperature=7.0).backward()
    expected = 7 * ((student / 7).softmax(1) - (teacher / 7).softmax(1)) / 3
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-4, atol=1e-6)


def test_the_papers_preset_is_its_nominal_weight_without_temperature_squared() -> None:
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    with_squares = d.PAPER.weight * d.distillation_term(student, teacher, temperature=d.PAPER.temperature)
    torch.testing.assert_close(with_squares, 10 * d.kl(student, teacher, 7.0))


@pytest.mark.parametrize("extreme", [1e4, 1e30])
def test_extreme_logits_stay_finite(extreme: float) -> None:
    student = torch.tensor([[extreme, 0.0, -extreme], [0.0, extreme, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-extreme, 0.0, extreme], [0.0, 0.0, extreme]])
    loss = total(d.distillation_loss(student, teacher, torch.tensor([0, 1])))
    loss = loss + d.dkd(student, teacher, torch.tensor([0, 1])) + d.trl(student, teacher, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# -- further losses --------------------------------------------------------------------------------------------------


def test_dkd_with_the_coupling_of_the_paper_is_plain_kl() -> None:
    """KL = TCKD + (1 - p_target of the teacher) NCKD: eq. 4 of the paper, sample by sample."""
    student, teacher, targets = logits(1, 8), logits(1, 8, seed=1), torch.tensor([3])
    rest = 1 - (teacher / 2).softmax(1)[0, 3].item()
    found = d.dkd(student, teacher, targets, alpha=1.0, beta=rest, temperature=2.0)
    torch.testing.assert_close(found, 4 * d.kl(student, teacher, 2.0))


def test_rkd_sees_relations_and_not_positions() -> None:
    teacher = logits(6, 5)
    turned = 3.0 * teacher @ torch.linalg.qr(logits(5, 5, seed=1)).Q + 7.0
    assert d.rkd(turned, teacher) < 1e-5
    assert d.rkd(logits(6, 5, seed=2), teacher) > 0.1


def test_rkd_distances_by_hand() -> None:
    student = torch.tensor([[0.0], [1.0], [3.0]])
    teacher = torch.tensor([[0.0], [1.0], [2.0]])
    # distances 1, 2, 3 in units of 2, and 1, 1, 2 in units of 4/3; each pair twice, over nine entries
    errors = [0.5 - 0.75, 1.5 - 1.5, 1.0 - 0.75]
    expected = 2 * sum(error**2 / 2 for error in errors) / 9
    assert d.rkd(student, teacher, distance=1.0, angle=0.0).item() == pytest.approx(expected)


def test_pkt_is_0_for_features_of_the_same_cosines() -> None:
    teacher = logits(6, 5)
    assert d.pkt(teacher * logits(6, 1, seed=4).abs().add(0.1), teacher).abs() < 1e-6
    assert d.pkt(logits(6, 5, seed=2), teacher) > 1e-3


def test_reverse_kl_reaches_the_teacher_too() -> None:
    student, teacher = logits(4, 6), logits(4, 6, seed=1).requires_grad_()
    found = d.reverse_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, 4 * d.kl(teacher, student, 2.0))
    found.backward()
    assert teacher.grad is not None
    assert teacher.grad.abs().sum() > 0


def test_trl_passes_over_the_sample_whose_teacher_is_surest() -> None:
    student, targets = logits(3, 4), torch.tensor([0, 1, 2])
    teacher = torch.tensor([[90.0, 1.0, 0.0, 0.0], [2.0, 1.9, 0.0, 0.0], [2.0, 1.9, 0.0, 0.0]])
    each = functional.cross_entropy(student, targets, reduction="none")
    torch.testing.assert_close(d.trl(student, teacher, targets), each[1:].sum() / 3)
    one_surest = torch.tensor([[5.0, -1.0, -2.0, -3.0], *teacher[1:].tolist()])
    torch.testing.assert_close(d.trl(student, one_surest, targets), each[1:].sum() / 3)


def test_supcon_by_hand() -> None:
    features = functional.normalize(logits(3, 2, 4), dim=2)
    targets = torch.tensor([7, 1, 7])
    rows, labels = features.flatten(0, 1), targets.repeat_interleave(2)
    losses = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        scores = {j: math.exp(float(rows[i] @ rows[j]) / 0.5) for j in others}
        positives = [j for j in others if labels[j] == labels[i]]
        losses.append(-sum(math.log(scores[j] / sum(scores.values())) for j in positives) / len(positives))
    found = d.supcon(5 * features, targets, temperature=0.5)
    assert found.item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_contrasting_without_labels_takes_the_other_view_as_the_only_positive() -> None:
    features = logits(4, 2, 8)
    apart = torch.arange(4)
    torch.testing.assert_close(d.supcon(features), d.supcon(features, apart))
    assert d.supcon(features[:, :1], apart) == 0  # no anchor has a positive


@pytest.mark.parametrize("name", d.auxiliary_names())
def test_auxiliary_losses_teach_the_student_alone(name: str) -> None:
    student, teacher = logits(6, 5).requires_grad_(), logits(6, 5, seed=1).requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    before = d.auxiliary_loss(name, student, teacher, targets)
    before.backward()
    assert student.grad is not None
    assert teacher.grad is None
    stepped = student.detach() - 1e-3 * student.grad / student.grad.norm()
    assert d.auxiliary_loss(name, stepped, teacher, targets) < before


@pytest.mark.parametrize("name", d.auxiliary_names())
def test_slopes_of_auxiliary_losses_are_right(name: str) -> None:
    student, teacher = logits(4, 5).requires_grad_(), logits(4, 5, seed=1)
    targets, direction = torch.tensor([0, 1, 2, 3]), logits(4, 5, seed=2, scale=1.0)
    d.auxiliary_loss(name, student, teacher, targets).backward()
    with torch.no_grad():
        ahead, behind = (
            d.auxiliary_loss(name, student + step * direction, teacher, targets).item() for step in (1e-2, -1e-2)
        )
    assert student.grad is not None
    assert (ahead - behind) / 2e-2 == pytest.approx((student.grad * direction).sum().item(), rel=2e-2, abs=2e-4)


def test_some_auxiliary_losses_have_views_too() -> None:
    student, teacher, targets = logits(4, 5), logits(4, 5, seed=1), torch.tensor([0, 1, 2, 3])
    student_views, teacher_views = logits(8, 5, seed=2), logits(8, 5, seed=3)
    for name in d.auxiliary_names():
        raw = d.auxiliary_loss(name, student, teacher, targets)
        found = d.auxiliary_loss(name, student, teacher, targets, student_views, teacher_views)
        views = d.auxiliary_loss(name, student_views, teacher_views, targets.repeat(2))
        expected = raw / 2 + views if name in ("cekd", "trl", "kl_trl", "std_focal") else raw
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [d.rkd, d.pkt, d.hint])
def test_relations_of_equal_samples_have_a_finite_slope(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for student in (torch.ones(3, 4, requires_grad=True), torch.zeros(1, 4, requires_grad=True)):
        loss(student, logits(*student.shape)).backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches_and_a_single_class_have_a_finite_loss(batch: int) -> None:
    for classes in (1, 2):
        student, teacher, targets = logits(batch, classes), logits(batch, classes, seed=1), torch.zeros(batch).long()
        both = torch.cat((student, student)), torch.cat((teacher, teacher))
        assert total(d.distillation_loss(student, teacher, targets, *both)).isfinite()
        for name in d.auxiliary_names():
            if classes == 1 and name in ("trl", "kl_trl"):
                with pytest.raises(UsageError, match="two classes"):
                    d.auxiliary_loss(name, student, teacher, targets)
            else:
                assert d.auxiliary_loss(name, student, teacher, targets).isfinite(), name


# -- the teacher's confidence ----------------------------------------------------------------------------------------


def test_ratio_and_margin_by_hand() -> None:
    raw = torch.tensor([[1.0, 8.0, 2.0], [3.0, 3.0, 0.0]])
    assert ratio_12(raw).tolist() == [4.0, 1.0]
    assert margin_12(raw).tolist() == [6.0, 0.0]
    torch.testing.assert_close(margin_12(raw + 100), torch.tensor([6.0, 0.0]))


def test_a_ratio_without_a_positive_second_logit_is_not_defined() -> None:
    raw = torch.tensor([[5.0, 0.0, -1.0], [5.0, -2.0, -3.0], [-1.0, -5.0, -6.0], [6.0, 2.0, 1.0]])
    assert ratio_12(raw).isnan().tolist() == [True, True, True, False]
    statistics = TeacherStatistics()
    statistics.update(raw)
    found = statistics.results()
    assert found["ratio_1_2_normal"] == 3.0
    assert found["defined"] == 0.25
    assert found["margin_1_2"] == pytest.approx((5 + 7 + 4 + 4) / 4)


def test_statistics_do_not_depend_on_batches() -> None:
    raw = logits(40, 7)
    whole, parts = TeacherStatistics(), TeacherStatistics()
    whole.update(raw)
    for size in (raw[:3], raw[3:4], raw[4:]):
        parts.update(size)
    assert parts.results() == pytest.approx(whole.results(), rel=1e-6)
    assert parts.samples == 40


def test_a_surer_teacher_has_the_higher_ratio_and_lower_entropy() -> None:
    raw = logits(200, 10).abs()
    calm, sure = TeacherStatistics(), TeacherStatistics()
    calm.update(raw)
    sure.update(torch.where(raw == raw.amax(1, keepdim=True), 3 * raw, raw))
    first, second = calm.results(), sure.results()
    for name in ("ratio_1_2_normal", "ratio_1_2_softmax", "margin_1_2"):
        assert second[name] > first[name]
    assert second["entropy"] < first["entropy"]


def test_few_classes_leave_out_what_they_do_not_have() -> None:
    statistics = TeacherStatistics()
    assert statistics.results() == {"defined": None}
    statistics.update(torch.tensor([[2.0, 1.0]]))
    found = statistics.results()
    assert found["ratio_1_2_normal"] == 2.0
    assert "ratio_1_3_normal" not in found
    assert "sec_std_normal" not in found
    with pytest.raises(UsageError, match="two classes"):
        statistics.update(torch.ones(3, 1))


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    student, teacher, targets = logits(4, 6), logits(4, 6, seed=1), torch.tensor([0, 1, 2, 3])
    with pytest.raises(UsageError, match="temperature must be a number above 0"):
        d.kl(student, teacher, 0.0)
    with pytest.raises(UsageError, match="view_weights"):
        d.distillation_term(
            student, teacher, torch.cat((student,) * 2), torch.cat((teacher,) * 2), view_weights=(1, -1, 0)
        )
    with pytest.raises(UsageError, match=r"unknown auxiliary loss 'rdk'.*rkd"):
        d.auxiliary_loss("rdk", student, teacher, targets)
    with pytest.raises(UsageError, match="switch MixUp"):
        d.dkd(student, teacher, student.softmax(1))
    with pytest.raises(ValueError, match="student and teacher"):
        d.kl(student, teacher[:, :5], 1.0)
    with pytest.raises(ValueError, match="4 crops and then 4 drops"):
        d.distillation_term(student, teacher, student, teacher)
    with pytest.raises(ValueError, match="both networks'"):
        d.distillation_term(student, teacher, torch.cat((student,) * 2))
    with pytest.raises(ValueError, match="features must be"):
        d.supcon(student)
