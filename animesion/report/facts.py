"""Data of the report of a build, from its tables: funnel, classes, clusters, drops, histograms and audit findings.

The result is JSON-ready and deterministic. Counts cover the whole build; lists and thumbnails are capped to keep the
page small, and `animesion browse` serves the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from animesion import schemas, splits
from animesion.dataset import tags
from animesion.dataset.dataset import Dataset
from animesion.errors import UsageError
from animesion.report.boxes import BOXED_SIDE, Boxes
from animesion.report.images import SIDE as SAMPLE_SIDE
from animesion.report.images import Album, Images, Rows
from animesion.report.pairs import KINDS, SIDE, Pair, Pairs
from animesion.stats import long_tail

#: Byte budgets of the thumbnails of classes, clusters, pairs and drops, before base64 makes them a third larger.
SAMPLE_BYTES, CLUSTER_BYTES, PAIR_BYTES, DROP_BYTES = 6_000_000, 750_000, 750_000, 500_000

#: Most entries of each list on a page.
CLASS_SAMPLES, CLUSTERS, MEMBERS, DROPS, DROP_IMAGES, FINDINGS = 12, 300, 12, 100, 24, 500

#: Most characters of a text on a page; longer ones are cut.
MOST_TEXT = 500

_BINS = 32

#: Longest sides of a class's images, and images by which one of them is chosen.
_SIDES, _PROBES = (SAMPLE_SIDE, 80, 64, 48, 32, 24, 16), 64

#: Keys that are hashed at once.
_BATCH = 65_536

_MOST_AUDIT = 200_000_000


@dataclass(frozen=True)
class Measure:
    """A column with a histogram.

    Attributes:
        title: caption, with the unit.
        log: whether the axis is logarithmic.
        least: smallest real value; smaller ones mark images that were not measured.
        whole: whether values are whole numbers.
        unit: `bytes`, `share`, or empty.
    """

    title: str
    log: bool = False
    least: float = 0.0
    whole: bool = False
    unit: str = ""


#: Histograms that every build has.
_SHORT_SIDE = Measure("short side in pixels", log=True)
_ASPECT_RATIO = Measure("aspect ratio: long side over short side")
_FILE_SIZE = Measure("file size", log=True, unit="bytes")


#: Columns of `features/part-*.parquet` with a histogram, if a build has them.
MEASURES = {
    "face_score": Measure("score of the best face box", least=1e-9),
    "jpeg_quality": Measure("JPEG quality, 1 to 100", least=1, whole=True),
    "sharpness": Measure("sharpness: variance of the Laplacian", log=True),
    "light": Measure("light: 99th percentile of the grey levels", whole=True),
    "dark": Measure("dark: 5th percentile of the grey levels", whole=True),
    "contrast": Measure("contrast: standard deviation of the grey levels"),
    "chroma": Measure("chroma: deviation of the colours"),
    "border": Measure("share of plain borders", unit="share"),
    "panels": Measure("panels separated by plain gutters", whole=True),
    "lines": Measure("rows that look like a line of text", whole=True),
}


def of_dataset(dataset: Dataset, audit: Path | None = None, images: Images | None = None) -> dict[str, Any]:
    """Collect all data of the report of a build.

    Args:
        dataset: the build.
        audit: path of the `audit.json` of `animesion audit`, None for a report without one.
        images: the images of the build, if they have been opened.

    Returns:
        JSON-ready data, as the assets of the page expect them.

    Raises:
        UsageError: a table or the audit is missing or damaged.
    """
    images, album = images or Images(dataset), Album()
    boxes = Boxes(images)
    found = overview(dataset, images.rows, audit)
    found["classes"]["samples"] = _samples(images, album)
    shown = []
    until = album.used + CLUSTER_BYTES
    for cluster in clusters(images.rows)[:CLUSTERS]:
        listed = [item(images.rows, i) for i in cluster.rows[:MEMBERS]]
        for member in listed:
            member["image"] = album.add(images.thumbnail(images.rows[member["row"]]), until)
        more = max(0, len(cluster.rows) - MEMBERS)
        together = {"members": [_without_row(member) for member in listed], "more": more}
        shown.append({"name": cluster.name, "conflict": cluster.conflict, **together})
    found["clusters"]["items"] = shown
    found["pairs"] = _shown_pairs(Pairs(images), album)
    _add_drops(found["drops"], images, boxes, album)
    found["images"] = album.images
    return found


def _add_drops(reasons: list[dict[str, Any]], images: Images, boxes: Boxes, album: Album) -> None:
    """Add some images of each drop reason, with thumbnails within `DROP_BYTES`, in turn: none is left without one."""
    for reason in reasons:
        every = dropped(images.rows, reason["reason"])
        listed = [item(images.rows, i) for i in every[_hashed(images.rows, every)[:DROPS]].tolist()]
        boxes.add(listed)
        reason["items"] = listed
    until = album.used + DROP_BYTES
    for turn in range(DROP_IMAGES):
        for reason in reasons:
            if turn < len(reason["items"]):
                entry = reason["items"][turn]
                size = (BOXED_SIDE,) if "boxes" in entry else ()
                entry["image"] = album.add(images.thumbnail(images.rows[entry["row"]], *size), until)
    for reason in reasons:
        reason["pictured"] = any(entry["image"] >= 0 for entry in reason["items"])
        reason["items"] = [_without_row(entry) for entry in reason["items"]]


def overview(dataset: Dataset, rows: Rows, audit: Path | None = None) -> dict[str, Any]:
    """Collect the data of the report, without images and without the lists of clusters and drops.

    Args:
        dataset: the build.
        rows: `Images.rows` of the build.
        audit: path of the `audit.json` of `animesion audit`, None for a report without one.

    Raises:
        UsageError: a table or the audit is missing or damaged.
    """
    metadata = _metadata(dataset.path / "dataset.json")
    counts = {name: [info.counts.get(name, 0) for info in dataset.classes] for name in dataset.splits}
    totals = [info.total for info in dataset.classes]
    recipe = dataset.recipe
    raw = (dataset.path / "raw").is_dir()
    decoded = rows.numbers("width") > 0
    reasons = [
        {
            "reason": clip(name),
            "count": count,
            "meaning": clip(schemas.MEANINGS.get(name, "")),
            "pictured": raw and bool(decoded[dropped(rows, name)].any()),
        }
        for name, count in dataset.dropped.items()
    ]
    named = rows.column("cluster").filter(pc.not_equal(rows.column("cluster"), ""))
    cluster_sizes = named.value_counts().field("counts").to_numpy()
    return {
        "kind": "dataset",
        "name": dataset.name,
        "title": clip(recipe.card.title or dataset.name),
        "summary": clip(recipe.card.summary or recipe.summary),
        "licence": clip(recipe.card.licence),
        "recipe": clip(metadata["recipe"]),
        "source": clip(recipe.source.kind),
        "strategy": clip(dataset.split_strategy),
        "seen": dataset.seen,
        "fetched": metadata["fetched"],
        "kept": dataset.kept,
        "notes": [*metadata["notes"], *metadata["tags"]],
        "drops": reasons,
        "splits": [
            {"name": split.name, "samples": split.samples, "bytes": split.bytes} for split in dataset.splits.values()
        ],
        "bands": {"many_above": long_tail.MANY_ABOVE, "few_below": long_tail.FEW_BELOW},
        "tail": long_tail.describe(totals, shown=1).to_dict() if totals else None,
        "train_bands": _bands(counts.get("train", [])),
        "classes": {"names": [clip(info.name) for info in dataset.classes], "counts": counts},
        "clusters": {"total": int((cluster_sizes > 1).sum()), "conflicts": metadata["conflicts"]},
        "histograms": histograms(dataset, rows),
        "audit": _audit(audit),
    }


def item(rows: Rows, i: int) -> dict[str, Any]:
    """The entry of an image in the page's lists.

    Args:
        rows: `Images.rows` of the build.
        i: index of the image's row.

    Returns:
        JSON-ready fields; `row` is `i`, and `image` is -1 until a thumbnail is added.
    """
    row = rows[i]
    return {
        "row": i,
        "key": row["key"],
        "label": clip(row["label"]),
        "split": row["split"],
        "kept": row["kept"],
        "reason": row["reason"],
        "detail": clip(row["detail"]),
        "keeper": row["keeper"],
        "cluster": row["cluster"],
        "width": row["width"],
        "height": row["height"],
        "bytes": row["bytes"],
        "source_id": clip(row["source_id"]),
        "url": web_address(row["page_url"]),
        "image": -1,
    }


def web_address(text: str) -> str:
    """A text that a page may link to: an http or https address of at most `MOST_TEXT` characters, else empty."""
    return text if text.startswith(("https://", "http://")) and len(text) <= MOST_TEXT else ""


class Cluster(NamedTuple):
    """A cluster of at least two duplicates.

    Attributes:
        name: the smallest key.
        rows: index of each member's row, kept images first.
        conflict: whether the members have several labels.
    """

    name: str
    rows: list[int]
    conflict: bool


def clusters(rows: Rows) -> list[Cluster]:
    """Every cluster of at least two duplicates: those with several labels first, then larger ones.

    Args:
        rows: `Images.rows` of the build.
    """
    column = rows.column("cluster")
    chosen = np.flatnonzero(pc.not_equal(column, "").to_numpy(zero_copy_only=False))
    names = column.take(pa.array(chosen)).to_pylist()
    kept = rows.numbers("kept")
    labels = rows.column("label").indices.to_numpy()
    members: dict[str, list[int]] = {}
    for i, name in zip(chosen.tolist(), names, strict=True):
        members.setdefault(name, []).append(i)
    found = []
    for name, together in members.items():
        if len(together) > 1:
            together.sort(key=lambda i: (not kept[i], rows.value("key", i)))
            found.append(Cluster(name, together, len({labels[i] for i in together}) > 1))
    return sorted(found, key=lambda each: (not each.conflict, -len(each.rows), each.name))


def pair(rows: Rows, each: Pair) -> dict[str, Any]:
    """The entry of a pair in the page's lists; `image` is -1 until a strip is added."""
    return {
        "first": item(rows, each.first),
        "second": item(rows, each.second),
        "verdict": each.verdict,
        "decided": each.decided,
        "whole": each.whole,
        "inliers": each.inliers,
        "residual": round(each.residual, 1),
        "how": clip(each.how),
        "image": -1,
    }


