"""What a run will do, in sentences for the user, before its first step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval import evaluate
from animesion_training.precision import emulates_bf16
from animesion_training.recipe import TrainRecipe
from animesion_training.text.tokenizer import SPECIAL_TOKENS
from animesion_training.tokens.tag_text import TagText


def describe(
    recipe: TrainRecipe,
    data: DataSplits,
    model: nn.Module,
    context: DistributedContext,
    out: Path,
    *,
    precision: str,
    steps: int,
    done: int,
    pairs: bool,
) -> list[str]:
    """Return one line each about network and data, and about steps and place; and warnings.

    Args:
        recipe: of the run.
        data: its data.
        model: its network.
        context: its processes.
        out: its folder.
        precision: of the forward pass.
        steps: in an epoch.
        done: steps done before, by a run that is resumed.
        pairs: whether a process needs two images of a batch.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    parameters = f"{every / 1e6:,.1f} M parameters" + (f", {trained / 1e6:,.1f} M trained" if trained < every else "")
    used = dict.fromkeys(filter(None, (recipe.data.train, recipe.data.val, recipe.data.test)))
    splits = ", ".join(f"{len(data.splits[name]):,} {name}" for name in used if name in data.splits)
    settings, epochs = recipe.run, recipe.schedule.epochs
    device = str(context.device)
    if context.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(context.device)} ({device})"
    processes = f", {context.world_size} processes" if context.world_size > 1 else ""
    outputs = f"{data.num_classes:,} classes" if data.tags is None else f"{len(data.tags):,} tags"
    lines = [
        f"{recipe.model.name} at {recipe.model.img_size} px ({parameters}) on {data.path}: {outputs}, images: {splits}",
        f"{epochs * steps:,} steps of {settings.batch_size:,} images, {steps:,} per epoch, in {precision} on {device}"
        f"{processes}, "
        f"into {out}" + (f"; continuing after step {done:,} of {epochs * steps:,}" if done else ""),
    ]
    if precision == "bf16" and emulates_bf16(context.device):
        lines.append("this CPU has no instructions for bf16 and emulates it: run.precision = 'fp32' is faster")
    tags = getattr(model, "tags", None)
    if isinstance(tags, TagText):
        lines.append(
            f"reads {tags.vocab_size - len(SPECIAL_TOKENS):,} tags ({', '.join(recipe.text.categories)}), at most "
            f"{tags.length - 2} of an image; schedule of masks: {recipe.text.schedule}; evaluated "
            + ("with the tags of each image" if recipe.text.evaluate else "on images alone")
        )
    lines += _untrained(recipe, data) if data.tags is None else []
    if recipe.objective.name == "supcon" and recipe.data.images_per_class == 1:
        lines.append(
            "supcon compares images of a class within a batch: data.images_per_class = 4 makes sure that there are some"
        )
    busy = settings.batch_size // (2 if pairs else 1)
    if busy < context.world_size:
        lines.append(
            f"{context.world_size - busy} of {context.world_size} processes have no images, because run.batch_size is "
            f"{settings.batch_size}" + (" and a process needs two of them" if pairs else "") + ": give a larger batch"
        )
    return lines


def _untrained(recipe: TrainRecipe, data: DataSplits) -> list[str]:
    """Notes on splits whose classes have no training images."""
    counts = evaluate.train_counts(data, recipe.data.train)
    lines = []
    for split in dict.fromkeys(filter(None, (recipe.data.val, recipe.data.test))):
        share = evaluate.untrained(counts, data, split) if len(data.splits.get(split, ())) else None
        if share == 1:
            lines.append(
                f"no class of the split '{split}' is trained on: it is evaluated by retrieval, with embeddings"
            )
        elif share:
            lines.append(
                f"{share:.1%} of the images in the split '{split}' are of classes without training images, which count "
                "as wrong"
            )
    return lines
