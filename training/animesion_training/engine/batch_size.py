"""The largest batch that fits into memory, for `run.batch_size = 0`.

On a GPU, steps of growing batches are tried until one runs out of memory. On a CPU, running out of memory would end the
process, so the memory per image is measured in one step and compared with what is free. A run keeps the number that was
found, in its recipe: it decides the result like any other setting.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.data import Batch, DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.engine import checkpoint, norms, optim, runs, setup, texts
from animesion_training.engine.update import Update
from animesion_training.memory import free_bytes
from animesion_training.precision import resolve
from animesion_training.recipe import TrainRecipe, load

#: Images of a process at most: larger batches are rarely faster.
_MOST = 1024
#: Steps of an epoch at least: with fewer, hardly anything is learned.
_STEPS = 16
#: Shares of the free memory that may be used. Allocators lose some to fragments. Beside a step on a CPU there are
#: decoded batches, caches of the system, and what the data loader reads.
_SHARES = {"cuda": 0.9, "cpu": 0.5}


def settle(
    recipe: TrainRecipe,
    data: DataSplits,
    context: DistributedContext,
    *,
    out: Path | None = None,
    notify: Callable[[str], None],
) -> TrainRecipe:
    """Return the recipe with a batch size, if it leaves it open.

    All processes get the same: that of the process with the least memory, for each of them.

    Args:
        recipe: of the run.
        data: its data.
        context: of this process.
        out: folder of the run; the batch size of a run there is kept.
        notify: receives a sentence on what was found.

    Raises:
        UsageError: not even the smallest batch fits, or the free memory is unknown.
    """
    if recipe.run.batch_size:
        return recipe
    recorded = load(str(out / runs.RECIPE)).run.batch_size if out and runs.newest_checkpoint(out) else 0
    recorded = context.all_gather(recorded)[0]
    if not recorded:
        found: int | str
        try:
            found = _largest(recipe, data, context)
        except UsageError as error:
            found = str(error)
        every = context.all_gather(found)
        if problems := [each for each in every if isinstance(each, str)]:
            raise UsageError(problems[0])
        recorded = min(every) * context.world_size
        processes = f", {min(every):,} for each of {context.world_size} processes" if context.world_size > 1 else ""
        notify(
            f"run.batch_size = {recorded:,}{processes}: the largest power of two that fits into memory, at most "
            f"{_MOST:,} for a process, with {_STEPS} steps per epoch at least; optimizer.lr is "
            f"{recipe.optimizer.lr:g}, as given"
        )
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"batch_size": recorded})})


def _largest(recipe: TrainRecipe, data: DataSplits, context: DistributedContext) -> int:
    """The largest batch of this process, a power of two."""
    images = len(data.select(recipe.data.train))
    most = max(2, min(_MOST, images // _STEPS // context.world_size))
    trial = _Trial(recipe, data, context.device)
    try:
        fits = trial.fits_on_gpu if context.device.type == "cuda" else trial.fits_on_cpu()
        return largest_power(fits, 2, most)
    finally:
        trial.close()


def largest_power(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest power of two in a range for which `fits` holds, tried in ascending order.

    Args:
        fits: whether a batch of this size fits; false for all sizes above one for which it is.
        least: the smallest size, a power of two.
        most: the largest size, at least `least`.

    Raises:
        UsageError: not even the smallest one fits.
    """
    if not fits(least):
        raise UsageError(f"not even {least} images fit into the free memory: use a smaller model.img_size or network")
    while 2 * least <= most and fits(2 * least):
        least *= 2
    return least


