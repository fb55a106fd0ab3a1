"""Stage 3: decide which images to keep, with which class and split; writes `curated.parquet`, one row per listed image.

Rules run in this order: failures of earlier stages and limits on single images (`animesion.pipeline.reasons`), the
curator's decisions, duplicates and label conflicts, class sizes, groups, class ids, splits. An image gets the first
reason that applies. Nothing here reads a pixel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
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
from animesion.executors import Executor
from animesion.executors.shared import Shared
from animesion.images import quality
from animesion.pipeline import compare, embed, fetch, grouping, published, reasons, rules, verdicts
from animesion.pipeline.columns import Coded, CodedLists, Columns, Texts, batches, load_columns, release
from animesion.pipeline.curated import Decided, Relatives
from animesion.pipeline.versions import Parent
from animesion.schemas import CURATED, FACE_REASONS, MEANINGS, DropReason
from animesion.storage import checksums, parquet
from animesion.storage.receipts import Receipt
from animesion.storage.removed import Removed
from animesion.storage.workspace import Workspace
from animesion.wording import amount

CODE = "curate-5"


def run(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    parts: int,
    crashed: Mapping[str, str],
    parent: Parent | None = None,
) -> Receipt:
    """Decide, write the table and commit; returns the existing receipt if it is still valid.

    The receipt's facts are JSON-ready: `images` (listed), `seen` (images, or faces where each face is a sample),
    `kept`, `dropped` (count by reason), `classes` (names in the order of their ids), `strategy` (of the split),
    `splits` (size by name), `clusters` (of duplicates), `conflicts` (clusters with several labels), `chains` (of near
    duplicates, cut into several clusters) and `notes`.

    Args:
        workspace: output folder whose fetch and inspect stages are done.
        recipe: the recipe.
        executor: searches for near hashes.
        parts: number of parts.
        crashed: keys whose images crashed the decoder in a later stage, with a detail.
        parent: the version of the dataset that this one is built onto.
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
    if parent:
        inputs["parent"] = parent.digest
    refused = fetch.removed_images(workspace, recipe)
    values = {"params": _params(recipe), "crashed": dict(crashed), "notes": notes}
    digest = params_digest({**values, "removed": refused.digest()} if refused else values)
    receipt = workspace.done("curate", CODE, digest, inputs)
    if receipt:
        return receipt
    checksums.unseal(workspace.root)
    others = published.load_all(recipe.duplicates)
    rows = load_columns(workspace, parts, _more_columns(recipe))
    if recipe.duplicates.embedding.decides:
        rows["embedding"] = embed.read(workspace, parts, rows["key"])
    placed = published.splits_of(Path(recipe.split.keep)) if recipe.split.keep else {}
    placed |= parent.splits if parent else {}
    compared = compare.read(workspace) if compare.wanted(recipe) else None
    curated, facts = decide(
        rows, recipe, crashed, others, placed, compared, refused, parent, Shared(executor, workspace.root)
    )
    facts["notes"] = [*notes, *facts["notes"]]
    release()
    outputs = {"curated.parquet": parquet.write_groups(workspace.path("curated.parquet"), CURATED, _tables(curated))}
    return workspace.commit("curate", CODE, digest, inputs, outputs, facts)


def _tables(curated: Decided) -> Iterator[pa.Table]:
    """The row groups of the table; a million rows are half a gigabyte, and go before the next are made."""
    for some in curated.groups():
        yield curated.table(some)
        release()


def _more_columns(recipe: Recipe) -> list[str]:
    """Columns that only some recipes need."""
    more = [check.column for check in quality.checks(recipe.quality)]
    more += ["hash", "hash_flip"] if recipe.duplicates.other_hash else []
    return more + (["md5"] if recipe.duplicates.against else [])


