"""`animesion publish`: upload a built dataset to the Hub, a bucket or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from animesion.wording import amount

if TYPE_CHECKING:
    from animesion.publishing import Publication

# keys of `animesion.verification.checks.CHECKS`, repeated here because that module is slow to import for a help text
_CHECKS = ("checksums", "archives", "keys", "labels", "decode", "leaks", "accounting")

_EXAMPLES = """\b
Examples:
  animesion publish datasets/daf-re --to hf://user/daf-re --private --dry-run
  animesion publish datasets/daf-re --to s3://bucket/daf-re
  animesion publish datasets/daf-re --to hf://user/daf-re-urls --urls-only --tag v1
"""


@click.command(epilog=_EXAMPLES)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="URL", help="hf://user/name, s3://bucket/prefix or file:///folder.")
@click.option("--dry-run", is_flag=True, help="Verify and list what would be sent; send nothing.")
@click.option("--private", is_flag=True, help="Create a private Hub repository.")
@click.option("--urls-only", is_flag=True, help="Send URLs, labels, boxes and digests instead of pixels.")
@click.option("--tag", default="", metavar="NAME", help="Tag the Hub revision.")
@click.option(
    "--force", multiple=True, type=click.Choice(_CHECKS), help="Publish despite faults of this check; repeatable."
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Worker processes of the check.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print what was sent as JSON.")
def publish(
    path: Path,
    to: str,
    dry_run: bool,
    private: bool,
    urls_only: bool,
    tag: str,
    force: tuple[str, ...],
    workers: int | None,
    as_json: bool,
) -> None:
    """Verify the dataset at PATH and upload it.

    Sends the files that the destination lacks and checks that all files arrived. A dataset with faults (see
    `animesion verify`) is refused. Run the same command again to resume. Exit status: 1 if the dataset is refused or a
    file does not arrive intact.
    """
    import animesion
    from animesion.cli.progress import for_terminal

    with for_terminal() as progress:
        done = animesion.publish(
            path,
            to,
            private=private,
            urls_only=urls_only,
            tag=tag,
            force=force,
            dry_run=dry_run,
            workers=workers or 0,
            progress=progress,
        )
    if done.omitted:
        click.echo(f"{done.omitted:,} samples have no URL and are left out", err=True)
    if as_json:
        _print_json(done, dry_run)
    else:
        _print(done, dry_run)


def _print_json(done: Publication, dry_run: bool) -> None:
    import json

    files = [
        {"name": file.name, "bytes": file.bytes, "sha256": file.sha256, "present": file.name in done.present}
        for file in done.files
    ]
    document = {"to": done.url, "dry_run": dry_run, "tag": done.tag, "forced": done.forced, "stale": done.stale}
    click.echo(json.dumps({**document, "files": files}, indent=1, ensure_ascii=False))


def _print(done: Publication, dry_run: bool) -> None:
    sent = done.sent
    for file in sent if dry_run else []:
        click.echo(f"{file.bytes:>15,}  {file.sha256[:12]}  {file.name}")
    for name in done.stale:
        click.echo(f"{'would remove' if dry_run else 'removed'} the old shard {name}")
    for check, count in done.forced.items():
        click.echo(f"ignored with --force: {amount(count, 'fault')} of {check}")
    present = f", {len(done.present):,} already present" if done.present else ""
    size = f"{amount(len(sent), 'file')}, {sum(file.bytes for file in sent):,} bytes{present}"
    if dry_run:
        click.echo(f"{done.url}: would send {size}")
        return
    tagged = f", tagged {done.tag}" if done.tag else ""
    click.echo(f"{done.url}: sent {size}; all {len(done.files):,} verified{tagged}")
