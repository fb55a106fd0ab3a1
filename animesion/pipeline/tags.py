"""Decide which tags there are, after curate: `tags.csv`, `sample_tags.parquet` and `dropped_tags.csv`.

The listing has the tags of each image as the source gives them (`raw/part-*.tags.parquet`). Here aliases are resolved
and implied tags added, then tags are counted over the kept samples, and those that the recipe does not want are
dropped. `animesion.dataset.tags` reads the result; pack writes it into the samples.

A tag has one category, as on boorus: the one that most samples list it in. An implied tag that no sample lists has the
category of what implies it.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion import sources, splits
from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dataset import tags, text_tables
from animesion.dataset.tags import Assigned, Vocabulary
from animesion.errors import UsageError
from animesion.pipeline import fetch
from animesion.pipeline.versions import Parent
from animesion.schemas import CURATED, RAW, SAMPLE_TAGS, TAG_CATEGORIES, TAG_MEANINGS, TAGS
from animesion.sources.tag_tables import TagTables
from animesion.storage import parquet
from animesion.storage.receipts import Receipt
from animesion.storage.workspace import Workspace, write_atomic

CODE = "tags-1"

IntArray = npt.NDArray[np.int64]


def run(
    workspace: Workspace, recipe: Recipe, source: sources.Source, plan: fetch.FetchPlan, parent: Parent | None
) -> Receipt:
    """Write the three files and commit, or return the receipt if it is still valid.

    Args:
        workspace: output folder whose curate stage is done.
        recipe: the recipe.
        source: gives the tables of aliases and implications.
        plan: the listing.
        parent: the version before; the vocabulary is then its own, unless samples get new shards.

    Raises:
        UsageError: no tag is left, or a table of aliases or implications cannot be read.
    """
    assert isinstance(source, sources.Tagged)
    tables = source.tag_tables()
    curate = workspace.receipt("curate")
    assert curate is not None
    listed = params_digest(plan.tags)
    fixed = parent.vocabulary if parent and not parent.compact else None
    inputs = {"curated": curate.outputs["curated.parquet"]["sha256"], "listed": listed}
    settings = [
        recipe.tags.model_dump(mode="json"),
        sorted(tables.aliases.items()),
        sorted(tables.implications.items()),
    ]
    params = params_digest([*settings, list(fixed.names) if fixed else None])
    if receipt := workspace.done("tags", CODE, params, inputs):
        return receipt
    kept = parquet.read(workspace.path("curated.parquet"), CURATED, ("key", "kept", "split", "part", "offset"))
    kept = kept.filter(kept["kept"]).sort_by("key").combine_chunks()
    found = _collect(workspace, kept, tables)
    chosen = _chosen(found, recipe, fixed)
    column = _lists(found.assigned, chosen)
    vocabulary, column = counted(chosen.names, chosen.categories, column, kept["split"])
    dropped = _dropped(found, chosen)
    if not len(vocabulary):
        raise UsageError(
            f"no tag is left of {len(found.names):,} that the images have: lower tags.min_images, or give other "
            "tags.categories"
        )
    table = pa.table([kept["key"], column], schema=SAMPLE_TAGS)
    outputs = {
        tags.VOCABULARY: write_atomic(workspace.path(tags.VOCABULARY), tags.render(vocabulary).encode()),
        tags.ASSIGNED: parquet.write(workspace.path(tags.ASSIGNED), table),
        tags.DROPPED: write_atomic(workspace.path(tags.DROPPED), _dropped_csv(dropped).encode()),
    }
    notes = found.notes
    if new := sum(row[3] == "new" for row in dropped):
        notes.append(
            f"{new:,} tags are not in the version before, whose vocabulary this one keeps: --update --compact makes "
            "another"
        )
    facts = {"summary": {**found.facts, "dropped": _dropped_counts(dropped)}, "notes": notes}
    return workspace.commit("tags", CODE, params, inputs, outputs, facts)


def remove(workspace: Workspace) -> None:
    """Remove what a build with tags has left in the folder."""
    workspace.path(".receipts/tags.json").unlink(missing_ok=True)
    for name in tags.FILES:
        workspace.path(name).unlink(missing_ok=True)


@dataclass
class _Found:
    """The tags of the kept samples, normalised; ids are positions in `names`.

    Attributes:
        names: every tag, also aliases, which no sample has any more.
        listed_in: (T, C), number of samples that list each tag in each of `TAG_CATEGORIES`.
        assigned: tags of the samples, in the order of their rows.
        facts: counts of what aliases and implications changed.
        notes: sentences for the card.
    """

    names: list[str]
    listed_in: IntArray
    assigned: Assigned
    facts: dict[str, int]
    notes: list[str] = field(default_factory=list)


def _collect(workspace: Workspace, kept: pa.Table, tables: TagTables) -> _Found:
    """Read the tags of the kept samples, part by part, and normalise them."""
    ids: dict[str, int] = {}
    pieces = []  # (rows of `kept`, their number of tags, ids, categories)
    for part, rows in _by_part(kept):
        listed = parquet.read(workspace.path(fetch.tags_name(part)), TAGS)
        table = listed.take(_places(workspace, part, kept["offset"].take(pa.array(rows)), listed["key"]))
        for code, category in enumerate(TAG_CATEGORIES):
            column = table[category].combine_chunks()
            counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            encoded = column.flatten().drop_null().dictionary_encode()
            if len(encoded) != counts.sum():
                raise parquet.damaged(workspace.path(fetch.tags_name(part)), category)
            known = np.array([ids.setdefault(name, len(ids)) for name in encoded.dictionary.to_pylist()], np.int64)
            flat = known[encoded.indices.to_numpy()] if len(encoded) else np.empty(0, np.int64)
            pieces.append((np.repeat(rows, counts), flat, np.full(len(flat), code)))
    row, flat, codes = (np.concatenate([piece[i] for piece in pieces]).astype(np.int64) for i in range(3))
    return _normalised(ids, row, flat, codes, len(kept), tables)


def _normalised(
    ids: dict[str, int], row: IntArray, flat: IntArray, code: IntArray, samples: int, tables: TagTables
) -> _Found:
    """Resolve aliases and add implied tags.

    Args:
        ids: id by name; extended by the names that aliases and implications add.
        row: sample of each listed tag.
        flat: its id.
        code: its category, a position in `TAG_CATEGORIES`.
        samples: number of samples.
        tables: the tables.
    """
    used = list(ids)
    canonical = np.array([ids.setdefault(tables.aliases.get(name, name), len(ids)) for name in used], np.int64)
    aliased = int((canonical[flat] != flat).sum())
    flat = canonical[flat]
    implied_by = {}
    for name in list(ids):
        if name not in tables.aliases and (implied := tables.implied_by(name)):
            implied_by[ids[name]] = sorted(ids.setdefault(general, len(ids)) for general in implied)
    names = list(ids)
    listed_in = np.zeros((len(names), len(TAG_CATEGORIES)), dtype=np.int64)
    listed_once = np.unique((flat * samples + row) * len(TAG_CATEGORIES) + code)
    np.add.at(listed_in, (listed_once // (samples * len(TAG_CATEGORIES)), listed_once % len(TAG_CATEGORIES)), 1)
    ambiguous = int(((listed_in > 0).sum(axis=1) > 1).sum())
    pairs = np.unique(row * len(names) + flat)  # sample and tag, each once
    before = len(pairs)
    if implied_by:
        lengths = np.array([len(implied_by.get(i, ())) for i in range(len(names))], dtype=np.int64)
        added = np.array([general for i in range(len(names)) for general in implied_by.get(i, ())], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        of_pair, per_pair = pairs % len(names), lengths[pairs % len(names)]
        ends = np.cumsum(per_pair)
        at = np.repeat(starts[of_pair] - ends + per_pair, per_pair) + np.arange(ends[-1] if len(ends) else 0)
        pairs = np.unique(np.concatenate((pairs, np.repeat(pairs // len(names), per_pair) * len(names) + added[at])))
        _spread(listed_in, implied_by, np.bincount(pairs % len(names), minlength=len(names)))
    counts = np.bincount(pairs // len(names), minlength=samples)
    assigned = Assigned((pairs % len(names)).astype(np.int32), np.cumsum(counts).astype(np.int64))
    notes = []
    if ambiguous:
        notes.append(f"{ambiguous:,} tags are listed in several categories, and have the one of most samples")
    facts = {"aliased": aliased, "implied": len(pairs) - before}
    return _Found(names, listed_in, assigned, facts, notes)


def _spread(listed_in: IntArray, implied_by: Mapping[int, Sequence[int]], samples: IntArray) -> None:
    """Give implied tags that no sample lists the category of what implies them, by the number of its samples."""
    alone = listed_in.sum(axis=1) == 0
    categories = listed_in.argmax(axis=1)
    for tag, general in implied_by.items():
        if not alone[tag]:
            for each in general:
                if alone[each]:
                    listed_in[each, categories[tag]] += samples[tag]


def _by_part(kept: pa.Table) -> Iterator[tuple[int, IntArray]]:
    """Each part and the rows of its samples."""
    parts = kept["part"].to_numpy()
    order = np.argsort(parts, kind="stable")
    firsts = np.flatnonzero(np.diff(parts[order], prepend=-1))
    for first, rows in zip(firsts.tolist(), np.split(order, firsts[1:]), strict=True):
        yield int(parts[order[first]]), rows.astype(np.int64)


def _places(workspace: Workspace, part: int, offsets: pa.ChunkedArray, keys: pa.ChunkedArray) -> pa.Array:
    """Rows in the table of a part's tags of samples, which are known by where their image is: faces have other keys."""
    path = workspace.path(f"raw/part-{part:05d}.parquet")
    raw = parquet.read(path, RAW, ("key", "offset", "reason"))
    raw = raw.filter(pc.equal(raw["reason"], ""))
    at = pc.index_in(offsets, value_set=raw["offset"].combine_chunks())
    places = pc.index_in(raw["key"].take(at), value_set=keys.combine_chunks()).combine_chunks()
    if at.null_count or places.null_count:
        raise parquet.damaged(path, "offset")
    return places