def decide(
    rows: Columns,
    recipe: Recipe,
    crashed: Mapping[str, str],
    others: Sequence[published.PublishedFeatures] = (),
    placed: Mapping[str, str] | None = None,
    compared: pa.Table | None = None,
    refused: Removed | None = None,
    parent: Parent | None = None,
    shared: Shared | None = None,
) -> tuple[Decided, dict[str, Any]]:
    """Decide on every row, without reading or writing files other than thumbnails of candidates.

    Columns and what is decided take about 400 bytes per row, and a pair of duplicates a few hundred more.

    Args:
        rows: one entry per image, as `animesion.pipeline.columns.load_columns` returns them.
        recipe: the recipe.
        crashed: keys to drop as `crashed decoder`, with a detail.
        others: published datasets whose images are not published again.
        placed: split by key of images that were published before and keep their split.
        compared: verdicts on pairs, of schema `PAIRS`; None if no pixels were compared.
        refused: images that were removed on request.
        parent: the version that fixes class ids and the names of groups.
        shared: workers for the search by hashes; None to search in this process.

    Returns:
        A table in the order of the rows, and the stage's facts.
    """
    placed = placed or {}
    keys: pa.Array = rows["key"]
    n = len(keys)
    labels = _labels(rows["labels"], recipe)
    # `reason`, `detail`, `keeper` and `labels` are changed in place by each rule; an empty reason means kept so far.
    reason, detail = reasons.single_image_reasons(rows, recipe, crashed)
    keeper = Texts(n)  # of images that another dataset has
    if refused:
        for some in batches(n):
            texts = (rows[name][some].to_pylist() for name in ("sha256", "pixels_blake3", "source_id"))
            for i, sha256, pixels, source_id in zip(range(some.start, some.stop), *texts, strict=True):
                if refused.has(sha256, pixels, rows["source"][i], source_id):
                    reason[i], detail[i] = DropReason.REMOVED, ""
    notes = _unsure_notes(rows, reason, detail, recipe)
    if recipe.crop.detector == "auto" and (without := int((~rows["has_table"]).sum())):
        notes.append(f"the source has no table of boxes for {without:,} images: the detector 'anime' looked for faces")
    notes += _apply_decisions(keys, rows["face"], labels, recipe, reason, detail)

    # Before duplicates within the build, so that the keeper of a cluster is never dropped as already published.
    published_twins = published.twins(rows, grouping.remaining(reason), others, recipe, compared)
    if recipe.duplicates.action == "drop":
        for i, (how, their_key) in published_twins.items():
            reason[i], detail[i], keeper[i] = DropReason.PUBLISHED_DUPLICATE, how, their_key
    elif published_twins:
        notes.append(f"{len(published_twins)} images are already in a published dataset")

    duplicates = clusters.judge(
        _with_sample_digests(rows), grouping.remaining(reason), labels, recipe, compared, shared
    )
    release()
    for i, other in duplicates.conflicting.items():
        reason[i], detail[i] = DropReason.LABEL_CONFLICT, f"also under {labels[other]} as {keys[other]}"
    of_twin = duplicates.kept_instead >= 0
    for equals, why in enumerate((DropReason.NEAR_DUPLICATE, DropReason.PIXEL_DUPLICATE, DropReason.EXACT_DUPLICATE)):
        reason[of_twin & (duplicates.equals == equals)] = why
    for i in detail.changed():  # what could be said of an image that stays
        if of_twin[i]:
            detail[i] = ""
    _confirm_decided(duplicates, keys, recipe, reason)
    pairs_decided = {frozenset(each.images) for each in recipe.curate.decisions.pairs}
    if unused := len(pairs_decided) - len(duplicates.decided):
        notes.append(
            f"decisions: {unused:,} verdicts on pairs have no effect: an image of the pair is not there or was dropped "
            "for another reason, or both have equal pixels"
        )
    if recipe.duplicates.action == "report":
        notes += _found_notes(duplicates, keys, labels, compared is not None)

    published_split = grouping.split_codes(rows["split"])
    if recipe.split.strategy == "published":
        reason[reason.has("") & (published_split < 0)] = DropReason.NO_PUBLISHED_SPLIT
    notes += grouping.class_name_notes(labels, reason)
    notes += grouping.apply_class_sizes(keys, labels, recipe, reason)

    # Groups cover dropped images too: two kept images may be related only through one that was dropped.
    tokens = grouping.family_tokens(rows, labels, recipe)
    in_family = np.zeros(n, dtype=np.bool_)
    in_family[np.concatenate([owner for _, owner in tokens])] = True
    group_ids = search.components(n, [*duplicates.related, grouping.family_pairs(rows, tokens, reason)])
    del tokens
    groups = grouping.component_names(group_ids, keys)
    if parent:
        groups = parent.stable_groups(groups, keys)
    del group_ids

    kept = grouping.remaining(reason)
    class_ids = grouping.class_map(grouping.published_ids(rows, recipe), labels, kept)
    if parent:
        class_ids = parent.stable_classes(class_ids)
    of_label = np.array([class_ids.get(name, -1) for name in labels.names], dtype=np.int64)
    strategy, assignment = grouping.assigned(rows, recipe, kept, labels, of_label, groups, placed)
    split_of = np.full(n, -1, dtype=np.int8)
    split_of[kept] = assignment.choices
    apart = reason.has("") & (split_of < 0)
    if apart.any():  # only with `by-class`
        reason[apart] = DropReason.CLASS_APART
        notes.append(
            f"{int(apart.sum()):,} images were dropped because most of their group is of classes in another split: a "
            "class and a group each stay in one split"
        )
        kept = grouping.remaining(reason)
        class_ids = grouping.class_map(grouping.published_ids(rows, recipe), labels, kept)

    cluster = grouping.component_names(duplicates.cluster, keys)
    cluster[np.bincount(duplicates.cluster, minlength=n)[duplicates.cluster] < 2] = -1
    relatives = Relatives(duplicates, keys, keeper)
    removed = _removed_names(reason, keys)
    curated = Decided(rows, reason, detail, labels, class_ids, split_of, groups, cluster, relatives, removed)

    if placed and strategy in ("grouped", "by-class"):
        notes.append(grouping.kept_splits_note(placed, keys, split_of))
    notes += grouping.lost_splits_notes(recipe, strategy, published_split[kept], placed)
    notes += grouping.straddling_notes(strategy, groups, split_of)
    notes += grouping.variants_notes(rows, recipe, labels, split_of, in_family)
    if others:
        copies = "off" if compared is None else recipe.duplicates.for_images(n).copies
        notes.append(f"published datasets: {reach.sentence(copies, other_hash=recipe.duplicates.other_hash)}")
        notes += grouping.published_family_notes(rows, others, split_of)
    notes += conflicts_note(duplicates.conflicts, duplicates.clusters)
    if duplicates.unlike:
        notes.append(
            f"{amount(duplicates.unlike, 'pair')} of images under two labels with close hashes kept, in one split"
        )
    if duplicates.chains:
        diameter = recipe.duplicates.diameter or 2 * recipe.duplicates.radius
        notes.append(
            f"{duplicates.chains} chains of near duplicates were cut: their ends differ by more than {diameter} bits"
        )
    class_names = list(class_ids)
    sizes = dict(zip(splits.SPLITS, np.bincount(split_of[kept], minlength=3).tolist(), strict=True))
    notes += grouping.empty_splits(strategy, recipe, sizes)
    # Splits are assigned by class id; readers of the notes know classes by name.
    notes += [note.replace(f"class {c}:", f"class {class_names[c]}:", 1) for c, note in assignment.notes]

    counts = reason.counts()
    facts = {
        # An image whose faces are samples has several rows; the first of them counts the image.
        "images": int(np.isin(rows["face"], (0, 1)).sum()),
        "seen": n,
        "kept": len(kept),
        "dropped": {name: counts[name] for name in MEANINGS if counts.get(name)},
        "classes": class_names,
        "strategy": strategy,
        "splits": {name: size for name, size in sizes.items() if size},
        "clusters": duplicates.clusters,
        "conflicts": duplicates.conflicts,
        "chains": duplicates.chains,
        "notes": notes,
    }
    return curated, facts


