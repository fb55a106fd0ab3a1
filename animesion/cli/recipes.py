"""`animesion recipes`: list and print the built-in recipes."""

from __future__ import annotations

import click


@click.command(epilog="Example: animesion recipes daf-re > mine.toml")
@click.argument("name", required=False)
@click.option("--resolved", is_flag=True, help="With NAME: fill in every default.")
@click.option("--card", is_flag=True, help="With NAME: print the card of the published set that the recipe reads.")
def recipes(name: str | None, resolved: bool, card: bool) -> None:
    """List the built-in recipes, or print recipe NAME as TOML."""
    from animesion import sources
    from animesion.config import recipe

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
