"""`animesion export`: convert a trained model to ONNX, TorchScript or the Hugging Face layout of timm."""

from __future__ import annotations

from pathlib import Path

import click

from animesion.wording import amount


@click.command(epilog="Example: animesion export runs/faces --to onnx --out faces.onnx")
@click.argument("checkpoint", metavar="RUN|FILE", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["onnx", "torchscript", "hf"]), required=True, help="Format.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write; a folder for hf.")
@click.option(
    "--push", metavar="USER/NAME", help="With hf: send it to this repository of the Hugging Face Hub, and keep no copy."
)
@click.option("--private", is_flag=True, help="With --push: the repository must be private.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(checkpoint: Path, kind: str, out: Path | None, push: str | None, private: bool, as_json: bool) -> None:
    """Export a model, and check that its outputs equal those of the original.

    onnx and torchscript write a file that includes class names and normalisation, hf a folder that
    timm.create_model("local-dir:OUT", pretrained=True) loads. Inputs are normalised images, in batches of any size.

    --push logs in as `hf auth login` or HF_TOKEN says, and sends only what the repository lacks.
    """
    import contextlib
    import json
    import tempfile

    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint)
    if (out is None) == (push is None):
        raise click.UsageError("give --out for a file or folder, or --push for a repository of the Hub")
    if push is not None and kind != "hf":
        raise click.UsageError(f"--push is for --to hf, not {kind}")
    if private and push is None:
        raise click.UsageError("--private is for --push: leave it out, or name a repository")
    with contextlib.ExitStack() as stack:
        hub = None
        if push is not None:
            from animesion.publishing.hub import Hub

            hub = Hub(push, kind="model", private=private)  # before seconds are spent on an export
        with torch_required():
            from animesion_training import export

        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="animesion-export-"))) / "hf"
        done = export.export(checkpoint, kind, out)
        sent = None if hub is None else export.push(done.path, hub)
    place = hub.url if hub is not None else str(done.path)
    if as_json:
        facts = {"out": place, "to": done.kind, "bytes": done.size, "max_abs_difference": done.difference}
        click.echo(json.dumps(facts | ({} if sent is None else {"files_sent": sent})))
        return
    click.echo(
        f"{place}: {done.size / 1e6:,.1f} MB, its logits differ from the original's by at most "
        f"{done.difference:.1e} (allowed: {export.TOLERANCE:.0e})"
    )
    if sent is not None:
        click.echo(f"{amount(sent, 'file')} sent, and all are there")
    if kind == "hf":
        click.echo(f'  timm.create_model("{f"hf-hub:{push}" if push else f"local-dir:{done.path}"}", pretrained=True)')
