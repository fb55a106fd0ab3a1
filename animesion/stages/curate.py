"""Stage 3: every decision that needs the whole dataset, made on tables: `curated.parquet`, one row a picture ever seen.

In order: what listing, fetch and decode gave, limits on single pictures, duplicates and label conflicts,
class sizes, groups, class map, splits. The first reason that holds is the one that is written down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion import clusters, decisions, duplicates, images, rules, splits, tables
from animesion.clusters import Columns
from animesion.errors import UsageError
from animesion.recipe import Recipe
from animesion.records import CURATED, FEATURES, RAW, REASONS
from animesion.settings import params_digest
from animesion.workspace import Receipt, Workspace

CODE = "curate-1"


#: What stands in for the features of a picture that has none.
_UNSEEN: dict[str, Any] = {
    "reason": "",
    "detail": "",
    "width": 0,
    "height": 0,
    "plain": False,
    "pixels_sha256": "",
    "phash": 0,
    "faces": -1,
    "face_score": 0.0,
}


def run(workspace: Workspace, recipe: Recipe, parts: int, crashed: Mapping[str, str]) -> Receipt:
    """Decide, write, commit; or return the receipt that still holds.

    The receipt's facts are JSON-ready: `seen`, `kept`, `dropped` by reason, `classes` in the order of their ids,
    `strategy` of the split, `splits` with their sizes, `clusters` of duplicates, `conflicts` (clusters under several
    labels) and `notes`.

    Args:
        workspace: output folder whose fetch and inspect stages are done.
        recipe: the recipe.
        parts: number of parts.
        crashed: keys that a later stage found to kill the decoder, with a detail.
    """
    inputs = _inputs(workspace, parts)
    digest = params_digest({"params": _params(recipe), "crashed": dict(crashed)})
    done = workspace.done("curate", CODE, digest, inputs)
    if done:
        return done
    for name in ("dataset.json", "SHA256SUMS"):  # what they say is not so any more
        workspace.path(name).unlink(missing_ok=True)
    curated, facts = decide(_load(workspace, parts), recipe, crashed)
    outputs = {"curated.parquet": tables.write(workspace.path("curated.parquet"), curated)}
    return workspace.commit("curate", CODE, digest, inputs, outputs, facts)


def decide(rows: Columns, recipe: Recipe, crashed: Mapping[str, str]) -> tuple[pa.Table, dict[str, Any]]:
    """The whole decision, without files.

    Args:
        rows: one entry a picture: the columns of `RAW`, of `FEATURES` (its reason and detail as `seen_reason` and
            `seen_detail`) and `part`, sorted by key.
        recipe: the recipe.
        crashed: keys to drop as `crashed decoder`, with a detail.

    Returns:
        A table of schema `CURATED` in the order of the rows, and the stage's facts.
    """
    keys: Sequence[str] = rows["key"]
    n = len(keys)
    labels = ["|".join(rules.labels_left(candidates, recipe.label)) for candidates in rows["labels"]]
    reason, detail = _single_reasons(rows, recipe, crashed)
    notes = _apply_decisions(keys, labels, recipe, reason)
    keeper = [""] * n
    found = clusters.judge(rows, _alive(reason), labels, recipe)
    for i, verdict in found.dropped.items():
        reason[i], detail[i], keeper[i] = verdict
    team = decisions.teams(recipe.curate.decisions.same)
    for i in found.dropped:
        if reason[i] == "near duplicate" and keys[i] in team and team[keys[i]] == team.get(keeper[i]):
            reason[i] = "duplicate by decision"
    if recipe.split.strategy == "published":
        for i in _alive(reason):
            if rows["split"][i] not in splits.SPLITS:
                reason[i] = "no published split"
    notes += _apply_class_sizes(keys, labels, recipe, reason)
    families = [
        (*tokens, f"id:{source}:{source_id}")
        for tokens, source, source_id in zip(rows["families"], rows["source"], rows["source_id"], strict=True)
    ]
    groups = _named(duplicates.components(n, [*found.related, _family_pairs(families)]), keys)
    kept = _alive(reason).tolist()
    published = [
        -1 if key in recipe.curate.decisions.label else rank
        for key, rank in zip(keys, rows["class_order"], strict=True)
    ]
    class_ids = _class_map(published, labels, kept)
    strategy, assignment = _split(rows, recipe, kept, [class_ids[labels[i]] for i in kept], groups)
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
    if found.conflicts:
        notes.append(f"{found.conflicts} of {found.clusters} duplicate clusters stand under several labels")
    columns = [pa.array(decided.get(f.name, rows.get(f.name)), f.type) for f in CURATED]
    counts = Counter(reason)
    names = list(class_ids)
    facts = {
        "seen": n,
        "kept": len(kept),
        "dropped": {name: counts[name] for name in REASONS if counts[name]},
        "classes": names,
        "strategy": strategy,
        "splits": {name: assignment.splits.count(name) for name in splits.SPLITS if name in assignment.splits},
        "clusters": found.clusters,
        "conflicts": found.conflicts,
        "notes": [*notes, *(note.replace(f"class {c}:", f"class {names[c]}:", 1) for c, note in assignment.notes)],
    }
    return pa.table(columns, schema=CURATED), facts


def _alive(reason: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.flatnonzero([not r for r in reason])


# -- single pictures -------------------------------------------------------------------------------------------------


def _single_reasons(rows: Columns, recipe: Recipe, crashed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Reason and detail of each row from what is known of it alone."""
    reasons, details = [], []
    names = ("key", "reason", "detail", "seen_reason", "seen_detail")
    for i, row in enumerate(zip(*(rows[name] for name in names), strict=True)):
        key, reason, detail, seen_reason, seen_detail = row
        if not reason and key in crashed:
            reason, detail = "crashed decoder", crashed[key]
        if not reason:
            reason, detail = (seen_reason, seen_detail) if seen_reason else _limits_reason(rows, i, recipe)
        reasons.append(reason)
        details.append(detail)
    return reasons, details


