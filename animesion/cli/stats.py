"""`animesion stats`: images per class and long-tail statistics of datasets, label files, shards and class folders.

This file parses options and prints; `animesion.stats.class_counts` counts. `animesion verify` checks that files are
intact and samples decode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt

    from animesion.dataset.label_files import ClassCounts
    from animesion.stats.long_tail import LongTail

    IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "val", "test")
PERCENTS = (70, 10, 20)

_EXAMPLES = """\b
Examples:
  animesion stats runs/daf-re
  animesion stats labels/ --split legacy-dafre --json
  animesion stats 'data/train-*.tar' --plots plots/
"""


@click.command(epilog=_EXAMPLES)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--plots",
    "plot_folder",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write lorenz.png and rank-frequency.png to DIR.",
)
@click.option(
    "--split",
    "strategy",
    type=click.Choice(["legacy-dafre", "grouped"]),
    help="Also print the split sizes that this strategy aims for.",
)
def stats(path: str, as_json: bool, plot_folder: Path | None, strategy: str | None) -> None:
    """Count images and classes, and measure the long tail.

    PATH is a built dataset, a folder of label files (train.csv, val.csv, test.csv, classid_classname.csv,
    per_class_counts.csv), one label or counts CSV, a WebDataset shard, a folder or quoted glob of shards, or a folder
    of class folders. The many (> 100), medium and few (< 20) bands are those of the training split.
    """
    from animesion.stats import class_counts

    found = class_counts.count(path, _track)
    if not found.counts.total.sum():
        raise UsageError(f"{path} has no labelled images; give a dataset, label files, shards or class folders")
    total = _describe(found.counts, found.counts.total)
    splits = {name: _describe(found.counts, images) for name, images in found.counts.splits.items()}
    basis = "train" if "train" in splits else "total"
    report: dict[str, Any] = {
        "path": path,
        "kind": found.kind,
        "images": total.images,
        "classes": total.classes,
        "gini": round(total.gini, 6),
        "imbalance_factor": round(total.imbalance_factor, 6),
        **{name: splits[name].images for name in SPLITS if name in splits},
        "splits": {name: each.to_dict() for name, each in splits.items()},
        "total": total.to_dict(),
        "bands": {"of": basis, **(splits.get(basis) or total).to_dict()["bands"]},
        "files": found.files,
        "consistency": found.consistency,
    }
    if found.kind in ("labels", "counts") and set(found.counts.splits) == set(SPLITS):
        report["legacy_dafre"] = _legacy_dafre(found.counts)
    if strategy:
        planned = _planned(found.counts.total, strategy)
        sizes = {name: _describe(found.counts, images) for name, images in planned.items()}
        report["split"] = {
            "strategy": strategy,
            **{name: each.images for name, each in sizes.items()},
            "splits": {name: each.to_dict() for name, each in sizes.items()},
        }
    if found.reading:
        report["reading"] = found.reading
    if found.tags:
        report["tags"] = found.tags
    if plot_folder:
        report["plots"] = _plot(plot_folder, path, basis, found.counts)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _track(paths: list[Path]) -> Iterable[Path]:
    from animesion.cli.progress import counted

    return counted(paths, "shards", len(paths))


def _describe(counts: ClassCounts, images: IntArray) -> LongTail:
    from animesion.stats.long_tail import describe

    return describe(images, counts.ids.tolist(), counts.names)


def _planned(total: IntArray, strategy: str) -> dict[str, IntArray]:
    import numpy as np

    from animesion.splits import grouped_sizes, legacy_dafre_sizes

    legacy = strategy == "legacy-dafre"
    sizes = [legacy_dafre_sizes(n) if legacy else grouped_sizes(n, PERCENTS) for n in total.tolist()]
    return dict(zip(SPLITS, np.array(sizes, dtype=np.int64).T, strict=True))


def _legacy_dafre(counts: ClassCounts) -> dict[str, int]:
    planned = _planned(counts.total, "legacy-dafre")
    differ = sum((planned[name] != counts.splits[name]) for name in SPLITS) > 0
    return {**{name: int(sizes.sum()) for name, sizes in planned.items()}, "mismatched_classes": int(differ.sum())}


def _plot(folder: Path, path: str, basis: str, counts: ClassCounts) -> list[str]:
    from animesion.stats.plots import write_plots

    images = counts.splits.get(basis, counts.total)
    title = f"{Path(path).resolve().name}, {'training images' if basis == 'train' else 'all images'}"
    try:
        return [str(written) for written in write_plots(folder, images, title)]
    except OSError as e:
        raise UsageError(f"{folder} cannot be written ({e.strerror}); give another folder to --plots") from e


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)

    def table(title: str, *columns: str) -> Table:
        empty = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
                      padding=(0, 1, 0, 0))  # fmt: skip
        for i, column in enumerate(columns):
            empty.add_column(column, justify="right" if i else "left", overflow="fold")
        return empty

    total = report["total"]
    name = _printable(Path(report["path"]).name or report["path"])
    console.print(
        f"{name} ({report['kind']}): {total['images']:,} images in {total['classes']:,} classes", style="bold"
    )
    console.print(
        f"images per class: quartiles {total['p25']:,.0f} / {total['median']:,.0f} / {total['p75']:,.0f}, "
        f"p90 {total['p90']:,.0f}, p99 {total['p99']:,.0f}, std {total['std']:,.1f}\n"
        f"effective classes: {total['effective_classes']:,.0f}; empty classes: {total['empty_classes']:,}\n"
        + (f"{_printable(report['reading'])}\n" if "reading" in report else "")
    )

    def add_splits(title: str, splits: dict[str, Any]) -> None:
        each = table(title, "split", "images", "share", "classes", "min", "median", "mean", "max", "Gini", "imbalance")
        for split, d in splits.items():
            each.add_row(
                _printable(split), f"{d['images']:,}", f"{d['images'] / total['images']:.1%}",
                f"{d['classes'] - d['empty_classes']:,}", f"{d['min']:,}", f"{d['median']:,.0f}", f"{d['mean']:,.1f}",
                f"{d['max']:,}", f"{d['gini']:.4f}", f"{d['imbalance_factor']:,.1f}",
            )  # fmt: skip
        console.print(each)

    # a single split is the total: print it once
    add_splits("Splits", {**(report["splits"] if len(report["splits"]) > 1 else {}), "total": total})
    if "split" in report:
        add_splits(f"Splits by strategy {report['split']['strategy']}", report["split"]["splits"])

    basis = report["splits"].get(report["bands"]["of"], total)
    bands = table("Bands, by training images" if report["bands"]["of"] == "train" else "Bands, by all images",
                  "band", "classes", "images", "share")  # fmt: skip
    for label, key in (("many (> 100)", "many"), ("medium (20..100)", "medium"), ("few (< 20)", "few")):
        band = report["bands"][key]
        share = band["images"] / max(1, basis["images"])
        bands.add_row(label, f"{band['classes']:,}", f"{band['images']:,}", f"{share:.1%}")
    console.print(bands)
    top = total["top"]
    console.print(
        f"share of images: largest class {top['top_1']:.1%}, top 10 {top['top_10']:.1%}, "
        f"top 100 {top['top_100']:.1%}, top tenth of the classes {top['top_tenth']:.1%}\n"
    )
    ends = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("largest", "images", "smallest", "images"):
        ends.add_column(column, justify="right" if column == "images" else "left", overflow="ellipsis", no_wrap=True)
    for big, small in zip(total["head"][:5], total["tail"][:5], strict=True):
        ends.add_row(_printable(big["name"]), f"{big['images']:,}", _printable(small["name"]), f"{small['images']:,}")
    console.print(ends)

    for file, figures in list(report["files"].items())[:12]:
        labelled = "rows" in figures
        size = f"{figures['rows']:,} rows, {figures['classes']:,} classes" if labelled else "not a label file"
        repeated = f", {figures['repeated_paths']:,} repeated paths" if figures.get("repeated_paths") else ""
        console.print(f"{_printable(file)}: {size}{repeated}{'' if figures.get('counted', True) else ' (not counted)'}")
    if len(report["files"]) > 12:
        console.print(f"and {len(report['files']) - 12:,} more files (--json prints all)")
    if "tags" in report:
        each = table("Tags", "category", "tags", "uses", "most frequent")
        for category, figures in report["tags"].items():
            frequent = ", ".join(f"{_printable(name)[:40]} {n:,}" for name, n in figures["most_frequent"].items())
            each.add_row(category, f"{figures['tags']:,}", f"{figures['uses']:,}", frequent)
        console.print(each)
    for line in _findings(report):
        console.print(line)


def _findings(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, result in report["consistency"].items():
        if name == "shared_paths":
            lines += [f"paths in both {pair.replace('/', ' and ')}: {count:,}" for pair, count in result.items()]
        elif name == "samples_without_label":
            lines.append(f"samples without a label: {result:,}")
        elif name == "unknown_splits":
            lines.append(f"splits of index.parquet that classes.csv lacks: {_printable(', '.join(result))}")
        else:
            wrong = result["mismatched_classes"]
            verdict = f"disagree in {wrong:,} classes" if wrong else "agree"
            lines.append(f"{_printable(name)}: the counts and {result['file']} {verdict}")
    if "legacy_dafre" in report:
        legacy = report["legacy_dafre"]
        sizes = " / ".join(f"{legacy[name]:,}" for name in SPLITS)
        lines.append(f"legacy-dafre split of the totals: {sizes}, {legacy['mismatched_classes']:,} classes differ")
    return lines + [f"wrote {_printable(path)}" for path in report.get("plots", [])]


def _printable(text: str) -> str:
    """Replace control characters: names are untrusted input and may hold terminal escape sequences."""
    return "".join(c if c.isprintable() else "?" for c in text)
