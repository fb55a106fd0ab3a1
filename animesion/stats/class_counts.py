"""Count the images of each class in datasets, label files, shards and class folders.

Counts are compared between the files of one source. `animesion.stats.long_tail` computes statistics of the counts, and
`animesion.verification.checks` verifies that files are intact and samples decode.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from animesion.dataset import label_files, tags
from animesion.dataset.label_files import ClassCounts, LabelFiles, LabelTable
from animesion.errors import UsageError
from animesion.sources import class_folders

SPLITS = ("train", "val", "test")

#: Called with the shards that are about to be read; yields them, and may show progress.
Track = Callable[[list[Path]], Iterable[Path]]

# a label has a few digits and the JSON of a sample a few hundred bytes: larger members are not read into memory
_MAX_CLS_BYTES, _MAX_JSON_BYTES = 64, 1 << 20


@dataclass(frozen=True)
class Counted:
    """Class counts of a path.

    Attributes:
        kind: dataset, labels, counts, shards or folders.
        counts: images of each class by split.
        files: rows and classes of each file that was read, by file name.
        consistency: disagreements between files.
        tags: by category, the number of tags and of their uses, and the most frequent ones; empty without tags.
        reading: how class folders were understood, in one sentence; empty for other kinds.
    """

    kind: str
    counts: ClassCounts
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    consistency: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, dict[str, Any]] = field(default_factory=dict)
    reading: str = ""


def count(path: str, track: Track = iter) -> Counted:
    """Count the images of each class at a path of any kind.

    Args:
        path: a built dataset or its URL, a folder of label files, one label or counts CSV, a shard, a folder or glob of
            shards, or a folder of class folders.
        track: wraps the list of shards while they are read.

    Raises:
        UsageError: nothing to count was found, or a file is damaged.
    """
    if "://" in path:
        from animesion.dataset import remote

        return _dataset(remote.local(path))
    place = Path(path)
    if not place.exists():
        shards = [Path(p) for p in sorted(glob.glob(path)) if p.endswith(".tar")]
        if shards:
            return _shards(shards, track)
        raise UsageError(f"{path} does not exist and matches no shard; check the path")
    if place.is_file():
        if place.suffix == ".tar":
            return _shards([place], track)
        if place.suffix == ".csv":
            return _csv(place)
        raise UsageError(f"{path} is neither .csv nor .tar; give a label file, a shard or a folder")
    # most specific first: a built dataset has shards too, and a folder of label files may have class folders
    if (place / "dataset.json").is_file():
        return _dataset(place)
    for folder in (place, place / "labels"):
        if folder.is_dir():
            files = label_files.with_class_ids(label_files.find_label_files(folder))
            if files.labels or files.counts:
                return _labels(folder, files)
    for folder in (place, place / "data"):
        shards = sorted(folder.glob("*.tar"))
        if shards:
            return _shards(shards, track)
    return _folders(place)


def _dataset(folder: Path) -> Counted:
    counts = label_files.read_class_counts(folder / "classes.csv")
    files: dict[str, dict[str, Any]] = {"classes.csv": {"rows": len(counts.ids), "classes": len(counts.ids)}}
    consistency: dict[str, Any] = {}
    if (folder / "index.parquet").is_file():
        indexed = _index(folder / "index.parquet")
        files["index.parquet"] = {"rows": sum(indexed.values()), "classes": len({c for _, c in indexed})}
        unknown = sorted({split for split, _ in indexed} - set(counts.splits))
        for name, images in counts.splits.items():
            in_index = {c: n for (split, c), n in indexed.items() if split == name}
            consistency[name] = {"file": "index.parquet", "mismatched_classes": counts.differing(images, in_index)}
        if unknown:
            consistency["unknown_splits"] = unknown
    return Counted("dataset", counts, files, consistency, _tags(folder))


def _tags(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / tags.VOCABULARY).is_file():
        return {}
    vocabulary = tags.read_vocabulary(folder)
    totals = [sum(counts) for counts in zip(*(each.tolist() for each in vocabulary.counts.values()), strict=True)]
    found = {}
    for category, ids in vocabulary.ranges.items():
        frequent = sorted(ids, key=lambda i: (-totals[i], i))[:3]
        found[category] = {
            "tags": len(ids),
            "uses": sum(totals[i] for i in ids),
            "most_frequent": {vocabulary.names[i]: totals[i] for i in frequent},
        }
    return found


def _index(path: Path) -> Counter[tuple[str, int]]:
    """Number of rows of the index by split and class id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = (
            pq.read_table(path, columns=["split", "label"]).group_by(["split", "label"]).aggregate([([], "count_all")])
        )
        triples = zip(*(rows[name].to_pylist() for name in ("split", "label", "count_all")), strict=True)
        return Counter({(str(split), int(label)): count for split, label, count in triples})
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as e:
        raise UsageError(f"{path} is not an index with the columns split and label; rebuild the dataset") from e


