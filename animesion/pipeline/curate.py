"""Stage 3: every decision that needs the whole dataset, made on tables: `curated.parquet`, one row an image ever seen.

In order: what listing, fetch and decode gave, limits on single images, duplicates and label conflicts,
class sizes, groups, class map, splits. The first reason that holds is the one that is written down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion import splits
from animesion.config import decisions
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dedup import clusters, search
from animesion.dedup.clusters import Rows
from animesion.errors import UsageError
from animesion.images import codec, quality
from animesion.pipeline import embed, published, rules
from animesion.schemas import CURATED, FEATURES, MEANINGS, RAW, DropReason, sample_key
from animesion.storage import checksums, parquet
from animesion.storage.workspace import Receipt, Workspace

CODE = "curate-3"

#: What stands in for the features of an image that has none.
_UNSEEN: dict[str, Any] = {
    "reason": "",
    "detail": "",
    "width": 0,
    "height": 0,
    "plain": False,
    "pixels_blake3": "",
    "phash": 0,
    "phash_flip": 0,
    "faces": -1,
    "face": 0,
    "face_score": 0.0,
}


#: Columns that are written as they were read, and those that are not written either.
_CARRIED = {"page_url", "file_url", "licence", "author", "rating", "md5", "plain", "part", "offset", "thumbnail"}
_UNUSED = {"boxes", "flags", "format", "mode"}


def run(workspace: Workspace, recipe: Recipe, parts: int, crashed: Mapping[str, str]) -> Receipt:
    """Decide, write, commit; or return the receipt that still holds.

    The receipt's facts are JSON-ready: `images` listed, `seen` (faces where each is a sample), `kept`, `dropped` by
    reason, `classes` in the order of their ids, `strategy` of the split, `splits` with their sizes, `clusters` of
    duplicates, `conflicts` (clusters under several labels), `chains` (of near duplicates, cut into several clusters)
    and `notes`.

    Args:
        workspace: output folder whose fetch and inspect stages are done.
        recipe: the recipe.
        parts: number of parts.
        crashed: keys that a later stage found to kill the decoder, with a detail.
    """
    against = recipe.duplicates.against_digests()
    stages = ("fetch", "inspect", "embed") if recipe.duplicates.embedding.model else ("fetch", "inspect")
    inputs = _inputs(workspace, parts, stages) | {f"against/{i}": digest for i, digest in enumerate(against)}
    if recipe.split.keep:
        inputs["keep"] = recipe.split.keep_digest()
    digest = params_digest({"params": _params(recipe), "crashed": dict(crashed)})
    done = workspace.done("curate", CODE, digest, inputs)
    if done:
        return done
    checksums.unseal(workspace.root)
    others = [published.load(Path(folder)) for folder in recipe.duplicates.against]
    rows = _load(workspace, parts)
    if recipe.duplicates.embedding.model:
        rows["embedding"] = embed.read(workspace, parts, rows["key"])
    placed = published.splits_of(Path(recipe.split.keep)) if recipe.split.keep else {}
    curated, facts = decide(rows, recipe, crashed, others, placed)
    outputs = {"curated.parquet": parquet.write(workspace.path("curated.parquet"), curated)}
    return workspace.commit("curate", CODE, digest, inputs, outputs, facts)


def decide(
    rows: Rows,
    recipe: Recipe,
    crashed: Mapping[str, str],
    others: Sequence[published.PublishedFeatures] = (),
    placed: Mapping[str, str] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """The whole decision, without files.

    Args:
        rows: one entry an image: the columns of `RAW`, of `FEATURES` (its reason and detail as `seen_reason` and
            `seen_detail`) and `part`, sorted by key. Thumbnails, and what nothing is decided by, may be Arrow columns.
        recipe: the recipe.
        crashed: keys to drop as `crashed decoder`, with a detail.
        others: published datasets whose images are not to be published again.
        placed: split of the images that were published and are to stay where they are, by key.

    Returns:
        A table of schema `CURATED` in the order of the rows, and the stage's facts.
    """
    keys: Sequence[str] = rows["key"]
    n = len(keys)
    labels = ["|".join(rules.labels_left(candidates, recipe.label)) for candidates in rows["labels"]]
    reason, detail = _single_reasons(rows, recipe, crashed)
    notes = _apply_decisions(keys, labels, recipe, reason)
    keeper = [""] * n
    again = published.twins(rows, _alive(reason), others, recipe)
    if recipe.duplicates.action == "drop":
        for i, (how, twin) in again.items():
            reason[i], detail[i], keeper[i] = DropReason.PUBLISHED_DUPLICATE, how, twin
    elif again:
        notes.append(f"{len(again)} images are in a published dataset already")
    found = clusters.judge(_samples(rows), _alive(reason), labels, recipe)
    for i, verdict in found.dropped.items():
        reason[i], detail[i], keeper[i] = verdict
    team = decisions.teams(recipe.curate.decisions.same)
    for i in found.dropped:
        if reason[i] == DropReason.NEAR_DUPLICATE and keys[i] in team and team[keys[i]] == team.get(keeper[i]):
            reason[i] = DropReason.DUPLICATE_BY_DECISION
    if recipe.split.strategy == "published":
        for i in _alive(reason):
            if rows["split"][i] not in splits.SPLITS:
                reason[i] = DropReason.NO_PUBLISHED_SPLIT
    notes += _apply_class_sizes(keys, labels, recipe, reason)
    families = [
        (*tokens, f"id:{source}:{source_id}")
        for tokens, source, source_id in zip(rows["families"], rows["source"], rows["source_id"], strict=True)
    ]
    groups = _named(search.components(n, [*found.related, _family_pairs(families)]), keys)
    kept = _alive(reason).tolist()
    ranks = [
        -1 if key in recipe.curate.decisions.label else rank
        for key, rank in zip(keys, rows["class_order"], strict=True)
    ]
    class_ids = _class_map(ranks, labels, kept)
    strategy, assignment = _split(rows, recipe, kept, [class_ids[labels[i]] for i in kept], groups, placed or {})
    split_of = dict(zip(kept, assignment.splits, strict=True))
    decided = {
        "kept": [not r for r in reason],
        "reason": reason,
        "detail": detail,
        "keeper": keeper,
        "label": labels,
        "class_id": [class_ids[labels[i]] if i in split_of else -1 for i in range(n)],
        "split": [split_of.get(i, "") for i in range(n)],
        "group": groups,
        "cluster": _named(found.cluster, keys, singles=False),
        "crop": [
            crop or [0, 0, width, height]
            for crop, width, height in zip(rows["crop"], rows["width"], rows["height"], strict=True)
        ],
    }
    if placed and strategy == "grouped":
        notes.append(_stayed(placed, [(keys[i], split_of[i]) for i in kept]))
    if found.conflicts:
        notes.append(f"{found.conflicts} of {found.clusters} duplicate clusters stand under several labels")
    if found.chains:
        bound = recipe.duplicates.diameter or 2 * recipe.duplicates.radius
        notes.append(f"{found.chains} chains of near duplicates were cut: their ends differ in more than {bound} bits")
    columns = [_as_arrow(decided.get(f.name, rows.get(f.name)), f.type) for f in CURATED]
    counts = Counter(reason)
    names = list(class_ids)
    facts = {
        "images": sum(face in (0, 1) for face in rows["face"]),
        "seen": n,
        "kept": len(kept),
        "dropped": {name: counts[name] for name in MEANINGS if counts[name]},
        "classes": names,
        "strategy": strategy,
        "splits": {name: assignment.splits.count(name) for name in splits.SPLITS if name in assignment.splits},
        "clusters": found.clusters,
        "conflicts": found.conflicts,
        "chains": found.chains,
        "notes": [*notes, *(note.replace(f"class {c}:", f"class {names[c]}:", 1) for c, note in assignment.notes)],
    }
    return pa.table(columns, schema=CURATED), facts


def _samples(rows: Rows) -> Rows:
    """The rows with digests of samples: faces of one image are as many images, not duplicates of one another."""
    if not any(rows["face"]):
        return rows
    crops = [f"#{crop}" if face else "" for face, crop in zip(rows["face"], rows["crop"], strict=True)]
    told = {
        name: [digest + crop for digest, crop in zip(rows[name], crops, strict=True)]
        for name in ("sha256", "pixels_blake3")
    }
    return {**rows, **told}


def _as_arrow(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def _alive(reason: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.flatnonzero([not r for r in reason])


# -- single images -------------------------------------------------------------------------------------------------


def _single_reasons(rows: Rows, recipe: Recipe, crashed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Reason and detail of each row from what is known of it alone."""
    reasons, details = [], []
    names = ("key", "reason", "detail", "seen_reason", "seen_detail")
    for i, row in enumerate(zip(*(rows[name] for name in names), strict=True)):
        key, reason, detail, seen_reason, seen_detail = row
        if not reason and key in crashed:
            reason, detail = DropReason.CRASHED_DECODER, crashed[key]
        if not reason:
            reason, detail = (seen_reason, seen_detail) if seen_reason else _limits_reason(rows, i, recipe)
        reasons.append(reason)
        details.append(detail)
    return reasons, details