def _labels(lists: CodedLists, recipe: Recipe) -> Coded:
    """The label of each row: its candidates without those that the recipe ignores, as one text."""
    labels = Coded.empty(len(lists))
    counts = lists.counts()
    code_of = functools.cache(
        lambda codes: labels.code("|".join(rules.labels_left([lists.names[code] for code in codes], recipe.label)))
    )
    alone = np.array([code_of((code,)) for code in range(len(lists.names))], dtype=np.int32)
    single = counts == 1
    labels.codes[single] = alone[lists.codes[lists.ends[single] - 1]]
    for i in np.flatnonzero(~single).tolist():
        labels.codes[i] = code_of(lists.of(i))
    return labels


def _removed_names(reason: Coded, keys: pa.Array) -> dict[int, str]:
    """Row of each removed image -> its name, which no image has as its key."""
    rows = np.flatnonzero(reason.has(DropReason.REMOVED))
    if not len(rows):
        return {}
    taken = set(keys.filter(pc.starts_with(keys, "removed-")).to_pylist())
    free = (name for number in itertools.count() if (name := f"removed-{number:05d}") not in taken)
    return dict(zip(rows.tolist(), free, strict=False))


def _found_notes(duplicates: clusters.Verdicts, keys: pa.Array, labels: Coded, compared: bool) -> list[str]:
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


