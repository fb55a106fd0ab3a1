"""`animesion build`: run a recipe."""

from __future__ import annotations

import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion.cli import completion
from animesion.wording import amount

if TYPE_CHECKING:
    from animesion.config.recipe import Recipe
    from animesion.pipeline.runner import BuildResult

#: Number of notes that are printed; dataset.json has all of them.
_NOTES = 8

_STAGES = ("fetch", "inspect", "curate", "pack", "finalize")


#: Recipes for data of any kind: their datasets are named after the output.
_FOR_ANY_DATA = frozenset({"booru", "folder", "urls"})


@click.command(
    epilog="Example: animesion build folder --set source.path=faces/ --set pack.size=128 --out datasets/faces"
)
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("--out", metavar="DIR|URL", help="Output folder, s3://... or gs://...  [default: datasets/NAME]")
@click.option(
    "--work",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Local build folder when --out is a URL.  [default: a folder in your cache]",
)
@click.option("--sample", is_flag=True, help="Use a small local booru of drawn images as the source.")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    shell_complete=completion.keys,
    help="Override a recipe value; repeatable.",
)
@click.option(
    "--against",
    metavar="DIR",
    multiple=True,
    help="Drop images that this published dataset has; repeatable.  [default: the recipe's]",
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Worker processes.  [default: one per core]")
@click.option("--engine", default="local", metavar="NAME", help="local, ray or ray:ADDRESS.  [default: local]")
@click.option("--until", type=click.Choice(_STAGES), default="finalize", help="Stop after this stage.")
@click.option("--dry-run", is_flag=True, help="List the source and print the plan; write nothing.")
@click.option("--replace", is_flag=True, help="Rebuild in a folder that another recipe wrote.")
@click.option("--retry-failed", is_flag=True, help="Also retry downloads that a crawled site refused permanently.")
@click.option("--update", is_flag=True, help="Add images that are new at the source, as a new version of the dataset.")
@click.option("--compact", is_flag=True, help="With --update: assign all samples to shards anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(
    recipe: str,
    out: str | None,
    work: Path | None,
    sample: bool,
    overrides: tuple[str, ...],
    against: tuple[str, ...],
    workers: int | None,
    engine: str,
    until: str,
    dry_run: bool,
    replace: bool,
    retry_failed: bool,
    update: bool,
    compact: bool,
    as_json: bool,
) -> None:
    """Build the dataset that RECIPE describes, or resume its build.

    RECIPE is a built-in name (see `animesion recipes`) or a TOML file. Run the same command again to resume a build
    that was stopped or killed, or that ran out of disk space.
    """
    from animesion.config.recipe import load

    if against:
        import json

        overrides = (*overrides, f"duplicates.against={json.dumps(against, ensure_ascii=False)}")
    if out and recipe in _FOR_ANY_DATA and not sample:  # such a dataset is called after its place, if nothing names it
        overrides = (f'name="{name_of(out)}"', *overrides)
    chosen = load(recipe, overrides, sample=sample)
    from animesion.pipeline import runner
    from animesion.storage import stores

    folder, to = runner.places(out or Path("datasets") / chosen.name, work)
    if dry_run:
        _dry_run(chosen, folder, to, replace=replace, as_json=as_json)
        return
    from animesion.cli.progress import for_terminal

    if to:
        click.echo(f"building in {folder}, uploading to {stores.shown(to, 1000)}", err=True)
    start = time.perf_counter()
    with for_terminal() as progress:
        result = runner.run(
            chosen,
            folder,
            workers=workers or 0,
            engine=engine,
            until=until,
            replace=replace,
            retry_failed=retry_failed,
            update=update,
            compact=compact,
            progress=progress,
            to=to,
        )
    if as_json:
        import json

        fields = {
            name: getattr(result, name)
            for name in ("until", "seen", "kept", "dropped", "splits", "notes", "crawl", "unanswered", "changed")
        }
        if to:
            fields |= {"url": result.url, "sent": result.sent}
        click.echo(json.dumps({"out": str(result.out), "classes": len(result.classes), **fields}, ensure_ascii=False))
    else:
        _print_funnel(chosen, result, time.perf_counter() - start)


def name_of(out: str) -> str:
    """A dataset's name from the last part of its folder or URL: letters, digits, `.`, `_` and `-`."""
    last = out.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:64] or "dataset"


