"""What is trained and how fast: frozen parameters, optimizer, learning-rate schedule; timm's, set up from a recipe."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch import nn

from animesion.errors import UsageError
from animesion_training.models import head_parameters
from animesion_training.models.create import bare
from animesion_training.recipe import OptimizerSection, ScheduleSection

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop the training of parameters.

    Args:
        model: the network.
        patterns: `backbone` for all but the classifier and what methods add, a name or its prefix up to a dot, or a
            shell pattern.

    Returns:
        Names of the frozen parameters.

    Raises:
        UsageError: a pattern that matches nothing, or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    head = {id(parameter) for parameter in head_parameters(model)}
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern == "backbone":
            # methods put on a backbone are trained; without any, that is the classifier
            own = getattr(model, "backbone_parameters", None)
            found = own() if own else {n for n, parameter in model.named_parameters() if id(parameter) not in head}
        else:
            found = {n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)}
        if not found:
            raise UsageError(
                f"model.freeze: no parameter is called '{pattern}'; names begin with "
                f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
            )
        frozen |= found
    if frozen and len(frozen) == len(names):
        raise UsageError("model.freeze leaves nothing to train: name fewer parameters")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return [name for name in names if name in frozen]


def train_mode(model: nn.Module) -> None:
    """Training mode, but frozen normalisation keeps its statistics: moving them would train it by the back door."""
    model.train()
    for module in bare(model).modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _NORMS) and own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of timm with that name over what is not frozen, with layer decay when it is not 1.

    Raises:
        UsageError: timm has no such optimizer.
    """
    options: dict[str, Any] = {"layer_decay": settings.layer_decay} if settings.layer_decay < 1 else {}
    try:
        return create_optimizer_v2(
            model,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            **options,
        )
    except (ValueError, AssertionError) as error:
        raise UsageError(f"optimizer.name '{settings.name}' cannot be made: {error}") from None


class _LateCosine(CosineLRScheduler):
    """Sets at each step the rate of the step before it."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set the rates for a step, from 0."""
        super().step_update(max(num_updates - 1, 0), metric)


def make_schedule(optimizer: torch.optim.Optimizer, settings: ScheduleSection, steps_an_epoch: int) -> Scheduler:
    """A schedule of timm, advanced by `step_update(step)`: a function of the step alone, so resuming needs no state."""
    total = settings.epochs * steps_an_epoch
    if settings.kind == "cosine-late":
        return _LateCosine(
            optimizer,
            t_initial=total,
            lr_min=settings.min_lr,
            warmup_t=settings.warmup_steps,
            warmup_lr_init=settings.warmup_lr,
            warmup_prefix=False,
            t_in_epochs=False,
        )
    warmup = min(settings.warmup_steps, total // 4)
    common: dict[str, Any] = {
        "optimizer": optimizer,
        "warmup_t": warmup,
        "warmup_lr_init": settings.warmup_lr,
        "warmup_prefix": settings.kind == "cosine",
        "t_in_epochs": False,
    }
    if settings.kind == "cosine":
        return CosineLRScheduler(t_initial=max(1, total - warmup), lr_min=settings.min_lr, **common)
    constant = settings.kind == "constant"
    return StepLRScheduler(
        decay_t=total + 1 if constant else settings.step_epochs * steps_an_epoch,
        decay_rate=1.0 if constant else settings.step_factor,
        **common,
    )
