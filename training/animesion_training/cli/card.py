"""`animesion card`: render the card of a built dataset or a training run from its files."""

from __future__ import annotations

from pathlib import Path

import click

_EXAMPLES = """\b
Examples:
  animesion card datasets/daf-re --out README.md
  animesion card datasets/daf-re --since datasets/daf-re-2025
  animesion card datasets/daf-re --eu-summary
  animesion card runs/daf-re-vit --out runs/daf-re-vit/README.md
"""


@click.command(epilog=_EXAMPLES)
@click.argument("place", metavar="PATH")
@click.option("--since", metavar="PATH", help="An earlier build: the card lists the changes.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file instead of stdout.")
@click.option("--eu-summary", is_flag=True, help="The EU's summary of training content, as far as the dataset knows.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def card(place: str, since: str | None, out: Path | None, eu_summary: bool, as_json: bool) -> None:
    """Print the card (Markdown) of the dataset or training run at PATH; datasets may be at s3://...

    With --eu-summary, print the answers for the template of Regulation (EU) 2024/1689, Article 53(1)(d), instead.
    Answers that the dataset does not know are named as missing.
    """
    from animesion.dataset import remote
    from animesion.errors import UsageError
    from animesion.storage.workspace import write_atomic

    path = remote.local(place)
    if as_json and not eu_summary:
        raise UsageError("--json is for --eu-summary: a card is Markdown")
    if eu_summary:
        if since is not None:
            raise UsageError("--since is for cards: omit it with --eu-summary")
        text = _eu_summary(path, as_json=as_json)
    elif (path / "best.safetensors").is_file() or path.suffix == ".safetensors":
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


def _eu_summary(path: Path, *, as_json: bool) -> str:
    import json

    from animesion import open_dataset
    from animesion.cards import eu_summary
    from animesion.errors import UsageError

    dataset = open_dataset(path)
    recipe, curated = dataset.recipe, dataset.curated
    facts = json.loads((path / "dataset.json").read_bytes())
    try:
        found = eu_summary.summary(facts, recipe, curated)
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n" if as_json else eu_summary.markdown(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} lacks values of the summary ({error}): run `animesion build` again") from None


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
