"""Distillation losses on the logits of student and teacher, for images and for the teacher's views of them.

`distillation_loss` is the loss of TGDA (Rios et al., arXiv 2507.12157) and of plain knowledge distillation; its KL part
is `distillation_term`. `auxiliary_loss` adds a further loss by name. `animesion_training.data.views` makes the views,
`animesion_training.engine.steps` runs the networks, `classification` has the losses on labels alone.

Every loss computes in float32, also under autocast, and is a mean over the samples. Where a gradient also flows to the
teacher's logits, the docstring states it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.losses.classification import SoftmaxObjective
from animesion_training.options import in_range

ViewWeights = tuple[float, float, float]

#: Weights of image, crop and drop.
VIEW_WEIGHTS: ViewWeights = (0.5, 0.5, 0.5)


class Preset(NamedTuple):
    """Temperature and weight of the distillation term; the weight multiplies temperature squared."""

    temperature: float
    weight: float


#: Values of TGDA (arXiv 2507.12157): temperature 7, and weight 10 without the factor of temperature squared, 49.
PAPER = Preset(temperature=7.0, weight=10 / 49)


def kl(
    student: Tensor, teacher: Tensor, temperature: float, reduction: Literal["batchmean", "none"] = "batchmean"
) -> Tensor:
    """`KL(softmax(teacher / T) || softmax(student / T))` in nats, without a factor of T squared.

    Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531), section 2. Gradients flow to
    both; exchanged arguments give the reverse KL.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        temperature: T, > 0.
        reduction: `batchmean` for the mean over the samples, `none` for one value per sample.

    Returns:
        A scalar or (B,), float32; 0 for an empty batch.

    Raises:
        UsageError: a temperature that is not positive.
        ValueError: shapes or types other than these.
    """
    temperature = in_range("temperature", temperature, low=0.0, low_open=True)
    student, teacher = _check_logits(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        student_logs, teacher_logs = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
        divergence = functional.kl_div(student_logs, teacher_logs, reduction="none", log_target=True).sum(1)
    return divergence if reduction == "none" else _mean(divergence)


def distillation_term(
    student: Tensor,
    teacher: Tensor,
    student_views: Tensor | None = None,
    teacher_views: Tensor | None = None,
    *,
    temperature: float = PAPER.temperature,
    view_weights: ViewWeights = VIEW_WEIGHTS,
    counts: Tensor | None = None,
) -> Tensor:
    """Temperature squared times the KL of the images, or a weighted sum of the KLs of images, crops and drops.

    `T^2 KL(raw)` without views, as in Hinton et al. (arXiv 1503.02531); else `T^2 (a_raw KL(raw) + a_crop KL(crop) +
    a_drop KL(drop))`, arXiv 2507.12157. No gradient flows to the teacher.

    Args:
        student: logits of the B images, (B, K).
        teacher: logits of the same images, (B, K).
        student_views: logits of the views, (2 B, K): crops, then drops.
        teacher_views: logits of the same views, (2 B, K).
        temperature: T, > 0.
        view_weights: a_raw, a_crop, a_drop, >= 0; ignored without views.
        counts: factor of each view, (2 B,), such as 1 for those that count and 0 for the others; means stay over all.

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
        raise ValueError(
            f"give both networks' logits of {len(student)} crops and then {len(student)} drops, or neither's"
        )
    a_raw, a_crop, a_drop = (in_range("view_weights", weight, low=0.0) for weight in view_weights)
    views = kl(student_views, teacher_views.detach(), temperature, "none")
    if counts is not None:
        views = views * counts.to(views)
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

    `w_ce CE + w_kd T^2 (...)`, arXiv 2507.12157; views are supervised by the teacher alone. Without views it is plain
    knowledge distillation.

    Args:
        student: logits of the images, (B, K).
        teacher: logits of the same images, (B, K).
        targets: class ids, int64 (B,), or soft labels, floating (B, K).
        student_views: logits of the views, (2 B, K): crops, then drops.
        teacher_views: logits of the same views, (2 B, K).
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
    cross_entropy = SoftmaxObjective(label_smoothing=label_smoothing)(student, targets)
    distillation = distillation_term(
        student, teacher, student_views, teacher_views, temperature=temperature, view_weights=view_weights
    )
    return {
        "label": in_range("label_weight", label_weight, low=0.0) * cross_entropy,
        "distillation": in_range("weight", weight, low=0.0) * distillation,
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

    `T^2 (alpha TCKD + beta NCKD)`: the KL of the target class against all others, and the KL among the others.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        targets: class ids, int64 (B,).
        alpha: weight of the target class.
        beta: weight of the others; TGDA uses 0.5, the paper up to 8.
        temperature: T, > 0.

    Returns:
        A scalar, float32.

    Raises:
        UsageError: soft labels, which have no single target class, or an option outside its range.
        ValueError: shapes or types other than these.
    """
    if targets.is_floating_point():
        raise UsageError("dkd needs one target class per image: switch MixUp and CutMix off")
    temperature = in_range("temperature", temperature, low=0.0, low_open=True)
    student, teacher = _check_logits(student, teacher)
    is_target = functional.one_hot(targets, student.shape[1]).bool()  # (B, K)

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of (target, all others), (B, 2), and among the others, (B, K)."""
        # finite, so that the masked class has probability 0 without NaN in the gradient
        others = logits.masked_fill(is_target, torch.finfo(logits.dtype).min / 4)
        both = torch.stack((logits.gather(1, targets[:, None])[:, 0], others.logsumexp(1)), dim=1)
        return both.log_softmax(1), others.log_softmax(1)

    student_target, student_others = split(student / temperature)
    teacher_target, teacher_others = split(teacher / temperature)
    target_kl = functional.kl_div(student_target, teacher_target, reduction="none", log_target=True).sum(1)
    others_kl = functional.kl_div(student_others, teacher_others, reduction="none", log_target=True)
    others_kl = others_kl.masked_fill(is_target, 0.0).sum(1)
    return temperature**2 * _mean(alpha * target_kl + beta * others_kl)


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Relational knowledge distillation; Park et al., CVPR 2019 (arXiv 1904.05068), eq. 5 to 9.

    Huber losses between the pairwise distances of the samples, in units of their mean, and between the cosines of the
    angles of all triplets. Memory grows as B^2 K and B^3.

    Args:
        student: logits or features, (B, K).
        teacher: logits or features, (B, K').
        distance: weight of the distances.
        angle: weight of the angles.

    Returns:
        A scalar, float32; 0 for a single sample.
    """
    student, teacher = student.float(), teacher.float()
    with torch.autocast(student.device.type, enabled=False):
        distances = _relative_distances(student), _relative_distances(teacher)  # (B, B) each
        angles = _angles(student), _angles(teacher)  # (B, B, B) each
        distance_loss, angle_loss = (
            _mean(functional.smooth_l1_loss(*pair, reduction="none").flatten()) for pair in (distances, angles)
        )
    return distance * distance_loss + angle * angle_loss


def _relative_distances(rows: Tensor) -> Tensor:
    """Pairwise distances (B, B) of rows (B, K), in units of their mean."""
    squares = (rows[:, None] - rows).square().sum(2)
    # the gradient of the root is infinite at 0: on the diagonal and for equal rows
    distances = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    mean = distances.sum() / max(1, len(rows) * (len(rows) - 1))
    return distances / mean.clamp(min=1e-12)


def _angles(rows: Tensor) -> Tensor:
    """Cosines (B, B, B) of the angle at sample i between samples j and k of rows (B, K)."""
    sides = functional.normalize(rows - rows[:, None], dim=2)  # (B, B, K): unit vectors from i to j
    return torch.bmm(sides, sides.transpose(1, 2))


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer; Passalis and Tefas, ECCV 2018 (arXiv 1803.10837), eq. 3 to 7.

    KL of the affinities of samples, which are (1 + cosine) / 2 normalised per sample; mean over all B^2 of them.

    Args:
        student: logits or features, (B, K).
        teacher: logits or features, (B, K').

    Returns:
        A scalar, float32.
    """
    tiny = 1e-7

    def affinities(rows: Tensor) -> Tensor:
        """Rows (B, K) to shares (B, B) that sum to 1 per row."""
        rows = rows.float()
        unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + tiny)
        shares: Tensor = (unit @ unit.T + 1) / 2
        return shares / shares.sum(1, keepdim=True)

    with torch.autocast(student.device.type, enabled=False):
        student_shares, teacher_shares = affinities(student), affinities(teacher)
        logs = ((teacher_shares + tiny) / (student_shares + tiny)).log()
        return _mean((teacher_shares * logs).flatten())


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference; Romero et al., "FitNets", ICLR 2015 (arXiv 1412.6550), eq. 3 without the factor 1/2.

    Args:
        student: any shape.
        teacher: the same shape.

    Returns:
        A scalar, float32.
    """
    return _mean((student.float() - teacher.float()).square().flatten())


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of one minus the cosine between the rows of both; no gradient flows to the teacher.

    Args:
        student: (B, D).
        teacher: (B, D).

    Returns:
        A scalar, float32, 0..2; 0 for an empty batch.
    """
    return _mean(1 - functional.cosine_similarity(student.float(), teacher.detach().float(), dim=1))


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = PAPER.temperature) -> Tensor:
    """`T^2 KL(student || teacher)`, for teachers that are trained together with the student (CE-KD).

    Gradients flow to both; arguments and errors as in `kl`.
    """
    return temperature**2 * kl(teacher, student, temperature)


