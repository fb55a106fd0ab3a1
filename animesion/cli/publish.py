"""`animesion publish`: send a built dataset to the Hub, a bucket or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from animesion.publishing import Publication

# the names of `animesion.verification.checks.CHECKS`, which is heavy to import for a help text
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
@click.option("--dry-run", is_flag=True, help="Verify and show what would be sent; send nothing.")
@click.option("--private", is_flag=True, help="A Hub repository that only its owners see.")
@click.option("--urls-only", is_flag=True, help="Send URLs, labels, boxes and digests instead of pixels.")
@click.option("--tag", default="", metavar="NAME", help="Tag the Hub revision.")
@click.option(
    "--force", multiple=True, type=click.Choice(_CHECKS), help="Send in spite of the faults of this check; repeatable."
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Worker processes of the check.  [default: one a core]")
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
    """Verify the dataset at PATH, send what is not there yet, and prove that all of it arrived.

    Refuses what `animesion verify` faults. A run that was stopped goes on with the same command. Exit status 1 when it
    refuses or something does not arrive.
    """
    import tempfile

    from animesion import open_dataset, publishing
    from animesion.cli.progress import for_terminal
    from animesion.verification import checks

    dataset = open_dataset(path)
    place = publishing.destination(to, private=private)
    with for_terminal() as progress, tempfile.TemporaryDirectory() as staged:
        report = checks.verify(dataset, workers=workers or 0, progress=progress)
        forced = publishing.judge(report, force)
        if urls_only:
            from animesion.publishing import urls

            if missing := urls.write(dataset, Path(staged)):
                click.echo(f"{missing:,} samples have no URL and are left out", err=True)
        files = publishing.files_of(Path(staged) if urls_only else path)
        done = publishing.publish(dataset, files, place, forced=forced, tag=tag, dry_run=dry_run, progress=progress)
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
        click.echo(f"passed over: {count:,} fault{'s' * (count != 1)} of {check}")
    there = f", {len(done.present):,} are there already" if done.present else ""
    size = f"{len(sent):,} file{'s' * (len(sent) != 1)}, {sum(file.bytes for file in sent):,} bytes{there}"
    if dry_run:
        click.echo(f"{done.url}: would send {size}")
        return
    tagged = f", tagged {done.tag}" if done.tag else ""
    click.echo(f"{done.url}: sent {size}; all {len(done.files):,} verified{tagged}")
