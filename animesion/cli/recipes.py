"""`animesion recipes`: what can be built."""

from __future__ import annotations

import click


@click.command(epilog="Example: animesion recipes daf-re > mine.toml")
@click.argument("name", required=False)
@click.option("--resolved", is_flag=True, help="With NAME: fill in every default.")
@click.option("--card", is_flag=True, help="With NAME: print the card of the published set that it reads instead.")
def recipes(name: str | None, resolved: bool, card: bool) -> None:
    """List the built-in recipes, or print the one called NAME as TOML."""
    from animesion import sources
    from animesion.config import recipe

    if name and card:
        from animesion import cards

        recipe.builtin_text(name)  # a mistyped name is told with the nearest
        click.echo(cards.published_card(name), nl=False)
        return
    if name:
        click.echo(recipe.load(name).to_toml() if resolved else recipe.builtin_text(name), nl=False)
        return
    installed = sources.names()
    width = max(map(len, recipe.builtin_names()))
    for each in recipe.builtin_names():
        model = recipe.load(each)
        later = "" if model.source.kind in installed else "  [its source is not installed; --sample works]"
        click.echo(f"{each:<{width}}  {model.summary}{later}")
