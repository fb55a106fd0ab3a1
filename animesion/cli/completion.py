"""What the shell offers for a word that is being typed: recipes, sources and the keys of recipes.

click asks these functions; `docs/start.md` tells how a shell is set up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from pydantic import BaseModel


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Built-in recipes of datasets, and files."""
    return recipes_of("animesion", incomplete)


def keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Keys of a dataset's recipe, such as `split.strategy=`."""
    from animesion.config.recipe import Recipe

    return keys_of(Recipe, incomplete)


def sources(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the installed sources."""
    from animesion import sources as installed

    return [name for name in installed.names() if name.startswith(incomplete)]


def recipes_of(package: str, incomplete: str) -> list[CompletionItem]:
    """The built-in recipes of a package, and files, which the shell itself completes."""
    from animesion.config.settings import builtin_names

    found = [CompletionItem(name) for name in builtin_names(package) if name.startswith(incomplete)]
    return [*found, CompletionItem(incomplete, type="file")] if not found or "/" in incomplete else found


def keys_of(model: type[BaseModel], incomplete: str) -> list[str]:
    """The keys of a recipe's model, each with an equals sign."""
    return [key for key in _keys(model, "") if key.startswith(incomplete)]


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}="
