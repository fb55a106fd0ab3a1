"""`animesion audit`: find labels to review."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion audit datasets/faces --checkpoint runs/a --out audit/")
@click.argument("path")
@click.option("--checkpoint", metavar="RUN|FILE", type=click.Path(path_type=Path), help="A trained network.")
@click.option("--model", metavar="NAME", help="In its place: a timm model, with the weights that timm has for it.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for audit.csv, .json and .html.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option(
    "--neighbours",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Nearest neighbours to compare with.",
)
@click.option("--limit", type=click.IntRange(1, 5000), default=200, show_default=True, help="Images in audit.html.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print every finding as JSON.")
def audit(
    path: str,
    checkpoint: Path | None,
    model: str | None,
    out: Path | None,
    images: Path | None,
    neighbours: int,
    limit: int,
    batch_size: int,
    precision: str,
    device: str,
    as_json: bool,
) -> None:
    """Rank the images of PATH whose neighbours have another label, and those far from their class.

    PATH is a built dataset, class folders or label CSVs; all splits are compared. Nothing is dropped: choose classes
    for `label.exclude` and images to remove from the list.
    """
    import json
    from dataclasses import asdict

    from animesion.cli.progress import one_task
    from animesion.errors import UsageError
    from animesion_training.cli.requirements import check_exists, torch_required

    network = checkpoint or model
    if network is None or (checkpoint and model):
        raise click.UsageError("give either --checkpoint or --model")
    check_exists(path, *filter(None, (checkpoint,)))
    if out is not None and out.is_dir() and (out / "dataset.json").exists():
        raise UsageError(f"{out} is a built dataset, which must not contain other files: give another --out")
    with torch_required():
        from animesion_training.analysis import audit
        from animesion_training.data import open_data
        from animesion_training.distributed import distributed_context

    opened = open_data(path, images=images)
    with distributed_context(device) as context:
        if context.world_size > 1:
            raise UsageError("an audit runs in one process: start it without torchrun")
        with one_task("audit"):
            outcome = audit.audit(
                opened, network, context, neighbours=neighbours, batch_size=batch_size, precision=precision
            )
    written = audit.write(out, outcome, opened, model=str(network), limit=limit) if out else []
    if as_json:
        click.echo(json.dumps([asdict(each) for each in outcome.findings], ensure_ascii=False))
        return
    wrong = [each for each in outcome.findings if each.kind == "other class"]
    click.echo(
        f"{outcome.images:,} images, {outcome.skipped:,} unread: {len(wrong):,} look like another class, "
        f"{len(outcome.findings) - len(wrong):,} are far from their own"
    )
    for each in outcome.findings[:20]:
        verdict = f"looks like {_printable(each.suggested)}" if each.suggested else "far from its class"
        click.echo(
            f"{each.score:+.3f}  {_printable(each.key)} ({each.split}), label {_printable(each.label)}: {verdict}"
        )
    for pair in outcome.pairs[:5]:
        click.echo(f"{pair.share:.1%} of {_printable(pair.first)} and {_printable(pair.second)} are mixed up")
    for file in written:
        click.echo(f"wrote {file}")


def _printable(text: str) -> str:
    """Replace escape sequences in names, which come from data and must not reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
