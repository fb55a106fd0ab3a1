"""`animesion export`: convert a trained model to ONNX, TorchScript or the Hugging Face layout of timm."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion export runs/faces --to onnx --out faces.onnx")
@click.argument("checkpoint", metavar="RUN|FILE", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["onnx", "torchscript", "hf"]), required=True, help="Format.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write; a folder for hf.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(checkpoint: Path, kind: str, out: Path, as_json: bool) -> None:
    """Export a model, and check that its outputs equal those of the original.

    onnx and torchscript write a file that includes class names and normalisation, hf a folder that
    timm.create_model("local-dir:OUT", pretrained=True) loads. Inputs are normalised images, in batches of any size.
    """
    import json

    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint)
    with torch_required():
        from animesion_training import export

        done = export.export(checkpoint, kind, out)
    if as_json:
        facts = {"out": str(done.path), "to": done.kind, "bytes": done.size, "max_abs_difference": done.difference}
        click.echo(json.dumps(facts))
        return
    click.echo(
        f"{done.path}: {done.size / 1e6:,.1f} MB, its logits differ from the original's by at most "
        f"{done.difference:.1e} (allowed: {export.TOLERANCE:.0e})"
    )
    if kind == "hf":
        click.echo(f'  timm.create_model("local-dir:{done.path}", pretrained=True)')
