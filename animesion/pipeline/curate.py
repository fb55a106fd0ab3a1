"""Stage 3: decide which images to keep, with which class and split; writes `curated.parquet`, one row per listed image.

Rules run in this order: failures of earlier stages and limits on single images (`animesion.pipeline.reasons`), the
curator's decisions, duplicates and label conflicts, class sizes, groups, class ids, splits. An image gets the first
reason that applies. Nothing here reads a pixel.
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
from animesion.dedup import clusters, reach, search
from animesion.dedup.clusters import Rows
from animesion.errors import UsageError
from animesion.pipeline import compare, embed, fetch, published, reasons, rules, variants, verdicts
from animesion.pipeline.columns import load_columns
from animesion.schemas import CURATED, FACE_REASONS, MEANINGS, DropReason
from animesion.sources import families
from animesion.storage import checksums, parquet
from animesion.storage.receipts import Receipt
from animesion.storage.removed import Removed
from animesion.storage.workspace import Workspace

CODE = "curate-5"


def run(workspace: Workspace, recipe: Recipe, parts: int, crashed: Mapping[str, str]) -> Receipt:
    """Decide, write the table and commit; returns the existing receipt if it is still valid.

    The receipt's facts are JSON-ready: `images` (listed), `seen` (images, or faces where each face is a sample),
    `kept`, `dropped` (count by reason), `classes` (names in the order of their ids), `strategy` (of the split),
    `splits` (size by name), `clusters` (of duplicates), `conflicts` (clusters with several labels), `chains` (of near
    duplicates, cut into several clusters) and `notes`.

    Args:
        workspace: output folder whose fetch and inspect stages are done.
        recipe: the recipe.
        parts: number of parts.
        crashed: keys whose images crashed the decoder in a later stage, with a detail.
    """
    against = recipe.duplicates.against_digests()
    stages = ("fetch", "inspect", "embed") if recipe.duplicates.embedding.model else ("fetch", "inspect")
    inputs = _inputs(workspace, parts, stages) | {f"against/{i}": digest for i, digest in enumerate(against)}
    notes: list[str] = []
    if compare.wanted(recipe):
        receipt = workspace.receipt("compare")
        if receipt is None:
            raise UsageError("images have not been compared: run the build again")
        inputs["pairs"] = receipt.outputs[verdicts.PAIRS_FILE]["sha256"]
        notes = receipt.facts["notes"]
    if recipe.split.keep:
        inputs["keep"] = recipe.split.keep_digest()
    refused = fetch.removed_images(workspace, recipe)
    values = {"params": _params(recipe), "crashed": dict(crashed), "notes": notes}
    digest = params_digest({**values, "removed": refused.digest()} if refused else values)
    receipt = workspace.done("curate", CODE, digest, inputs)
    if receipt:
        return receipt
    checksums.unseal(workspace.root)
    others = published.load_all(recipe.duplicates)
    rows = load_columns(workspace, parts, ("hash", "hash_flip") if recipe.duplicates.other_hash else ())
    if recipe.duplicates.embedding.decides:
        rows["embedding"] = embed.read(workspace, parts, rows["key"])
    placed = published.splits_of(Path(recipe.split.keep)) if recipe.split.keep else {}
    compared = compare.read(workspace) if compare.wanted(recipe) else None
    curated, facts = decide(rows, recipe, crashed, others, placed, compared, refused)
    facts["notes"] = [*notes, *facts["notes"]]
    outputs = {"curated.parquet": parquet.write(workspace.path("curated.parquet"), curated)}
    return workspace.commit("curate", CODE, digest, inputs, outputs, facts)


def decide(
    rows: Rows,
    recipe: Recipe,
    crashed: Mapping[str, str],
    others: Sequence[published.PublishedFeatures] = (),
    placed: Mapping[str, str] | None = None,
    compared: pa.Table | None = None,
    refused: Removed | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """Decide on every row, without reading or writing files.

    Args:
        rows: one entry per image, sorted by key: the columns of `RAW`, of `FEATURES` (its reason and detail as
            `seen_reason` and `seen_detail`) and `part`. Thumbnails and columns that no rule reads may be Arrow arrays.
        recipe: the recipe.
        crashed: keys to drop as `crashed decoder`, with a detail.
        others: published datasets whose images are not published again.
        placed: split by key of images that were published before and keep their split.
        compared: verdicts on pairs, of schema `PAIRS`; None if no pixels were compared.
        refused: images that were removed on request.

    Returns:
        A table of schema `CURATED` in the order of the rows, and the stage's facts.
    """
    placed = placed or {}
    keys: Sequence[str] = rows["key"]
    labels = ["|".join(rules.labels_left(candidates, recipe.label)) for candidates in rows["labels"]]
    # `reason`, `detail`, `keeper` and `labels` are changed in place by each rule; an empty reason means kept so far.
    reason, detail = reasons.single_image_reasons(rows, recipe, crashed)
    keeper = [""] * len(keys)
    if refused:
        known = zip(*(rows[name] for name in ("sha256", "pixels_blake3", "source", "source_id")), strict=True)
        for i, each in enumerate(known):
            if refused.has(*each):
                reason[i], detail[i] = DropReason.REMOVED, ""
    notes = _unsure_notes(rows, reason, detail, recipe)
    if recipe.crop.detector == "auto" and (without := sum(not table for table in rows["has_table"])):
        notes.append(f"the source has no table of boxes for {without:,} images: the detector 'anime' looked for faces")
    notes += _apply_decisions(keys, rows["face"], labels, recipe, reason, detail)

    # Before duplicates within the build, so that the keeper of a cluster is never dropped as already published.
    published_twins = published.twins(rows, _remaining(reason), others, recipe, compared)
    if recipe.duplicates.action == "drop":
        for i, (how, twin) in published_twins.items():
            reason[i], detail[i], keeper[i] = DropReason.PUBLISHED_DUPLICATE, how, twin
    elif published_twins:
        notes.append(f"{len(published_twins)} images are already in a published dataset")

    duplicates = clusters.judge(_with_sample_digests(rows), _remaining(reason), labels, recipe, compared)
    for i, verdict in duplicates.dropped.items():
        reason[i], detail[i], keeper[i] = verdict
    # Clusters treat pairs that a curator confirmed like near duplicates; their reason differs.
    first_of_set = decisions.representatives(recipe.curate.decisions.same)
    row_of_key = {key: i for i, key in enumerate(keys)}
    for i in duplicates.dropped:
        confirmed = keys[i] in first_of_set and first_of_set[keys[i]] == first_of_set.get(keeper[i])
        if duplicates.decided and keeper[i]:
            pair = sorted((int(duplicates.unit[i]), int(duplicates.unit[row_of_key[keeper[i]]])))
            confirmed |= duplicates.decided.get((pair[0], pair[1])) == "copy"
        if reason[i] == DropReason.NEAR_DUPLICATE and confirmed:
            reason[i] = DropReason.DUPLICATE_BY_DECISION
    pairs_decided = {frozenset(each.images) for each in recipe.curate.decisions.pairs}
    if unused := len(pairs_decided) - len(duplicates.decided):
        notes.append(
            f"decisions: {unused:,} verdicts on pairs have no effect: an image of the pair is not there or was dropped "
            "for another reason, or both have equal pixels"
        )
    if recipe.duplicates.action == "report":
        notes += _found_notes(duplicates, keys, labels, compared is not None)

    if recipe.split.strategy == "published":
        for i in _remaining(reason):
            if rows["split"][i] not in splits.SPLITS:
                reason[i] = DropReason.NO_PUBLISHED_SPLIT
    notes += _apply_class_sizes(keys, labels, recipe, reason)

    # Groups cover dropped images too: two kept images may be related only through one that was dropped. Names are read
    # again, as an update lists a variant after its image, and classes may have been renamed.
    named = families.of_images(families.option_of(recipe), rows["source_id"], labels)
    tokens_of = [
        # a removed image names no group
        () if why == DropReason.REMOVED else (*tokens, *more, f"id:{source}:{source_id}")
        for tokens, more, source, source_id, why in zip(
            rows["families"], named, rows["source"], rows["source_id"], reason, strict=True
        )
    ]
    group_ids = search.components(len(keys), [*duplicates.related, _family_pairs(tokens_of)])
    groups = _component_names(group_ids, keys)

    kept = _remaining(reason).tolist()
    # A published id belongs to the source's label, not to a label that a decision gives.
    published_ids = [
        -1 if key in recipe.curate.decisions.label else class_id
        for key, class_id in zip(keys, rows["class_order"], strict=True)
    ]
    class_ids = _class_map(published_ids, labels, kept)
    strategy, assignment = _split(rows, recipe, kept, [class_ids[labels[i]] for i in kept], groups, placed)
    split_of = dict(zip(kept, assignment.splits, strict=True))

    decided = {
        "kept": [not each for each in reason],
        "reason": reason,
        "detail": detail,
        "keeper": keeper,
        "label": labels,
        "class_id": [class_ids[label] if i in split_of else -1 for i, label in enumerate(labels)],
        "split": [split_of.get(i, "") for i in range(len(keys))],
        "group": groups,
        "cluster": _component_names(duplicates.cluster, keys, singles=False),
        **_relatives(duplicates, keys, keeper),
        "crop": [
            crop or [0, 0, width, height]
            for crop, width, height in zip(rows["crop"], rows["width"], rows["height"], strict=True)
        ],
    }
    columns = [_as_arrow(decided.get(field.name, rows.get(field.name)), field.type) for field in CURATED]

    if placed and strategy == "grouped":
        notes.append(_kept_splits_note(placed, [(keys[i], split_of[i]) for i in kept]))
    notes += _straddling_notes(strategy, groups, split_of)
    alone = [i for i in split_of if not rows["families"][i] and not named[i]]
    notes += _variants_notes(rows, recipe, labels, split_of, alone)
    if others:
        copies = "off" if compared is None else recipe.duplicates.for_images(len(keys)).copies
        notes.append(f"published datasets: {reach.sentence(copies, other_hash=recipe.duplicates.other_hash)}")
        notes += _published_family_notes(rows, others, split_of)
    if duplicates.conflicts:
        notes.append(f"{duplicates.conflicts} of {duplicates.clusters} duplicate clusters have several labels")
    if duplicates.unlike:
        notes.append(
            f"{duplicates.unlike:,} pairs of images under two labels have close hashes: they were kept, in one split"
        )
    if duplicates.chains:
        diameter = recipe.duplicates.diameter or 2 * recipe.duplicates.radius
        notes.append(
            f"{duplicates.chains} chains of near duplicates were cut: their ends differ by more than {diameter} bits"
        )
    class_names = list(class_ids)
    notes += _empty_splits(strategy, recipe, assignment.splits)
    # Splits are assigned by class id; readers of the notes know classes by name.
    notes += [note.replace(f"class {c}:", f"class {class_names[c]}:", 1) for c, note in assignment.notes]

    counts = Counter(reason)
    facts = {
        # An image whose faces are samples has several rows; the first of them counts the image.
        "images": sum(face in (0, 1) for face in rows["face"]),
        "seen": len(keys),
        "kept": len(kept),
        "dropped": {name: counts[name] for name in MEANINGS if counts[name]},
        "classes": class_names,
        "strategy": strategy,
        "splits": {name: assignment.splits.count(name) for name in splits.SPLITS if name in assignment.splits},
        "clusters": duplicates.clusters,
        "conflicts": duplicates.conflicts,
        "chains": duplicates.chains,
        "notes": notes,
    }
    return _without_removed(pa.table(columns, schema=CURATED), keys), facts


def _without_removed(curated: pa.Table, keys: Sequence[str]) -> pa.Table:
    """The table with nothing about removed images but that they were dropped, and from which source."""
    gone = pc.equal(curated["reason"], DropReason.REMOVED.value)
    rows = np.flatnonzero(gone.to_numpy())
    if not len(rows):
        return curated
    taken, number, named = set(keys), 0, {}
    for i in rows.tolist():
        while (name := f"removed-{number:05d}") in taken:
            number += 1
        taken.add(name)
        named[i] = name
    for place, column in enumerate(CURATED):
        if column.name in ("kept", "reason", "class_id", "source", "part"):
            continue
        values = curated[column.name].to_pylist()
        for i in rows.tolist():
            blank: Any = "" if column.type == pa.string() else [0, 0, 0, 0] if column.name == "crop" else 0
            values[i] = named[i] if column.name in ("key", "group") else False if column.type == pa.bool_() else blank
        curated = curated.set_column(place, column, pa.array(values, column.type))
    return curated


def _found_notes(
    duplicates: clusters.Verdicts, keys: Sequence[str], labels: Sequence[str], compared: bool
) -> list[str]:
    """What the search found, where nothing is dropped: counts by verdict, and an example of each.

    Args:
        duplicates: the verdicts.
        keys: key of each row.
        labels: label of each row.
        compared: whether pixels were compared.
    """
    kinds: dict[str, list[tuple[int, int]]] = {}
    for pair, relation in sorted(duplicates.relations.items()):
        kinds.setdefault(f"{'mirrored ' if relation.mirrored else ''}{relation.verdict}", []).append(pair)
    counts = {"equal bytes": duplicates.equal[0], "equal pixels": duplicates.equal[1]}
    counts |= {kind: len(pairs) for kind, pairs in sorted(kinds.items(), key=lambda each: -len(each[1]))}
    if not compared:
        counts["close hashes"] = duplicates.near
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    if not listed:
        return ["no duplicates were found"]
    notes = [f'duplicates were found and kept (duplicates.action = "report"), in pairs: {listed}']
    examples = []
    for kind, [(a, b), *_] in kinds.items():
        how = duplicates.relations[a, b].how
        examples.append(f"{kind}: {keys[a]} and {keys[b]}{f' ({how})' if how else ''}")
    if duplicates.conflict:
        a, b = duplicates.conflict
        examples.append(f"two labels: {keys[a]} under {labels[a]} and {keys[b]} under {labels[b]}")
    return [*notes, *([f"for example {'; '.join(examples)}"] if examples else [])]


def _relatives(duplicates: clusters.Verdicts, keys: Sequence[str], keeper: Sequence[str]) -> dict[str, list[Any]]:
    """The columns on the image that each row resembles: the one that is kept instead, or its closest relative."""
    of_unit: dict[int, list[tuple[int, clusters.Relation]]] = {}
    for (a, b), relation in duplicates.relations.items():
        of_unit.setdefault(a, []).append((b, relation))
        of_unit.setdefault(b, []).append((a, relation))
    row_of_key = {key: i for i, key in enumerate(keys)}
    columns: dict[str, list[Any]] = {name: [] for name in ("resembles", "verdict", "how", "inliers", "residual")}
    for i, kept_key in enumerate(keeper):
        related = of_unit.get(int(duplicates.unit[i]), []) if len(duplicates.unit) else []
        kept = row_of_key.get(kept_key)
        if kept is not None:
            related = [each for each in related if each[0] == int(duplicates.unit[kept])]
        if related:
            other, relation = min(related, key=lambda each: (*clusters.closeness(each[1]), each[0]))
            name = kept_key if kept is not None else keys[other]
            values = [name, relation.verdict, relation.how, relation.inliers, relation.residual]
        else:  # equal bytes or pixels need no comparison
            values = [kept_key, "copy" if kept_key else "", "", 0, 0.0]
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def _with_sample_digests(rows: Rows) -> Rows:
    """The rows with the crop appended to each digest where faces are samples.

    All faces of an image share its bytes and pixels; without this they would be exact duplicates of one another.
    """
    if not any(rows["face"]):
        return rows
    crops = [crop if face else None for face, crop in zip(rows["face"], rows["crop"], strict=True)]
    digests = {
        name: [decisions.image_id(digest, crop) for digest, crop in zip(rows[name], crops, strict=True)]
        for name in ("sha256", "pixels_blake3")
    }
    return {**rows, **digests}


def _as_arrow(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def _remaining(reason: Sequence[str]) -> npt.NDArray[np.int64]:
    """Rows without a drop reason, ascending."""
    return np.flatnonzero([not r for r in reason])


# -- decisions -------------------------------------------------------------------------------------------------------


def _unsure_notes(rows: Rows, reason: Sequence[str], detail: list[str], recipe: Recipe) -> list[str]:
    """Notes on images with one face and perhaps another; those that are kept get a detail, in place."""
    if recipe.crop.faces != "one-only" or recipe.crop.detector == "none":
        return []
    perhaps = [
        i
        for i, boxes in enumerate(zip(rows["box_count"], rows["best_score"], rows["second_score"], strict=True))
        # one face by decision, whatever the detector found
        if rows["faces"][i] != 1 and rules.is_perhaps(*boxes, recipe)
    ]
    dropped = sum(reason[i] == DropReason.SEVERAL_FACES for i in perhaps)
    kept = [i for i in perhaps if not reason[i]]
    for i in kept:
        detail[i] = f"perhaps a second face, score {rows['second_score'][i]:.2f}"
    notes = []
    if dropped:
        notes.append(
            f"{dropped:,} images were dropped as '{DropReason.SEVERAL_FACES}' although only one face is sure: the "
            "second one's score is below crop.min_score; crop.unsure=report keeps them"
        )
    if kept:
        notes.append(
            f"{len(kept):,} images that passed the limits perhaps have a second face: `detail` in curated.parquet has "
            "its score; crop.unsure=drop drops them"
        )
    return notes


def _apply_decisions(
    keys: Sequence[str],
    faces: Sequence[int],
    labels: list[str],
    recipe: Recipe,
    reason: list[str],
    detail: list[str],
) -> list[str]:
    """Exclude and relabel images as the curator decided, and drop those of several characters, in place; returns notes.

    Decisions on pairs (`same`, `different`) are applied in `animesion.dedup.clusters`, those on boxes in
    `animesion.pipeline.inspect`.
    """
    decided = recipe.curate.decisions
    if not decided:
        return []
    excluded, several = set(decided.exclude), set(decided.several)
    without_effect = 0
    images = [key.removesuffix(f"-face{face}") if face else key for key, face in zip(keys, faces, strict=True)]
    for i, key in enumerate(keys):
        if images[i] in several or key in several:
            if not reason[i] or reason[i] in FACE_REASONS:
                reason[i], detail[i] = DropReason.SEVERAL_FACES, "by decision"
        elif key in excluded:
            reason[i] = reason[i] or DropReason.EXCLUDED_BY_DECISION
        elif key in decided.label:
            labels[i] = decided.label[key]
            without_effect += bool(reason[i])
            # The rule on excluded labels ran on the label that the source gave.
            if not reason[i] and labels[i] in recipe.label.exclude:
                reason[i] = DropReason.EXCLUDED_LABEL
    notes = [
        f"decisions: {len(excluded):,} images to exclude, {len(decided.label):,} labels, "
        f"{len(decided.same):,} sets of the same image, {len(decided.different):,} sets of different images, "
        f"{len(decided.pairs):,} verdicts on pairs"
        + (f", {len(decided.box):,} boxes" if decided.box else "")
        + (f", {len(decided.several):,} images of several characters" if decided.several else "")
    ]
    if decided.box and recipe.crop.detector == "none":
        notes.append("decisions: boxes have no effect where the whole image is the sample (crop.detector is 'none')")
    unknown = len(decided.named().difference(keys, images))
    if unknown:
        notes.append(f"decisions: {unknown:,} keys match no image of this source")
    if without_effect:
        notes.append(f"decisions: {without_effect:,} labels belong to images that other rules dropped")
    return notes


# -- classes, groups, splits -----------------------------------------------------------------------------------------


def _apply_class_sizes(keys: Sequence[str], labels: Sequence[str], recipe: Recipe, reason: list[str]) -> list[str]:
    """Drop rare classes and images over the cap, in place; returns notes."""
    of_label: dict[str, list[int]] = {}
    for i in _remaining(reason).tolist():
        of_label.setdefault(labels[i], []).append(i)
    rare = 0
    for members in of_label.values():
        if len(members) < recipe.classes.minimum:
            rare += 1
            for i in members:
                reason[i] = DropReason.RARE_CLASS
        elif recipe.classes.cap:
            # By hash, so that a new image displaces few of the images that were under the cap before.
            members.sort(key=lambda i: splits.hashed_order(recipe.split.seed, keys[i]))
            for i in members[recipe.classes.cap :]:
                reason[i] = DropReason.OVER_CLASS_CAP
    return [f"{rare} of {len(of_label)} classes have fewer than {recipe.classes.minimum} images"] if rare else []


def _family_pairs(tokens_of: Sequence[Sequence[str]]) -> search.Pairs:
    """Pairs of rows that share a token, shape (pairs, 2); each row is paired with the last one of the same token."""
    last: dict[str, int] = {}
    pairs = []
    for i, tokens in enumerate(tokens_of):
        for token in tokens:
            if token in last:
                pairs.append((last[token], i))
            last[token] = i
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _component_names(component: npt.NDArray[np.int64], keys: Sequence[str], *, singles: bool = True) -> list[str]:
    """The name of each row's component: its smallest key, which does not depend on the order of rows.

    Args:
        component: component number of each row, shape (rows,).
        keys: key of each row.
        singles: whether a component of one row has a name; otherwise its name is empty.
    """
    numbers = component.tolist()
    smallest: dict[int, str] = {}
    for number, key in zip(numbers, keys, strict=True):
        smallest[number] = min(smallest.get(number, key), key)
    size = Counter(numbers)
    return [smallest[number] if singles or size[number] > 1 else "" for number in numbers]


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
    """The strategy that was used, and the splits that it assigns to the kept rows."""
    published_splits = [rows["split"][i] for i in kept]
    strategy: str = recipe.split.strategy
    if strategy == "auto":
        complete = bool(published_splits) and all(name in splits.SPLITS for name in published_splits)
        strategy = "published" if complete else "grouped"
    if strategy == "published":
        return strategy, splits.Assignment(published_splits, [])
    if strategy == "legacy-dafre":
        return strategy, splits.legacy_dafre(classes, [rows["order"][i] for i in kept])
    if strategy == "single":
        return strategy, splits.Assignment(["train"] * len(kept), [])
    percents = (recipe.split.train, recipe.split.val, recipe.split.test)
    fixed: dict[str, str] = {}
    # Dropped rows count too: a better copy may have replaced a published image and takes over its split.
    for key, group in zip(rows["key"], groups, strict=True):
        if (split := placed.get(key, "")) in splits.SPLITS:
            # Train wins within a group: an image that was trained on must not become a test image later.
            fixed[group] = min(split, fixed.get(group, split), key=splits.SPLITS.index)
    return strategy, splits.grouped(classes, [groups[i] for i in kept], percents, recipe.split.seed, fixed)


def _empty_splits(strategy: str, recipe: Recipe, assigned: Sequence[str]) -> list[str]:
    """A note if a split that the recipe wants has no images."""
    wanted = {"train": recipe.split.train, "val": recipe.split.val, "test": recipe.split.test}
    empty = [name for name, percent in wanted.items() if percent and name not in assigned]
    if strategy != "grouped" or not assigned or not empty:
        return []
    return [f"no images in split {' and '.join(empty)}: the classes are too small for the shares of the recipe"]


def _kept_splits_note(placed: Mapping[str, str], assigned: Sequence[tuple[str, str]]) -> str:
    """How many published images kept their split; `assigned` has the key and split of each kept image."""
    before_after = [(placed[key], split) for key, split in assigned if key in placed]
    moved = sum(before != after for before, after in before_after)
    moved_note = f"; {moved} moved to the split of a related image" if moved else ""
    return f"{len(before_after) - moved} of {len(placed)} published images kept their split{moved_note}"


def _straddling_notes(strategy: str, groups: Sequence[str], split_of: Mapping[int, str]) -> list[str]:
    """The note on kept images with a relative in an earlier split (train, val, test), where splits are published."""
    if strategy not in ("published", "legacy-dafre"):
        return []
    there: dict[str, set[str]] = {}
    for i, split in split_of.items():
        there.setdefault(groups[i], set()).add(split)
    order = splits.SPLITS
    related = Counter(split for i, split in split_of.items() if there[groups[i]] & {*order[: order.index(split)]})
    if not related:
        return []
    sizes = Counter(split_of.values())
    counts = " and ".join(f"{related[split]:,} of {sizes[split]:,} in {split}" for split in order if related[split])
    return [
        f"images related to one of an earlier split, by family or as duplicates: {counts}; `animesion verify` names "
        "them, and split.strategy=grouped makes splits without them"
    ]


def _variants_notes(
    rows: Rows, recipe: Recipe, labels: Sequence[str], split_of: Mapping[int, str], alone: Sequence[int]
) -> list[str]:
    """The note on kept images of no family (`alone`) whose names look like variants of one image."""
    if recipe.source.options.get("family") == "":
        return []
    # An image whose faces are samples has several rows of one name.
    chosen = [i for i in alone if rows["face"][i] in (0, 1)]
    advice = ": set source.family to a regular expression, or empty to silence" if families.option_of(recipe) else ""
    note = variants.note(
        [rows["source_id"][i] for i in chosen],
        [labels[i] for i in chosen],
        [split_of[i] for i in chosen],
        len(split_of),
        advice,
    )
    return [note] if note else []


def _published_family_notes(
    rows: Rows, others: Sequence[published.PublishedFeatures], split_of: Mapping[int, str]
) -> list[str]:
    """Notes on kept images whose family a published dataset has in another split, one for each dataset."""
    notes = []
    for other in others:
        relatives = published.relatives(rows, split_of, other)
        if relatives:
            i, place = next(iter(relatives.items()))
            example = f"{rows['key'][i]} in {split_of[i]} and {other.name}:{other.keys[place]} in {other.splits[place]}"
            notes.append(
                f"{len(relatives):,} images are from posts, works or files that {other.name} has in another split, "
                f"such as {example}"
            )
    return notes


# -- receipt ---------------------------------------------------------------------------------------------------------


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
    values["duplicates"]["embedding"] = recipe.duplicates.embedding.model_dump(include={"model", "threshold", "verify"})
    # The content of these datasets is among the inputs; where they are stored does not matter.
    del values["split"]["keep"]
    del values["duplicates"]["against"]
    del values["curate"]["removed"]
    # Margin, square and detector options change features, whose digests are inputs already.
    crop_names = ("detector", "min_score", "unsure_score", "unsure", "min_side", "min_share", "faces", "outside")
    values["crop"] = {name: values["crop"][name] for name in crop_names}
    return {**values, "pack": {name: values["pack"][name] for name in ("size", "fit", "format")}}
