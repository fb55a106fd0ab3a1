"""Verify a built dataset and list its faults: checksums, shards, keys, labels, pixels, leaks and accounting.

Only the bytes are trusted: every shard is walked, and every sample is read and, unless switched off, decoded. A shard
that cannot be read to its end is one fault; its samples are not reported again one by one.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from animesion import executors
from animesion.config.recipe import DuplicatesSection
from animesion.dataset import tags, text_tables
from animesion.dataset.dataset import Dataset
from animesion.dedup import reach
from animesion.errors import UsageError
from animesion.images import codec, other_hashes
from animesion.progress import Progress
from animesion.schemas import MEANINGS
from animesion.sources import families
from animesion.storage import checksums
from animesion.storage.checksums import CHECKSUMS
from animesion.storage.workspace import sha256_file
from animesion.verification import copies, leaks, scan
from animesion.verification.scan import Contents, Walk

#: Name of each check, in order, and the condition that it checks.
CHECKS = {
    "checksums": "every file is listed and has its SHA-256",
    "archives": "every shard is complete and holds as many samples as the side files list",
    "keys": "keys are unique, index.parquet places each, all samples have the same fields",
    "labels": "cls, json, index, curated.parquet and classes.csv agree, and so do the tags",
    "decode": "every image decodes",
    "leaks": "no image, group or near duplicate straddles splits",
    "accounting": "seen = kept + dropped by reason, and totals agree",
}

_LISTED = ("README.md", "_info.json", "classes.csv", "curated.parquet", "data/sizes.json", "dataset.json",
           "index.parquet", "recipe.toml")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A fault in one sentence, and the keys and splits of the samples that are affected."""

    text: str
    keys: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


@dataclass
class Report:
    """Result of a verification.

    Attributes:
        name: name of the dataset.
        samples: number of samples that were read.
        shards: number of shards that were read.
        decoded: whether images were decoded and compared by their pixels.
        faults: faults by name of the check; checks that did not run have no entry.
        leaking: number of samples by split that are related to a sample of an earlier split: train, val, test.
        reach: what the search for copies can and cannot see, in one sentence.
    """

    name: str
    samples: int = 0
    shards: int = 0
    decoded: bool = True
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    leaking: dict[str, int] = field(default_factory=dict)
    reach: str = ""

    @property
    def clean(self) -> bool:
        """Whether there are no faults."""
        return not any(self.faults.values())


def verify(dataset: Dataset, *, workers: int = 0, decode: bool = True, progress: Progress | None = None) -> Report:
    """Run every check.

    Args:
        dataset: an opened dataset.
        workers: number of worker processes; 0 for one per core.
        decode: decode images; without it, equal and nearly equal pixels are not detected.
        progress: receives progress events.
    """
    progress = progress or Progress()
    report = Report(dataset.name, decoded=decode, faults={name: [] for name in CHECKS if decode or name != "decode"})
    faults = report.faults
    settings, limits = DuplicatesSection().for_images(len(dataset)), codec.Limits()
    try:
        # leaks are judged by the thresholds of the build, or by the defaults if its recipe cannot be read
        recipe = dataset.recipe
        settings = recipe.duplicates.for_images(len(dataset))
        limits = codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
    except UsageError as error:
        faults["accounting"].append(Fault(str(error)))
    if decode and settings.other_hash:
        other_hashes.require(settings.other_hash)
    with executors.make(workers=workers) as engine:
        found = scan.read(dataset, engine, limits if decode else None, progress, settings.copies, settings.other_hash)
        related = copies.find(dataset, found, settings, limits, engine, progress) if decode else []
    report.reach = reach.sentence(settings.copies, other_hash=settings.other_hash, decoded=decode)
    if decode and settings.copies != "off" and dataset.split_strategy in ("grouped", "by-class"):
        report.reach += "; limits are a little narrower than those of the build, whose split this is"
    report.samples, report.shards = len(found.keys), len(found.walks) - len(found.unread)
    index = _rows(dataset, "index.parquet", faults["keys"])
    curated = _rows(dataset, "curated.parquet", faults["accounting"])
    faults["checksums"] += _checksums(dataset, found.walks)
    faults["archives"] += _archives(dataset, found.walks)
    for i, check, text in found.result.faults:
        faults[check].append(Fault(f"{found.where(i)}: {text}", (found.keys[i],)))
    if index is not None:
        faults["keys"] += _keys(dataset, found, index)
    faults["labels"] += [*_class_table(dataset), *_labels(dataset, found, index, curated), *_tags(dataset, found)]
    leak_faults, report.leaking = _leaks(dataset, found, curated, settings, related, decode=decode)
    faults["leaks"] += leak_faults
    if curated is not None:
        faults["accounting"] += _accounting(dataset, curated)
    return report


