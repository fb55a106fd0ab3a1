"""Stage 3: decide which images to keep, with which class and split; writes `curated.parquet`, one row per listed image.

Rules run in this order: failures of earlier stages and limits on single images (`animesion.pipeline.reasons`), the
curator's decisions, duplicates and label conflicts, class sizes, groups, class ids, splits. An image gets the first
reason that applies. Nothing here reads a pixel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from animesion.images import quality
from animesion.pipeline import compare, embed, fetch, published, reasons, rules, variants, verdicts
from animesion.pipeline.columns import PASSED, Coded, CodedLists, Columns, Texts, batches, load_columns
from animesion.pipeline.versions import Parent
from animesion.schemas import CURATED, FACE_REASONS, MEANINGS, DropReason
from animesion.sources import families
from animesion.storage import checksums, parquet
from animesion.storage.receipts import Receipt
from animesion.storage.removed import Removed
from animesion.storage.workspace import Workspace

CODE = "curate-5"


def run(
    workspace: Workspace, recipe: Recipe, parts: int, crashed: Mapping[str, str], parent: Parent | None = None
) -> Receipt:
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
    curated, facts = decide(rows, recipe, crashed, others, placed, compared, refused, parent)
    facts["notes"] = [*notes, *facts["notes"]]
    groups = (curated.table(some) for some in curated.groups())
    outputs = {"curated.parquet": parquet.write_groups(workspace.path("curated.parquet"), CURATED, groups)}
    return workspace.commit("curate", CODE, digest, inputs, outputs, facts)


def _more_columns(recipe: Recipe) -> list[str]:
    """Columns that only some recipes need."""
    more = [check.column for check in quality.checks(recipe.quality)]
    more += ["hash", "hash_flip"] if recipe.duplicates.other_hash else []
    return more + (["md5"] if recipe.duplicates.against else [])


@dataclass
class Decided:
    """The table `curated.parquet`, of which parts are made when they are asked for.

    Attributes:
        rows: what was decided on.
        reason: drop reason of each row; empty if it is kept.
        detail: detail of the reason.
        keeper: key of the image that is kept instead.
        label: label of each row.
        class_ids: class id by label.
        split: shape (n,), place in `SPLITS` of each row's split, -1 for a dropped one.
        group: shape (n,), the row whose key is the name of each row's group.
        cluster: shape (n,), likewise of its cluster, -1 for none.
        relatives: the columns on the image that each row resembles.
        removed: row of each removed image -> the name that it has instead of its key.
    """

    rows: Columns
    reason: Coded
    detail: Texts
    keeper: Texts
    label: Coded
    class_ids: Mapping[str, int]
    split: npt.NDArray[np.int8]
    group: npt.NDArray[np.int64]
    cluster: npt.NDArray[np.int64]
    relatives: _Relatives
    removed: Mapping[int, str]

    def groups(self) -> Iterator[slice]:
        """Ranges of rows that are a row group of the file each."""
        n = len(self.reason)
        return (slice(start, min(start + parquet.ROW_GROUP, n)) for start in range(0, max(n, 1), parquet.ROW_GROUP))

    def table(self, some: slice) -> pa.Table:
        """A range of rows, of schema `CURATED`."""
        rows, keys = self.rows, self.rows["key"]
        start, stop = some.start, some.stop
        kept = self.split[some] >= 0
        ids = np.array([self.class_ids.get(name, -1) for name in self.label.names], dtype=np.int64)
        shown = pa.array([*splits.SPLITS, ""]).take(pa.array(np.where(kept, self.split[some], len(splits.SPLITS))))
        columns: dict[str, Any] = {
            "kept": self.reason.has("")[some],
            "reason": self.reason.texts(some),
            "detail": self.detail.texts(start, stop),
            "keeper": self.keeper.texts(start, stop),
            "label": self.label.texts(some),
            "class_id": np.where(kept, ids[self.label.codes[some]], -1),
            "split": shown,
            "group": keys.take(pa.array(self.group[some])),
            "cluster": keys.take(pa.array(self.cluster[some], mask=self.cluster[some] < 0)).fill_null(""),
            **self.relatives.columns(start, stop),
            "crop": pa.FixedSizeListArray.from_arrays(pa.array(rows["crop"][some].ravel()), 4),
        }
        for name in CURATED.names:
            if name in PASSED:
                columns[name] = rows.passed.column(name, start, stop)
            elif name not in columns:
                values = rows[name]
                columns[name] = values.texts(some) if isinstance(values, Coded) else values[some]
        arrays = [_as_arrow(columns[field.name], field.type) for field in CURATED]
        return self._without_removed(pa.table(arrays, schema=CURATED), start)

    def _without_removed(self, table: pa.Table, start: int) -> pa.Table:
        """The table with nothing about removed images but that they were dropped, and from which source."""
        names = {row - start: name for row, name in self.removed.items() if 0 <= row - start < len(table)}
        if not names:
            return table
        mask = np.zeros(len(table), dtype=np.bool_)
        mask[list(names)] = True
        for place, column in enumerate(CURATED):
            if column.name in ("kept", "reason", "class_id", "source", "part"):
                continue
            blank: Any = "" if column.type == pa.string() else 0
            blanks = [names[row] if column.name in ("key", "group") else blank for row in sorted(names)]
            if column.name == "crop":
                corners = np.array(table["crop"].combine_chunks().flatten()).reshape(-1, 4)
                values: Any = pa.FixedSizeListArray.from_arrays(
                    pa.array(np.where(mask[:, None], 0, corners).ravel()), 4
                )
            else:
                values = pc.replace_with_mask(
                    table[column.name].combine_chunks(), mask, pa.array(blanks).cast(column.type)
                )
            table = table.set_column(place, column, values.cast(column.type))
        return table


def decide(
    rows: Columns,
    recipe: Recipe,
    crashed: Mapping[str, str],
    others: Sequence[published.PublishedFeatures] = (),
    placed: Mapping[str, str] | None = None,
    compared: pa.Table | None = None,
    refused: Removed | None = None,
    parent: Parent | None = None,
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

    Returns:
        A table in the order of the rows, and the stage's facts.
    """
    placed = placed or {}
    keys: pa.Array = rows["key"]
    n = len(keys)
    labels = _labels(rows["labels"], recipe)
    # `reason`, `detail`, `keeper` and `labels` are changed in place by each rule; an empty reason means kept so far.
    reason, detail = reasons.single_image_reasons(rows, recipe, crashed)
    keeper = Texts(n)
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
    published_twins = published.twins(rows, _remaining(reason), others, recipe, compared)
    if recipe.duplicates.action == "drop":
        for i, (how, their_key) in published_twins.items():
            reason[i], detail[i], keeper[i] = DropReason.PUBLISHED_DUPLICATE, how, their_key
    elif published_twins:
        notes.append(f"{len(published_twins)} images are already in a published dataset")

    duplicates = clusters.judge(_with_sample_digests(rows), _remaining(reason), labels, recipe, compared)
    kept_instead: dict[int, int] = {}
    for i, (why, how, twin) in duplicates.dropped.items():
        reason[i], detail[i] = why, how
        if twin >= 0:
            keeper[i], kept_instead[i] = keys[twin].as_py(), twin
    # Clusters treat pairs that a curator confirmed like near duplicates; their reason differs.
    first_of_set = decisions.representatives(recipe.curate.decisions.same)
    for i, twin in kept_instead.items() if first_of_set or duplicates.decided else ():
        key = keys[i].as_py()
        confirmed = key in first_of_set and first_of_set[key] == first_of_set.get(keeper[i])
        if duplicates.decided:
            pair = sorted((int(duplicates.unit[i]), int(duplicates.unit[twin])))
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

    published_split = _split_codes(rows["split"])
    if recipe.split.strategy == "published":
        reason[reason.has("") & (published_split < 0)] = DropReason.NO_PUBLISHED_SPLIT
    notes += _apply_class_sizes(keys, labels, recipe, reason)

    # Groups cover dropped images too: two kept images may be related only through one that was dropped.
    tokens = _family_tokens(rows, labels, recipe)
    in_family = np.zeros(n, dtype=np.bool_)
    in_family[np.concatenate([owner for _, owner in tokens])] = True
    group_ids = search.components(n, [*duplicates.related, _family_pairs(rows, tokens, reason)])
    del tokens
    groups = _component_names(group_ids, keys)
    if parent:
        groups = parent.stable_groups(groups, keys)
    del group_ids

    kept = _remaining(reason)
    class_ids = _class_map(_published_ids(rows, recipe), labels, kept)
    if parent:
        class_ids = parent.stable_classes(class_ids)
    of_label = np.array([class_ids.get(name, -1) for name in labels.names], dtype=np.int64)
    strategy, assignment = _split(rows, recipe, kept, labels, of_label, groups, placed)
    split_of = np.full(n, -1, dtype=np.int8)
    split_of[kept] = assignment.choices
    apart = reason.has("") & (split_of < 0)
    if apart.any():  # only with `by-class`
        reason[apart] = DropReason.CLASS_APART
        notes.append(
            f"{int(apart.sum()):,} images were dropped because most of their group is of classes in another split: a "
            "class and a group each stay in one split"
        )
        kept = _remaining(reason)
        class_ids = _class_map(_published_ids(rows, recipe), labels, kept)

    cluster = _component_names(duplicates.cluster, keys)
    cluster[np.bincount(duplicates.cluster, minlength=n)[duplicates.cluster] < 2] = -1
    relatives = _Relatives(duplicates, keys, keeper, kept_instead, n)
    removed = _removed_names(reason, keys)
    curated = Decided(rows, reason, detail, keeper, labels, class_ids, split_of, groups, cluster, relatives, removed)

    if placed and strategy in ("grouped", "by-class"):
        notes.append(_kept_splits_note(placed, keys, split_of))
    notes += _straddling_notes(strategy, groups, split_of)
    notes += _variants_notes(rows, recipe, labels, split_of, in_family)
    if others:
        copies = "off" if compared is None else recipe.duplicates.for_images(n).copies
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
    sizes = dict(zip(splits.SPLITS, np.bincount(split_of[kept], minlength=3).tolist(), strict=True))
    notes += _empty_splits(strategy, recipe, sizes)
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


