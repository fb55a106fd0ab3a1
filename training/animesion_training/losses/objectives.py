"""Create training objectives by name: `create_objective("ldam-drw", counts, epochs=200, scale=30.0)`.

An objective is called as `objective(logits, targets)` with logits (B, C) and targets that are class ids (B,) or soft
labels (B, C), and returns a scalar. The losses and their conventions are in `classification`; sampling is left to
`animesion_training.data`. Objectives on tags (`is_on_tags`) take targets (B, T) of a binary decision each.

A distillation objective is a subclass of `Objective` with `needs_teacher = True`, added with `register_objective`; it
is called with the teacher's logits as the third argument. Other packages add factories through the entry-point group
`animesion.objectives`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import numpy.typing as npt

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.losses.classification import (
    LDAM,
    LossReduction,
    Objective,
    SoftmaxObjective,
    class_balanced_weights,
    log_prior,
)
from animesion_training.losses.metric import ArcFace, CosFace, ProxyAnchor, SupCon
from animesion_training.losses.multilabel import AsymmetricLoss, BinaryCrossEntropy
from animesion_training.options import in_range

GROUP = "animesion.objectives"

_FACTORIES: dict[str, Callable[..., Objective]] = {}
_ON_TAGS: set[str] = set()


def register_objective(
    name: str, *, on_tags: bool = False
) -> Callable[[Callable[..., Objective]], Callable[..., Objective]]:
    """Register a factory by name for `create_objective`.

    The factory receives `counts` and `epochs` if it has parameters of these names. Its other parameters are the options
    of the objective, and all have defaults. An objective on tags returns a `MultiLabelObjective`; a factory of another
    package says so by an attribute `on_tags` that is true.
    """

    def register(factory: Callable[..., Objective]) -> Callable[..., Objective]:
        if name in _FACTORIES:
            raise ValueError(f"there is already an objective '{name}'")
        _FACTORIES[name] = factory
        if on_tags:
            _ON_TAGS.add(name)
        return factory

    return register


def objective_names() -> list[str]:
    """Return the names that `create_objective` accepts."""
    return sorted({*_FACTORIES, *(point.name for point in entry_points(group=GROUP))})


def is_on_tags(name: str) -> bool:
    """Whether an objective trains on the tags of the samples, and not on their classes.

    Raises:
        UsageError: an unknown name.
    """
    return name in _ON_TAGS or bool(getattr(_factory(name), "on_tags", False))


def objective_options(name: str) -> dict[str, Any]:
    """Return the options of an objective and their defaults.

    Raises:
        UsageError: an unknown name.
    """
    parameters = inspect.signature(_factory(name)).parameters
    return {option: each.default for option, each in parameters.items() if option not in ("counts", "epochs")}


def create_objective(
    name: str, counts: npt.ArrayLike | None = None, *, epochs: int | None = None, **options: Any
) -> Objective:
    """Create an objective by name.

    Call `set_epoch` at the start of each epoch and `.to(device)` once. Objectives have no learned state, so checkpoints
    do not contain them.

    Args:
        name: one of `objective_names`.
        counts: training images of each class by class id, (C,), non-negative integers; required by the objectives for
            long-tailed data.
        epochs: length of the run; default schedules inside an objective depend on it.
        options: see `objective_options`.

    Raises:
        UsageError: an unknown name or option, a value out of range, or counts or epochs are missing.
    """
    factory = _factory(name)
    known = objective_options(name)
    for option in options:
        if option not in known:
            near = nearest(option, known) or f"; it takes {', '.join(known)}"
            raise UsageError(f"the objective '{name}' has no option '{option}'{near}")
    context: Mapping[str, Any] = {"counts": counts, "epochs": epochs}
    parameters = inspect.signature(factory).parameters
    if "counts" in parameters and counts is None:
        raise UsageError(f"the objective '{name}' needs the training images of each class; give class counts")
    return factory(**{key: value for key, value in context.items() if key in parameters}, **options)


@register_objective("cross-entropy")
def cross_entropy(label_smoothing: float = 0.0, reduction: LossReduction = "mean") -> Objective:
    """Cross-entropy; smoothing also applies to soft labels, so set it here or in `mixing`, not in both."""
    return SoftmaxObjective(label_smoothing=label_smoothing, reduction=reduction)


@register_objective("focal")
def focal(gamma: float = 2.0, label_smoothing: float = 0.0, reduction: LossReduction = "mean") -> Objective:
    """Focal loss in the softmax form, `-(1 - p_y)^gamma log p_y`; Lin et al., ICCV 2017 (arXiv 1708.02002), eq. 4."""
    return SoftmaxObjective(gamma=gamma, label_smoothing=label_smoothing, reduction=reduction)


@register_objective("class-balanced")
def class_balanced(
    counts: npt.ArrayLike,
    beta: float = 0.9999,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: LossReduction = "mean",
) -> Objective:
    """Cross-entropy, or focal loss with gamma > 0, weighted by `class_balanced_weights`."""
    return SoftmaxObjective(
        weights=class_balanced_weights(counts, beta), gamma=gamma, label_smoothing=label_smoothing, reduction=reduction
    )


@register_objective("balanced-softmax")
def balanced_softmax(
    counts: npt.ArrayLike, label_smoothing: float = 0.0, reduction: LossReduction = "mean"
) -> Objective:
    """Cross-entropy of `softmax(z + log n)`; Ren et al., NeurIPS 2020 (arXiv 2007.10740), theorem 1.

    Predictions use the plain logits.
    """
    return SoftmaxObjective(shift=log_prior(counts), label_smoothing=label_smoothing, reduction=reduction)


@register_objective("logit-adjustment")
def logit_adjustment(
    counts: npt.ArrayLike, tau: float = 1.0, label_smoothing: float = 0.0, reduction: LossReduction = "mean"
) -> Objective:
    """Cross-entropy of `softmax(z + tau log prior)`; Menon et al., ICLR 2021 (arXiv 2007.07314), section 5.

    Predictions use the plain logits; tau = 1 is the balanced softmax.
    """
    shift = in_range("tau", tau, low=0.0) * log_prior(counts)
    return SoftmaxObjective(shift=shift, label_smoothing=label_smoothing, reduction=reduction)


@register_objective("ldam")
def ldam(
    counts: npt.ArrayLike, max_m: float = 0.5, scale: float = 30.0, reduction: LossReduction = "mean"
) -> Objective:
    """`LDAM` without re-weighting."""
    return LDAM(counts, max_m=max_m, scale=scale, reduction=reduction)


@register_objective("ldam-drw")
def ldam_drw(
    counts: npt.ArrayLike,
    epochs: int | None,
    max_m: float = 0.5,
    scale: float = 30.0,
    drw_epoch: int | None = None,
    beta: float = 0.9999,
    reduction: LossReduction = "mean",
) -> Objective:
    """`LDAM` with class weights from `drw_epoch` on, by default after 80% of the epochs (160 of 200 in the paper)."""
    if drw_epoch is None:
        if epochs is None:
            raise UsageError("the objective 'ldam-drw' needs drw_epoch, the first epoch with class weights")
        drw_epoch = epochs * 4 // 5
    elif epochs is not None and drw_epoch >= epochs:
        raise UsageError(f"drw_epoch {drw_epoch} is never reached in {epochs} epochs; the first epoch is 0")
    return LDAM(counts, max_m=max_m, scale=scale, drw_epoch=drw_epoch, beta=beta, reduction=reduction)


@register_objective("arcface")
def arcface(margin: float = 0.5, scale: float = 64.0, reduction: LossReduction = "mean") -> Objective:
    """`ArcFace`; a margin of 0 is a softmax over scaled cosines."""
    return ArcFace(margin=margin, scale=scale, reduction=reduction)


@register_objective("cosface")
def cosface(margin: float = 0.35, scale: float = 64.0, reduction: LossReduction = "mean") -> Objective:
    """`CosFace`."""
    return CosFace(margin=margin, scale=scale, reduction=reduction)


@register_objective("proxy-anchor")
def proxy_anchor(
    counts: npt.ArrayLike, alpha: float = 32.0, delta: float = 0.1, reduction: LossReduction = "mean"
) -> Objective:
    """`ProxyAnchor`, with a proxy for each class that has training images."""
    return ProxyAnchor(alpha=alpha, delta=delta, counts=counts, reduction=reduction)


@register_objective("supcon")
def supcon(temperature: float = 0.1, reduction: LossReduction = "mean") -> Objective:
    """`SupCon`."""
    return SupCon(temperature=temperature, reduction=reduction)


@register_objective("bce", on_tags=True)
def bce(label_smoothing: float = 0.0, reduction: LossReduction = "mean") -> Objective:
    """`BinaryCrossEntropy` on tags."""
    return BinaryCrossEntropy(label_smoothing=label_smoothing, reduction=reduction)


@register_objective("asl", on_tags=True)
def asl(
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    margin: float = 0.05,
    label_smoothing: float = 0.0,
    reduction: LossReduction = "mean",
) -> Objective:
    """`AsymmetricLoss` on tags."""
    return AsymmetricLoss(
        gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin, label_smoothing=label_smoothing, reduction=reduction
    )


def _factory(name: str) -> Callable[..., Objective]:
    if name not in _FACTORIES:
        for point in entry_points(group=GROUP, name=name):
            found: Callable[..., Objective] = point.load()
            return found
        near = nearest(name, objective_names()) or f"; there are {', '.join(objective_names())}"
        raise UsageError(f"there is no objective '{name}'{near}")
    return _FACTORIES[name]
