"""Prove a built dataset right, or list every fault: checksums, shards, keys, labels, pixels, leaks and accounting.

Nothing is trusted but the bytes: every shard is walked, every sample read and, unless switched off, decoded. Samples of
a shard that cannot be read to its end are one fault of the archive and are not judged again one by one.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from animesion import executors
from animesion.config.recipe import DuplicatesSection
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.images import codec
from animesion.progress import Progress
from animesion.schemas import MEANINGS
from animesion.storage import checksums
from animesion.storage.checksums import CHECKSUMS
from animesion.storage.workspace import sha256_file
from animesion.verification import leaks, scan
from animesion.verification.scan import Contents, Walk

#: Name of each check, in order, and what it asks.
CHECKS = {
    "checksums": "every file is listed and has its SHA-256",
    "archives": "every shard is complete and holds as many samples as the side files say",
    "keys": "keys are unique, index.parquet places each, all samples have the same fields",
    "labels": "cls, json, index, curated.parquet and classes.csv agree",
    "decode": "every image decodes",
    "leaks": "no image, group or near duplicate straddles splits",
    "accounting": "seen = kept + dropped by reason, and totals agree",
}

_LISTED = ("README.md", "_info.json", "classes.csv", "curated.parquet", "data/sizes.json", "dataset.json",
           "index.parquet", "recipe.toml")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, in one sentence, and the samples and splits that it is about."""

    text: str
    keys: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


@dataclass
class Report:
    """The outcome.

    Attributes:
        name: the dataset's name.
        samples: samples that were read.
        shards: shards that were read.
        decoded: whether images were decoded and compared by their pixels.
        faults: by name of the check; a check that was left out is not there.
    """

    name: str
    samples: int = 0
    shards: int = 0
    decoded: bool = True
    faults: dict[str, list[Fault]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.faults.values())


def verify(dataset: Dataset, *, workers: int = 0, decode: bool = True, progress: Progress | None = None) -> Report:
    """Run every check.

    Args:
        dataset: an opened dataset.
        workers: worker processes; 0 for one a core.
        decode: decode images; without it equal and nearly equal pixels are not looked for.
        progress: told what happens.
    """
    progress = progress or Progress()
    report = Report(dataset.name, decoded=decode, faults={name: [] for name in CHECKS if decode or name != "decode"})
    faults = report.faults
    settings, limits = DuplicatesSection(), codec.Limits()
    try:
        recipe = dataset.recipe
        settings, limits = recipe.duplicates, codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
    except UsageError as error:
        faults["accounting"].append(Fault(str(error)))
    with executors.make(workers=workers) as engine:
        found = scan.read(dataset, engine, limits if decode else None, progress)
    report.samples, report.shards = len(found.keys), len(found.walks) - len(found.unread)
    index = _rows(dataset, "index.parquet", faults["keys"])
    curated = _rows(dataset, "curated.parquet", faults["accounting"])
    faults["checksums"] += _checksums(dataset, found.walks)
    faults["archives"] += _archives(dataset, found.walks)
    for i, check, text in found.look.faults:
        faults[check].append(Fault(f"{found.where(i)}: {text}", (found.keys[i],)))
    if index is not None:
        faults["keys"] += _keys(dataset, found, index)
    faults["labels"] += [*_class_table(dataset), *_labels(dataset, found, index, curated)]
    faults["leaks"] += _leaks(dataset, found, curated, settings, decode=decode)
    if curated is not None:
        faults["accounting"] += _accounting(dataset, curated)
    return report


def _rows(dataset: Dataset, name: str, faults: list[Fault]) -> dict[str, list[Any]] | None:
    try:
        columns: dict[str, list[Any]] = dataset.read_table(name).to_pydict()
    except UsageError as error:
        faults.append(Fault(str(error)))
        return None
    return columns


# -- files -----------------------------------------------------------------------------------------------------------


def _checksums(dataset: Dataset, walks: dict[str, Walk]) -> list[Fault]:
    try:
        listed, malformed = checksums.parse(dataset.path)
    except (OSError, UnicodeDecodeError):
        return [Fault(f"{CHECKSUMS} is missing or unreadable, so no file can be told from a damaged one")]
    faults = [Fault(f"{CHECKSUMS} line {line} is no digest and file name inside the dataset") for line in malformed]
    for name, digest in listed.items():
        path = dataset.path / name
        try:
            actual = walks[name].sha256 if name in walks else sha256_file(path)
        except OSError:
            actual = ""
        if not actual:
            faults.append(Fault(f"{name} is listed in {CHECKSUMS} but missing or unreadable"))
        elif actual != digest:
            faults.append(Fault(f"{name} has another SHA-256 than {CHECKSUMS} says"))
    faults += [Fault(f"{name} is not listed in {CHECKSUMS}") for name in (*_LISTED, *walks) if name not in listed]
    for path in sorted((dataset.path / "data").glob("*.tar")):
        if f"data/{path.name}" not in walks:
            faults.append(Fault(f"data/{path.name} is no shard of dataset.json, but readers would load it"))
    for split in dataset.splits.values():
        for shard in split.shards:
            if walks[shard.path].sha256 not in ("", shard.sha256):
                faults.append(Fault(f"{shard.path} has another SHA-256 than dataset.json says"))
    return faults


