"""`animesion detectors`: what can find a face, and the files that some need."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True, epilog="Example: animesion detectors")
@click.pass_context
def detectors(ctx: click.Context) -> None:
    """List the installed detectors for `crop.detector` and `predict --detector`."""
    if ctx.invoked_subcommand:
        return
    from animesion import detectors as known
    from animesion.detectors import model_files

    width = max(map(len, known.names()))
    for name in known.names():
        lacking = model_files.lacking(name)
        click.echo(f"{name:<{width}}  {'missing' if lacking else 'ready':<7}  {known.summary(name)}")
        if lacking:
            click.echo(f"{'':<{width}}  {lacking}")


@detectors.command(epilog="Example: animesion detectors install lbp --from lbpcascade_animeface.xml")
@click.argument("name")
@click.option("--from", "source", required=True, metavar="FILE|URL", help="The file that the detector needs.")
@click.option("--sha256", default="", metavar="HEX", help="Digest of the file, if it is not the known version.")
@click.option("--contact", default="", help="E-mail or URL of yours for the User-Agent; needed for a URL.")
@click.option("--allow-private", is_flag=True, help="The URL may lead to this machine or its network, by http too.")
def model_files(name: str, source: str, sha256: str, contact: str, allow_private: bool) -> None:
    """Check the file that detector NAME needs, and put it where the detector looks for it."""
    from animesion.detectors import model_files

    path = model_files.install(name, source, sha256, contact=contact, allow_private=allow_private)
    click.echo(f"{name} is ready: {path}")
