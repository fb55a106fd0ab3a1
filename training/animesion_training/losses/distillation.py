"""Distillation: what a student learns from a teacher's logits, on images and on the views that the teacher makes.

`distillation_loss` is that of TGDA (Rios et al., arXiv 2507.12157) and of plain knowledge distillation; its KL part is
`distillation_term`. Further losses on logits go beside it by name, `auxiliary_loss`. `TeacherStatistics` says how
confident a teacher is. Views are made in `views`, steps of training in `steps`, losses on labels alone are in `losses`.

Every loss computes in float32, whatever autocast says, and is a mean over the samples. Where a gradient flows to the
teacher's logits too, the docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.losses.classification import SoftmaxObjective
from animesion_training.options import in_range

ViewWeights = tuple[float, float, float]

#: Of image, crop and drop.
VIEW_WEIGHTS: ViewWeights = (0.5, 0.5, 0.5)


class Preset(NamedTuple):
    """Temperature and weight of the distillation term (the weight stands before temperature squared)."""

    temperature: float
    weight: float


#: TGDA's: temperature 7 and nominal weight 10 without the factor of temperature squared (arXiv 2507.12157).
PAPER = Preset(temperature=7.0, weight=10 / 49)


def kl(
    student: Tensor, teacher: Tensor, temperature: float, reduction: Literal["batchmean", "none"] = "batchmean"
) -> Tensor:
    """`KL(softmax(teacher / T) || softmax(student / T))` in nats, without a factor of T squared.

    Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531), section 2. Gradients flow to
    both; with the two exchanged it is the reverse KL.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        temperature: T, > 0.
        reduction: `batchmean` for the mean over the samples, `none` for each.

    Returns:
        A scalar or (B,), float32; 0 for an empty batch.

    Raises:
        UsageError: a temperature that is not positive.
        ValueError: shapes or types other than these.
    """
    temperature = in_range("temperature", temperature, low=0.0, low_open=True)
    student, teacher = _checked(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        learned, taught = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
        divergence = functional.kl_div(learned, taught, reduction="none", log_target=True).sum(1)
    return divergence if reduction == "none" else _mean(divergence)


def distillation_term(
    student: Tensor,
    teacher: Tensor,
    student_views: Tensor | None = None,
    teacher_views: Tensor | None = None,
    *,
    temperature: float = PAPER.temperature,
    view_weights: ViewWeights = VIEW_WEIGHTS,
) -> Tensor:
    """Temperature squared times the KL of the images, or a weighted sum of it and those of crops and drops.

    `T^2 KL(raw)` without views, as in Hinton et al. (arXiv 1503.02531); else `T^2 (a_raw KL(raw) + a_crop KL(crop) +
    a_drop KL(drop))`, arXiv 2507.12157. No gradient flows to the teacher.

    Args:
        student: logits of the B images, (B, K).
        teacher: logits of the same, (B, K).
        student_views: logits of the views, (2 B, K): crops, then drops.
        teacher_views: logits of the same, (2 B, K).
        temperature: T, > 0.
        view_weights: a_raw, a_crop, a_drop, >= 0; for use with views.

    Returns:
        A scalar, float32.

    Raises:
        UsageError: an option outside its range.
        ValueError: shapes or types other than these, or views of one network only.
    """
    raw = kl(student, teacher.detach(), temperature)
    if student_views is None and teacher_views is None:
        return temperature**2 * raw
    if student_views is None or teacher_views is None or len(student_views) != 2 * len(student):
        raise ValueError(f"both networks' logits of {len(student)} crops and then {len(student)} drops are needed")
    a_raw, a_crop, a_drop = (in_range("view_weights", weight, low=0.0) for weight in view_weights)
    views = kl(student_views, teacher_views.detach(), temperature, "none")
    crop, drop = (_mean(half) for half in views.view(2, len(student)))
    return temperature**2 * (a_raw * raw + a_crop * crop + a_drop * drop)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    student_views: Tensor | None = None,
    teacher_views: Tensor | None = None,
    *,
    temperature: float = PAPER.temperature,
    weight: float = PAPER.weight,
    label_weight: float = 1.0,
    view_weights: ViewWeights = VIEW_WEIGHTS,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Cross-entropy of the images and distillation of images and views: the student's loss of TGDA.

    `w_ce CE + w_kd T^2 (...)`, arXiv 2507.12157; views have the teacher's word and no label. Without views it is plain
    knowledge distillation.

    Args:
        student: as `distillation_term` takes it, and the next one and the views.
        teacher: logits (B, K).
        targets: class ids, int64 (B,), or soft labels, floating (B, K).
        student_views: logits (2 B, K).
        teacher_views: logits (2 B, K).
        temperature: T, > 0.
        weight: w_kd, >= 0.
        label_weight: w_ce, >= 0.
        view_weights: of image, crop and drop.
        label_smoothing: of the cross-entropy, 0..1.

    Returns:
        The terms `label` and `distillation`, scalars with their weights; their sum is the loss.

    Raises:
        UsageError: an option outside its range.
        ValueError: shapes or types other than these.
    """
    told = SoftmaxObjective(label_smoothing=label_smoothing)(student, targets)
    taught = distillation_term(
        student, teacher, student_views, teacher_views, temperature=temperature, view_weights=view_weights
    )
    return {
        "label": in_range("label_weight", label_weight, low=0.0) * told,
        "distillation": in_range("weight", weight, low=0.0) * taught,
    }


