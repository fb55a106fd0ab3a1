"""`animesion export`: a trained model for use elsewhere."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion export --checkpoint runs/faces/model.safetensors --to onnx --out faces.onnx")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Weight file of a trained model.")
@click.option("--to", "kind", type=click.Choice(["onnx", "torchscript", "hf"]), required=True, help="Format.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write; a folder for hf.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(checkpoint: Path, kind: str, out: Path, as_json: bool) -> None:
    """Export a model, and check that it computes what the original does.

    onnx and torchscript write a file with the class names and normalisation inside, hf a folder that
    timm.create_model("local-dir:OUT", pretrained=True) loads. Images go in normalised, in batches of any size.
    """
    import json

    from animesion_training.cli.requirements import torch_required

    with torch_required():
        from animesion_training import export

        done = export.export(checkpoint, kind, out)
    if as_json:
        facts = {"out": str(done.path), "to": done.kind, "bytes": done.size, "max_abs_difference": done.difference}
        click.echo(json.dumps(facts))
        return
    click.echo(
        f"{done.path}: {done.size / 1e6:,.1f} MB, its logits differ from the original's by {done.difference:.1e} "
        f"at most (allowed: {export.TOLERANCE:.0e})"
    )
    if kind == "hf":
        click.echo(f'  timm.create_model("local-dir:{done.path}", pretrained=True)')
