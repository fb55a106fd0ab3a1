"""`animesion models`: list the networks that can be trained."""

from __future__ import annotations

import click

from animesion_training.cli import completion


@click.command(epilog="Example: animesion models 'vit_*ifa'")
@click.argument("pattern", required=False, shell_complete=completion.models)
@click.option("--parameters", is_flag=True, help="Also count parameters, for 1,000 classes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def models(pattern: str | None, parameters: bool, as_json: bool) -> None:
    """List the baselines and Animesion's own models, or all timm models whose name matches PATTERN.

    PATTERN may contain * and ?; without them it matches anywhere in a name.
    """
    import json

    from animesion_training.cli.requirements import torch_required

    with torch_required():
        from animesion_training.models.names import list_models

        rows = list_models(pattern, parameters=parameters)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        count = f"{row['parameters'] / 1e6:9.2f} M  " if parameters else ""
        weights = f"{row['weights']} weights" if row["weights"] else "no weights published"
        alias = f", timm's {row['timm']}" if row["timm"] != row["name"] else ""
        click.echo(f"{row['name']:<{width}}  {count}{weights}{alias}")
    if not pattern:
        click.echo("every other timm model works too: animesion models PATTERN", err=True)
