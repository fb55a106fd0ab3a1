"""`animesion demo`: a page for a trained network."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion demo runs/faces --out space --examples images/red")
@click.argument("checkpoint", metavar="RUN|FILE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write.")
@click.option("--title", default="", help="Title of the page.  [default: the name of the run]")
@click.option("--licence", default="", help="Licence of the page, as the Hugging Face Hub spells it.")
@click.option(
    "--examples",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Images, or folders of images, that the page offers; may be repeated.",
)
def demo(checkpoint: Path, out: Path, title: str, licence: str, examples: tuple[Path, ...]) -> None:
    """Write a Gradio Space that predicts with a trained network: a page to which images are dragged.

    The folder can be pushed to a Space of the Hugging Face Hub, and runs on any machine: pip install gradio, the
    packages of its requirements.txt, and python app.py.
    """
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, *examples)
    with torch_required():
        from animesion_training import demo

        written = demo.write_space(checkpoint, out, title=title, licence=licence, examples=examples)
    size = sum(path.stat().st_size for path in written)
    click.echo(f"{out}: {len(written):,} files, {size / 1e6:,.1f} MB")
    click.echo(f"Next:\n  pip install gradio -r {out}/requirements.txt && python {out}/app.py")