def _csv(path: Path) -> Counted:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            head = [cell.strip().lower() for cell in lines.readline(10_000).split(",")]
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}); give a readable file") from e
    if label_files.is_counts_header(head):
        counts = label_files.read_class_counts(path)
        return Counted("counts", counts, {path.name: {"rows": len(counts.ids), "classes": len(counts.ids)}})
    if path.name == label_files.NAMES_FILE:
        raise UsageError(f"{path} has class names but no counts; give a label file or its folder")
    table = label_files.read_labels(path)
    names = path.with_name(label_files.NAMES_FILE)
    known = label_files.read_class_names(names) if names.is_file() else {}
    split = path.stem if path.stem in label_files.LABEL_FILES else "all"
    return Counted("labels", label_files.count_classes({split: table.counts()}, known), {path.name: _figures(table)})


def _labels(folder: Path, there: LabelFiles) -> Counted:
    tables = {name: label_files.read_labels(path) for name, path in there.labels.items()}
    files = {there.labels[name].name: _figures(table) for name, table in tables.items()}
    for path in there.others:
        try:
            files[path.name] = {**_figures(label_files.read_labels(path)), "counted": False}
        except UsageError:
            files[path.name] = {"counted": False}  # another kind of table, such as tags, is not an error
    known = label_files.read_class_names(there.names) if there.names else {}
    if there.names:
        files[there.names.name] = {"rows": len(known), "classes": len(known)}
    consistency: dict[str, Any] = {}
    if there.counts:
        counts = label_files.read_class_counts(there.counts)
        files[there.counts.name] = {"rows": len(counts.ids), "classes": len(counts.ids)}
        for name in (split for split in counts.splits if split in tables):
            differ = counts.differing(counts.splits[name], tables[name].counts())
            consistency[name] = {"file": f"{name}.csv", "mismatched_classes": differ}
        if known:
            given = dict(zip(counts.ids.tolist(), counts.names, strict=True))
            differ = sum(given.get(c) != known.get(c) for c in given.keys() | known.keys())
            consistency["names"] = {"file": label_files.NAMES_FILE, "mismatched_classes": differ}
    else:
        # train_val repeats train and val if those exist too
        split_up = tables.keys() & {"train", "val"}
        counts = label_files.count_classes(
            {n: t.counts() for n, t in tables.items() if n != "train_val" or not split_up}, known
        )
    pairs = itertools.combinations([name for name in SPLITS if name in tables], 2)
    shared = {f"{a}/{b}": len(set(tables[a].paths).intersection(tables[b].paths)) for a, b in pairs}
    return Counted("labels", counts, files, {**consistency, **({"shared_paths": shared} if shared else {})})


def _folders(root: Path) -> Counted:
    found = class_folders.read(root)
    sizes = {split: {name: len(images) for name, images in classes.items()} for split, classes in found.splits.items()}
    names = sorted(set().union(*sizes.values()))
    ids = {name: i for i, name in enumerate(names)}
    splits = {split: {ids[name]: n for name, n in counts.items()} for split, counts in sizes.items()}
    counts = label_files.count_classes(splits, dict(enumerate(names)))
    return Counted("folders", counts, reading=found.summary)


def _shards(paths: list[Path], track: Track) -> Counted:
    names: dict[int, str] = {}
    splits: dict[str, Counter[int]] = defaultdict(Counter)
    files: dict[str, dict[str, Any]] = {}
    unlabelled = 0
    for path in track(paths):
        labels, without = _shard(path, names)
        numbered = re.fullmatch(r"(.+?)[-_]\d+", path.stem)
        splits[numbered[1] if numbered else path.stem].update(labels)
        files[path.name] = {"rows": labels.total(), "classes": len(labels)}
        unlabelled += without
    return Counted("shards", label_files.count_classes(splits, names), files, {"samples_without_label": unlabelled})


def _shard(path: Path, names: dict[int, str]) -> tuple[Counter[int], int]:
    """Number of samples of each label, and of samples without one.

    Args:
        path: of the shard.
        names: class id -> name; names that are not known yet are added.
    """
    labels: dict[str, int] = {}
    keys: set[str] = set()
    described = ("", b"")  # key and JSON of the current sample; the members of a sample are adjacent
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
        # tarfile treats a damaged or missing header as the end; a real end is a block of zeros
        with path.open("rb") as data:
            data.seek(end)
            if data.read(512) != bytes(512):
                raise tarfile.ReadError("no end of archive")
    except (tarfile.TarError, EOFError, OSError, ValueError, MemoryError, OverflowError, RecursionError) as e:
        why = str(e) or "a member is larger than the file"
        raise UsageError(f"{path} is not a whole uncompressed tar ({why}); copy or build the shard again") from e
    return Counter(labels.values()), len(keys - labels.keys())


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo, limit: int, path: Path, key: str) -> bytes:
    if member.size > limit:
        raise UsageError(
            f"{path}, sample {key[:80]!r}: {member.name.rpartition('.')[2]} of {member.size:,} bytes exceeds the "
            f"limit of {limit:,}; build the shard again"
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
        return  # names are optional here; `animesion verify` reports invalid JSON
    if isinstance(sample, dict) and isinstance(sample.get("name"), str):
        names.setdefault(label, sample["name"])


def _figures(table: LabelTable) -> dict[str, Any]:
    repeated = len(table.paths) - len(set(table.paths))
    return {"rows": len(table.paths), "classes": len(table.counts()), "repeated_paths": repeated}
