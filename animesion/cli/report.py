"""`animesion report`: write the report of a build or a training run as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion report datasets/daf-re --out daf-re.html")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: NAME-report.html]"
)
@click.option(
    "--audit",
    type=click.Path(path_type=Path),
    help="The audit.json of `animesion audit`.  [default: PATH/audit/audit.json]",
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="For a training run: the built dataset, to show the mistakes."
)
def report(path: Path, out: Path | None, audit: Path | None, data: Path | None) -> None:
    """Write the report of PATH as one self-contained HTML file.

    PATH is a built dataset or the folder of a training run.
    """
    from animesion import open_dataset
    from animesion.errors import UsageError
    from animesion.report import facts, page, runs
    from animesion.storage.workspace import write_atomic

    if runs.is_run(path):
        if audit is not None:
            raise UsageError(f"--audit is for built datasets, but {path} is a training run")
        shown = runs.of_run(path, None if data is None else open_dataset(data))
    elif data is not None:
        raise UsageError(f"--data is for training runs, but {path} is not one")
    else:
        shown = facts.of_dataset(open_dataset(path), audit or facts.audit_of(path))
    out = out or Path(f"{shown['name']}-report.html")
    write_atomic(out, page.render(shown).encode())
    click.echo(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")