def _archives(dataset: Dataset, walks: dict[str, Walk]) -> list[Fault]:
    faults: list[Fault] = []
    timm, sizes = _side_file(dataset, "_info.json", faults), _side_file(dataset, "data/sizes.json", faults)
    for split in dataset.splits.values():
        for shard in split.shards:
            walk = walks[shard.path]
            if walk.damage:
                faults.append(Fault(walk.damage))
                continue
            if (len(walk.keys), walk.bytes) != (shard.samples, shard.bytes):
                faults.append(
                    Fault(
                        f"{shard.path} holds {len(walk.keys):,} samples in {walk.bytes:,} bytes, "
                        f"dataset.json says {shard.samples:,} in {shard.bytes:,}"
                    )
                )
            if sizes is not None and sizes.get(shard.path.removeprefix("data/")) != shard.samples:
                faults.append(Fault(f"data/sizes.json does not say {shard.samples:,} samples for {shard.path}"))
        for what in ("samples", "bytes"):
            if sum(getattr(shard, what) for shard in split.shards) != getattr(split, what):
                faults.append(Fault(f"dataset.json: the {what} of the shards of {split.name} do not add up"))
        told = {
            "name": split.name,
            "num_samples": split.samples,
            "filenames": [shard.path for shard in split.shards],
            "shard_lengths": [shard.samples for shard in split.shards],
        }
        if timm is not None and (not isinstance(timm.get("splits"), dict) or timm["splits"].get(split.name) != told):
            faults.append(Fault(f"_info.json and dataset.json disagree on {split.name}"))
    return faults


