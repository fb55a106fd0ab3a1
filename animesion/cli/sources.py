"""`animesion sources`: list the installed sources and their options."""

from __future__ import annotations

import click

from animesion.cli import completion


@click.command(epilog="Example: animesion sources folder")
@click.argument("name", required=False, shell_complete=completion.sources)
def sources(name: str | None) -> None:
    """List the installed sources, or the options of source NAME."""
    from animesion import sources as installed

    if name is None:
        width = max(map(len, installed.names()))
        for each in installed.names():
            click.echo(f"{each:<{width}}  {installed.source_class(each).summary}")
        return
    found = installed.source_class(name)
    click.echo(f"{name}: {found.summary}\n")
    for key, field in found.Options.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        click.echo(f"  source.{key} ({default})\n      {field.description or ''}")
