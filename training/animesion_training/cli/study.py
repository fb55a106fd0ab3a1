"""`animesion study`: run a grid of training runs and tabulate it."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion study studies/size.toml --data datasets/daf-re-sample --out studies/size")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="A built dataset or class folders with a test split.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--table", is_flag=True, help="Tabulate the runs that are done, and train none.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def study(file: Path, data: str, out: Path, device: str, table: bool, as_json: bool) -> None:
    """Run the unfinished training runs of the grid in FILE (TOML), and tabulate it.

    The same command resumes a study that was stopped, or takes a share of one that is running.
    """
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(file, data)
    with torch_required():
        from animesion_training.analysis import cost_plot, study
        from animesion_training.cli.progress import screen

    chosen = study.load(file)
    with screen() as watcher:
        rows = study.run(chosen, data, out, device=device, notify=watcher.message, watcher=watcher, train=not table)
    if as_json:
        import json

        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    keys = [key for key in ("variant", *chosen.grid, *chosen.choose) if key != "run.seed" and key in rows[0]]
    grid = Table(title=f"{chosen.name}: test split", title_justify="left", box=None, pad_edge=False)
    unit, scale = cost_plot.unit_of_cost(rows)
    for name in [*keys, "runs", "top-1 %", "top-5 %", "macro %", "M parameters", f"{unit} multiply-adds"]:
        grid.add_column(escape(name), justify="left" if name in keys else "right")
    for row in rows:
        values = [escape(str(row[key])) for key in keys]
        numbers = [
            f"{100 * row[metric]:.2f}" + (f" ± {100 * row[f'{metric}_deviation']:.2f}" if row["runs"] > 1 else "")
            for metric in ("top_1", "top_5", "macro_accuracy")
        ]
        costs = [f"{row['parameters'] / 1e6:.2f}", f"{row['multiply_adds'] / scale:,.{3 if unit == 'G' else 1}f}"]
        grid.add_row(*values, str(row["runs"]), *numbers, *costs)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(grid)
    console.print(f"{out}/table.csv, {out}/accuracy-cost.png", soft_wrap=True, markup=False)
