"""Learning-rate range test: the loss while the learning rate grows, and the rate at which it falls fastest.

Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3, with a rate that grows
exponentially. The steps are those of a training by the recipe, but for the schedule; no file is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from animesion.errors import UsageError
from animesion_training.distributed import distributed_context
from animesion_training.engine import batch_size, checkpoint, norms, optim, setup, steps, texts
from animesion_training.engine.feed import feed
from animesion_training.engine.update import piece_starts
from animesion_training.precision import numerics, resolve
from animesion_training.recipe import TrainRecipe

#: Range of learning rates; more than any optimizer of timm is used with.
LOWEST, HIGHEST = 1e-6, 10.0
_SMOOTHING = 0.9
#: The test ends when the smoothed loss is this many times its minimum.
_DIVERGED = 4.0


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Attributes:
        rates: learning rate of each step, ascending.
        losses: mean loss over the batch of each step.
        smoothed: the losses, exponentially smoothed.
        suggested: the rate at which the smoothed loss falls fastest; None if it never falls.
        lowest: the rate at which the smoothed loss is lowest.
        diverged: the rate at which it was several times its minimum or not finite; None if that did not happen.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggested: float | None
    lowest: float
    diverged: float | None


def find_lr(
    recipe: TrainRecipe,
    data_path: Path | str,
    *,
    images: Path | str | None = None,
    device: str = "auto",
    count: int = 100,
    notify: Callable[[str], None] = lambda text: None,
) -> RangeTest:
    """Train with a growing learning rate, from `LOWEST` to `HIGHEST` or until the loss diverges.

    Args:
        recipe: the recipe; its learning rate, schedule and number of epochs are not used.
        data_path: a built dataset, class folders or label files.
        images: image root of label files.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        count: number of steps.
        notify: receives sentences for the user.

    Raises:
        UsageError: a recipe that does not fit the data, or several processes.
    """
    data, _ = setup.open_datasets(recipe, data_path, images)
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(distributed_context(device))
        settings = recipe.run
        stack.enter_context(numerics(context.device, deterministic=settings.deterministic, tf32=settings.tf32))
        if context.world_size > 1:
            raise UsageError("--find-lr runs in one process: start it without torchrun")
        recipe = batch_size.settle(recipe, data, context, notify=notify)
        precision = resolve(recipe.run.precision, context.device)
        checkpoint.seed_generators(recipe.run.seed, 0)
        vocabulary = texts.tag_vocabulary(recipe, data)
        model = setup.build_model(recipe, data, context.device, vocabulary=vocabulary)
        found = texts.open_texts(recipe, data, vocabulary, length=setup.text_length(model))
        teacher = setup.load_teacher(recipe, data, context.device)
        mixing = setup.build_mixing(recipe)
        mix_generator = torch.Generator().manual_seed(recipe.run.seed * 1000)
        # as many epochs as the test may need, whatever the recipe says: each has a step or more
        longer = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"epochs": count})})
        pairs = setup.needs_pairs(model, teacher, recipe, mixing)
        stream = setup.open_stream(longer, data, context, teacher=teacher, pairs=pairs, notify=lambda text: None)
        augment, _ = setup.build_augmentation(recipe.augment, model)
        inputs = setup.build_inputs(recipe, data, augment, mixing, context.device)
        counts = setup.output_counts(data, recipe.data.train)
        objective = setup.build_objective(recipe, counts, mixing, context.device)
        step = setup.build_step(recipe, model, objective, mixing, teacher, context.device, precision, count)
        optimizer = optim.make_optimizer(model, recipe.optimizer, context.device, step.extra)
        scaler = torch.amp.GradScaler(context.device.type, enabled=precision == "fp16")
        norms.train_mode(step)
        rates: list[float] = []
        losses: list[float] = []
        smoothed: list[float] = []
        diverged: float | None = None
        while len(rates) < count and diverged is None:
            for batch, _ in feed(stream, context.device, found.get(recipe.data.train)):  # one epoch
                rate = LOWEST * (HIGHEST / LOWEST) ** (len(rates) / (count - 1))
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)  # of layer decay
                pixels, targets = inputs(batch, mix_generator)
                loss = 0.0
                starts = piece_starts(len(targets), recipe.run.accumulate, unit=step.unit)
                step.begin(context, batch.places, batch.total, len(rates) + 1)
                given = (pixels, targets, batch.seeds, *(() if batch.text is None else (batch.text,)))
                for piece in zip(*(each.tensor_split(starts) for each in given), strict=True):
                    term: Any = steps.sum_terms(step(*piece)) * (len(piece[0]) / len(targets))
                    scaler.scale(term).backward()
                    loss += float(term.detach())
                rates.append(rate)
                losses.append(loss)
                smoothed = smooth(losses)
                if not math.isfinite(loss) or (len(rates) > 10 and smoothed[-1] > _DIVERGED * min(smoothed)):
                    diverged = rate
                    break
                scaler.unscale_(optimizer)
                if recipe.optimizer.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if len(rates) == count:
                    break
    finite = [value if math.isfinite(value) else math.inf for value in smoothed]
    lowest = rates[finite.index(min(finite))]
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), steepest(rates, finite), lowest, diverged)


def smooth(losses: Sequence[float]) -> list[float]:
    """Smooth losses exponentially, without the bias towards 0 of the first ones."""
    mean, result = 0.0, []
    for number, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        result.append(mean / (1 - _SMOOTHING**number))
    return result


def steepest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate, before its minimum.

    Args:
        rates: ascending, equally spaced in their logarithm.
        smoothed: the loss at each of them; infinite if it is not finite.

    Returns:
        None if the loss does not fall.
    """
    end = smoothed.index(min(smoothed))
    # the first steps are noise: their mean has few losses
    slopes = {i: smoothed[i + 1] - smoothed[i - 1] for i in range(3, end)}
    best = min(slopes, key=slopes.__getitem__, default=None)
    return None if best is None or slopes[best] >= 0 else rates[best]