def _limits_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    width, height = rows["width"][i], rows["height"][i]
    short, long = sorted((width, height))
    if short < recipe.filter.min_side:
        return DropReason.TOO_SMALL, f"{width}x{height}"
    if recipe.filter.max_aspect and long > short * recipe.filter.max_aspect:
        return DropReason.ASPECT_RATIO, f"{width}x{height}"
    too_large = _packed_too_large(rows["crop"][i] or (0, 0, width, height), recipe)
    if recipe.crop.detector != "none":
        reason, detail = _face_reason(rows, i, recipe)
        if reason:
            return reason, detail
    return (DropReason.TOO_LARGE, too_large) if too_large else _quality_reason(rows, i, recipe)


def _quality_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    return quality.reason({name: rows[name][i] for name in quality.COLUMNS if name in rows}, recipe.quality)


def _face_reason(rows: Rows, i: int, recipe: Recipe) -> tuple[str, str]:
    width, height = rows["width"][i], rows["height"][i]
    reason = rules.face_reason(rows["faces"][i], rows["face_score"][i], recipe)
    if reason:
        return reason, f"{rows['faces'][i]} boxes, best score {rows['face_score'][i]:.2f}"
    left, top, right, bottom = rows["crop"][i]
    if min(right - left, bottom - top) < recipe.crop.min_side:
        return DropReason.SMALL_FACE, f"{right - left}x{bottom - top}"
    inner = (min(right, width) - max(left, 0)) * (min(bottom, height) - max(top, 0))
    if inner < recipe.crop.min_share * width * height:
        return DropReason.SMALL_FACE, f"{inner / (width * height):.2%} of the image"
    if recipe.crop.outside == "drop" and (min(left, top) < 0 or right > width or bottom > height):
        return DropReason.CUT_FACE, f"{left},{top},{right},{bottom} in {width}x{height}"
    return "", ""