class _Relatives:
    """The columns on the image that each row resembles: the one that is kept instead, or its closest relative.

    Args:
        duplicates: the verdicts.
        keys: key of each row.
        keeper: key of the image that is kept instead of each row.
        kept_instead: row of that image, where it is one of the build.
        n: number of rows.
    """

    def __init__(
        self,
        duplicates: clusters.Verdicts,
        keys: pa.Array,
        keeper: Texts,
        kept_instead: Mapping[int, int],
        n: int,
    ) -> None:
        self._texts = {name: Texts(n) for name in ("resembles", "verdict", "how")}
        self._inliers = np.zeros(n, dtype=np.int32)
        self._residual = np.zeros(n, dtype=np.float32)
        of_unit: dict[int, list[tuple[int, clusters.Relation]]] = {}
        for (a, b), relation in duplicates.relations.items():
            of_unit.setdefault(a, []).append((b, relation))
            of_unit.setdefault(b, []).append((a, relation))
        for i in keeper.changed():
            # equal bytes or pixels need no comparison
            self._texts["resembles"][i], self._texts["verdict"][i] = keeper[i], "copy"
        units = np.fromiter(of_unit, dtype=np.int64, count=len(of_unit))
        for i in np.flatnonzero(np.isin(duplicates.unit, units)).tolist():
            related = of_unit[int(duplicates.unit[i])]
            kept = kept_instead.get(i)
            if kept is not None:
                related = [each for each in related if each[0] == int(duplicates.unit[kept])]
            if related:
                other, relation = min(related, key=lambda each: (*clusters.closeness(each[1]), each[0]))
                self._texts["resembles"][i] = keys[other if kept is None else kept].as_py()
                self._texts["verdict"][i], self._texts["how"][i] = relation.verdict, relation.how
                self._inliers[i], self._residual[i] = relation.inliers, relation.residual

    def columns(self, start: int, stop: int) -> dict[str, Any]:
        """The columns of a range of rows."""
        texts = {name: texts.texts(start, stop) for name, texts in self._texts.items()}
        return {**texts, "inliers": self._inliers[start:stop], "residual": self._residual[start:stop]}


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
        name: pc.if_else(is_face, pc.binary_join_element_wise(rows[name], crop, "#"), rows[name])
        for name in ("sha256", "pixels_blake3")
    }
    return {**rows, **digests}


