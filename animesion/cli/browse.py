"""`animesion browse`: serve the report of a build locally, with every image and editable decisions."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion browse datasets/daf-re")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on.  [default: a free one]")
@click.option(
    "--decisions",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of decisions.  [default: PATH/decisions.toml]",
)
@click.option(
    "--audit",
    type=click.Path(path_type=Path),
    help="The audit.json of `animesion audit`.  [default: PATH/audit/audit.json]",
)
def browse(path: Path, port: int, decisions: Path | None, audit: Path | None) -> None:
    """Explore the dataset at PATH in a local browser.

    Decisions about labels and duplicates are saved to a file; a build with `--set curate.decisions=FILE --replace`
    applies them. Press Ctrl-C to stop.
    """
    import secrets
    import socket

    from aiohttp import web

    from animesion import open_dataset
    from animesion.errors import UsageError
    from animesion.report import facts, live

    browser = live.Browser(open_dataset(path), decisions or path / "decisions.toml", audit or facts.audit_of(path))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # before the address is printed, so that the first request cannot be too early
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on port {port} ({error.strerror}): choose another with --port") from None
    token = secrets.token_urlsafe(24)
    click.echo(f"{browser.dataset.name}: {browser.dataset.kept:,} images; decisions are saved to {browser.file}")
    click.echo(f"open http://127.0.0.1:{listener.getsockname()[1]}/#token={token}")
    web.run_app(live.application(browser, token), sock=listener, print=None, access_log=None)