def _rows(dataset: Dataset, name: str, faults: list[Fault]) -> dict[str, list[Any]] | None:
    """Columns of a table, or None and one more fault if it cannot be read."""
    try:
        columns: dict[str, list[Any]] = dataset.read_table(name).to_pydict()
    except UsageError as error:
        faults.append(Fault(str(error)))
        return None
    return columns


# -- files -----------------------------------------------------------------------------------------------------------


def _checksums(dataset: Dataset, walks: dict[str, Walk]) -> list[Fault]:
    """Faults of `SHA256SUMS` and of the shard digests in `dataset.json`."""
    try:
        listed, malformed = checksums.parse(dataset.path)
    except (OSError, UnicodeDecodeError):
        return [Fault(f"{CHECKSUMS} is missing or unreadable, so damaged files cannot be detected")]
    faults = [Fault(f"{CHECKSUMS} line {line} is not a digest and a file inside the dataset") for line in malformed]
    for name, digest in listed.items():
        path = dataset.path / name
        try:
            actual = walks[name].sha256 if name in walks else sha256_file(path)
        except OSError:
            actual = ""
        if not actual:
            faults.append(Fault(f"{name} is listed in {CHECKSUMS} but missing or unreadable"))
        elif actual != digest:
            faults.append(Fault(f"{name} does not have the SHA-256 in {CHECKSUMS}"))
    faults += [Fault(f"{name} is not listed in {CHECKSUMS}") for name in (*_LISTED, *walks) if name not in listed]
    for path in sorted((dataset.path / "data").glob("*.tar")):
        if f"data/{path.name}" not in walks:
            faults.append(Fault(f"data/{path.name} is not a shard of dataset.json, but readers would load it"))
    for split in dataset.splits.values():
        for shard in split.shards:
            if walks[shard.path].sha256 not in ("", shard.sha256):
                faults.append(Fault(f"{shard.path} does not have the SHA-256 in dataset.json"))
    return faults


def _archives(dataset: Dataset, walks: dict[str, Walk]) -> list[Fault]:
    """Faults of the shards as files, and disagreements about their number of samples and bytes."""
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
                        f"but {shard.samples:,} in {shard.bytes:,} according to dataset.json"
                    )
                )
            if sizes is not None and sizes.get(shard.path.removeprefix("data/")) != shard.samples:
                faults.append(Fault(f"data/sizes.json does not list {shard.samples:,} samples for {shard.path}"))
        for what in ("samples", "bytes"):
            if sum(getattr(shard, what) for shard in split.shards) != getattr(split, what):
                faults.append(Fault(f"dataset.json: the {what} of the shards of {split.name} do not add up"))
        expected = {
            "name": split.name,
            "num_samples": split.samples,
            "filenames": [shard.path for shard in split.shards],
            "shard_lengths": [shard.samples for shard in split.shards],
        }
        if timm is None:
            continue  # reported by `_side_file`
        if not isinstance(timm.get("splits"), dict) or timm["splits"].get(split.name) != expected:
            faults.append(Fault(f"_info.json and dataset.json disagree on {split.name}"))
    return faults


