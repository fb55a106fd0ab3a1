"""`animesion audit`: labels that a person should look at."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion audit datasets/faces --model runs/a/best.safetensors --out audit/")
@click.argument("path")
@click.option("--model", required=True, metavar="NAME", help="A .safetensors of a run, or a name of timm's.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for audit.csv, .json and .html.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: the folder their paths start from.")
@click.option("--neighbours", type=click.IntRange(1, 100), default=5, show_default=True, help="Images to compare with.")
@click.option("--limit", type=click.IntRange(1, 5000), default=200, show_default=True, help="Images on the page.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print every finding as JSON.")
def audit(
    path: str,
    model: str,
    out: Path | None,
    images: Path | None,
    neighbours: int,
    limit: int,
    batch_size: int,
    precision: str,
    device: str,
    as_json: bool,
) -> None:
    """Rank the images of PATH whose neighbours stand under another label, and those far from their class.

    PATH is a built dataset, class folders or label CSVs; all its splits are compared with one another. Nothing is
    dropped: names for `label.exclude` and images to take out are for you to choose.
    """
    import json
    from dataclasses import asdict

    from animesion.errors import UsageError
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(path, *([model] if model.endswith(".safetensors") else []))
    if out is not None and out.is_dir() and (out / "dataset.json").exists():
        raise UsageError(f"{out} is a built dataset, whose files are accounted for; give another folder with --out")
    with torch_required():
        from animesion_training.analysis import audit
        from animesion_training.data import open_data
        from animesion_training.distributed import distributed_context

    opened = open_data(path, images=images)
    with distributed_context(device) as context:
        if context.world_size > 1:
            raise UsageError("an audit runs in one process; start it without torchrun")
        outcome = audit.audit(opened, model, context, neighbours=neighbours, batch_size=batch_size, precision=precision)
    written = audit.write(out, outcome, opened, model=model, limit=limit) if out else []
    if as_json:
        click.echo(json.dumps([asdict(each) for each in outcome.findings], ensure_ascii=False))
        return
    wrong = [each for each in outcome.findings if each.kind == "other class"]
    click.echo(
        f"{outcome.images:,} images, {outcome.skipped:,} unread: {len(wrong):,} lie in another class, "
        f"{len(outcome.findings) - len(wrong):,} far from their own"
    )
    for each in outcome.findings[:20]:
        like = f"looks like {_shown(each.suggested)}" if each.suggested else "far from its class"
        click.echo(f"{each.score:+.3f}  {_shown(each.key)} ({each.split}) under {_shown(each.label)}: {like}")
    for pair in outcome.pairs[:5]:
        click.echo(f"{pair.share:.1%} of {_shown(pair.first)} and {_shown(pair.second)} lie among one another")
    for file in written:
        click.echo(f"wrote {file}")


def _shown(text: str) -> str:
    """Names come from other people's files: no escape sequence of theirs reaches the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