# -- which tags ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """The tags that are kept, and why others are not.

    Attributes:
        ids: ids of the kept tags, in the order of the vocabulary.
        names: names of the vocabulary; those of the version before may be of no id.
        places: (T,), place of each tag in the vocabulary, -1 if it is dropped.
        categories: category of each name of the vocabulary.
        reasons: (T,), reason of each dropped tag; empty for kept ones.
    """

    names: list[str]
    categories: list[str]
    places: IntArray
    reasons: list[str]


def _chosen(found: _Found, recipe: Recipe, fixed: Vocabulary | None) -> _Chosen:
    settings = recipe.tags
    totals = found.assigned.totals(len(found.names))
    category = found.listed_in.argmax(axis=1)
    wanted = {TAG_CATEGORIES.index(name) for name in settings.categories}
    excluded = _pattern(settings.exclude)
    known = {name: i for i, name in enumerate(fixed.names)} if fixed else {}
    reasons = [""] * len(found.names)
    for i in np.flatnonzero(totals).tolist():
        name = found.names[i]
        if fixed:
            reasons[i] = "" if name in known else "new"
        elif int(category[i]) not in wanted:
            reasons[i] = "category"
        elif excluded.fullmatch(name):
            reasons[i] = "excluded"
        elif totals[i] < settings.min_images:
            reasons[i] = "rare"
    left = [i for i in np.flatnonzero(totals).tolist() if not reasons[i]]
    left.sort(key=lambda i: (-int(totals[i]), found.names[i]))
    places = np.full(len(found.names), -1, dtype=np.int64)
    if fixed:
        for i in left:
            places[i] = known[found.names[i]]
        return _Chosen(list(fixed.names), list(fixed.categories), places, reasons)
    for i in left[settings.most or len(left) :]:
        reasons[i] = "over the limit"
    left = sorted(left[: settings.most or len(left)], key=lambda i: int(category[i]))  # stable: by count within each
    places[left] = np.arange(len(left))
    return _Chosen([found.names[i] for i in left], [TAG_CATEGORIES[category[i]] for i in left], places, reasons)


def _pattern(exclude: Sequence[str]) -> re.Pattern[str]:
    """Matches the names that are excluded: `*` stands for any characters, as in searches of boorus."""
    # each star takes as few letters as it can and never gives one back: linear, whatever the pattern
    listed = [fnmatch.translate(re.sub(r"([?[])", r"[\1]", each)) for each in exclude]
    return re.compile("|".join(listed) or r"(?!)")


def _lists(assigned: Assigned, chosen: _Chosen) -> pa.Array:
    """The tags of each sample as a column of lists of places in the vocabulary, ascending."""
    places = chosen.places[assigned.ids]
    row = np.repeat(np.arange(len(assigned)), assigned.counts())[places >= 0]
    places = places[places >= 0]
    order = np.lexsort((places, row))
    ends = np.cumsum(np.bincount(row, minlength=len(assigned)))
    return Assigned(places[order].astype(np.int32), ends).column()


def _dropped(found: _Found, chosen: _Chosen) -> list[tuple[str, str, int, str]]:
    """Name, category, samples and reason of each dropped tag, the most frequent first."""
    totals = found.assigned.totals(len(found.names))
    category = found.listed_in.argmax(axis=1)
    dropped = [
        (found.names[i], TAG_CATEGORIES[category[i]], int(totals[i]), reason)
        for i, reason in enumerate(chosen.reasons)
        if reason
    ]
    return sorted(dropped, key=lambda row: (-row[2], row[0]))


def counted(
    names: Sequence[str], categories: Sequence[str], column: pa.ListArray, split: pa.ChunkedArray
) -> tuple[Vocabulary, pa.ListArray]:
    """The vocabulary with its counts, without tags that no sample has; and the tags of the samples by its ids.

    Args:
        names: of the tags.
        categories: of each.
        column: tags of each sample, as positions in `names`.
        split: split of each sample.
    """
    assigned = Assigned(*tags.of_lists(column))
    used = np.flatnonzero(assigned.totals(len(names)))
    places = np.full(len(names), -1, dtype=np.int32)
    places[used] = np.arange(len(used), dtype=np.int32)
    assigned = Assigned(places[assigned.ids], assigned.ends)
    there = [name for name in splits.SPLITS if pc.any(pc.equal(split, name), min_count=0).as_py()]
    rows = {name: np.flatnonzero(pc.equal(split, name).to_numpy()).astype(np.int64) for name in there}
    counts = {name: assigned.take(rows[name]).totals(len(used)) for name in there}
    left = used.tolist()
    vocabulary = Vocabulary(tuple(names[i] for i in left), tuple(categories[i] for i in left), counts)
    return vocabulary, assigned.column()


def _dropped_csv(dropped: Sequence[tuple[str, str, int, str]]) -> str:
    """The text of `dropped_tags.csv`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "category", "images", "reason"])
    writer.writerows((text_tables.cell_of(name), *rest) for name, *rest in dropped)
    return out.getvalue()