def trl(student: Tensor, teacher: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Cross-entropy with less weight on samples where the teacher's first logit is far above its second.

    The weight of a sample is `(1 - r_i)^gamma`, r the softmax over the batch of the teacher's `P1 / P2`. It is a
    variant in the code of TGDA's authors, not in their papers.

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
    return _mean(_uncertainty(teacher, gamma) * SoftmaxObjective(reduction="none")(student, targets))


def kl_trl(student: Tensor, teacher: Tensor, *, gamma: float = 2.0) -> Tensor:
    """`trl` with the KL of teacher and student at temperature 1, mean over samples and classes, as the loss.

    Arguments and errors as in `trl`.
    """
    return _mean(_uncertainty(teacher, gamma) * kl(student, teacher, 1.0, "none")) / max(1, student.shape[1])


Modulation = Literal["teacher", "student", "difference"]


def std_focal(
    student: Tensor, teacher: Tensor, targets: Tensor, *, gamma: float = 2.0, modulation: Modulation = "teacher"
) -> Tensor:
    """Cross-entropy with more weight on samples whose class a network finds unlikely: `-m^gamma log s_y`.

    m is `1 - t_y` (`teacher`), `1 - s_y` (`student`, the focal loss) or `|t_y - s_y|` (`difference`), with the
    probabilities s of the student and t of the teacher. It is a variant in the code of TGDA's authors, not in their
    papers; its form over several labels of the teacher is left out, because how the labels are summed is not stated.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        targets: class ids, int64 (B,).
        gamma: >= 0.
        modulation: what m is made from; the student's part of it has a gradient.

    Returns:
        A scalar, float32.

    Raises:
        UsageError: soft labels, or an unknown or impossible option.
        ValueError: shapes or types other than these.
    """
    if targets.is_floating_point():
        raise UsageError("std_focal needs one target class per image: switch MixUp and CutMix off")
    gamma = in_range("gamma", gamma, low=0.0)
    student, teacher = _check_logits(student, teacher)
    logs = student.log_softmax(1).gather(1, targets[:, None])[:, 0]  # log s_y, (B,)
    own, other = logs.exp(), teacher.softmax(1).gather(1, targets[:, None])[:, 0]
    if modulation not in ("teacher", "student", "difference"):
        raise UsageError(f"modulation of std_focal is teacher, student or difference, not {modulation!r}")
    weights = {"teacher": 1 - other, "student": 1 - own, "difference": (other - own).abs()}[modulation]
    return _mean(-(weights**gamma) * logs)


def top_values(values: Tensor, most: int) -> Tensor:
    """Return the largest values of each row of (B, K) in descending order, (B, min(most, K)).

    Raises:
        UsageError: a single class.
    """
    if values.ndim != 2 or values.shape[1] < 2:
        raise UsageError(
            f"a teacher's confidence needs logits (B, K) of two classes or more, not {tuple(values.shape)}"
        )
    return values.topk(min(most, values.shape[1]), dim=1).values


def _uncertainty(teacher: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the samples in `trl`, from the teacher's logits (B, K)."""
    first, second = top_values(teacher.float(), 2)[:, :2].unbind(1)
    # a second logit of 0 or less makes the ratio very large
    ratios = first / second.clamp(min=1e-6)
    return (1 - ratios.softmax(0)) ** in_range("gamma", gamma, low=0.0)


def supcon(features: Tensor, targets: Tensor | None = None, *, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss; Khosla et al., NeurIPS 2020 (arXiv 2004.11362), eq. 2.

    Without labels, the other views of a sample are its only positives: the loss of SimCLR, Chen et al., ICML 2020
    (arXiv 2002.05709), eq. 1. Anchors without positives are ignored.

    Args:
        features: (B, V, D), V views of each sample; they are normalised to length 1 here.
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
        rows = functional.normalize(features.float(), dim=2).flatten(0, 1)  # (B V, D)
        groups = torch.arange(len(features), device=features.device) if targets is None else targets
        groups = groups.repeat_interleave(features.shape[1])
        diagonal = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        # an anchor is not compared with itself
        similarity = (rows @ rows.T / temperature).masked_fill(diagonal, torch.finfo(rows.dtype).min / 4)
        positives = (groups[:, None] == groups) & ~diagonal  # (B V, B V)
        counts = positives.sum(1)
        losses = -(similarity.log_softmax(1) * positives).sum(1) / counts.clamp(min=1)
        return losses.sum() / (counts > 0).sum().clamp(min=1)


#: Losses of student, teacher and, if they have a parameter for them, targets, with the defaults of TGDA's code.
_AUXILIARY: dict[str, Callable[..., Tensor]] = {
    "cekd": reverse_kl,
    "dkd": dkd,
    "hint": hint,
    "kl_trl": kl_trl,
    "pkt": pkt,
    "rkd": rkd,
    "std_focal": std_focal,
    "trl": trl,
}

#: Losses that also apply to views, with weight 1/2 for the images and 1 for the mean over the 2 B views.
_ON_VIEWS = ("cekd", "kl_trl", "std_focal", "trl")


def auxiliary_names() -> list[str]:
    """Return the names that `auxiliary_loss` accepts."""
    return sorted(_AUXILIARY)


def auxiliary_loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    student_views: Tensor | None = None,
    teacher_views: Tensor | None = None,
    view_targets: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute a further loss by name: `dkd`, `rkd`, `pkt` and `hint` on the logits of the images alone.

    With views, `cekd` (`reverse_kl`), `trl`, `kl_trl` and `std_focal` are `raw / 2 + views`, as in the code of TGDA. No
    gradient flows to the teacher.

    Args:
        name: one of `auxiliary_names`.
        student: logits (B, K).
        teacher: logits (B, K).
        targets: class ids, int64 (B,), or soft labels, floating (B, K), except for `dkd`.
        student_views: logits (2 B, K).
        teacher_views: logits (2 B, K).
        view_targets: targets of the views, (2 B,) or (2 B, K); None for those of the images, twice.
        **options: of the loss, its keyword arguments, such as `beta=8.0` of `dkd`.

    Returns:
        A scalar, float32.

    Raises:
        UsageError: an unknown name or option, or soft labels for `dkd` or `std_focal`.
        ValueError: shapes or types other than these.
    """
    if name not in _AUXILIARY:
        near = nearest(name, _AUXILIARY) or f": give one of {', '.join(auxiliary_names())}"
        raise UsageError(f"unknown auxiliary loss '{name}'{near}")
    parameters = inspect.signature(_AUXILIARY[name]).parameters
    known = [each.name for each in parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            near = nearest(option, known) or f"; it takes {', '.join(known) or 'none'}"
            raise UsageError(f"the auxiliary loss '{name}' has no option '{option}'{near}")

    def loss(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        inputs = (student, teacher, targets) if "targets" in parameters else (student, teacher)
        return _AUXILIARY[name](*inputs, **options)

    raw = loss(student, teacher.detach(), targets)
    if name not in _ON_VIEWS or student_views is None or teacher_views is None:
        return raw
    if view_targets is None:
        view_targets = targets.repeat(2, *[1] * (targets.ndim - 1))
    return raw / 2 + loss(student_views, teacher_views.detach(), view_targets)


def _check_logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 2 or student.shape != teacher.shape or not student.is_floating_point():
        raise ValueError(
            f"logits of student and teacher must be floating (B, K), not {tuple(student.shape)} {student.dtype} and "
            f"{tuple(teacher.shape)}"
        )
    return student.float(), teacher.float()


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))
