"""The command `install` of `animesion detectors` and `animesion embedders`."""

from __future__ import annotations

import click


def install_command(kind: str, example: str) -> click.Command:
    """The command that installs the model file of a detector or an embedder.

    Args:
        kind: `detector` or `embedder`.
        example: arguments to show.
    """

    @click.command(
        "install",
        help=f"Check the file that {kind} NAME needs and install it.",
        epilog=f"Example: animesion {kind}s install {example}",
    )
    @click.argument("name")
    @click.option("--from", "source", required=True, metavar="FILE|URL", help="The file to install.")
    @click.option("--sha256", default="", metavar="HEX", help="Expected SHA-256, if it is not the known version.")
    @click.option("--contact", default="", help="Your e-mail or URL for the User-Agent; required for a URL.")
    @click.option("--allow-private", is_flag=True, help="Allow URLs on this machine or its network, also over http.")
    def install(name: str, source: str, sha256: str, contact: str, allow_private: bool) -> None:
        from animesion import model_files

        path = model_files.install(name, source, sha256, kind=kind, contact=contact, allow_private=allow_private)
        click.echo(f"{name} is ready: {path}")

    return install
