"""`animesion detectors`: list the detectors, install the model files that some of them need, and evaluate one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from animesion.cli.installing import install_command


@click.group(invoke_without_command=True, epilog="Example: animesion detectors")
@click.pass_context
def detectors(ctx: click.Context) -> None:
    """List the detectors, and whether they are ready to use.

    Their names are values of the recipe key `crop.detector` and of `predict --detector`.
    """
    if ctx.invoked_subcommand:
        return
    from animesion import detectors as installed
    from animesion import model_files

    width = max(map(len, installed.names()))
    for name in installed.names():
        hint = model_files.setup_hint(name)
        click.echo(f"{name:<{width}}  {'missing' if hint else 'ready':<7}  {installed.summary(name)}")
        if hint:
            click.echo(f"{'':<{width}}  {hint}")


detectors.add_command(install_command("detector", "lbp --from lbpcascade_animeface.xml"))
