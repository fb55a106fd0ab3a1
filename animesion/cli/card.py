"""`animesion card`: the dataset card, made anew from a built dataset."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion card datasets/daf-re --out README.md")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it there instead of to stdout.")
def card(path: Path, out: Path | None) -> None:
    """Print the dataset card (Markdown) of the dataset at PATH."""
    import json

    from animesion import cards, open_dataset
    from animesion.errors import UsageError
    from animesion.workspace import write_atomic

    recipe = open_dataset(path).recipe
    facts = json.loads((path / "dataset.json").read_bytes())
    try:
        text = cards.dataset_card(facts, recipe)
    except Exception as error:  # a template meets whatever a damaged file holds
        raise UsageError(
            f"{path / 'dataset.json'} lacks what the card tells ({error}): run `animesion build` again"
        ) from error
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomic(out, text.encode())