def _side_file(dataset: Dataset, name: str, faults: list[Fault]) -> dict[str, Any] | None:
    """The object in a JSON file, or None and one more fault if it cannot be read."""
    try:
        content = json.loads((dataset.path / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        faults.append(Fault(f"{name} is missing or not a JSON object"))
        return None
    return content


# -- samples ---------------------------------------------------------------------------------------------------------


def _keys(dataset: Dataset, found: Contents, index: dict[str, list[Any]]) -> list[Fault]:
    """Repeated keys, members and JSON fields that differ between samples, and disagreements with the index."""
    faults = []
    first: dict[str, int] = {}  # key -> position of its first sample
    row_of: dict[str, int] = {}  # key -> row of the index
    for row, key in enumerate(index["key"]):
        if key in row_of:
            faults.append(Fault(f"index.parquet has two rows for {key}", (key,)))
        row_of.setdefault(key, row)
    fields, json_fields = ",".join(dataset.fields), ""
    digests, described = found.result.sha256, found.result.json_fields
    for i, key in enumerate(found.keys):
        where = found.where(i)
        if found.fields[i] != fields:
            faults.append(Fault(f"{where} has the members {found.fields[i]} instead of {fields}", (key,)))
        json_fields = json_fields or described[i]  # those of the first sample with a readable JSON member
        if described[i] and described[i] != json_fields:
            faults.append(Fault(f"{where} has other fields or types in its json than the first sample", (key,)))
        if key in first:
            faults.append(Fault(f"key {key} is in {found.shards[first[key]]} and in {found.shards[i]}", (key,)))
            continue
        first[key] = i
        if key not in row_of:
            faults.append(Fault(f"{where} has no row in index.parquet", (key,)))
            continue
        listed = {name: values[row_of[key]] for name, values in index.items()}
        if (listed["shard"], listed["split"]) != (found.shards[i], found.splits[i]):
            faults.append(Fault(f"{where}: index.parquet has it in {listed['shard']}, split {listed['split']}", (key,)))
        elif (listed["offset"], listed["size"], listed["sample_offset"], listed["sample_size"]) != found.places[i]:
            faults.append(Fault(f"{where} is not at the offset in index.parquet", (key,)))
        if listed["sha256"] != digests[i].hex():
            faults.append(Fault(f"{where}: its image does not have the SHA-256 in index.parquet", (key,)))
    for key, row in row_of.items():
        # a sample may be missing only because its shard could not be read, which is a fault of its own
        if key not in first and index["shard"][row] not in found.unread:
            faults.append(Fault(f"index.parquet has {key} in {index['shard'][row]}, which does not hold it", (key,)))
    return faults


def _labels(
    dataset: Dataset,
    found: Contents,
    index: dict[str, list[Any]] | None,
    curated: dict[str, list[Any]] | None,
) -> list[Fault]:
    """Samples whose `cls` member disagrees with their JSON member, the index or curated.parquet.

    Args:
        dataset: supplies the class map.
        found: the samples.
        index: columns of index.parquet; None if it cannot be read.
        curated: columns of curated.parquet; None if it cannot be read.
    """
    faults = []
    names = [info.name for info in dataset.classes]
    indexed = dict(zip(index["key"], index["label"], strict=True)) if index else {}
    shard_of = dict(zip(index["key"], index["shard"], strict=True)) if index else {}
    rows = {key: i for i, key in enumerate(curated["key"]) if curated["kept"][i]} if curated else {}
    result = found.result
    columns = (result.labels.tolist(), result.json_labels.tolist(), result.json_names, result.json_splits)
    for i, (key, label, json_label, name, split) in enumerate(zip(found.keys, *columns, strict=True)):
        if label < 0:
            continue  # an unreadable `cls` was reported by the scan
        # file -> class id, and file -> class name and split, of this sample
        ids: dict[str, Any] = {"index.parquet": indexed[key]} if key in indexed else {}
        texts: dict[str, tuple[str, str]] = {}
        if result.json_fields[i]:
            ids, texts = {"json": json_label, **ids}, {"json": (name, split)}
        if curated is not None and key not in rows:
            faults.append(Fault(f"{found.where(i)} is not a kept row of curated.parquet", (key,)))
        elif curated is not None:
            row = rows[key]
            ids["curated.parquet"] = curated["class_id"][row]
            texts["curated.parquet"] = (curated["label"][row], curated["split"][row])
        if label >= len(names):
            faults.append(Fault(f"{found.where(i)}: class {label} is not in the class map", (key,)))
            continue
        wrong = [f"{where} has {other}" for where, other in ids.items() if other != label]
        expected = (names[label], found.splits[i])
        wrong += [f"{where} has {' in '.join(other)!r}" for where, other in texts.items() if other != expected]
        if wrong:
            known = f"cls has {label} ({names[label]} in {expected[1]})"
            faults.append(Fault(f"{found.where(i)}: {known}, but {', '.join(wrong)}", (key,)))
    there = set(found.keys)
    for key in rows:
        # a kept image may be missing only because its shard, or any shard if it is unknown, could not be read
        unread = shard_of[key] in found.unread if key in shard_of else bool(found.unread)
        if key not in there and not unread:
            faults.append(Fault(f"curated.parquet keeps {key}, but no shard holds it", (key,)))
    return faults


def _tags(dataset: Dataset, found: Contents) -> list[Fault]:
    """Samples whose tags disagree with `sample_tags.parquet`, and counts in `tags.csv` that do not add up."""
    listed = [name for name in tags.FILES if (dataset.path / name).exists()]
    digests = found.result.json_tags
    if not listed:
        return [
            Fault(f"{found.where(i)}: its json has tags, but the dataset has no {tags.VOCABULARY}", (found.keys[i],))
            for i, digest in enumerate(digests)
            if digest
        ]
    try:
        vocabulary = tags.read_vocabulary(dataset.path)
        keys = dataset.index["key"]
        assigned = tags.read_assigned(dataset.path, keys, len(vocabulary))
    except UsageError as error:
        return [Fault(str(error))]
    row_of = {key: row for row, key in enumerate(keys.to_pylist())}
    faults = [
        Fault(f"{found.where(i)}: its tags are not those in {tags.ASSIGNED}", (key,))
        for i, (key, digest) in enumerate(zip(found.keys, digests, strict=True))
        if key in row_of
        and found.result.json_fields[i]
        and digest != tags.digest(vocabulary.grouped(assigned.of(row_of[key])))
    ]
    split = np.array(dataset.index["split"].to_pylist())
    counted = {name: assigned.take(np.flatnonzero(split == name)).totals(len(vocabulary)) for name in dataset.splits}
    for name, counts in counted.items():
        if not np.array_equal(vocabulary.counts.get(name, np.empty(0)), counts):
            faults.append(Fault(f"{tags.VOCABULARY}: the counts of {name} are not those in {tags.ASSIGNED}"))
    return faults


def _class_table(dataset: Dataset) -> list[Fault]:
    """Differences between `classes.csv` and the class map of `dataset.json`."""
    expected = [["class_id", "name", *dataset.splits, "total"]]
    for info in dataset.classes:
        expected.append(
            [str(info.id), text_tables.cell_of(info.name), *(str(info.counts.get(name, 0)) for name in dataset.splits)]
        )
        expected[-1].append(str(info.total))
    try:
        with (dataset.path / "classes.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, ValueError, csv.Error):
        return [Fault("classes.csv is missing or not a CSV file")]
    if len(rows) != len(expected):
        return [Fault(f"classes.csv has {len(rows) - 1:,} classes, dataset.json {len(expected) - 1:,}")]
    return [
        Fault(f"classes.csv line {number} is {','.join(row)!r}, dataset.json has {','.join(line)!r}")
        for number, (row, line) in enumerate(zip(rows, expected, strict=True), 1)
        if row != line
    ]


def _leaks(
    dataset: Dataset,
    found: Contents,
    curated: dict[str, list[Any]] | None,
    settings: DuplicatesSection,
    related: Sequence[copies.Related],
    *,
    decode: bool,
) -> tuple[list[Fault], dict[str, int]]:
    """Images, groups and near duplicates in several splits: one fault per pair of samples, and their count by split.

    Args:
        dataset: supplies the split strategy.
        found: the samples.
        curated: columns of curated.parquet; without them, groups and source images are not compared.
        settings: thresholds of near duplicates.
        related: pairs of images whose pixels were compared.
        decode: whether `found` has pixels.
    """
    n = len(found.keys)
    groups, sources = [""] * n, [""] * n
    by_name: list[tuple[str, ...]] = []
    if curated is not None:
        rows = {key: i for i, key in enumerate(curated["key"])}
        chosen = [rows.get(key, -1) for key in found.keys]
        groups = [curated["group"][row] if row >= 0 else "" for row in chosen]
        sources = [f"{curated['source'][row]} {curated['source_id'][row]}" if row >= 0 else "" for row in chosen]
        by_name = _families(
            dataset, [(curated["source_id"][i], curated["label"][i]) if i >= 0 else ("", "") for i in chosen]
        )
    result = found.result
    pixels = (
        leaks.PixelColumns(result.decoded, result.pixels, result.image_hashes(settings.other_hash), result.thumbnails)
        if decode
        else None
    )
    known = ""  # explains leaks that the recipe permits
    if dataset.split_strategy in ("published", "legacy-dafre"):
        known = f", as the split strategy {dataset.split_strategy} allows"
    elif not settings.near:
        known = ", in a recipe without a search for near duplicates"
    faults = []
    found_leaks = leaks.find(found.splits, groups, sources, result.sha256, pixels, settings, by_name, related)
    for leak in found_leaks:
        pair = (leak.first, leak.second)
        keys, splits = tuple(found.keys[i] for i in pair), tuple(found.splits[i] for i in pair)
        both = " and ".join(f"{key} in {split}" for key, split in zip(keys, splits, strict=True))
        faults.append(Fault(f"{both}: {', '.join(leak.why)}{known}", keys, splits))
    return faults, leaks.straddling_counts(found_leaks, found.splits)


def _families(dataset: Dataset, named: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Tokens of the families of samples by their names, if the recipe's `source.family` is `auto`; otherwise empty.

    With a regular expression, only groups count: the recipe of a dataset is untrusted, and a pattern may not end.

    Args:
        dataset: supplies the recipe.
        named: the source's id and the label of each sample.
    """
    try:
        option = families.option_of(dataset.recipe)
    except UsageError:  # the recipe cannot be read, which is another fault
        option = ""
    return families.of_images(option, [source_id for source_id, _ in named], [label for _, label in named])


def _accounting(dataset: Dataset, curated: dict[str, list[Any]]) -> list[Fault]:
    """Differences between the totals of `dataset.json` and the rows of curated.parquet."""
    faults = []

    def compare(what: str, listed: Any, counted: Any) -> None:
        if listed != counted:
            faults.append(Fault(f"dataset.json: {what} is {listed}, but {counted} in curated.parquet"))

    kept = [i for i, keep in enumerate(curated["kept"]) if keep]
    dropped = Counter(reason for reason, keep in zip(curated["reason"], curated["kept"], strict=True) if not keep)
    compare("seen", dataset.seen, len(curated["key"]))
    compare("kept", dataset.kept, len(kept))
    for reason in sorted(dropped.keys() | dataset.dropped.keys()):
        compare(f"dropped as '{reason}'", dataset.dropped.get(reason, 0), dropped[reason])
        if reason not in MEANINGS:
            faults.append(Fault(f"'{reason}' is not a known reason to drop an image"))
    if dataset.seen != dataset.kept + sum(dataset.dropped.values()):
        faults.append(Fault("dataset.json: seen does not equal kept + dropped"))
    compare("images", dataset.images, len(kept))
    compare("samples in splits", len(dataset), len(kept))
    if len(set(curated["key"])) != len(curated["key"]):
        faults.append(Fault("curated.parquet contains a key twice"))
    for i in (i for i in kept if curated["reason"][i]):
        faults.append(Fault(f"curated.parquet keeps {curated['key'][i]} but has a reason to drop it"))
    counts = Counter((curated["class_id"][i], curated["split"][i]) for i in kept)
    listed = {(info.id, split): n for info in dataset.classes for split, n in info.counts.items() if n}
    for label, split in sorted(counts.keys() | listed.keys(), key=str):
        compare(f"class {label} in {split}", listed.get((label, split), 0), counts[label, split])
    return faults
