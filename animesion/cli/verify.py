"""`animesion verify`: check that a built dataset is intact, consistent and free of leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from animesion.wording import amount

if TYPE_CHECKING:
    from animesion.verification.checks import Report

_SHOWN = 10


@click.command(epilog="Example: animesion verify datasets/daf-re")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print every fault as JSON.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Worker processes.  [default: one per core]")
@click.option("--no-decode", is_flag=True, help="Do not decode images: faster, but only equal bytes count as a leak.")
def verify(path: str, as_json: bool, workers: int | None, no_decode: bool) -> None:
    """Read every sample of the dataset at PATH and list every fault.

    Checks checksums, shards, keys, labels, decoding, leaks across splits and the accounting. A dataset at a URL
    (s3://...) is first copied into your cache. Exit status: 1 if there is a fault, 2 if PATH is not a dataset.
    """
    from animesion import open_dataset
    from animesion.cli.progress import for_terminal
    from animesion.dataset import remote
    from animesion.verification import checks

    with for_terminal() as progress:
        folder = remote.local(path, shards=True, progress=progress)
        dataset = open_dataset(folder)
        report = checks.verify(dataset, workers=workers or 0, decode=not no_decode, progress=progress)
    if str(folder) != path:
        click.echo(f"the local copy in {folder} can be deleted", err=True)
    if as_json:
        import json

        click.echo(json.dumps(_document(report, path), indent=1, ensure_ascii=False))
    else:
        _print(report, path)
    if not report.clean:
        raise SystemExit(1)


def _document(report: Report, path: str) -> dict[str, Any]:
    from animesion.verification.checks import CHECKS

    return {
        "path": path,
        "name": report.name,
        "ok": report.clean,
        "samples": report.samples,
        "shards": report.shards,
        "decoded": report.decoded,
        "faults": sum(map(len, report.faults.values())),
        "leaking": report.leaking,
        "reach": report.reach,
        "checks": [
            {
                "check": name,
                "asks": CHECKS[name],
                "ok": not faults,
                "faults": [{"fault": f.text, "keys": list(f.keys), "splits": list(f.splits)} for f in faults],
            }
            for name, faults in report.faults.items()
        ],
    }


def _print(report: Report, path: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from animesion.verification.checks import CHECKS

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("check")
    table.add_column("result", justify="right")
    table.add_column("condition", overflow="fold")
    for name, asks in CHECKS.items():
        faults = report.faults.get(name)
        state = "not run" if faults is None else amount(len(faults), "fault") if faults else "ok"
        table.add_row(name, state, asks)
    console.print(table)
    for name, faults in report.faults.items():
        if faults:
            console.print(f"{name}:", style="bold")
        for fault in faults[:_SHOWN]:
            console.print(f"  {_printable(fault.text)}")
        if len(faults) > _SHOWN:
            console.print(f"  and {len(faults) - _SHOWN:,} more (--json prints all)")
        if name == "leaks" and report.leaking:
            counts = " and ".join(f"{count:,} of {_printable(split)}" for split, count in report.leaking.items())
            console.print(f"  in all, {counts} are related to an image of an earlier split (train, val, test)")
    console.print(f"leaks: {report.reach}")
    total = sum(map(len, report.faults.values()))
    verdict = amount(total, "fault") if total else "no faults"
    searched = f"{amount(report.samples, 'sample')} of {amount(report.shards, 'shard')}"
    console.print(f"{_printable(path)}: {verdict} in {searched}", style="bold")


def _printable(text: str) -> str:
    """Replace control characters: names are untrusted input and may hold terminal escape sequences."""
    return "".join(c if c.isprintable() else "?" for c in text)
