"""What the shell offers for a word that is being typed: training recipes, their keys, and networks."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from animesion.cli.completion import keys_of, recipes_of


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Built-in training recipes, and files."""
    return recipes_of("animesion_training", incomplete)


def keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Keys of a training recipe, such as `optimizer.lr=`."""
    from animesion_training.recipe import TrainRecipe

    return keys_of(TrainRecipe, incomplete)


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Networks: the baselines and Animesion's own, or those of timm that begin with the word."""
    import fnmatch

    from animesion_training.cli.requirements import torch_required

    with torch_required():
        from animesion_training.models.names import list_models

    ours = [row["name"] for row in list_models()]
    found = [name for name in ours if name.startswith(incomplete)]
    if found or not incomplete:
        return found
    import timm

    return fnmatch.filter(timm.list_models(), f"{incomplete}*")
