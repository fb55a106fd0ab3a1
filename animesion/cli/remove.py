"""`animesion remove`: remove images from a built dataset on request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from animesion.wording import amount

if TYPE_CHECKING:
    from animesion.pipeline.removal_plan import Plan

_SHOWN = 20

_EXAMPLES = """\b
Examples:
  animesion remove datasets/faces danbooru-4381 --dry-run
  animesion remove datasets/faces https://danbooru.donmai.us/posts/4381 --note "request 12"
  animesion remove datasets/faces --author some_artist
"""


@click.command(epilog=_EXAMPLES)
@click.argument("path", metavar="DATASET")
@click.argument("what", metavar="[ID|URL|DIGEST]...", nargs=-1)
@click.option("--author", "authors", metavar="NAME", multiple=True, help="Everything by this author; repeatable.")
@click.option("--note", default="", metavar="TEXT", help="A line for the log, such as the number of the request.")
@click.option("--dry-run", is_flag=True, help="List what would be removed; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was removed as JSON.")
def remove(path: str, what: tuple[str, ...], authors: tuple[str, ...], note: str, dry_run: bool, as_json: bool) -> None:
    """Remove images and their copies from DATASET, the output folder of a build.

    An image is named by its key or its number at the source, by the URL of its page or file, or by a digest (MD5,
    SHA-256, or BLAKE3 of its pixels). Only the shards that have it are written again; splits and class ids stay.
    `removed.csv` keeps the digests, and later builds refuse these images. After an interruption, run the same command
    again.
    """
    from animesion.cli.progress import one_task
    from animesion.errors import UsageError
    from animesion.pipeline import removal
    from animesion.storage import stores

    if stores.is_url(path):
        raise UsageError(
            f"{stores.shown(path)} is a URL: remove the images from its local folder, and run `animesion publish` again"
        )
    folder = Path(path)
    with one_task("remove"):
        done = removal.finished(folder, what, authors)
        if done is not None and not done.repeated:
            click.echo("an interrupted removal was finished first", err=True)
            done = None
        plan = done.plan if done else removal.remove(folder, what, authors, note=note, dry_run=dry_run)
    if as_json:
        import json

        click.echo(json.dumps({"dataset": path, "dry_run": dry_run, **plan.to_dict()}, indent=1, ensure_ascii=False))
    else:
        _print(plan, path, dry_run=dry_run)


def _print(plan: Plan, path: str, *, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    for image in plan.images[:_SHOWN] if dry_run else ():
        where = f"{image.split}, class {image.label}" if image.split else f"not in the shards: {image.reason}"
        why = "asked for" if image.asked else "a copy"
        click.echo(f"  {image.key}: {why}; {where}")
    if dry_run and len(plan.images) > _SHOWN:
        click.echo(f"  and {len(plan.images) - _SHOWN:,} more (--json prints all)")
    copies = sum(not image.asked for image in plan.images)
    samples = sum(plan.samples.values())
    listed = ", ".join(f"{count:,} of {split}" for split, count in plan.samples.items())
    click.echo(
        f"{path}: {amount(len(plan.images), 'image')} {would}removed"
        f"{f', {copies:,} of them as copies' if copies else ''}; {amount(samples, 'sample')}"
        f"{f' ({listed})' if listed else ''}"
    )
    click.echo(
        f"shards: {len(plan.rewritten):,} {would}written again, {len(plan.emptied):,} {would}deleted, "
        f"{plan.untouched:,} untouched"
    )
    for note in plan.notes:
        click.echo(f"note: {note}")
    if not dry_run:
        click.echo(f"`animesion publish {path} --to URL` sends the difference.")