def _packed_too_large(crop: Sequence[int], recipe: Recipe) -> str:
    """The size that the packed image would have, if nobody could write or read it; else an empty string."""
    left, top, right, bottom = crop
    width, height = codec.target_size(right - left, bottom - top, recipe.pack.size, recipe.pack.fit)
    longest = min(codec.LONGEST_SIDE[recipe.pack.format], recipe.filter.max_side)
    fits = max(width, height) <= longest and width * height <= recipe.filter.max_pixels
    # a crop that is filled up is as large as that before it is scaled
    whole = max(right - left, bottom - top), (right - left) * (bottom - top)
    fits = fits and whole[0] <= recipe.filter.max_side and whole[1] <= recipe.filter.max_pixels
    return "" if fits else f"{width}x{height}"


# -- decisions -------------------------------------------------------------------------------------------------------


def _apply_decisions(keys: Sequence[str], labels: list[str], recipe: Recipe, reason: list[str]) -> list[str]:
    """Leave out and label anew what a person decided, in place; returns notes. Clusters are decided where they are."""
    decided = recipe.curate.decisions
    if not decided:
        return []
    out = set(decided.exclude)
    late = 0
    for i, key in enumerate(keys):
        if key in out:
            reason[i] = reason[i] or DropReason.EXCLUDED_BY_DECISION
        elif key in decided.label:
            labels[i] = decided.label[key]
            late += bool(reason[i])
            if not reason[i] and labels[i] in recipe.label.exclude:
                reason[i] = DropReason.EXCLUDED_LABEL
    notes = [
        f"decisions: {len(out):,} to leave out, {len(decided.label):,} labels, {len(decided.same):,} sets of the same "
        f"and {len(decided.different):,} of different images"
    ]
    unknown = len(decided.named().difference(keys))
    if unknown:
        notes.append(f"decisions: {unknown:,} keys are of no image of this source")
    if late:
        notes.append(f"decisions: {late:,} labels are of images that were dropped for what they are")
    return notes