class _Trial:
    """Steps of a run in this process alone, on images of one value; nothing of them is kept."""

    def __init__(self, recipe: TrainRecipe, data: DataSplits, device: torch.device) -> None:
        alone = DistributedContext(0, 1, device)
        settings = recipe.run
        # a compiled network needs less memory as a rule, and compiling each size takes long
        changes: dict[str, Any] = {"compile": False, "checkpointing": False, "accumulate": 1}
        self.pieces = 1
        if device.type == "cuda":
            changes = {"compile": False}
        else:  # what is recomputed or freed between pieces would escape the measurement
            self.pieces = settings.accumulate
        recipe = recipe.model_copy(update={"run": settings.model_copy(update=changes)})
        precision = resolve(recipe.run.precision, device)
        checkpoint.seed_generators(recipe.run.seed, 0)
        self.device = device
        model = setup.build_model(recipe, data, device, vocabulary=texts.tag_vocabulary(recipe, data))
        teacher = setup.load_teacher(recipe, data, device)
        mixing = setup.build_mixing(recipe)
        self.pairs = setup.needs_pairs(model, teacher, recipe, mixing)
        self.size, self.num_classes = setup.image_size(recipe, teacher), data.num_classes
        augment, _ = setup.build_augmentation(recipe.augment, model)
        self.inputs = setup.build_inputs(recipe, data, augment, mixing, device)
        counts = setup.output_counts(data, recipe.data.train)
        objective = setup.build_objective(recipe, counts, mixing, device)
        step = setup.build_step(recipe, model, objective, mixing, teacher, device, precision, 1)
        self.update = Update(
            recipe,
            alone,
            model,
            step,
            optim.make_optimizer(model, recipe.optimizer, device, step.extra),
            precision=precision,
            ema=optim.make_average(model, recipe.run) if recipe.run.ema else None,
            smallest=2 if self.pairs else 1,
        )
        norms.train_mode(self.update.step)
        cached = recipe.data.cache == "device" or (recipe.data.cache == "ram" and device.type == "cpu")
        # images of a cache are 1.15 times as large
        self.cached = cached * len(data.select(recipe.data.train)) * 3 * int(1.15 * self.size + 1) ** 2
        self.state = sum(each.nbytes for each in model.state_dict().values())

    def close(self) -> None:
        """Free the memory."""
        vars(self).clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def step(self, count: int) -> None:
        """Do one step with a batch."""
        numbers = torch.arange(count, device=self.device)
        images = torch.full((count, 3, self.size, self.size), 127, dtype=torch.uint8, device=self.device)
        images = images.to(memory_format=torch.channels_last)
        batch = Batch(images, numbers % self.num_classes, numbers, numbers, numbers, count)
        pixels, targets = self.inputs(batch, torch.Generator().manual_seed(count))
        self.update(pixels, targets, batch.seeds, batch.places, count, number=1)

    def fits_on_gpu(self, count: int) -> bool:
        """Whether two steps run with a part of the memory to spare: the buckets of gradients of several processes."""
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - self.cached
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            for _ in range(2):  # the first one creates the state of the optimizer
                self.step(count)
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            return False
        except RuntimeError as error:  # of libraries, which allocate by themselves
            if "ALLOC_FAILED" in str(error) or "out of memory" in str(error):
                return False
            raise
        finally:
            self.update.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        peak = torch.cuda.max_memory_reserved(self.device) + self.state
        return bool(peak <= _SHARES["cuda"] * free)

    def fits_on_cpu(self) -> Callable[[int], bool]:
        """Measure the memory of a step; return a function that states whether a batch fits.

        Raises:
            UsageError: the free memory is unknown.
        """
        free = free_bytes(self.device)
        if free is None:
            raise UsageError("this system does not tell its free memory: give --batch-size a number")
        count = 4
        kept: dict[int, int] = {}  # tensors that the backward pass needs: what a step holds at its peak, to about 10 %

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        saved: Any = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saved:
            self.step(count)
        own = {each.untyped_storage().data_ptr() for each in self.update.model.state_dict().values()}
        pixels = 3 * self.size**2 * 4 * 3  # floats of the batch, of its augmentation, and of views
        each = sum(size for place, size in kept.items() if place not in own) / count / self.pieces + pixels
        usable = _SHARES["cpu"] * (free - self.cached) / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 2 * self.state
        return lambda batch: batch * each <= usable
