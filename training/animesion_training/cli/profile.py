"""`animesion profile`: count parameters and operations of networks, and time their inference."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from animesion.errors import UsageError

_EXAMPLES = """\b
Examples:
  animesion profile --model vit_base_patch16 --head ifa --img-size 224
  animesion profile --model resnet18 --model vit_tiny_patch16 --img-size 64 --img-size 128 --no-timing --json
"""


@click.command(epilog=_EXAMPLES)
@click.option("--model", "names", metavar="NAME", multiple=True, required=True, help="Model; may be repeated.")
@click.option(
    "--img-size",
    "sizes",
    metavar="N",
    type=click.IntRange(1, 8192),
    multiple=True,
    help="Side in pixels; may be repeated.  [default: the model's own]",
)
@click.option("--num-classes", type=click.IntRange(1), default=1000, show_default=True, help="Number of classes.")
@click.option("--head", default="linear", show_default=True, help="Head: linear, cosine, ifa, cla, ...")
@click.option("--freeze", multiple=True, help="Parameters to freeze: `backbone`, a name, a shell pattern.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="For throughput and memory.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--seconds", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds per measurement.")
@click.option("--no-timing", is_flag=True, help="Count only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line, for each model and size.")
def profile(
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    num_classes: int,
    head: str,
    freeze: tuple[str, ...],
    batch_size: int,
    device: str,
    seconds: float,
    no_timing: bool,
    as_json: bool,
) -> None:
    """Count parameters, multiply-adds and activations of models, and time their inference.

    A name may carry methods: `evit50_clca_vit_base_patch16`, `ila_vit_base_patch16`, `glsim_vit_base_patch16`, ...

    Multiply-adds are of convolutions and matrix products, attention included. Counts are per image.
    """
    from animesion_training.cli.requirements import torch_required

    rows = []
    with torch_required():
        for name in names:
            for size in sizes or (None,):
                timed = None if no_timing else seconds
                row = _row(name, size, num_classes, head, freeze, batch_size, device, timed)
                if as_json:
                    click.echo(json.dumps(row))
                rows.append(row)
    if not as_json:
        _print(rows)


def _row(
    name: str,
    size: int | None,
    num_classes: int,
    head: str,
    freeze: tuple[str, ...],
    batch_size: int,
    device: str,
    seconds: float | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    from animesion_training.analysis.profile import count, measure, to_device
    from animesion_training.engine import optim
    from animesion_training.models import create_model, input_config

    model = to_device(create_model(name, num_classes, size, head), device)
    optim.freeze(model, freeze)
    pixels = input_config(model).size
    row: dict[str, Any] = {"model": name, "head": head, "img_size": list(pixels), "num_classes": num_classes}
    try:
        row |= asdict(count(model, pixels))
        if seconds is not None:
            row |= asdict(measure(model, pixels, batch_size, seconds=seconds))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UsageError(f"{name} cannot be run on {pixels[0]} x {pixels[1]} pixels: {reason}") from error
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    timed = "images_per_second" in rows[0]
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    columns = ["pixels", "parameters M", "trainable M", "multiply-adds G", "activations M"]
    if timed:
        columns += ["images/s", "latency ms", "peak MB"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        head = "" if row["head"] == "linear" else f" + {row['head']}"
        cells = [row["model"] + head, "x".join(map(str, row["img_size"]))]
        cells += [f"{row['parameters'] / 1e6:.3f}", f"{row['trainable'] / 1e6:.3f}"]
        cells += [f"{row['multiply_adds'] / 1e9:.3f}", f"{row['activations'] / 1e6:.2f}"]
        if timed:
            cells += [f"{row['images_per_second']:.1f}", f"{row['latency_ms']:.1f}"]
            cells += [f"{row['peak_memory'] / 1e6:.0f}"]
        table.add_row(*cells)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
    click.echo("multiply-adds of convolutions and matrix products, attention included; one is two operations")
    if timed:
        one = rows[0]
        click.echo(
            f"inference on {one['device']}, {one['threads']} threads, {one['dtype']}, batches of {one['batch_size']}, "
            f"latency of a single image; peak: {one['memory_is']}"
        )