def pair_totals(pairs: Pairs) -> dict[str, Any]:
    """Number of pairs by kind, and of those with an image of a published dataset."""
    return {"totals": {kind: len(places) for kind, places in pairs.of_kind.items()}, "published": pairs.published}


def dropped(rows: Rows, reason: str) -> npt.NDArray[np.int64]:
    """Row indices of all images that were dropped for a reason, ascending."""
    return np.flatnonzero(~rows.numbers("kept") & rows.equal("reason", reason))


class Members:
    """Row indices of the kept images of each class, in hash order, so that the first few are a random sample.

    Args:
        rows: `Images.rows` of the build.
        classes: number of classes.
    """

    def __init__(self, rows: Rows, classes: int) -> None:
        ids = rows.numbers("class_id")
        kept = np.flatnonzero(rows.numbers("kept") & (ids >= 0) & (ids < classes))
        self._table = rows
        self._rows = kept[np.argsort(ids[kept], kind="stable")]
        self._ends = np.cumsum(np.bincount(ids[kept], minlength=classes))
        self._hashed: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, label: int) -> npt.NDArray[np.int64]:
        if not 0 <= label < len(self):
            raise IndexError(label)
        if label not in self._hashed:
            found = self._rows[self._ends[label - 1] if label else 0 : self._ends[label]]
            self._hashed[label] = found[_hashed(self._table, found)]
        return self._hashed[label]


