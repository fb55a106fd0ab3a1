"""Batch norms of a run: frozen ones stay still, and the statistics of all processes are merged before they are used.

Each process normalises its own share of a batch, and keeps running statistics of it. Evaluation and files need the
same statistics everywhere: `reduce_statistics` averages them. `synchronise` makes processes normalise the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion_training.distributed import DistributedContext
from animesion_training.models.create import bare
from animesion_training.recipe import TrainRecipe

_NORMS = (nn.modules.batchnorm._BatchNorm,)
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def train_mode(model: nn.Module) -> None:
    """Set training mode, except for batch norms with frozen parameters, whose running statistics must not change."""
    model.train()
    for module in _frozen(model):
        module.eval()


def normalises_over_batch(model: nn.Module, *, frozen: bool = False) -> bool:
    """Whether a network has batch norms that compute statistics in training; with `frozen`, also frozen ones."""
    still = set() if frozen else set(_frozen(model))
    return any(isinstance(module, _NORMS) and module not in still for module in bare(model).modules())


def reduce_statistics(models: Sequence[nn.Module], context: DistributedContext, passes: int) -> None:
    """Average the running statistics of batch norms over all processes, in place.

    Averaging commutes with the running mean, so its times do not matter. Processes count by their passes since the last
    call, because one without images has not seen what the others have.

    Args:
        models: with the same modules in every process.
        context: of this process.
        passes: forward passes of this process in training since the last call.
    """
    statistics = [buffer for model in models for buffer in _statistics(model)]
    if context.world_size == 1 or not statistics:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in statistics])
    summed = context.sum_(torch.cat((flat * passes, flat.new_tensor([passes]))))
    if summed[-1] > 0:
        mean = torch.split(summed[:-1] / summed[-1], [buffer.numel() for buffer in statistics])
        for buffer, values in zip(statistics, mean, strict=True):
            buffer.copy_(values.view(buffer.shape))


def synchronise(model: nn.Module, recipe: TrainRecipe, context: DistributedContext) -> None:
    """Replace batch norms by those of torch that normalise over all processes, in place; with one process, keep them.

    They communicate in each forward pass, so all processes must make the same passes, with as many images.

    Raises:
        UsageError: settings with which processes could differ, CPUs, or a batch norm of another kind.
    """
    unit = 2 * context.world_size  # images of a batch are shared in pairs
    if context.world_size == 1:
        return
    if recipe.run.batch_size % unit or recipe.data.last != "drop" or recipe.data.on_error != "raise":
        raise UsageError(
            f"run.sync_bn needs as many images in every process: with {context.world_size} processes, a "
            f"run.batch_size that is a multiple of {unit}, data.last = 'drop' and data.on_error = 'raise'"
        )
    if context.device.type != "cuda":
        raise UsageError("run.sync_bn needs GPUs: torch synchronises no batch norms on CPUs")
    replace_norms(model)


def replace_norms(model: nn.Module) -> None:
    """Replace batch norms by synchronised ones with the same parameters, in place.

    Raises:
        UsageError: a batch norm of another kind.
    """
    for name, module in bare(model).named_modules():
        if isinstance(module, _NORMS) and not isinstance(module, BatchNormAct2d) and type(module) not in _PLAIN:
            raise UsageError(f"run.sync_bn: {name} is a {type(module).__name__}, which cannot be synchronised")
    convert: Any = convert_sync_batchnorm  # untyped
    convert(model)


def _frozen(model: nn.Module) -> Iterator[nn.Module]:
    for module in bare(model).modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _NORMS) and own and not any(parameter.requires_grad for parameter in own):
            yield module


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in bare(model).modules():
        if isinstance(module, _NORMS):
            yield from (each for each in (module.running_mean, module.running_var) if each is not None)
