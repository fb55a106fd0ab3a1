"""`animesion diff`: what changed between two builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from animesion.verification.diff import Change, Difference

_SHOWN = 5

#: List of a difference -> what to call its entries.
_HEADINGS = {
    "recipe": "recipe values differ",
    "classes": "classes differ (id before -> id after)",
    "added": "samples added",
    "removed": "samples removed",
    "relabelled": "samples relabelled",
    "moved": "samples moved to another split",
    "repainted": "images with other bytes",
    "reasons": "images kept or dropped otherwise",
    "shards": "shards with another order or other metadata",
}


@click.command(epilog="Example: animesion diff datasets/faces-old datasets/faces")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option("--json", "as_json", is_flag=True, help="Print every difference as JSON.")
def diff(before: str, after: str, as_json: bool) -> None:
    """Tell what differs in the built dataset B from the built dataset A; each a folder or a URL (s3://...).

    Exit status 0 when they are identical, 1 when they differ, 2 when one is no dataset.
    """
    from animesion import open_dataset
    from animesion.dataset import remote
    from animesion.verification.diff import compare

    found = compare(open_dataset(remote.local(before)), open_dataset(remote.local(after)))
    if as_json:
        import json

        document = {"a": before, "b": after, **found.to_dict()}
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        _print(found)
    if not found.identical:
        raise SystemExit(1)


def _print(found: Difference) -> None:
    if found.identical:
        click.echo(f"identical: {int(found.totals[-1].after):,} samples")
        return
    for name, heading in _HEADINGS.items():
        entries: list[Change] | list[str] = getattr(found, name)
        if not entries:
            continue
        click.echo(f"{len(entries):,} {heading}")
        for entry in entries[:_SHOWN]:
            click.echo(f"  {_printable(entry if isinstance(entry, str) else _arrow(entry))}")
        if len(entries) > _SHOWN:
            click.echo(f"  and {len(entries) - _SHOWN:,} more (all with --json)")
    totals = (
        f"{total.what} {total.before or 'none'} -> {total.after or 'none'}"
        if total.before != total.after
        else f"{total.what} {total.after}"
        for total in found.totals
    )
    click.echo(f"samples: {', '.join(totals)}")


def _arrow(change: Change) -> str:
    return f"{change.what}: {change.before or '(none)'} -> {change.after or '(none)'}"


def _printable(text: str) -> str:
    """Names come from other people's files: no escape sequence of theirs reaches the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