def _print_funnel(recipe: Recipe, result: BuildResult, seconds: float) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from animesion.schemas import MEANINGS

    # a file or a pipe has no width: use a fixed one instead of rich's 80 columns
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{recipe.name}: where every image went", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("images", justify="right")
    table.add_column("")
    table.add_row("[bold]seen[/]", f"{result.seen:,}", "listed by the source")
    for reason, count in result.dropped.items():
        table.add_row(f"  {reason}", f"-{count:,}", f"[dim]{MEANINGS[reason]}[/]")
    if result.kept or result.dropped:
        table.add_row(
            "[bold green]kept[/]", f"{result.kept:,}", f"in {amount(len(result.classes), 'class', 'classes')}"
        )
        for split, count in result.splits.items():
            table.add_row(f"  {split}", f"{count:,}", f"[dim]{100 * count / max(1, result.kept):.1f}%[/]")
    console.print(table)
    whole = result.until == "finalize"
    shown = result.notes[:_NOTES] if whole else result.notes
    for note in shown:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if result.unanswered:
        keys = f"card.{', '.join(result.unanswered)}"
        console.print(f'note: the recipe leaves open {keys}; "none known" is an answer too', soft_wrap=True)
    for sentence in result.crawl:
        console.print(f"crawl: {escape(sentence)}", soft_wrap=True)
    where = escape(str(result.out))
    if len(shown) < len(result.notes):
        console.print(f"note: and {len(result.notes) - len(shown)} more in {where}/dataset.json", soft_wrap=True)
    if result.url:
        uploaded = f"{amount(len(result.sent), 'file')} uploaded and verified"
        console.print(f"{escape(result.url)}: {uploaded}; {where} is the local copy that builds resume from",
                      soft_wrap=True)  # fmt: skip
    if whole:
        name = f"[bold]{escape(result.url) or where}[/]"
        done = f"Done in {seconds:.1f} s. Dataset: {name}"
        lines = [
            f"\n{done if result.changed else f'Nothing to do: {name} is up to date ({seconds:.1f} s).'}",
            f"  {where}/README.md         dataset card, with loading code for each reader",
            f"  {where}/report.html       report, to open in a browser",
            f"  {where}/curated.parquet   every image, kept or dropped, and why",
            "Next:",
            f"  animesion stats {where}",
            f"  animesion verify {where}",
        ]
        console.print("\n".join(lines), soft_wrap=True)
    else:
        console.print(f"\nStopped after {result.until} as requested, {seconds:.1f} s. Run without --until to continue.")


def _dry_run(recipe: Recipe, out: Path, to: str, *, replace: bool, as_json: bool) -> None:
    from animesion.pipeline import preview

    facts: dict[str, Any] = preview.preview(recipe, out, replace=replace, to=to)
    if as_json:
        import json

        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    size = f", {facts['bytes_to_fetch'] / 1e6:,.1f} MB announced" if facts["bytes_to_fetch"] else ""
    if size and facts["bytes_unknown"]:
        size += f", {facts['bytes_unknown']:,} of unknown size"
    click.echo(f"{facts['recipe']}: {amount(facts['listed'], 'image')} listed, {facts['to_fetch']:,} to fetch{size}")
    for reason, count in sorted(facts["not_fetched"].items(), key=lambda pair: -pair[1]):
        click.echo(f"  {count:>9,}  not fetched: {reason}")
    if facts["requests"]:
        duration = timedelta(seconds=round(facts["seconds"]))
        click.echo(f"crawl: {facts['requests']:,} file requests, {duration} at the site's rate limit")
    for note in facts["notes"]:
        click.echo(f"note: {note}")
    state = "would be created"
    if facts["out_exists"]:
        done = facts["parts_done"]
        state = f"exists, with {amount(done['fetch'], 'part')} fetched and {done['inspect']:,} inspected"
        state = state if done["fetch"] else "exists, with no part fetched yet"
    click.echo(f"{amount(facts['parts'], 'part')}; stages: {', '.join(_STAGES)}")
    click.echo(f"output: {facts['out']} ({state}). Nothing was written.")
