"""`animesion recipes`: list and print the built-in recipes."""

from __future__ import annotations

import click

from animesion.cli import completion

#: The package whose recipes `animesion train` takes.
_TRAINING = "animesion_training"


@click.command(epilog="Example: animesion recipes daf-re > mine.toml")
@click.argument("name", required=False, shell_complete=completion.recipes)
@click.option("--train", is_flag=True, help="The recipes of `animesion train` instead.")
@click.option("--resolved", is_flag=True, help="With NAME: fill in every default.")
@click.option("--card", is_flag=True, help="With NAME: print the card of the published set that the recipe reads.")
def recipes(name: str | None, train: bool, resolved: bool, card: bool) -> None:
    """List the built-in recipes of datasets, or with --train those of training, or print recipe NAME as TOML."""
    from animesion import sources
    from animesion.config import recipe

    if train:
        if card or resolved:
            raise click.UsageError("--resolved and --card are for recipes of datasets: leave --train out")
        _training(name)
        return

    if name and card:
        from animesion import cards

        recipe.builtin_text(name)  # raises for an unknown name and suggests the nearest one
        click.echo(cards.published_card(name), nl=False)
        return
    if name:
        click.echo(recipe.load(name).to_toml() if resolved else recipe.builtin_text(name), nl=False)
        return
    installed = sources.names()
    width = max(map(len, recipe.builtin_names()))
    for each in recipe.builtin_names():
        model = recipe.load(each)
        note = "" if model.source.kind in installed else "  [source not installed; --sample works]"
        click.echo(f"{each:<{width}}  {model.summary}{note}")


def _training(name: str | None) -> None:
    from animesion.config.settings import builtin_names, builtin_text, parse_toml

    if name:
        click.echo(builtin_text(_TRAINING, name), nl=False)
        return
    names = builtin_names(_TRAINING)
    width = max(map(len, names))
    for each in names:
        click.echo(f"{each:<{width}}  {parse_toml(builtin_text(_TRAINING, each), each)['summary']}")
