"""Frozen parameters, optimizer, average of the weights and learning-rate schedule: timm's, configured by a recipe."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.models import head_parameters
from animesion_training.recipe import OptimizerSection, RunSection, ScheduleSection

#: Optimizers of torch with fused kernels for CPUs and NVIDIA GPUs: one pass over the weights per step.
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
#: Settings of their own.
_OWN = {"lr", "momentum", "weight_decay", "layer_decay"}


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze parameters.

    Args:
        model: the network.
        patterns: `backbone` for all but the classifier and the parameters of methods, a name or its prefix up to a
            dot, or a shell pattern.

    Returns:
        Names of the frozen parameters.

    Raises:
        UsageError: a pattern matches nothing, or no trainable parameter is left.
    """
    names = [name for name, _ in model.named_parameters()]
    # by identity, because `head_parameters` returns no names
    head = {id(parameter) for parameter in head_parameters(model)}
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern == "backbone":
            # methods on a backbone stay trainable; without methods, only the classifier does
            own = getattr(model, "backbone_parameters", None)
            matches = own() if own else {n for n, parameter in model.named_parameters() if id(parameter) not in head}
        else:
            matches = {
                n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)
            }
        if not matches:
            raise UsageError(
                f"model.freeze: no parameter matches '{pattern}'; names start with "
                f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
            )
        frozen |= matches
    if frozen and len(frozen) == len(names):
        raise UsageError("model.freeze leaves no trainable parameter: freeze fewer")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return [name for name in names if name in frozen]


def make_optimizer(
    model: nn.Module, settings: OptimizerSection, device: torch.device, extra: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Create the optimizer over all trainable parameters, with layer decay if it is below 1.

    Optimizers of torch with a fused kernel for the device use it, unless an option says otherwise.

    Args:
        model: on the device.
        settings: of the recipe.
        device: that computes.
        extra: what is trained beside the model, see `Step.extra`; without layer decay.

    Raises:
        UsageError: timm has no optimizer of this name, or it rejects an option.
    """
    try:
        info = get_optimizer_info(settings.name.lower().rpartition("_")[2])
        known = set(inspect.signature(info.opt_class).parameters) if inspect.isclass(info.opt_class) else None
    except (ValueError, AssertionError):
        names = [str(each) for each in list_optimizers()]
        near = nearest(settings.name, names) or f"; there are {', '.join(names)}"
        raise UsageError(f"optimizer.name: timm has no optimizer '{settings.name}'{near}") from None
    options: dict[str, Any] = dict(settings.options)
    if known is not None and "kwargs" not in known:
        known -= {*_OWN, "params"}
        # timm leaves these out without a word
        known -= {name for name, taken in (("eps", info.has_eps), ("betas", info.has_betas)) if not taken}
        if unknown := sorted(options.keys() - known):
            near = nearest(unknown[0], known) or f"; there are {', '.join(sorted(known))}"
            raise UsageError(f"optimizer.options: {settings.name} has no option '{unknown[0]}'{near}")
    if taken := sorted(options.keys() & _OWN):
        raise UsageError(f"optimizer.options cannot contain {taken[0]}: set optimizer.{taken[0]}")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    fused = info.opt_class in _FUSED and device.type in ("cpu", "cuda")
    if fused and options.keys().isdisjoint({"fused", "foreach", "differentiable"}):
        options["fused"] = True
    if settings.layer_decay < 1:
        options["layer_decay"] = settings.layer_decay
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            **options,
        )
    except (ValueError, AssertionError, TypeError, RuntimeError) as error:
        raise UsageError(f"optimizer.name '{settings.name}' cannot be created: {error}") from None
    if extra is not None:
        # biases, norms and single vectors are not decayed, as in timm's groups
        for flat, decay in ((False, settings.weight_decay), (True, 0.0)):
            parameters = [each for each in extra.parameters() if (each.squeeze().ndim <= 1) == flat]
            optimizer.add_param_group({"params": parameters, "weight_decay": decay})
    return optimizer


def make_average(model: nn.Module, settings: RunSection) -> ModelEmaV3:
    """Create the exponential moving average of the weights.

    Its decay warms up (D. Crowson's rule in timm), so that a short run does not average over its initial weights: with
    a power of 0.75 the decay reaches 0.99 in step 465 and 0.999 in step 10,000.
    """
    power = settings.ema_warmup
    return ModelEmaV3(model, decay=settings.ema, use_warmup=power > 0, warmup_power=power)


class _LateCosine(CosineLRScheduler):
    """Cosine schedule that applies each rate one step late."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set the learning rates of a step, counted from 0."""
        super().step_update(max(num_updates - 1, 0), metric)


def make_schedule(optimizer: torch.optim.Optimizer, settings: ScheduleSection, steps_per_epoch: int) -> Scheduler:
    """Create a timm schedule for `step_update(step)`; it depends on the step alone, so resuming needs no state."""
    total = settings.epochs * steps_per_epoch
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
    warmup = min(settings.warmup_steps, total // 4)  # short runs would otherwise end within the warm-up
    common: dict[str, Any] = {
        "optimizer": optimizer,
        "warmup_t": warmup,
        "warmup_lr_init": settings.warmup_lr,
        "warmup_prefix": settings.kind == "cosine",
        "t_in_epochs": False,
    }
    if settings.kind == "cosine":
        return CosineLRScheduler(t_initial=max(1, total - warmup), lr_min=settings.min_lr, **common)
    constant = settings.kind == "constant"  # a step schedule whose first step is after the end
    return StepLRScheduler(
        decay_t=total + 1 if constant else settings.step_epochs * steps_per_epoch,
        decay_rate=1.0 if constant else settings.step_factor,
        **common,
    )
