"""`animesion stats`: how many images, in which classes, how long the tail, of anything that carries labels.

It counts and prints. Whether files are intact and samples decode is the business of `animesion verify`.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from animesion.labelfiles import ClassCounts, LabelFiles, LabelTable
    from animesion.longtail import LongTail

    IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "val", "test")
PERCENTS = (70, 10, 20)
IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

_SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}
# a label is a few digits, the JSON of a sample some hundred bytes: anything larger is not ours to load
_MAX_CLS_BYTES, _MAX_JSON_BYTES = 64, 1 << 20

_EXAMPLES = """\b
Examples:
  animesion stats runs/daf-re
  animesion stats labels/ --split legacy-dafre --json
  animesion stats 'data/train-*.tar' --plots plots/
"""


@dataclass(frozen=True)
class _Found:
    """What a path holds: its kind, the counts, figures of each file, and whether the files agree."""

    kind: str
    counts: ClassCounts
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    consistency: dict[str, Any] = field(default_factory=dict)


@click.command(epilog=_EXAMPLES)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--plots",
    "plot_folder",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write lorenz.png and rank-frequency.png there.",
)
@click.option(
    "--split",
    "strategy",
    type=click.Choice(["legacy-dafre", "grouped"]),
    help="Also show the class sizes that this split strategy would aim for.",
)
def stats(path: str, as_json: bool, plot_folder: Path | None, strategy: str | None) -> None:
    """Count images and classes, and measure the long tail.

    PATH is a built dataset, a folder of label files (train.csv, val.csv, test.csv, classid_classname.csv,
    per_class_counts.csv), one label or counts CSV, a WebDataset shard, a folder or quoted glob of shards, or a folder
    of class folders. The many (> 100), medium and few (< 20) bands are those of the training split.
    """
    found = _look_at(path)
    if not found.counts.total.sum():
        raise UsageError(f"{path} holds no labelled image; give a dataset, label files, shards or class folders")
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
    if plot_folder:
        report["plots"] = _plot(plot_folder, path, basis, found.counts)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _look_at(path: str) -> _Found:
    from animesion.labelfiles import find_label_files

    place = Path(path)
    if "://" in path:
        raise UsageError(f"{path} is not on this machine; copy its classes.csv or shards here and give that path")
    if not place.exists():
        shards = [Path(p) for p in sorted(glob.glob(path)) if p.endswith(".tar")]
        if shards:
            return _shards(shards)
        raise UsageError(f"{path} does not exist and matches no shard; check the path")
    if place.is_file():
        if place.suffix == ".tar":
            return _shards([place])
        if place.suffix == ".csv":
            return _csv(place)
        raise UsageError(f"{path} is neither .csv nor .tar; give a label file, a shard or a folder")
    if (place / "dataset.json").is_file():
        return _dataset(place)
    for folder in (place, place / "labels"):
        if folder.is_dir():
            files = find_label_files(folder)
            if files.labels or files.counts:
                return _labels(folder, files)
    for folder in (place, place / "data"):
        shards = sorted(folder.glob("*.tar"))
        if shards:
            return _shards(shards)
    return _folders(place)


def _dataset(folder: Path) -> _Found:
    from animesion.labelfiles import read_class_counts

    counts = read_class_counts(folder / "classes.csv")
    files: dict[str, dict[str, Any]] = {"classes.csv": {"rows": len(counts.ids), "classes": len(counts.ids)}}
    consistency: dict[str, Any] = {}
    if (folder / "index.parquet").is_file():
        indexed = _index(folder / "index.parquet")
        files["index.parquet"] = {"rows": sum(indexed.values()), "classes": len({c for _, c in indexed})}
        unknown = sorted({split for split, _ in indexed} - set(counts.splits))
        for name, images in counts.splits.items():
            there = {c: n for (split, c), n in indexed.items() if split == name}
            consistency[name] = {"file": "index.parquet", "mismatched_classes": counts.differing(images, there)}
        if unknown:
            consistency["unknown_splits"] = unknown
    return _Found("dataset", counts, files, consistency)


def _index(path: Path) -> Counter[tuple[str, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = (
            pq.read_table(path, columns=["split", "label"]).group_by(["split", "label"]).aggregate([([], "count_all")])
        )
        triples = zip(*(rows[name].to_pylist() for name in ("split", "label", "count_all")), strict=True)
        return Counter({(str(split), int(label)): count for split, label, count in triples})
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as e:
        raise UsageError(f"{path} is no index with the columns split and label; rebuild the dataset") from e


def _csv(path: Path) -> _Found:
    from animesion import labelfiles

    try:
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            head = [cell.strip().lower() for cell in lines.readline(10_000).split(",")]
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}); give a readable file") from e
    if labelfiles.is_counts_header(head):
        counts = labelfiles.read_class_counts(path)
        return _Found("counts", counts, {path.name: {"rows": len(counts.ids), "classes": len(counts.ids)}})
    if path.name == labelfiles.NAMES_FILE:
        raise UsageError(f"{path} names classes but counts nothing; give a label file or the folder that holds it")
    table = labelfiles.read_labels(path)
    names = path.with_name(labelfiles.NAMES_FILE)
    known = labelfiles.read_class_names(names) if names.is_file() else {}
    split = path.stem if path.stem in labelfiles.LABEL_FILES else "all"
    return _Found("labels", labelfiles.count_classes({split: table.counts()}, known), {path.name: _figures(table)})


def _labels(folder: Path, there: LabelFiles) -> _Found:
    from animesion import labelfiles

    tables = {name: labelfiles.read_labels(path) for name, path in there.labels.items()}
    files = {there.labels[name].name: _figures(table) for name, table in tables.items()}
    for path in there.others:
        try:
            files[path.name] = {**_figures(labelfiles.read_labels(path)), "counted": False}
        except UsageError:
            files[path.name] = {"counted": False}  # some other table, such as tags: not a fault of this folder
    known = labelfiles.read_class_names(there.names) if there.names else {}
    if there.names:
        files[there.names.name] = {"rows": len(known), "classes": len(known)}
    consistency: dict[str, Any] = {}
    if there.counts:
        counts = labelfiles.read_class_counts(there.counts)
        files[there.counts.name] = {"rows": len(counts.ids), "classes": len(counts.ids)}
        for name in (split for split in counts.splits if split in tables):
            differ = counts.differing(counts.splits[name], tables[name].counts())
            consistency[name] = {"file": f"{name}.csv", "mismatched_classes": differ}
        if known:
            given = dict(zip(counts.ids.tolist(), counts.names, strict=True))
            differ = sum(given.get(c) != known.get(c) for c in given.keys() | known.keys())
            consistency["names"] = {"file": labelfiles.NAMES_FILE, "mismatched_classes": differ}
    else:
        # train_val repeats train and val where those are there too
        split_up = tables.keys() & {"train", "val"}
        counts = labelfiles.count_classes(
            {n: t.counts() for n, t in tables.items() if n != "train_val" or not split_up}, known
        )
    pairs = itertools.combinations([name for name in SPLITS if name in tables], 2)
    shared = {f"{a}/{b}": len(set(tables[a].paths).intersection(tables[b].paths)) for a, b in pairs}
    return _Found("labels", counts, files, {**consistency, **({"shared_paths": shared} if shared else {})})


def _folders(root: Path) -> _Found:
    from animesion.labelfiles import count_classes

    folders = _subfolders(root)
    per_split = bool(folders) and all(folder.name in _SPLIT_FOLDERS for folder in folders)
    roots = {folder.name: folder for folder in folders} if per_split else {"all": root}
    classes = {split: {folder.name: _images_in(folder) for folder in _subfolders(top)} for split, top in roots.items()}
    names = sorted(set().union(*classes.values()))
    ids = {name: i for i, name in enumerate(names)}
    splits = {split: {ids[name]: n for name, n in sizes.items()} for split, sizes in classes.items()}
    return _Found("folders", count_classes(splits, dict(enumerate(names))))


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir() and not p.is_symlink())
    except OSError as e:
        raise UsageError(f"{folder} cannot be listed ({e.strerror}); give a readable folder") from e


def _images_in(folder: Path) -> int:
    return sum(Path(name).suffix.lower() in IMAGE_SUFFIXES for _, _, names in os.walk(folder) for name in names)


def _shards(paths: list[Path]) -> _Found:
    from rich.console import Console
    from rich.progress import track

    from animesion.labelfiles import count_classes

    names: dict[int, str] = {}
    splits: dict[str, Counter[int]] = defaultdict(Counter)
    files: dict[str, dict[str, Any]] = {}
    unlabelled = 0
    quiet = not sys.stderr.isatty()
    for path in track(paths, "reading shards", console=Console(stderr=True), disable=quiet, transient=True):
        labels, without = _shard(path, names)
        numbered = re.fullmatch(r"(.+?)[-_]\d+", path.stem)
        splits[numbered[1] if numbered else path.stem].update(labels)
        files[path.name] = {"rows": labels.total(), "classes": len(labels)}
        unlabelled += without
    return _Found("shards", count_classes(splits, names), files, {"samples_without_label": unlabelled})


def _shard(path: Path, names: dict[int, str]) -> tuple[Counter[int], int]:
    """Samples of each label, and samples without one; adds class names that were not known yet to `names`."""
    labels: dict[str, int] = {}
    keys: set[str] = set()
    described = ("", b"")  # key and JSON of the sample at hand; a sample's members stand together
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.size < 0:
                    raise tarfile.ReadError("negative size")
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isreg() or not stem:
                    continue
                keys.add(key)
                if kind == "cls":
                    labels[key] = _label(_content(shard, member, _MAX_CLS_BYTES, path, key), path, key)
                elif kind == "json" and labels.get(key) not in names:
                    described = (key, _content(shard, member, _MAX_JSON_BYTES, path, key))
                if key in labels and described[0] == key:
                    _add_name(names, labels[key], described[1])
                    described = ("", b"")
            end = shard.offset
        # tarfile takes a damaged or missing header for the end; a real end is a block of zeros
        with path.open("rb") as data:
            data.seek(end)
            if data.read(512) != bytes(512):
                raise tarfile.ReadError("no end of archive")
    except (tarfile.TarError, EOFError, OSError, ValueError, MemoryError, OverflowError) as e:
        why = str(e) or "a size beyond the file"
        raise UsageError(f"{path} is not a whole uncompressed tar ({why}); copy or build the shard again") from e
    return Counter(labels.values()), len(keys - labels.keys())


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo, limit: int, path: Path, key: str) -> bytes:
    if member.size > limit:
        raise UsageError(
            f"{path}, sample {key[:80]!r}: {member.name.rpartition('.')[2]} of {member.size:,} bytes where at most "
            f"{limit:,} were due; build the shard again"
        )
    stream = shard.extractfile(member)
    return stream.read() if stream else b""


def _label(content: bytes, path: Path, key: str) -> int:
    text = content.strip()
    if not text.isdigit() or len(text) > 9:
        raise UsageError(
            f"{path}, sample {key[:80]!r}: the label {content[:20]!r} is not a class id; rebuild the shard"
        )
    return int(text)


def _add_name(names: dict[int, str], label: int, content: bytes) -> None:
    try:
        sample = json.loads(content)
    except (ValueError, RecursionError):
        return  # the name is a nicety here; `animesion verify` judges the JSON
    if isinstance(sample, dict) and isinstance(sample.get("name"), str):
        names.setdefault(label, sample["name"])


def _figures(table: LabelTable) -> dict[str, Any]:
    repeated = len(table.paths) - len(set(table.paths))
    return {"rows": len(table.paths), "classes": len(table.counts()), "repeated_paths": repeated}


def _describe(counts: ClassCounts, images: IntArray) -> LongTail:
    from animesion.longtail import describe

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
    from animesion.plots import write_plots

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
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
                     padding=(0, 1, 0, 0))  # fmt: skip
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left", overflow="fold")
        return made

    total = report["total"]
    name = _printable(Path(report["path"]).name or report["path"])
    console.print(
        f"{name} ({report['kind']}): {total['images']:,} images in {total['classes']:,} classes", style="bold"
    )
    console.print(
        f"images per class: quartiles {total['p25']:,.0f} / {total['median']:,.0f} / {total['p75']:,.0f}, "
        f"p90 {total['p90']:,.0f}, p99 {total['p99']:,.0f}, std {total['std']:,.1f}\n"
        f"as diverse as {total['effective_classes']:,.0f} equal classes; empty classes: {total['empty_classes']:,}\n"
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

    # an only split is the total
    add_splits("Splits", {**(report["splits"] if len(report["splits"]) > 1 else {}), "total": total})
    if "split" in report:
        add_splits(f"With the strategy {report['split']['strategy']}", report["split"]["splits"])

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
        f"the largest class holds {top['top_1']:.1%} of the images, 10 classes {top['top_10']:.1%}, "
        f"100 classes {top['top_100']:.1%}, a tenth of them {top['top_tenth']:.1%}\n"
    )
    ends = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("largest", "images", "smallest", "images"):
        ends.add_column(column, justify="right" if column == "images" else "left", overflow="ellipsis", no_wrap=True)
    for big, small in zip(total["head"][:5], total["tail"][:5], strict=True):
        ends.add_row(_printable(big["name"]), f"{big['images']:,}", _printable(small["name"]), f"{small['images']:,}")
    console.print(ends)

    for file, figures in list(report["files"].items())[:12]:
        told = f"{figures['rows']:,} rows, {figures['classes']:,} classes" if "rows" in figures else "no label file"
        repeated = f", {figures['repeated_paths']:,} paths repeated" if figures.get("repeated_paths") else ""
        console.print(f"{_printable(file)}: {told}{repeated}{'' if figures.get('counted', True) else ' (not counted)'}")
    if len(report["files"]) > 12:
        console.print(f"and {len(report['files']) - 12:,} more files (all with --json)")
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
    """Names come from other people's files: no escape sequence of theirs reaches the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
