"""`animesion predict`: who is on a picture."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion predict --checkpoint runs/a/best.safetensors picture.jpg --json")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Weights: a .safetensors of a run.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Guesses for each picture.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each picture.")
@click.pass_context
def predict(
    ctx: click.Context, paths: tuple[Path, ...], checkpoint: Path, top: int, device: str, as_json: bool
) -> None:
    """Name what is on PATHS (pictures or folders of them); exit status 1 when one of them cannot be read."""
    import json

    from animesion.cli.training import check_there, training

    check_there(checkpoint, *paths)
    with training():
        from animesion_training.distributed import joined
        from animesion_training.predicting import predict as predictions

    unread = 0
    with joined(device) as place:
        for each in predictions(checkpoint, paths, place, top=top):
            unread += bool(each.problem)
            if as_json:
                guesses = [{"name": name, "probability": round(value, 6)} for name, value in each.guesses]
                line = {"path": str(each.path), "guesses": guesses}
                click.echo(json.dumps(line | ({"problem": each.problem} if each.problem else {}), ensure_ascii=False))
            elif each.problem:
                click.echo(f"{each.path}: cannot be read ({each.problem})", err=True)
            else:
                click.echo(f"{each.path}: " + ", ".join(f"{name} {100 * value:.1f}%" for name, value in each.guesses))
    if unread:
        ctx.exit(1)
