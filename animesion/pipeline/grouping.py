"""Classes, groups and splits of the images that curate keeps, and the notes on them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion import splits
from animesion.config.recipe import Recipe
from animesion.dataset import text_tables
from animesion.dedup import search
from animesion.dedup.clusters import Rows
from animesion.pipeline import published, variants
from animesion.pipeline.columns import Coded, batches, concatenated
from animesion.schemas import DropReason
from animesion.sources import families
from animesion.wording import amount

#: Groups of similar names that a note shows.
_SHOWN = 3


def class_name_notes(labels: Coded, reason: Coded) -> list[str]:
    """Notes on classes whose names differ in spelling only, and on classes named like a missing label."""
    sizes = np.bincount(labels.codes[remaining(reason)], minlength=len(labels.names)).tolist()
    names = [name for name, size in zip(labels.names, sizes, strict=True) if size]
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        # not before a digit: -1 is not 1, and 1-23 not 12-3
        alike[re.sub(r"[\s_-]+(?!\d)", "", plain)].append(name)
    notes = []
    if groups := sorted(sorted(each) for each in alike.values() if len(each) > 1):
        shown = "; ".join(" and ".join(map(repr, each)) for each in groups[:_SHOWN])
        more = f"; and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
        quoted = ([json.dumps(name, ensure_ascii=False) for name in each] for each in groups[:_SHOWN])
        joined = ", ".join(f"{name} = {kept}" for kept, *others in quoted for name in others)
        notes.append(
            f"classes whose names differ in case, blanks, _, - or width only: {shown}{more}; "
            f"label.rename = {{ {joined} }} joins {'these' if more else 'them'}"
        )
    for name, size in zip(labels.names, sizes, strict=True):
        if size and (name == "-1" or name.casefold() in text_tables.MISSING):
            notes.append(
                f"{amount(size, 'image is', 'images are')} of a class '{name}': if this means that "
                f"{'it has' if size == 1 else 'they have'} no label, label.exclude = [{json.dumps(name)}] drops "
                f"{'it' if size == 1 else 'them'}"
            )
    return notes


def apply_class_sizes(keys: pa.Array, labels: Coded, recipe: Recipe, reason: Coded) -> list[str]:
    """Drop rare classes and images over the cap, in place; returns notes."""
    left = remaining(reason)
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
Tokens = tuple[pa.Array, npt.NDArray[np.int64]]


def family_tokens(rows: Rows, labels: Coded, recipe: Recipe) -> list[Tokens]:
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


def family_pairs(rows: Rows, tokens: Sequence[Tokens], reason: Coded) -> search.Pairs:
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
    whole = concatenated(texts)
    del texts, sources, ids
    pairs = search.equal_pairs(whole)
    found: search.Pairs = np.concatenate(owners)[pairs]
    return found


def component_names(component: npt.NDArray[np.int64], keys: pa.Array) -> npt.NDArray[np.int64]:
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


def published_ids(rows: Rows, recipe: Recipe) -> npt.NDArray[np.int64]:
    """The published class id of each row, -1 for none."""
    ids: npt.NDArray[np.int64] = rows["class_order"]
    # A published id belongs to the source's label, not to a label that a decision gives.
    relabelled = [*search.rows_of(rows["key"], recipe.curate.decisions.label).values()]
    if relabelled:
        ids = ids.copy()
        ids[relabelled] = -1
    return ids


def class_map(published_ids: npt.NDArray[np.int64], labels: Coded, kept: npt.NDArray[np.int64]) -> dict[str, int]:
    """Class ids: in the order of the published ids where there are any, then by name."""
    none = np.iinfo(np.int64).max
    ids = published_ids[kept]
    least = np.full(len(labels.names), none, dtype=np.int64)
    np.minimum.at(least, labels.codes[kept], np.where(ids >= 0, ids, none))
    names = [(least[code].item(), labels.names[code]) for code in np.unique(labels.codes[kept]).tolist()]
    return {label: i for i, (_, label) in enumerate(sorted(names))}


def split_codes(published_splits: Coded) -> npt.NDArray[np.int8]:
    """The place in `SPLITS` of each row's published split, -1 for none, shape (n,)."""
    places = {name: place for place, name in enumerate(splits.SPLITS)}
    codes = np.array([places.get(name, -1) for name in published_splits.names], dtype=np.int8)
    found: npt.NDArray[np.int8] = codes[published_splits.codes]
    return found


def assigned(
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
    published_splits = split_codes(rows["split"])[kept]
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


def empty_splits(strategy: str, recipe: Recipe, sizes: Mapping[str, int]) -> list[str]:
    """A note if a split that the recipe wants has no images."""
    wanted = {"train": recipe.split.train, "val": recipe.split.val, "test": recipe.split.test}
    empty = [name for name, percent in wanted.items() if percent and not sizes[name]]
    if strategy not in ("grouped", "by-class") or not any(sizes.values()) or not empty:
        return []
    why = "there are too few classes" if strategy == "by-class" else "the classes are too small"
    return [f"no images in split {' and '.join(empty)}: {why} for the shares of the recipe"]


def lost_splits_notes(
    recipe: Recipe, strategy: str, published_splits: npt.NDArray[np.int8], placed: Mapping[str, str]
) -> list[str]:
    """A note if splits are made although some kept images have a published one, which `auto` takes where all have."""
    known = int((published_splits >= 0).sum())
    if recipe.split.strategy != "auto" or strategy == "published" or not known or placed:
        return []
    return [
        f"{known:,} of {len(published_splits):,} images have a published split and the others none, so all get new "
        "ones: split.strategy=published keeps these and drops the others, grouped silences this"
    ]


def kept_splits_note(placed: Mapping[str, str], keys: pa.Array, split_of: npt.NDArray[np.int8]) -> str:
    """How many published images kept their split."""
    rows = {key: row for key, row in search.rows_of(keys, placed).items() if split_of[row] >= 0}
    moved = sum(placed[key] != splits.SPLITS[split_of[row]] for key, row in rows.items())
    moved_note = f"; {moved} moved to the split of a related image" if moved else ""
    return f"{len(rows) - moved} of {len(placed)} published images kept their split{moved_note}"


def straddling_notes(strategy: str, groups: npt.NDArray[np.int64], split_of: npt.NDArray[np.int8]) -> list[str]:
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


def variants_notes(
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


def published_family_notes(
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


def remaining(reason: Coded) -> npt.NDArray[np.int64]:
    """Rows without a drop reason, ascending."""
    return np.flatnonzero(reason.has(""))