def _as_arrow(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind) if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, kind)


def _remaining(reason: Coded) -> npt.NDArray[np.int64]:
    """Rows without a drop reason, ascending."""
    return np.flatnonzero(reason.has(""))


# -- decisions -------------------------------------------------------------------------------------------------------


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
    notes = [
        f"decisions: {len(excluded):,} images to exclude, {len(decided.label):,} labels, "
        f"{len(decided.same):,} sets of the same image, {len(decided.different):,} sets of different images, "
        f"{len(decided.pairs):,} verdicts on pairs"
        + (f", {len(decided.box):,} boxes" if decided.box else "")
        + (f", {len(decided.several):,} images of several characters" if decided.several else "")
    ]
    if decided.box and recipe.crop.detector == "none":
        notes.append("decisions: boxes have no effect where the whole image is the sample (crop.detector is 'none')")
    if unknown:
        notes.append(f"decisions: {len(unknown):,} keys match no image of this source")
    if without_effect:
        notes.append(f"decisions: {without_effect:,} labels belong to images that other rules dropped")
    return notes


# -- classes, groups, splits -----------------------------------------------------------------------------------------


def _apply_class_sizes(keys: pa.Array, labels: Coded, recipe: Recipe, reason: Coded) -> list[str]:
    """Drop rare classes and images over the cap, in place; returns notes."""
    left = _remaining(reason)
    codes = labels.codes[left]
    sizes = np.bincount(codes, minlength=len(labels.names))
    is_rare = (sizes > 0) & (sizes < recipe.classes.minimum)
    reason[left[is_rare[codes]]] = DropReason.RARE_CLASS
    if cap := recipe.classes.cap:
        by_class = left[np.argsort(codes, kind="stable")]
        ends = np.cumsum(sizes)
        for code in np.flatnonzero((sizes > cap) & ~is_rare).tolist():
            members = by_class[ends[code] - sizes[code] : ends[code]]
            # By hash, so that a new image displaces few of the images that were under the cap before.
            hashes = [splits.hashed_order(recipe.split.seed, key) for key in keys.take(pa.array(members)).to_pylist()]
            queue = sorted(range(len(members)), key=hashes.__getitem__)
            reason[members[queue[cap:]]] = DropReason.OVER_CLASS_CAP
    rare = int(is_rare.sum())
    total = int((sizes > 0).sum())
    return [f"{rare} of {total} classes have fewer than {recipe.classes.minimum} images"] if rare else []