def _hashed(rows: Rows, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The positions of some rows in `chosen`, in the order of the hashes of their keys."""
    keys = rows.column("key")
    hashes = np.empty((len(chosen), 2), dtype=np.uint64)
    for start in range(0, len(chosen), _BATCH):
        some = keys.take(pa.array(chosen[start : start + _BATCH])).to_pylist()
        content = b"".join(splits.hashed_order(0, key) for key in some)
        hashes[start : start + _BATCH] = np.frombuffer(content, dtype=">u8").reshape(-1, 2)
    return np.lexsort((hashes[:, 1], hashes[:, 0]))


def clip(text: str) -> str:
    """Text cut to `MOST_TEXT` characters."""
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"


def histograms(dataset: Dataset, rows: Rows) -> list[dict[str, Any]]:
    """Histograms of image sizes and of the columns of `MEASURES`, for kept and for dropped images."""
    seen = (rows.numbers("width") > 0) & (rows.numbers("height") > 0)
    kept = rows.numbers("kept")[seen]
    width, height, bytes_ = (rows.numbers(name)[seen].astype(np.float64) for name in ("width", "height", "bytes"))
    found = [
        _histogram(_SHORT_SIDE, np.minimum(width, height), kept),
        _histogram(_ASPECT_RATIO, np.maximum(width, height) / np.minimum(width, height), kept),
        _histogram(_FILE_SIZE, bytes_, kept),
    ]
    of_kept = rows.column("key").filter(pa.array(rows.numbers("kept")))
    for name, (keys, values) in _measured(dataset.path / "features").items():
        measure = MEASURES[name]
        chosen = values >= measure.least
        of = pc.is_in(keys, value_set=of_kept).to_numpy(zero_copy_only=False)
        found.append(_histogram(measure, values[chosen], of[chosen]))
    return [each for each in found if each]


def audit_of(path: Path) -> Path | None:
    """Path of a dataset's own audit, `audit/audit.json`; None if it has none."""
    found = path / "audit" / "audit.json"
    return found if found.is_file() else None


def _samples(images: Images, album: Album) -> list[list[dict[str, Any]]]:
    """Up to `CLASS_SAMPLES` images per class, within `SAMPLE_BYTES`.

    Round robin: every class gets its first image before any class gets its second. Where there are so many classes that
    the first ones would exceed the budget, thumbnails are smaller.
    """
    of_class = Members(images.rows, len(images.dataset.classes))
    chosen: list[list[dict[str, Any]]] = [[] for _ in range(len(of_class))]
    classes = [label for label in range(len(of_class)) if len(of_class[label])]
    side = sample_side(images, [int(of_class[label][0]) for label in classes])
    for done, label in enumerate(classes, 1):
        row = images.rows[int(of_class[label][0])]
        # what classes before did not use is left for those after them
        until = SAMPLE_BYTES * done // len(classes)
        place = -1
        for smaller in (side, *(each for each in _SIDES if each < side)):
            content = images.thumbnail(row, smaller)
            if content is None or album.fits(content, until):
                break
        if content is not None:
            # of a hundred thousand classes, even the smallest exceed the budget: each class has an image even so
            place = album.add(content, max(until, album.used + len(content)))
        chosen[label].append({"key": row["key"], "split": row["split"], "image": place})
    for turn in range(1, CLASS_SAMPLES):
        for label in classes:
            if turn >= len(of_class[label]):
                continue
            row = images.rows[int(of_class[label][turn])]
            place = album.add(images.thumbnail(row, side), SAMPLE_BYTES)
            if place == -2:
                return chosen
            chosen[label].append({"key": row["key"], "split": row["split"], "image": place})
    return chosen


def sample_side(images: Images, firsts: Sequence[int]) -> int:
    """The side at which the first images of all classes are within `SAMPLE_BYTES`, by some of them.

    Args:
        images: the images of the build.
        firsts: the row of the first image of each class that has one.
    """
    probes = [images.rows[i] for i in firsts[:: -(-len(firsts) // _PROBES) or 1]]
    for side in _SIDES:
        sizes = [len(content) for row in probes if (content := images.thumbnail(row, side)) is not None]
        if sum(sizes) * len(firsts) <= SAMPLE_BYTES * max(1, len(sizes)):
            return side
    return _SIDES[-1]


def _shown_pairs(pairs: Pairs, album: Album) -> dict[str, Any]:
    """The pairs of each kind that a file shows, within `PAIR_BYTES`: each kind has a share of it by its number."""
    rows = pairs.images.rows
    until = album.used
    items: dict[str, list[dict[str, Any]]] = {}
    for kind, most in KINDS.items():
        until += PAIR_BYTES * most // sum(KINDS.values())
        items[kind] = []
        for place in pairs.of_kind[kind][:most]:
            entry = pair(rows, pairs.every[place])
            entry["image"] = album.add(pairs.strip(pairs.every[place], SIDE), until)
            if entry["image"] == -2:
                break
            entry |= {name: _without_row(entry[name]) for name in ("first", "second")}
            items[kind].append(entry)
    return {**pair_totals(pairs), "items": items}


def _without_row(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "row"}


def _metadata(path: Path) -> dict[str, Any]:
    """Fields of `dataset.json` that `Dataset` does not read; the file is untrusted, so every type is checked."""
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    funnel = facts.get("funnel")
    fetched = funnel.get("fetched") if isinstance(funnel, dict) else None
    notes = facts.get("notes")
    return {
        "recipe": facts["recipe"] if isinstance(facts.get("recipe"), str) else "",
        "fetched": fetched if isinstance(fetched, int) else None,
        "conflicts": facts["label_conflicts"] if isinstance(facts.get("label_conflicts"), int) else 0,
        "notes": [clip(note) for note in notes if isinstance(note, str)][:FINDINGS] if isinstance(notes, list) else [],
        "tags": tags.of_facts(facts.get("tags")),
    }


def _bands(counts: Sequence[int]) -> dict[str, dict[str, int]]:
    if not counts:
        return {}
    return {
        name: {"classes": band.classes, "images": band.images} for name, band in vars(long_tail.bands(counts)).items()
    }


def _measured(folder: Path) -> dict[str, tuple[pa.Array, npt.NDArray[np.float64]]]:
    """Keys and finite values of the columns of `MEASURES` that all parts have; empty without `features/`."""
    paths = sorted(folder.glob("part-*.parquet"))
    try:
        columns = [set(pq.read_schema(path).names) for path in paths]
        names = [name for name in MEASURES if columns and all(name in each for each in columns)]
        if not names:
            return {}
        table = pa.concat_tables([pq.read_table(path, columns=["key", "face", *names]) for path in paths])
        keys, faces = (table[name].combine_chunks() for name in ("key", "face"))
        several = pc.greater(faces, 0).fill_null(False)
        of_faces = map(schemas.sample_key, keys.filter(several).to_pylist(), faces.filter(several).to_pylist())
        keys = pc.replace_with_mask(keys, several, pa.array([*of_faces], keys.type))
        found = {}
        for name in names:
            values = table[name].combine_chunks().cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
            finite = np.isfinite(values)
            found[name] = (keys.filter(pa.array(finite)), values[finite])
        return found
    except (pa.ArrowException, OSError, KeyError, ValueError):
        raise UsageError(f"{folder} is damaged: delete it, or run `animesion build` again") from None


def _histogram(measure: Measure, values: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]) -> dict[str, Any] | None:
    """Counts per bin; on a logarithmic axis, values of 0 are in the first bin. None if there are no values.

    Bins of whole numbers hold the same number of them each: others would leave gaps between bars.
    """
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if measure.log:
        # the axis starts at the smallest positive value; `np.clip` below moves zeros into the first bin
        low = max(low, float(values[values > 0].min(initial=np.inf)) if (values > 0).any() else 1.0)
        high = max(high, low)
    if low == high:  # a single value gets one bin
        edges = np.array([low, low + 1.0])
    elif measure.log:
        edges = np.geomspace(low, high, _BINS + 1)
    elif measure.whole:
        width = -(-int(high - low + 1) // _BINS)
        edges = np.arange(low - 0.5, high + width, width)
    else:
        edges = np.linspace(low, high, _BINS + 1)
    inside = np.clip(values, edges[0], edges[-1])
    of_kept, of_dropped = (np.histogram(inside[chosen], edges)[0].tolist() for chosen in (kept, ~kept))
    shown = [float(f"{edge:.6g}") for edge in edges]
    axis = {"log": measure.log, "whole": measure.whole, "unit": measure.unit}
    return {"title": measure.title, **axis, "edges": shown, "kept": of_kept, "dropped": of_dropped}


def _audit(path: Path | None) -> dict[str, Any] | None:
    """The findings of `animesion audit`; None without a path.

    Raises:
        UsageError: the file cannot be read or is not an `audit.json`.
    """
    if path is None:
        return None
    try:
        if path.stat().st_size > _MOST_AUDIT:
            raise ValueError
        content = json.loads(path.read_bytes())
        findings = [
            {name: clip(str(each[name])) for name in ("key", "split", "label", "kind", "suggested", "nearest")}
            | {"score": round(float(each["score"]), 4)}
            for each in content["findings"][:FINDINGS]
        ]
        return {"total": len(content["findings"]), "model": clip(str(content.get("model", ""))), "items": findings}
    except OSError as error:
        raise UsageError(f"cannot read the audit {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is not an audit.json of `animesion audit`: pass one, or omit --audit") from None
