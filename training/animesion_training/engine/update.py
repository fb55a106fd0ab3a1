"""One optimizer step, the same for any number of processes: forward and backward passes, reduction and update.

Each process cuts its share of the global batch into pieces. Gradients are weighted so that their sum over pieces and
processes is the gradient of the mean over the global batch. They are reduced in the backward pass of a process's last
piece, and a process without images makes a pass of weight 0 in its place, so all processes take part in the same
collectives: one reduction of the gradients, and one of a vector with everything else (`StepReport`). Nothing of a step
waits for the device, except for a gradient scaler (fp16), and with `data.on_error = "skip"` for the number of images.

`steps` computes the loss, `loop` prepares batches, `meter` reads the reports.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from animesion_training.distributed import DistributedContext
from animesion_training.engine import steps
from animesion_training.recipe import TrainRecipe


@dataclass(frozen=True)
class StepReport:
    """What is known of a step, summed over all processes and still on the device.

    Attributes:
        numbers: float32: images that were read, processes that are asked to stop, seconds per step of the first
            process, then the sum over the images of each term of the loss.
        names: of the terms.
    """

    numbers: Tensor
    names: tuple[str, ...]


class Update:
    """Does optimizer steps.

    Args:
        recipe: of the run.
        context: of this process.
        model: the network, bare.
        step: the module that computes the loss.
        optimizer: over the parameters of the step: the network's, and others that it trains.
        precision: of the forward pass; with `fp16`, gradients are scaled.
        ema: average of the weights, if there is one.
        smallest: images that a piece needs; the share of a process has none or at least as many.

    Attributes:
        before_change: called after the backward pass of each step, before weights, their average, the optimizer and the
            state of the method change.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        context: DistributedContext,
        model: nn.Module,
        step: steps.Step,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str,
        ema: ModelEmaV3 | None,
        smallest: int,
    ) -> None:
        self.settings, self.clip = recipe.run, recipe.optimizer.clip
        self.skips = recipe.data.on_error == "skip"
        self.context, self.model, self.step, self.optimizer, self.ema = context, model, step, optimizer, ema
        self.smallest = smallest
        self.before_change: Callable[[], None] = lambda: None
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=precision == "fp16")
        self.parallel_step: nn.Module = step
        self._names: tuple[str, ...] = ()
        self._passes = 0
        if context.world_size > 1:
            parallel: Any = nn.parallel.DistributedDataParallel
            # statistics of batch norm are reduced before they are used (`norms`), not in each forward pass
            names = inspect.signature(parallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # before 2.15
            self.parallel_step = parallel(
                step,
                device_ids=[context.device] if context.device.type == "cuda" else None,
                **{buffers: False},
                find_unused_parameters=self.settings.find_unused_parameters,
                gradient_as_bucket_view=self.settings.gradient_as_bucket_view,
                static_graph=self.settings.static_graph,
            )

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        seeds: Tensor,
        places: Tensor,
        total: int,
        *,
        number: int,
        text: Tensor | None = None,
        stop: bool = False,
        pace: float = 0.0,
    ) -> StepReport:
        """Do one step.

        Args:
            images: this process's share of the batch, (B, 3, S, S), normalised; it may be empty.
            targets: class ids (B,) or soft labels (B, C).
            seeds: one per sample, (B,) int64.
            places: positions in the global batch, (B,) int64.
            total: samples of the global batch, those that cannot be read included.
            number: of the step, from 1.
            text: token ids of the tags, (B, T) int64, for a network that reads tags.
            stop: whether this process is asked to stop.
            pace: seconds per step; that of the first process is reported.
        """
        self.step.begin(self.context, places, total, number)
        inputs = (images, targets, seeds) if text is None else (images, targets, seeds, text)
        terms = self._accumulate(inputs, total)
        self.before_change()
        report = self._reduce(terms, len(images), places, total, stop=stop, pace=pace)
        if self.skips:
            found = int(report.numbers[0])
            if found == 0:  # a batch of which nothing can be read changes nothing
                self.optimizer.zero_grad(set_to_none=True)
                return report
            if found < total:  # the gradients are those of a mean over `total` images
                gradients = [each.grad for each in self.step.parameters() if each.grad is not None]
                torch._foreach_mul_(gradients, total / found)
        self.scaler.unscale_(self.optimizer)
        if self.clip:
            nn.utils.clip_grad_norm_(self.step.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step=number)
        return report

    def take_passes(self) -> int:
        """Return the number of forward passes of the network since the last call."""
        passes, self._passes = self._passes, 0
        return passes

    def _accumulate(self, inputs: tuple[Tensor, ...], total: int) -> dict[str, Tensor]:
        """Add up the gradients of all pieces; return the sum over the images of each term."""
        sums: dict[str, Tensor] = {}
        unit, smallest = self.step.unit, self.smallest
        starts = piece_starts(len(inputs[0]), self.settings.accumulate, unit=unit, smallest=smallest)
        pieces = zip(*(tensor.tensor_split(starts) for tensor in inputs), strict=True)
        for i, piece in enumerate(pieces):
            size = len(piece[0])
            with self._without_reduction() if i < len(starts) else contextlib.nullcontext():
                terms: dict[str, Tensor] = self.parallel_step(*piece)
                # terms are means over the piece, and the reduction divides by the number of processes
                weight = size / total * self.context.world_size
                loss: Any = self.scaler.scale(steps.sum_terms(terms) * weight)
                loss.backward()
            self._passes += size > 0
            for name, term in terms.items() if size else ():
                sums[name] = sums.get(name, 0.0) + term.detach().float() * size
        return sums

    def _without_reduction(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.parallel_step, nn.parallel.DistributedDataParallel):
            return self.parallel_step.no_sync()
        return contextlib.nullcontext()

    def _reduce(
        self, terms: dict[str, Tensor], count: int, places: Tensor, total: int, *, stop: bool, pace: float
    ) -> StepReport:
        """Sum the report over all processes, and what the method of the step shares, by one collective."""
        if not self._names:  # in the first step; a process without images does not know the terms
            self._names = next(filter(None, self.context.all_gather(tuple(terms))), ())
        device = self.context.device
        facts = (count, stop, pace if self.context.is_main else 0.0)
        # filled on the device: a copy from the host would wait for it
        numbers = torch.stack(
            [torch.full((), float(fact), device=device) for fact in facts]
            + [terms[name] if name in terms else torch.zeros((), device=device) for name in self._names]
        )
        collected = self.step.collect(places, total)
        if collected is None:
            return StepReport(self.context.sum_(numbers), self._names)
        both = self.context.sum_(torch.cat((numbers, collected.flatten())))
        self.step.absorb(both[len(numbers) :].view(collected.shape))
        return StepReport(both[: len(numbers)].clone(), self._names)


def piece_starts(count: int, most: int, *, unit: int = 1, smallest: int = 1) -> list[int]:
    """Where the pieces of a share start, except for the first: at multiples of `unit`, about equally far apart.

    Args:
        count: images of the share.
        most: pieces to cut it into, or fewer if these would be too small; at least one.
        unit: images that stay together.
        smallest: images that a piece needs.
    """
    pieces = max(1, min(most, count // max(smallest, unit)))
    # `tensor_split`, because `chunk` may return fewer pieces, and a smaller last one
    return [unit * int(part[0]) for part in torch.arange(-(-count // unit)).tensor_split(pieces)[1:]]