def _limits_reason(rows: Columns, i: int, recipe: Recipe) -> tuple[str, str]:
    width, height = rows["width"][i], rows["height"][i]
    short, long = sorted((width, height))
    if short < recipe.filter.min_side:
        return "too small", f"{width}x{height}"
    if recipe.filter.max_aspect and long > short * recipe.filter.max_aspect:
        return "aspect ratio", f"{width}x{height}"
    too_large = _packed_too_large(rows["crop"][i] or (0, 0, width, height), recipe)
    if recipe.crop.detector == "none":
        return ("too large", too_large) if too_large else ("", "")
    reason = rules.face_reason(rows["faces"][i], rows["face_score"][i], recipe)
    if reason:
        return reason, f"{rows['faces'][i]} boxes, best score {rows['face_score'][i]:.2f}"
    left, top, right, bottom = rows["crop"][i]
    if min(right - left, bottom - top) < recipe.crop.min_side:
        return "small face", f"{right - left}x{bottom - top}"
    return ("too large", too_large) if too_large else ("", "")


def _packed_too_large(crop: Sequence[int], recipe: Recipe) -> str:
    """The size that the packed picture would have, if nobody could write or read it; else an empty string."""
    left, top, right, bottom = crop
    width, height = images.target_size(right - left, bottom - top, recipe.pack.size, recipe.pack.fit)
    longest = min(images.LONGEST_SIDE[recipe.pack.format], recipe.filter.max_side)
    fits = max(width, height) <= longest and width * height <= recipe.filter.max_pixels
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
            reason[i] = reason[i] or "excluded by decision"
        elif key in decided.label:
            labels[i] = decided.label[key]
            late += bool(reason[i])
            if not reason[i] and labels[i] in recipe.label.exclude:
                reason[i] = "excluded label"
    notes = [
        f"decisions: {len(out):,} to leave out, {len(decided.label):,} labels, {len(decided.same):,} sets of the same "
        f"and {len(decided.different):,} of different pictures"
    ]
    unknown = len(decided.named().difference(keys))
    if unknown:
        notes.append(f"decisions: {unknown:,} keys are of no picture of this source")
    if late:
        notes.append(f"decisions: {late:,} labels are of pictures that were dropped for what they are")
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
                reason[i] = "rare class"
        elif recipe.classes.cap:
            members.sort(key=lambda i: splits.hashed_order(recipe.split.seed, keys[i]))
            for i in members[recipe.classes.cap :]:
                reason[i] = "over class cap"
    return [f"{rare} of {len(of_label)} classes have fewer than {recipe.classes.minimum} pictures"] if rare else []


