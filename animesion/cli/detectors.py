"""`animesion detectors`: what can find a face."""

from __future__ import annotations

import click


@click.command(epilog="Example: animesion detectors")
def detectors() -> None:
    """List the installed detectors for `crop.detector`."""
    from animesion import detectors as installed

    width = max(map(len, installed.names()))
    for name in installed.names():
        click.echo(f"{name:<{width}}  {installed.load(name).summary}")
