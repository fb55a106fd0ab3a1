"""`animesion detectors`: list the detectors and install the model files that some of them need."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True, epilog="Example: animesion detectors")
@click.pass_context
def detectors(ctx: click.Context) -> None:
    """List the detectors, and whether they are ready to use.

    Their names are values of the recipe key `crop.detector` and of `predict --detector`.
    """
    if ctx.invoked_subcommand:
        return
    from animesion import detectors as installed
    from animesion.detectors import model_files

    width = max(map(len, installed.names()))
    for name in installed.names():
        hint = model_files.setup_hint(name)
        click.echo(f"{name:<{width}}  {'missing' if hint else 'ready':<7}  {installed.summary(name)}")
        if hint:
            click.echo(f"{'':<{width}}  {hint}")


@detectors.command(epilog="Example: animesion detectors install lbp --from lbpcascade_animeface.xml")
@click.argument("name")
@click.option("--from", "source", required=True, metavar="FILE|URL", help="The file to install.")
@click.option("--sha256", default="", metavar="HEX", help="Expected SHA-256, if it is not the known version.")
@click.option("--contact", default="", help="Your e-mail or URL for the User-Agent; required for a URL.")
@click.option("--allow-private", is_flag=True, help="Allow URLs on this machine or its network, also over http.")
def install(name: str, source: str, sha256: str, contact: str, allow_private: bool) -> None:
    """Check the file that detector NAME needs and install it."""
    from animesion.detectors import model_files

    path = model_files.install(name, source, sha256, contact=contact, allow_private=allow_private)
    click.echo(f"{name} is ready: {path}")