def _family_pairs(families: Sequence[Sequence[str]]) -> duplicates.Pairs:
    last: dict[str, int] = {}
    pairs = []
    for i, tokens in enumerate(families):
        for token in tokens:
            if token in last:
                pairs.append((last[token], i))
            last[token] = i
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _named(component: npt.NDArray[np.int64], keys: Sequence[str], *, singles: bool = True) -> list[str]:
    """Name each component by its smallest key, which does not hang on the order of rows."""
    names = component.tolist()
    smallest: dict[int, str] = {}
    for c, key in zip(names, keys, strict=True):
        smallest[c] = min(smallest.get(c, key), key)
    size = Counter(names)
    return [smallest[c] if singles or size[c] > 1 else "" for c in names]


def _class_map(published: Sequence[int], labels: Sequence[str], kept: Sequence[int]) -> dict[str, int]:
    """Class ids: in the order of the published ids where there are any, then by name."""
    order: dict[str, float] = {}
    for i in kept:
        rank = published[i] if published[i] >= 0 else float("inf")
        order[labels[i]] = min(order.get(labels[i], rank), rank)
    return {label: i for i, label in enumerate(sorted(order, key=lambda label: (order[label], label)))}


def _split(
    rows: Columns, recipe: Recipe, kept: Sequence[int], classes: Sequence[int], groups: Sequence[str]
) -> tuple[str, splits.Assignment]:
    """The strategy that was used and its assignment of the kept rows."""
    published = [rows["split"][i] for i in kept]
    strategy: str = recipe.split.strategy
    if strategy == "auto":
        strategy = "published" if published and all(name in splits.SPLITS for name in published) else "grouped"
    if strategy == "published":
        return strategy, splits.Assignment(published, [])
    if strategy == "legacy-dafre":
        return strategy, splits.legacy_dafre(classes, [rows["order"][i] for i in kept])
    if strategy == "single":
        return strategy, splits.Assignment(["train"] * len(kept), [])
    percents = (recipe.split.train, recipe.split.val, recipe.split.test)
    return strategy, splits.grouped(classes, [groups[i] for i in kept], percents, recipe.split.seed)


# -- tables ----------------------------------------------------------------------------------------------------------


def _load(workspace: Workspace, parts: int) -> dict[str, list[Any]]:
    """Raw and feature tables of all parts, joined by key and sorted by it, as columns of plain lists."""
    raws, features = [], []
    for part in range(parts):
        raw = tables.read(workspace.path(f"raw/part-{part:05d}.parquet"), RAW)
        raws.append(raw.append_column("part", pa.array([part] * len(raw), pa.int32())))
        features.append(tables.read(workspace.path(f"features/part-{part:05d}.parquet"), FEATURES))
    left = pa.concat_tables(raws)
    left = left.take(pc.sort_indices(left, sort_keys=[("key", "ascending")]))
    right = pa.concat_tables(features)
    place = {key: i for i, key in enumerate(right["key"].to_pylist())}
    right = right.take(pa.array([place.get(key) for key in left["key"].to_pylist()], pa.int64()))
    columns: dict[str, list[Any]] = {name: left[name].to_pylist() for name in left.column_names}
    for name in FEATURES.names:
        if name == "key":
            continue
        target = {"reason": "seen_reason", "detail": "seen_detail"}.get(name, name)
        values = right[name].fill_null(_UNSEEN[name]) if name in _UNSEEN else right[name]
        columns[target] = values.to_pylist()
    return columns


def _inputs(workspace: Workspace, parts: int) -> dict[str, str]:
    inputs: dict[str, str] = {}
    for part in range(parts):
        for stage in ("fetch", "inspect"):
            receipt = workspace.receipt(f"{stage}/part-{part:05d}")
            if receipt is None:
                raise UsageError(f"part {part} of stage {stage} is not done: run the build again")
            inputs |= {name: known["sha256"] for name, known in receipt.outputs.items() if name.endswith(".parquet")}
    return inputs


def _params(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(
        mode="json", include={"label", "filter", "duplicates", "crop", "curate", "classes", "split", "pack"}
    )
    values["crop"] = {name: values["crop"][name] for name in ("detector", "min_score", "min_side")}
    return {**values, "pack": {name: values["pack"][name] for name in ("size", "fit", "format")}}