#: Texts that name the family of an image, and the row of each.
_Tokens = tuple[pa.Array, npt.NDArray[np.int64]]


def _family_tokens(rows: Rows, labels: Coded, recipe: Recipe) -> list[_Tokens]:
    """The families of images, as the source lists them and by their names.

    Names are read again, as an update lists a variant after its image, and classes may have been renamed.
    """
    listed: pa.ListArray = rows["families"]
    counts = listed.value_lengths().to_numpy()
    tokens = [(listed.flatten(), np.repeat(np.arange(len(listed)), counts))]
    if families.option_of(recipe) != "auto":
        return tokens

    def ids_and_labels() -> Iterator[tuple[list[str], list[str]]]:
        for some in batches(len(labels)):
            yield rows["source_id"][some].to_pylist(), [labels.names[code] for code in labels.codes[some].tolist()]

    for some, found in zip(batches(len(labels)), families.in_batches(ids_and_labels), strict=True):
        owners = [i for i, names in zip(range(some.start, some.stop), found, strict=True) for _ in names]
        if owners:
            texts = pa.array([name for names in found for name in names], tokens[0][0].type)
            tokens.append((texts, np.array(owners, dtype=np.int64)))
    return tokens


def _family_pairs(rows: Rows, tokens: Sequence[_Tokens], reason: Coded) -> search.Pairs:
    """Pairs of rows that share a token or an id of a source, shape (m, 2); a removed image shares none."""
    named = np.flatnonzero(~reason.has(DropReason.REMOVED))
    kind = tokens[0][0].type
    sources = pa.array([f"id:{name}" for name in rows["source"].names], kind)
    sources = sources.take(pa.array(rows["source"].codes[named]))
    ids = rows["source_id"].take(pa.array(named)).cast(kind)
    texts = [pc.binary_join_element_wise(sources, ids, pa.scalar(":", kind))]
    owners = [named]
    for values, owner in tokens:
        shared = ~reason.has(DropReason.REMOVED)[owner]
        texts.append(values.filter(pa.array(shared)))
        owners.append(owner[shared])
    pairs = search.equal_pairs(pa.concat_arrays(texts))
    found: search.Pairs = np.concatenate(owners)[pairs]
    return found


