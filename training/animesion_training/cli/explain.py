"""`animesion explain`: visualise what a network attends to."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion explain --checkpoint runs/teacher/best.safetensors faces/ --out teacher.png")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    "weights",
    type=click.Path(path_type=Path),
    required=True,
    help="Weights of a run, or a checkpoint that describes its network.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Image to write, .png or .jpg.")
@click.option(
    "--side", type=click.IntRange(32, 1024), default=128, show_default=True, help="Side of a panel in pixels."
)
@click.option("--limit", type=click.IntRange(1, 200), default=12, show_default=True, help="Maximum number of rows.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def explain(paths: tuple[Path, ...], weights: Path, out: Path, side: int, limit: int, device: str) -> None:
    """Draw attention maps, crops, drops and tokens of a network on PATHS, one row per image."""
    import io
    from itertools import islice

    from animesion.cli.progress import counted
    from animesion.errors import UsageError
    from animesion.storage.workspace import write_atomic
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(weights, *paths)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"{out}: give an --out that ends in .png or .jpg")
    with torch_required():
        from animesion_training.analysis import explain
        from animesion_training.distributed import distributed_context
    with distributed_context(device) as context:
        rows = list(counted(islice(explain.explain(weights, paths, context), limit), "explain"))
    if not rows:
        raise UsageError("none of the paths is a readable image")
    content = io.BytesIO()
    explain.sheet(rows, side).save(content, "PNG" if out.suffix.lower() == ".png" else "JPEG")
    write_atomic(out, content.getvalue())
    click.echo(f"{len(rows)} rows in {out}")