# -- further losses on logits ----------------------------------------------------------------------------------------


def dkd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Decoupled knowledge distillation; Zhao et al., CVPR 2022 (arXiv 2203.08679), eq. 7.

    `T^2 (alpha TCKD + beta NCKD)`: the KL of the target class against all others, and that among the others.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        targets: class ids, int64 (B,).
        alpha: of the target class.
        beta: of the others; 0.5 is TGDA's, the paper has up to 8.
        temperature: T, > 0.

    Returns:
        A scalar, float32.

    Raises:
        UsageError: soft labels, which have no target class, or an option outside its range.
        ValueError: shapes or types other than these.
    """
    if targets.is_floating_point():
        raise UsageError("dkd tells the target class from the others: switch MixUp and CutMix off with it")
    temperature = in_range("temperature", temperature, low=0.0, low_open=True)
    student, teacher = _checked(student, teacher)
    learned, taught = student / temperature, teacher / temperature
    target = functional.one_hot(targets, student.shape[1]).bool()

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of (target, rest), (B, 2), and of each of the others among themselves."""
        others = logits.masked_fill(target, torch.finfo(logits.dtype).min / 4)
        both = torch.stack((logits.gather(1, targets[:, None])[:, 0], others.logsumexp(1)), dim=1)
        return both.log_softmax(1), others.log_softmax(1)

    (learned_target, learned_others), (taught_target, taught_others) = split(learned), split(taught)
    of_target = functional.kl_div(learned_target, taught_target, reduction="none", log_target=True).sum(1)
    among_others = functional.kl_div(learned_others, taught_others, reduction="none", log_target=True)
    among_others = among_others.masked_fill(target, 0.0).sum(1)
    return temperature**2 * _mean(alpha * of_target + beta * among_others)


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Relational knowledge distillation; Park et al., CVPR 2019 (arXiv 1904.05068), eq. 5 to 9.

    Huber losses between the pairwise distances of the samples, in units of their mean, and between the cosines of the
    angles of all triplets. Memory grows as B^2 K and B^3.

    Args:
        student: (B, K), logits or features.
        teacher: (B, K'), the same of the teacher.
        distance: weight of the distances.
        angle: weight of the angles.

    Returns:
        A scalar, float32; 0 for a single sample.
    """
    student, teacher = student.float(), teacher.float()
    with torch.autocast(student.device.type, enabled=False):
        apart = _relative_distances(student), _relative_distances(teacher)
        turned = _angles(student), _angles(teacher)
        distances, angles = (
            _mean(functional.smooth_l1_loss(*each, reduction="none").flatten()) for each in (apart, turned)
        )
    return distance * distances + angle * angles


def _relative_distances(rows: Tensor) -> Tensor:
    squares = (rows[:, None] - rows).square().sum(2)
    # the slope of the root is infinite at 0, where a sample meets itself or its double
    distances = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return distances / (distances.sum() / max(1, len(rows) * (len(rows) - 1))).clamp(min=1e-12)


def _angles(rows: Tensor) -> Tensor:
    """Cosines (B, B, B) of the angle at sample i between samples j and k."""
    sides = functional.normalize(rows - rows[:, None], dim=2)
    return torch.bmm(sides, sides.transpose(1, 2))


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer; Passalis and Tefas, ECCV 2018 (arXiv 1803.10837), eq. 3 to 7.

    KL of the samples' affinities, (1 + cosine) / 2 normalised for each sample; mean over all B^2 of them.

    Args:
        student: (B, K), logits or features.
        teacher: (B, K'), the same of the teacher.

    Returns:
        A scalar, float32.
    """
    tiny = 1e-7

    def affinities(rows: Tensor) -> Tensor:
        rows = rows.float()
        unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + tiny)
        shares: Tensor = (unit @ unit.T + 1) / 2
        return shares / shares.sum(1, keepdim=True)

    with torch.autocast(student.device.type, enabled=False):
        learned, taught = affinities(student), affinities(teacher)
        return _mean((taught * ((taught + tiny) / (learned + tiny)).log()).flatten())


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference; Romero et al., "FitNets", ICLR 2015 (arXiv 1412.6550), eq. 3 without its half.

    Args:
        student: of any shape.
        teacher: of the same shape.

    Returns:
        A scalar, float32.
    """
    return _mean((student.float() - teacher.float()).square().flatten())


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = PAPER.temperature) -> Tensor:
    """`T^2 KL(student || teacher)`: what a teacher that is trained with its student learns from it (CE-KD).

    Gradients flow to both; arguments and errors as in `kl`.
    """
    return temperature**2 * kl(teacher, student, temperature)


def trl(student: Tensor, teacher: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Cross-entropy that counts a sample less the further the teacher's first logit is above its second.

    The weight of a sample is `(1 - r_i)^gamma`, r the softmax over the batch of the teacher's `P1 / P2`. A variant of
    the TGDA authors' code, not of their papers.

    Args:
        student: logits (B, K).
        teacher: logits (B, K), K >= 2.
        targets: class ids, int64 (B,), or soft labels, floating (B, K).
        gamma: >= 0.

    Returns:
        A scalar, float32.

    Raises:
        UsageError: an option outside its range, or a single class.
        ValueError: shapes or types other than these.
    """
    return _mean(_doubt(teacher, gamma) * SoftmaxObjective(reduction="none")(student, targets))