def _component_names(component: npt.NDArray[np.int64], keys: pa.Array) -> npt.NDArray[np.int64]:
    """The row of each component's smallest key, which does not depend on the order of rows.

    Args:
        component: a row of its component for each row, shape (n,).
        keys: key of each row.
    """
    n = len(keys)
    if n < 2 or pc.all(pc.less(keys[:-1], keys[1:])).as_py():
        smallest = np.full(n, n, dtype=np.int64)
        np.minimum.at(smallest, component, np.arange(n))
        return smallest[component]
    order = pc.sort_indices(keys).to_numpy().astype(np.int64)
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    smallest = np.full(n, n, dtype=np.int64)
    np.minimum.at(smallest, component, rank)
    named: npt.NDArray[np.int64] = order[smallest[component]]
    return named


def _published_ids(rows: Rows, recipe: Recipe) -> npt.NDArray[np.int64]:
    """The published class id of each row, -1 for none."""
    ids: npt.NDArray[np.int64] = rows["class_order"]
    # A published id belongs to the source's label, not to a label that a decision gives.
    relabelled = [*search.rows_of(rows["key"], recipe.curate.decisions.label).values()]
    if relabelled:
        ids = ids.copy()
        ids[relabelled] = -1
    return ids


def _class_map(published_ids: npt.NDArray[np.int64], labels: Coded, kept: npt.NDArray[np.int64]) -> dict[str, int]:
    """Class ids: in the order of the published ids where there are any, then by name."""
    none = np.iinfo(np.int64).max
    ids = published_ids[kept]
    least = np.full(len(labels.names), none, dtype=np.int64)
    np.minimum.at(least, labels.codes[kept], np.where(ids >= 0, ids, none))
    names = [(least[code].item(), labels.names[code]) for code in np.unique(labels.codes[kept]).tolist()]
    return {label: i for i, (_, label) in enumerate(sorted(names))}


def _split_codes(published_splits: Coded) -> npt.NDArray[np.int8]:
    """The place in `SPLITS` of each row's published split, -1 for none, shape (n,)."""
    places = {name: place for place, name in enumerate(splits.SPLITS)}
    codes = np.array([places.get(name, -1) for name in published_splits.names], dtype=np.int8)
    found: npt.NDArray[np.int8] = codes[published_splits.codes]
    return found


def _split(
    rows: Rows,
    recipe: Recipe,
    kept: npt.NDArray[np.int64],
    labels: Coded,
    of_label: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    placed: Mapping[str, str],
) -> tuple[str, splits.Assignment]:
    """The strategy that was used, and the splits that it assigns to the kept rows.

    Args:
        rows: what is decided on.
        recipe: the recipe.
        kept: rows that are kept.
        labels: label of each row.
        of_label: class id by the code of the label.
        groups: the row whose key is the name of each row's group.
        placed: split by key of images that were published before.
    """
    classes = of_label[labels.codes[kept]]
    published_splits = _split_codes(rows["split"])[kept]
    strategy: str = recipe.split.strategy
    if strategy == "auto":
        strategy = "published" if len(kept) and (published_splits >= 0).all() else "grouped"
    if strategy == "published":
        return strategy, splits.Assignment(published_splits, [])
    if strategy == "legacy-dafre":
        return strategy, splits.legacy_dafre(classes, rows["order"][kept])
    if strategy == "single":
        return strategy, splits.Assignment(np.zeros(len(kept), dtype=np.int8), [])
    percents = (recipe.split.train, recipe.split.val, recipe.split.test)
    fixed: dict[str, str] = {}
    keys = rows["key"]
    if strategy == "by-class":
        for key, row in search.rows_of(keys, placed).items():
            if (split := placed[key]) in splits.SPLITS:
                fixed[labels[row]] = min(split, fixed.get(labels[row], split), key=splits.SPLITS.index)
        codes = labels.codes[kept].astype(np.int64)
        return strategy, splits.by_class(codes, labels.names, groups[kept], percents, recipe.split.seed, fixed)
    # Dropped rows count too: a better copy may have replaced a published image and takes over its split.
    for key, row in search.rows_of(keys, placed).items():
        if (split := placed[key]) in splits.SPLITS:
            group = keys[int(groups[row])].as_py()
            # Train wins within a group: an image that was trained on must not become a test image later.
            fixed[group] = min(split, fixed.get(group, split), key=splits.SPLITS.index)
    names, codes = np.unique(groups[kept], return_inverse=True)
    encoded = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), keys.take(pa.array(names)))
    return strategy, splits.grouped(classes, encoded, percents, recipe.split.seed, fixed)