# -- classes, groups, splits -----------------------------------------------------------------------------------------


def _apply_class_sizes(keys: Sequence[str], labels: Sequence[str], recipe: Recipe, reason: list[str]) -> list[str]:
    """Drop rare classes and what is over the cap; returns notes."""
    of_label: dict[str, list[int]] = {}
    for i in _alive(reason).tolist():
        of_label.setdefault(labels[i], []).append(i)
    rare = 0
    for members in of_label.values():
        if len(members) < recipe.classes.minimum:
            rare += 1
            for i in members:
                reason[i] = DropReason.RARE_CLASS
        elif recipe.classes.cap:
            members.sort(key=lambda i: splits.hashed_order(recipe.split.seed, keys[i]))
            for i in members[recipe.classes.cap :]:
                reason[i] = DropReason.OVER_CLASS_CAP
    return [f"{rare} of {len(of_label)} classes have fewer than {recipe.classes.minimum} images"] if rare else []


def _family_pairs(families: Sequence[Sequence[str]]) -> search.Pairs:
    last: dict[str, int] = {}
    pairs = []
    for i, tokens in enumerate(families):
        for token in tokens:
            if token in last:
                pairs.append((last[token], i))
            last[token] = i
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _named(component: npt.NDArray[np.int64], keys: Sequence[str], *, singles: bool = True) -> list[str]:
    """Name each component by its smallest key, which does not depend on the order of rows."""
    names = component.tolist()
    smallest: dict[int, str] = {}
    for c, key in zip(names, keys, strict=True):
        smallest[c] = min(smallest.get(c, key), key)
    size = Counter(names)
    return [smallest[c] if singles or size[c] > 1 else "" for c in names]


def _class_map(published_ids: Sequence[int], labels: Sequence[str], kept: Sequence[int]) -> dict[str, int]:
    """Class ids: in the order of the published ids where there are any, then by name."""
    order: dict[str, float] = {}
    for i in kept:
        rank = published_ids[i] if published_ids[i] >= 0 else float("inf")
        order[labels[i]] = min(order.get(labels[i], rank), rank)
    return {label: i for i, label in enumerate(sorted(order, key=lambda label: (order[label], label)))}


def _split(
    rows: Rows,
    recipe: Recipe,
    kept: Sequence[int],
    classes: Sequence[int],
    groups: Sequence[str],
    placed: Mapping[str, str],
) -> tuple[str, splits.Assignment]:
    """The strategy that was used and its assignment of the kept rows."""
    stated = [rows["split"][i] for i in kept]
    strategy: str = recipe.split.strategy
    if strategy == "auto":
        strategy = "published" if stated and all(name in splits.SPLITS for name in stated) else "grouped"
    if strategy == "published":
        return strategy, splits.Assignment(stated, [])
    if strategy == "legacy-dafre":
        return strategy, splits.legacy_dafre(classes, [rows["order"][i] for i in kept])
    if strategy == "single":
        return strategy, splits.Assignment(["train"] * len(kept), [])
    percents = (recipe.split.train, recipe.split.val, recipe.split.test)
    fixed: dict[str, str] = {}
    for key, group in zip(rows["key"], groups, strict=True):  # also those that a better copy has replaced
        if (split := placed.get(key, "")) in splits.SPLITS:
            # what a network may have been trained on must not be tested on later: train holds its group
            fixed[group] = min(split, fixed.get(group, split), key=splits.SPLITS.index)
    return strategy, splits.grouped(classes, [groups[i] for i in kept], percents, recipe.split.seed, fixed)