def _with_sample_digests(rows: Rows) -> Rows:
    """The rows with the crop appended to each digest where faces are samples, as `decisions.image_id` does.

    All faces of an image share its bytes and pixels; without this they would be exact duplicates of one another.
    """
    is_face = (rows["face"] > 0) & rows["cropped"]
    if not is_face.any():
        return rows
    corners = [pa.array(corner).cast(pa.string()) for corner in rows["crop"].T]
    crop = pc.binary_join_element_wise(*corners, ",")
    digests = {
        name: pc.if_else(is_face, pc.binary_join_element_wise(texts, crop, "#"), texts)
        for name in ("sha256", "pixels_blake3")
        for texts in [rows[name][:]]
    }
    return {**rows, **digests}


# -- decisions -------------------------------------------------------------------------------------------------------


def _confirm_decided(duplicates: clusters.Verdicts, keys: pa.Array, recipe: Recipe, reason: Coded) -> None:
    """Give near duplicates that a curator confirmed a reason of their own, in place: clusters treat them alike."""
    first_of_set = decisions.representatives(recipe.curate.decisions.same)
    if not first_of_set and not duplicates.decided:
        return
    near = np.flatnonzero((duplicates.kept_instead >= 0) & (duplicates.equals == 0))
    for i, twin in zip(near.tolist(), duplicates.kept_instead[near].tolist(), strict=True):
        key = keys[i].as_py()
        confirmed = key in first_of_set and first_of_set[key] == first_of_set.get(keys[twin].as_py())
        if duplicates.decided:
            pair = sorted((int(duplicates.unit[i]), int(duplicates.unit[twin])))
            confirmed |= duplicates.decided.get((pair[0], pair[1])) == "copy"
        if confirmed:
            reason[i] = DropReason.DUPLICATE_BY_DECISION


def _unsure_notes(rows: Rows, reason: Coded, detail: Texts, recipe: Recipe) -> list[str]:
    """Notes on images with one face and perhaps another; those that are kept get a detail, in place."""
    if recipe.crop.faces != "one-only" or recipe.crop.detector == "none":
        return []
    # one face by decision, whatever the detector found, is sure
    may_be = np.flatnonzero(
        (rows["box_count"] > 1) & (rows["faces"] != 1) & (rows["second_score"] < recipe.crop.min_score)
    )
    count, best, second = (rows[name][may_be].tolist() for name in ("box_count", "best_score", "second_score"))
    boxes = zip(may_be.tolist(), count, best, second, strict=True)
    perhaps = [i for i, *each in boxes if rules.is_perhaps(each[0], each[1], each[2], recipe)]
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


def conflicts_note(conflicts: int, clusters: int) -> list[str]:
    """The note on duplicate clusters that have several labels, if there are any."""
    if not conflicts:
        return []
    return [f"{conflicts} of {clusters} duplicate clusters {'has' if conflicts == 1 else 'have'} several labels"]


def _apply_decisions(
    keys: pa.Array,
    faces: npt.NDArray[np.int32],
    labels: Coded,
    recipe: Recipe,
    reason: Coded,
    detail: Texts,
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
    unknown = decided.named()
    for some in batches(len(keys)):
        for i, key, face in zip(
            range(some.start, some.stop), keys[some].to_pylist(), faces[some].tolist(), strict=True
        ):
            image = key.removesuffix(f"-face{face}") if face else key
            unknown -= {key, image}
            if image in several or key in several:
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
    counts = [
        (len(excluded), "image to exclude", "images to exclude"),
        (len(decided.label), "label", "labels"),
        (len(decided.same), "set of the same image", "sets of the same image"),
        (len(decided.different), "set of different images", "sets of different images"),
        (len(decided.pairs), "verdict on a pair", "verdicts on pairs"),
        (len(decided.box), "box", "boxes"),
        (len(decided.several), "image of several characters", "images of several characters"),
    ]
    notes = [f"decisions: {', '.join(amount(*each) for each in counts if each[0])}"]
    if decided.box and recipe.crop.detector == "none":
        notes.append("decisions: boxes have no effect where the whole image is the sample (crop.detector is 'none')")
    if unknown:
        notes.append(f"decisions: {amount(len(unknown), 'key matches', 'keys match')} no image of this source")
    if without_effect:
        notes.append(
            f"decisions: {amount(without_effect, 'label is', 'labels are')} of images that other rules dropped"
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