def _dropped_counts(dropped: Sequence[tuple[str, str, int, str]]) -> dict[str, dict[str, int]]:
    """Number of dropped tags and of their assignments by reason."""
    tags_of, uses_of = Counter(row[3] for row in dropped), Counter[str]()
    for _, _, images, reason in dropped:
        uses_of[reason] += images
    return {each: {"tags": tags_of[each], "assignments": uses_of[each]} for each in TAG_MEANINGS if tags_of[each]}


# -- for finalize ----------------------------------------------------------------------------------------------------


def describe(vocabulary: Vocabulary, table: pa.Table, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `dataset.json` tells of the tags.

    Args:
        vocabulary: of the dataset.
        table: tags of its samples, schema `SAMPLE_TAGS`.
        summary: what was dropped, and what aliases and implications changed, from the receipt.
    """
    totals = sum(vocabulary.counts.values(), np.zeros(len(vocabulary), dtype=np.int64))
    lengths = pc.list_value_length(table["tags"])
    return {
        **summary,
        "tags": len(vocabulary),
        "assignments": int(totals.sum()),
        "per_sample": round(int(totals.sum()) / max(1, len(table)), 2),
        "without": pc.sum(pc.equal(lengths, 0)).as_py() or 0,
        "categories": {
            name: {"tags": len(ids), "assignments": int(totals[ids.start : ids.stop].sum())}
            for name, ids in vocabulary.ranges.items()
        },
    }