def _stayed(placed: Mapping[str, str], now: Sequence[tuple[str, str]]) -> str:
    """How many published images are in the splits that they were in."""
    again = [(placed[key], split) for key, split in now if key in placed]
    moved = sum(before != after for before, after in again)
    why = f"; {moved} went over to the split of an image that they now belong with" if moved else ""
    return f"{len(again) - moved} of {len(placed)} published images are here and in the splits that they were in{why}"


# -- tables ----------------------------------------------------------------------------------------------------------


def _load(workspace: Workspace, parts: int) -> dict[str, Any]:
    """Raw and feature tables of all parts, joined by key and sorted by it, as columns.

    Those that decisions are made by are plain lists. The others, and thumbnails, stay as Arrow has them: at a million
    images lists of them take gigabytes.
    """
    raws, features = [], []
    for part in range(parts):
        raw = parquet.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW)
        raws.append(raw.append_column("part", pa.array([part] * len(raw), pa.int32())))
        features.append(parquet.read(workspace.path(f"features/part-{part:05d}.parquet"), FEATURES))
    left = pa.concat_tables(raws)
    left = left.take(pc.sort_indices(left, sort_keys=[("key", "ascending")]))
    right = pa.concat_tables(features)
    places: dict[str, list[int]] = {}
    for i, key in enumerate(right["key"].to_pylist()):
        places.setdefault(key, []).append(i)
    keys, faces = left["key"].to_pylist(), right["face"].to_pylist()
    taken = set(keys)
    # an image whose faces are samples has a row for each
    joined = [(_face_key(key, faces[j] if j is not None else 0, taken), i, j)
              for i, key in enumerate(keys) for j in places.get(key, [None])]  # fmt: skip
    joined.sort(key=lambda row: row[0])
    left = left.take(pa.array([i for _, i, _ in joined], pa.int64()))
    right = right.take(pa.array([j for _, _, j in joined], pa.int64()))
    left = left.set_column(left.column_names.index("key"), "key", pa.array([key for key, _, _ in joined], pa.string()))
    del raws, features
    columns: dict[str, Any] = {
        name: left[name] if name in _CARRIED else left[name].to_pylist()
        for name in left.column_names
        if name not in _UNUSED
    }
    for name in FEATURES.names:
        if name == "key" or name in _UNUSED:
            continue
        target = {"reason": "seen_reason", "detail": "seen_detail"}.get(name, name)
        values = right[name].fill_null(_UNSEEN[name]) if name in _UNSEEN else right[name]
        if name in ("phash", "phash_flip"):
            columns[target] = values.to_numpy()
        else:
            columns[target] = values if name in _CARRIED else values.to_pylist()
    return columns


def _face_key(key: str, face: int | None, taken: set[str]) -> str:
    """The key of a face: the image's, `-face` and a number; one that another image has is made longer."""
    named = sample_key(key, face)
    while face and named in taken:
        named += "_"
    return named


def _inputs(workspace: Workspace, parts: int, stages: Sequence[str]) -> dict[str, str]:
    inputs: dict[str, str] = {}
    for part in range(parts):
        for stage in stages:
            receipt = workspace.receipt(f"{stage}/part-{part:05d}")
            if receipt is None:
                raise UsageError(f"part {part} of stage {stage} is not done: run the build again")
            inputs |= {name: known["sha256"] for name, known in receipt.outputs.items() if name.endswith(".parquet")}
    return inputs


def _params(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(
        mode="json", include={"label", "filter", "duplicates", "crop", "quality", "curate", "classes", "split", "pack"}
    )
    values["duplicates"]["embedding"] = recipe.duplicates.embedding.model_dump(include={"model", "threshold"})
    del values["split"]["keep"]
    del values["duplicates"]["against"]  # their content is among the inputs
    own = ("detector", "min_score", "min_side", "min_share", "faces", "outside")
    values["crop"] = {name: values["crop"][name] for name in own}
    return {**values, "pack": {name: values["pack"][name] for name in ("size", "fit", "format")}}
