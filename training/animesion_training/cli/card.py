"""`animesion card`: render the card of a built dataset or a training run from its files."""

from __future__ import annotations

from pathlib import Path

import click

_EXAMPLES = """\b
Examples:
  animesion card datasets/daf-re --out README.md
  animesion card datasets/daf-re --since datasets/daf-re-2025
  animesion card runs/daf-re-vit --out runs/daf-re-vit/README.md
"""


@click.command(epilog=_EXAMPLES)
@click.argument("place", metavar="PATH")
@click.option("--since", metavar="PATH", help="An earlier build: the card lists the changes.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file instead of stdout.")
def card(place: str, since: str | None, out: Path | None) -> None:
    """Print the card (Markdown) of the dataset or training run at PATH; datasets may be at s3://..."""
    from animesion.dataset import remote
    from animesion.errors import UsageError
    from animesion.storage.workspace import write_atomic

    path = remote.local(place)
    if (path / "best.safetensors").is_file() or path.suffix == ".safetensors":
        if since is not None:
            raise UsageError("--since compares datasets: omit it for a training run")
        from animesion_training.cli.requirements import torch_required

        with torch_required():
            from animesion_training.model_card import model_card

            text = model_card(path)
    else:
        text = _dataset(path, since)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomic(out, text.encode())


def _dataset(path: Path, since: str | None) -> str:
    import json

    from animesion import cards, open_dataset
    from animesion.cards.facts import counted
    from animesion.dataset import remote
    from animesion.errors import UsageError
    from animesion.verification.diff import compare

    dataset = open_dataset(path)
    recipe = dataset.recipe
    facts = json.loads((path / "dataset.json").read_bytes())
    if not {"provenance", "leak_check"} <= facts.keys():  # written by an earlier version
        facts |= counted(dataset.curated)
    changes = compare(open_dataset(remote.local(since)), dataset) if since else None
    try:
        return cards.dataset_card(facts, recipe, changes=changes, since=Path(since).resolve().name if since else "")
    except Exception as error:  # the template can fail in any way on a damaged file
        raise UsageError(
            f"{path / 'dataset.json'} lacks values of the card ({error}): run `animesion build` again"
        ) from error