def _side_file(dataset: Dataset, name: str, faults: list[Fault]) -> dict[str, Any] | None:
    try:
        content = json.loads((dataset.path / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        faults.append(Fault(f"{name} is missing or no JSON object"))
        return None
    return content


# -- samples ---------------------------------------------------------------------------------------------------------


def _keys(dataset: Dataset, found: Contents, index: dict[str, list[Any]]) -> list[Fault]:
    faults = []
    first: dict[str, int] = {}
    row_of: dict[str, int] = {}
    for row, key in enumerate(index["key"]):
        if key in row_of:
            faults.append(Fault(f"index.parquet has two rows for {key}", (key,)))
        row_of.setdefault(key, row)
    fields, due = ",".join(dataset.fields), ""
    digests, described = found.look.sha256, found.look.json_fields
    for i, key in enumerate(found.keys):
        where = found.where(i)
        if found.fields[i] != fields:
            faults.append(Fault(f"{where} has the members {found.fields[i]}, where {fields} are due", (key,)))
        due = due or described[i]
        if described[i] and described[i] != due:
            faults.append(Fault(f"{where} has other fields or types in its json than the first sample", (key,)))
        if key in first:
            faults.append(Fault(f"key {key} stands in {found.shards[first[key]]} and in {found.shards[i]}", (key,)))
            continue
        first[key] = i
        if key not in row_of:
            faults.append(Fault(f"{where} has no row in index.parquet", (key,)))
            continue
        told = {name: values[row_of[key]] for name, values in index.items()}
        if (told["shard"], told["split"]) != (found.shards[i], found.splits[i]):
            faults.append(Fault(f"{where}: index.parquet has it in {told['shard']}, split {told['split']}", (key,)))
        elif (told["offset"], told["size"], told["sample_offset"], told["sample_size"]) != found.places[i]:
            faults.append(Fault(f"{where} lies at another place than index.parquet says", (key,)))
        if told["sha256"] != digests[i].hex():
            faults.append(Fault(f"{where}: its image has another SHA-256 than index.parquet says", (key,)))
    for key, row in row_of.items():
        if key not in first and index["shard"][row] not in found.unread:
            faults.append(Fault(f"index.parquet has {key} in {index['shard'][row]}, which does not hold it", (key,)))
    return faults


def _labels(
    dataset: Dataset,
    found: Contents,
    index: dict[str, list[Any]] | None,
    curated: dict[str, list[Any]] | None,
) -> list[Fault]:
    faults = []
    names = [info.name for info in dataset.classes]
    indexed = dict(zip(index["key"], index["label"], strict=True)) if index else {}
    shard_of = dict(zip(index["key"], index["shard"], strict=True)) if index else {}
    rows = {key: i for i, key in enumerate(curated["key"]) if curated["kept"][i]} if curated else {}
    look = found.look
    columns = (look.labels.tolist(), look.json_labels.tolist(), look.json_names, look.json_splits)
    for i, (key, label, told, name, split) in enumerate(zip(found.keys, *columns, strict=True)):
        if label < 0:
            continue  # said already
        said: dict[str, Any] = {"index.parquet": indexed[key]} if key in indexed else {}
        texts: dict[str, tuple[str, str]] = {}
        if look.json_fields[i]:
            said, texts = {"json": told, **said}, {"json": (name, split)}
        if curated is not None and key not in rows:
            faults.append(Fault(f"{found.where(i)} is no kept row of curated.parquet", (key,)))
        elif curated is not None:
            row = rows[key]
            said["curated.parquet"] = curated["class_id"][row]
            texts["curated.parquet"] = (curated["label"][row], curated["split"][row])
        if label >= len(names):
            faults.append(Fault(f"{found.where(i)}: class {label} is not in the class map", (key,)))
            continue
        wrong = [f"{where} says {other}" for where, other in said.items() if other != label]
        due = (names[label], found.splits[i])
        wrong += [f"{where} says {' in '.join(other)!r}" for where, other in texts.items() if other != due]
        if wrong:
            known = f"cls says {label} ({names[label]} in {due[1]})"
            faults.append(Fault(f"{found.where(i)}: {known}, {', '.join(wrong)}", (key,)))
    there = set(found.keys)
    for key in rows:
        if key not in there and (shard_of.get(key) not in found.unread if key in shard_of else not found.unread):
            faults.append(Fault(f"curated.parquet keeps {key}, but no shard holds it", (key,)))
    return faults


def _class_table(dataset: Dataset) -> list[Fault]:
    """`classes.csv` against the class map of `dataset.json`."""
    due = [["class_id", "name", *dataset.splits, "total"]]
    for info in dataset.classes:
        due.append([str(info.id), info.name, *(str(info.counts.get(name, 0)) for name in dataset.splits)])
        due[-1].append(str(info.total))
    try:
        with (dataset.path / "classes.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, ValueError, csv.Error):
        return [Fault("classes.csv is missing or no CSV")]
    if len(rows) != len(due):
        return [Fault(f"classes.csv has {len(rows) - 1:,} classes, dataset.json {len(due) - 1:,}")]
    return [
        Fault(f"classes.csv line {number} says {','.join(row)!r}, dataset.json {','.join(told)!r}")
        for number, (row, told) in enumerate(zip(rows, due, strict=True), 1)
        if row != told
    ]


def _leaks(
    dataset: Dataset,
    found: Contents,
    curated: dict[str, list[Any]] | None,
    settings: DuplicatesSection,
    *,
    decode: bool,
) -> list[Fault]:
    n = len(found.keys)
    groups, sources = [""] * n, [""] * n
    if curated is not None:
        rows = {key: i for i, key in enumerate(curated["key"])}
        chosen = [rows.get(key, -1) for key in found.keys]
        groups = [curated["group"][row] if row >= 0 else "" for row in chosen]
        sources = [f"{curated['source'][row]} {curated['source_id'][row]}" if row >= 0 else "" for row in chosen]
    look = found.look
    pixels = (
        leaks.PixelColumns(look.decoded, look.pixels, look.phash, look.phash_flip, look.thumbnails) if decode else None
    )
    known = ""
    if dataset.split_strategy in ("published", "legacy-dafre"):
        known = f", as the split strategy {dataset.split_strategy} allows"
    elif not settings.near:
        known = ", in a recipe that looks for no near duplicates"
    faults = []
    for leak in leaks.find(found.splits, groups, sources, look.sha256, pixels, settings):
        pair = (leak.first, leak.second)
        keys, splits = tuple(found.keys[i] for i in pair), tuple(found.splits[i] for i in pair)
        both = " and ".join(f"{key} in {split}" for key, split in zip(keys, splits, strict=True))
        faults.append(Fault(f"{both}: {', '.join(leak.why)}{known}", keys, splits))
    return faults


def _accounting(dataset: Dataset, curated: dict[str, list[Any]]) -> list[Fault]:
    faults = []

    def compare(what: str, told: Any, counted: Any) -> None:
        if told != counted:
            faults.append(Fault(f"dataset.json says {what} {told}, curated.parquet has {counted}"))

    kept = [i for i, keep in enumerate(curated["kept"]) if keep]
    dropped = Counter(reason for reason, keep in zip(curated["reason"], curated["kept"], strict=True) if not keep)
    compare("seen", dataset.seen, len(curated["key"]))
    compare("kept", dataset.kept, len(kept))
    for reason in sorted(dropped.keys() | dataset.dropped.keys()):
        compare(f"dropped as '{reason}'", dataset.dropped.get(reason, 0), dropped[reason])
        if reason not in MEANINGS:
            faults.append(Fault(f"'{reason}' is no known reason to drop an image"))
    if dataset.seen != dataset.kept + sum(dataset.dropped.values()):
        faults.append(Fault("dataset.json: seen is not kept + dropped"))
    compare("images", dataset.images, len(kept))
    compare("samples in splits", len(dataset), len(kept))
    if len(set(curated["key"])) != len(curated["key"]):
        faults.append(Fault("curated.parquet has a key twice"))
    for i in (i for i in kept if curated["reason"][i]):
        faults.append(Fault(f"curated.parquet keeps {curated['key'][i]} and gives a reason to drop it"))
    counts = Counter((curated["class_id"][i], curated["split"][i]) for i in kept)
    told = {(info.id, split): n for info in dataset.classes for split, n in info.counts.items() if n}
    for label, split in sorted(counts.keys() | told.keys(), key=str):
        compare(f"class {label} in {split}", told.get((label, split), 0), counts[label, split])
    return faults