def kl_trl(student: Tensor, teacher: Tensor, *, gamma: float = 2.0) -> Tensor:
    """`trl` with the KL of teacher and student at temperature 1, mean over samples and classes, as the loss.

    Arguments and errors as in `trl`.
    """
    return _mean(_doubt(teacher, gamma) * kl(student, teacher, 1.0, "none")) / max(1, student.shape[1])


def top_values(values: Tensor, most: int) -> Tensor:
    """The largest values of each sample in descending order, (B, up to `most`)."""
    if values.ndim != 2 or values.shape[1] < 2:
        raise UsageError(
            f"a teacher's confidence needs logits (B, K) of two classes or more, not {tuple(values.shape)}"
        )
    return values.topk(min(most, values.shape[1]), dim=1).values


def _doubt(teacher: Tensor, gamma: float) -> Tensor:
    first, second = top_values(teacher.float(), 2)[:, :2].unbind(1)
    # a second logit of 0 or less is infinitely far below
    ratios = first / second.clamp(min=1e-6)
    return (1 - ratios.softmax(0)) ** in_range("gamma", gamma, low=0.0)


def supcon(features: Tensor, targets: Tensor | None = None, *, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss; Khosla et al., NeurIPS 2020 (arXiv 2004.11362), eq. 2.

    Without labels a sample's other views are its only positives: SimCLR's loss, Chen et al., ICML 2020 (arXiv
    2002.05709), eq. 1. An anchor without a positive does not count.

    Args:
        features: (B, V, D), V views of each sample; scaled to length 1 here.
        targets: class ids, int64 (B,); None for SimCLR.
        temperature: > 0.

    Returns:
        A scalar, float32, the mean over the anchors.

    Raises:
        UsageError: a temperature that is not positive.
        ValueError: shapes or types other than these.
    """
    if features.ndim != 3 or (targets is not None and targets.shape != features.shape[:1]):
        raise ValueError(f"features must be (B, V, D) and targets (B,), not {tuple(features.shape)}")
    temperature = in_range("temperature", temperature, low=0.0, low_open=True)
    with torch.autocast(features.device.type, enabled=False):
        rows = functional.normalize(features.float(), dim=2).flatten(0, 1)
        same = torch.arange(len(features), device=features.device) if targets is None else targets
        same = same.repeat_interleave(features.shape[1])
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        likeness = (rows @ rows.T / temperature).masked_fill(itself, torch.finfo(rows.dtype).min / 4)
        positives = (same[:, None] == same) & ~itself
        counts = positives.sum(1)
        losses = -(likeness.log_softmax(1) * positives).sum(1) / counts.clamp(min=1)
        return losses.sum() / (counts > 0).sum().clamp(min=1)


#: Name -> loss of (student, teacher, targets), with the defaults of TGDA's code.
_AUXILIARY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cekd": lambda student, teacher, targets: reverse_kl(student, teacher),
    "dkd": dkd,
    "hint": lambda student, teacher, targets: hint(student, teacher),
    "kl_trl": lambda student, teacher, targets: kl_trl(student, teacher),
    "pkt": lambda student, teacher, targets: pkt(student, teacher),
    "rkd": lambda student, teacher, targets: rkd(student, teacher),
    "trl": trl,
}

#: Those that also teach from views: half a weight for the images, a whole one for the mean over the 2 B views.
_ON_VIEWS = ("cekd", "kl_trl", "trl")


def auxiliary_names() -> list[str]:
    """The names that `auxiliary_loss` knows."""
    return sorted(_AUXILIARY)


def auxiliary_loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    student_views: Tensor | None = None,
    teacher_views: Tensor | None = None,
) -> Tensor:
    """A loss by name beside distillation: `dkd`, `rkd`, `pkt` and `hint` on the logits of the images alone.

    `cekd` (`reverse_kl`), `trl` and `kl_trl` are also for the views where they are given, `raw / 2 + views`, as in the
    code of TGDA. No gradient flows to the teacher.

    Args:
        name: one of `auxiliary_names`.
        student: logits (B, K).
        teacher: logits (B, K).
        targets: class ids, int64 (B,), or soft labels, floating (B, K), where the loss has a meaning for them.
        student_views: logits (2 B, K).
        teacher_views: logits (2 B, K).

    Returns:
        A scalar, float32.

    Raises:
        UsageError: an unknown name, or soft labels for `dkd`.
        ValueError: shapes or types other than these.
    """
    if name not in _AUXILIARY:
        near = nearest(name, _AUXILIARY) or f"; there are {', '.join(auxiliary_names())}"
        raise UsageError(f"there is no auxiliary loss '{name}'{near}")
    loss = _AUXILIARY[name]
    raw = loss(student, teacher.detach(), targets)
    if name not in _ON_VIEWS or student_views is None or teacher_views is None:
        return raw
    repeated = targets.repeat(2, *[1] * (targets.ndim - 1))
    return raw / 2 + loss(student_views, teacher_views.detach(), repeated)


def _checked(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 2 or student.shape != teacher.shape or not student.is_floating_point():
        raise ValueError(
            f"logits of student and teacher must be floating (B, K), not {tuple(student.shape)} {student.dtype} and "
            f"{tuple(teacher.shape)}"
        )
    return student.float(), teacher.float()


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))