def _empty_splits(strategy: str, recipe: Recipe, sizes: Mapping[str, int]) -> list[str]:
    """A note if a split that the recipe wants has no images."""
    wanted = {"train": recipe.split.train, "val": recipe.split.val, "test": recipe.split.test}
    empty = [name for name, percent in wanted.items() if percent and not sizes[name]]
    if strategy not in ("grouped", "by-class") or not any(sizes.values()) or not empty:
        return []
    why = "there are too few classes" if strategy == "by-class" else "the classes are too small"
    return [f"no images in split {' and '.join(empty)}: {why} for the shares of the recipe"]


def _kept_splits_note(placed: Mapping[str, str], keys: pa.Array, split_of: npt.NDArray[np.int8]) -> str:
    """How many published images kept their split."""
    rows = {key: row for key, row in search.rows_of(keys, placed).items() if split_of[row] >= 0}
    moved = sum(placed[key] != splits.SPLITS[split_of[row]] for key, row in rows.items())
    moved_note = f"; {moved} moved to the split of a related image" if moved else ""
    return f"{len(rows) - moved} of {len(placed)} published images kept their split{moved_note}"


def _straddling_notes(strategy: str, groups: npt.NDArray[np.int64], split_of: npt.NDArray[np.int8]) -> list[str]:
    """The note on kept images with a relative in an earlier split (train, val, test), where splits are published."""
    if strategy not in ("published", "legacy-dafre"):
        return []
    order = splits.SPLITS
    there = np.zeros((len(groups), len(order)), dtype=np.bool_)
    kept = np.flatnonzero(split_of >= 0)
    there[groups[kept], split_of[kept]] = True
    # whether the group of each row is in an earlier split
    earlier = np.zeros(len(groups), dtype=np.bool_)
    for place in range(1, len(order)):
        of_split = kept[split_of[kept] == place]
        earlier[of_split] = there[groups[of_split], :place].any(axis=1)
    sizes = np.bincount(split_of[kept], minlength=len(order)).tolist()
    related = np.bincount(split_of[earlier], minlength=len(order)).tolist()
    if not any(related):
        return []
    listed = zip(order, related, sizes, strict=True)
    counts = " and ".join(f"{count:,} of {size:,} in {split}" for split, count, size in listed if count)
    return [
        f"images related to one of an earlier split, by family or as duplicates: {counts}; `animesion verify` names "
        "them, and split.strategy=grouped makes splits without them"
    ]


def _variants_notes(
    rows: Rows, recipe: Recipe, labels: Coded, split_of: npt.NDArray[np.int8], in_family: npt.NDArray[np.bool_]
) -> list[str]:
    """The note on kept images of no family whose names look like variants of one image."""
    if recipe.source.options.get("family") == "":
        return []
    # An image whose faces are samples has several rows of one name.
    chosen = np.flatnonzero((split_of >= 0) & ~in_family & np.isin(rows["face"], (0, 1)))
    advice = ": set source.family to a regular expression, or empty to silence" if families.option_of(recipe) else ""
    note = variants.note(
        rows["source_id"].take(pa.array(chosen)),
        labels.codes[chosen],
        split_of[chosen],
        int((split_of >= 0).sum()),
        advice,
    )
    return [note] if note else []


def _published_family_notes(
    rows: Rows, others: Sequence[published.PublishedFeatures], split_of: npt.NDArray[np.int8]
) -> list[str]:
    """Notes on kept images whose family a published dataset has in another split, one for each dataset."""
    notes = []
    for other in others:
        relatives = published.relatives(rows, split_of, other)
        if relatives:
            i, place = next(iter(relatives.items()))
            theirs = f"{other.name}:{other.keys[place]} in {other.splits[place]}"
            example = f"{rows['key'][i]} in {splits.SPLITS[split_of[i]]} and {theirs}"
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
