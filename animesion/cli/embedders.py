"""`animesion embedders`: list the embedders with a file of their own, and install it."""

from __future__ import annotations

import click

from animesion.cli.installing import install_command


@click.group(invoke_without_command=True, epilog="Example: animesion embedders")
@click.pass_context
def embedders(ctx: click.Context) -> None:
    """List the embedders that need a file, and whether they are ready to use.

    Their names are values of the recipe key `duplicates.embedding.model`, as are the names of all timm models.
    """
    if ctx.invoked_subcommand:
        return
    from animesion import model_files
    from animesion.pipeline import sscd

    hint = model_files.setup_hint("sscd")
    click.echo(f"sscd  {'missing' if hint else 'ready':<7}  {sscd.SUMMARY}")
    if hint:
        click.echo(f"      {hint}")


embedders.add_command(install_command("embedder", "sscd --from sscd_disc_mixup.torchscript.pt"))
