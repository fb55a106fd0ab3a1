"""`animesion diff`: compare two builds, or a build with published label files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from animesion.verification.diff import Change, Difference
    from animesion.verification.label_diff import LabelDifference

_SHOWN = 5

#: Field of `Difference` -> heading of its entries.
_HEADINGS = {
    "recipe": "recipe values that differ",
    "classes": "classes that differ (id before -> id after)",
    "added": "samples added",
    "removed": "samples removed",
    "relabelled": "samples relabelled",
    "moved": "samples moved to another split",
    "repainted": "images with different bytes",
    "reasons": "images with a different verdict or drop reason",
    "shards": "shards with a different order or different metadata",
}

#: Field of `LabelDifference` -> heading of its entries.
_LABEL_HEADINGS = {
    "classes": "classes that differ (published id -> id in the dataset)",
    "counts": "class counts that differ (published -> dataset)",
    "missing": "published images missing in the dataset",
    "extra": "images of the dataset not published",
    "relabelled": "images with another class",
    "moved": "images in another split",
}


@click.command(
    epilog="Examples: animesion diff datasets/faces-old datasets/faces; animesion diff labels/ datasets/daf-re"
)
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option("--json", "as_json", is_flag=True, help="Print every difference as JSON.")
def diff(before: str, after: str, as_json: bool) -> None:
    """List the differences between two built datasets, from A to B.

    Each is a folder or a URL (s3://...). A may also be published label files: a folder with train.csv, val.csv or
    test.csv, or one CSV, with the class names in classid_classname.csv. Exit status: 0 if they are identical, 1 if they
    differ, 2 if one of them is not a dataset.
    """
    from animesion import open_dataset
    from animesion.cli.progress import one_task
    from animesion.dataset import remote
    from animesion.verification import label_diff
    from animesion.verification.diff import compare

    found: Difference | LabelDifference
    headings = _HEADINGS
    labels = Path(before).expanduser()
    if label_diff.is_label_files(labels):
        found = label_diff.compare(label_diff.read(labels), open_dataset(remote.local(after)))
        headings = _LABEL_HEADINGS
    else:
        with one_task("diff"):
            found = compare(open_dataset(remote.local(before)), open_dataset(remote.local(after)))
    if as_json:
        import json

        document = {"a": before, "b": after, **found.to_dict()}
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        _print(found, headings)
    if not found.identical:
        raise SystemExit(1)


def _print(found: Difference | LabelDifference, headings: Mapping[str, str]) -> None:
    if found.identical:
        click.echo(f"identical: {int(found.totals[-1].after):,} samples")
        return
    for name, heading in headings.items():
        entries: list[Change] | list[str] = getattr(found, name)
        if not entries:
            continue
        click.echo(f"{heading}: {len(entries):,}")
        for entry in entries[:_SHOWN]:
            click.echo(f"  {_printable(entry if isinstance(entry, str) else _arrow(entry))}")
        if len(entries) > _SHOWN:
            click.echo(f"  and {len(entries) - _SHOWN:,} more (--json prints all)")
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
    """Replace control characters: names are untrusted input and may hold terminal escape sequences."""
    return "".join(c if c.isprintable() else "?" for c in text)
