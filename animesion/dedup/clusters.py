"""Duplicate clusters, the image kept of each cluster, and the images that must share a split.

`animesion.dedup.search` finds pairs; this module applies the recipe's rules to them. Rows are columns, as
`animesion.pipeline.columns` loads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from animesion.config import decisions
from animesion.config.recipe import Recipe
from animesion.dedup import candidates, search
from animesion.dedup.digests import Digests
from animesion.dedup.hashes import ImageHashes
from animesion.executors.shared import Shared

Rows = Mapping[str, Any]


class Labels(Protocol):
    """A label for each of n rows.

    Attributes:
        codes: shape (n,); equal labels have equal codes.
    """

    codes: npt.NDArray[np.int32]

    def __getitem__(self, row: int, /) -> str:
        """The label of a row."""


_LOSSLESS = ("png", "bmp", "tif")

#: Verdicts, the closest first; `animesion.dedup.verdict.Verdict` has their meanings.
_ORDER = ("copy", "copy with overlay", "part", "alternate")


@dataclass
class Verdicts:
    """Result of the duplicate search over all rows.

    Attributes:
        cluster: shape (n,), for each row the smallest row of its cluster of confirmed duplicates.
        related: sets of pairs of rows that must share a split, each of shape (m, 2).
        kept_instead: shape (n,), the row that each duplicate gives way to, -1 for the others.
        equals: shape (n,), whether the two have equal bytes (2) or equal pixels (1), not just similar ones (0).
        conflicting: row that is dropped because of its label -> the row that it conflicts with.
        clusters: number of clusters of two or more rows.
        conflicts: number of sets of connected duplicates with several labels.
        chains: number of sets of connected duplicates that were cut because their ends are too far apart.
        unit: shape (n,), the smallest row with equal bytes or pixels.
        relations: pairs of units `a < b` -> the verdict on them.
        unlike: number of pairs that resemble one another under two labels, of which nobody compared the pixels.
        near: number of pairs of units that are duplicates of one another.
        equal: number of rows with the bytes, and number with the pixels but not the bytes, of an earlier one.
        conflict: two rows of one cluster under two labels, as an example; None if there are none.
        decided: verdicts on pairs of units `a < b` that a curator decided.
    """

    cluster: npt.NDArray[np.int64]
    related: list[search.Pairs]
    kept_instead: npt.NDArray[np.int64]
    equals: npt.NDArray[np.int8]
    conflicting: dict[int, int] = field(default_factory=dict)
    clusters: int = 0
    conflicts: int = 0
    chains: int = 0
    unit: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    relations: dict[tuple[int, int], Relation] = field(default_factory=dict)
    unlike: int = 0
    near: int = 0
    equal: tuple[int, int] = (0, 0)
    conflict: tuple[int, int] | None = None
    decided: dict[tuple[int, int], str] = field(default_factory=dict)


class Relation(NamedTuple):
    """What a comparison of two images found; the fields of `animesion.schemas.PAIRS` besides keys and transform."""

    verdict: str
    whole: bool
    mirrored: bool
    inliers: int
    residual: float
    how: str


@dataclass(frozen=True)
class _Near:
    """Near duplicates in a component: a unit is all rows with equal bytes or pixels, named by its smallest row.

    Attributes:
        unit: row -> its unit.
        neighbours: unit -> units that it is paired with; only units that have any.
        units: all units, ascending.
        hashes: their hashes.
        flip: whether mirror images are duplicates.
    """

    unit: Mapping[int, int]
    neighbours: Mapping[int, set[int]]
    units: npt.NDArray[np.int64]
    hashes: ImageHashes
    flip: bool

    def distance(self, a: int, b: int) -> int:
        """Number of differing bits between two units, the smaller of plain and mirrored."""
        pair = np.searchsorted(self.units, [[a, b]])
        return min(int(self.hashes.distances(pair, np.array([way]))[0]) for way in [False, True][: 1 + self.flip])


def judge(
    rows: Rows,
    alive: npt.NDArray[np.int64],
    labels: Labels,
    recipe: Recipe,
    compared: pa.Table | None = None,
    shared: Shared | None = None,
) -> Verdicts:
    """Find clusters among the rows that are still alive and decide which rows are dropped.

    The steps are: equal bytes and pixels form units; one row per unit takes part in the search for near duplicates;
    connected units form components; each component is cut into clusters; in each component, rows with conflicting
    labels and rows that duplicate a kept row are dropped.

    Args:
        rows: columns `key sha256 pixels_blake3 phash phash_flip thumbnail width height extension bytes order`, each
            with n entries, `hash hash_flip` if the recipe names another hash, and `embedding` (array of shape (n, d))
            if it names a model whose similarity decides.
        alive: shape (a,), rows that no other rule has dropped, ascending.
        labels: label of each of the n rows, and its code.
        recipe: supplies the `duplicates` section and the decisions of `curate`.
        compared: verdicts on pairs, of schema `PAIRS`; None if no pixels were compared: hashes and thumbnails then
            decide, but never against a label.
        shared: workers for the search by hashes; None to search in this process.
    """
    settings = recipe.duplicates
    sha, pixels = rows["sha256"], rows["pixels_blake3"]
    exact, same_pixels = search.equal_pairs(sha, alive), search.equal_pairs(pixels, alive)
    # only one row per unit is compared: a thousand blank images would otherwise make half a million pairs
    unit = search.components(len(sha), [exact, same_pixels])
    representatives = alive[unit[alive] == alive]
    hashes = hashes_of(rows, representatives, recipe)
    relations: dict[tuple[int, int], Relation] = {}
    unlike = 0
    if compared is not None:
        relations = _relations(rows, alive, unit, compared)
        near, wide = _verified(relations, recipe)
        alike = near[:0]
    else:
        alike, wide = _near(rows, representatives, hashes, recipe, shared)
        near = alike[:0]
    if settings.embedding.decides:
        similar = search.cosine_pairs(rows["embedding"][representatives], settings.embedding.threshold)
        alike = np.concatenate([alike, representatives[similar]])
    # a resemblance is no proof: it may keep images in one split, but must not cost both their place
    same = labels.codes[alike[:, 0]] == labels.codes[alike[:, 1]]
    unlike = int((~same).sum())
    near, wide = np.concatenate([near, alike[same]]), np.concatenate([wide, alike[~same]])
    decided = recipe.curate.decisions
    if decided:
        # images that a curator declared different still share a split, so `wide` keeps the pairs before the decisions
        wide = np.concatenate([wide, near])
        is_alive = np.zeros(len(sha), dtype=np.bool_)
        is_alive[alive] = True
        row_of_key = search.rows_of(rows["key"], decided.named(), is_alive)
        near = decisions.decided_pairs(near, row_of_key, lambda i: int(unit[i]), decided)
    turned: dict[tuple[int, int], str] = {}
    if decided.pairs:
        named = search.rows_of(sha[:], (image for each in decided.pairs for image in each.images), is_alive)
        unit_of = {image: int(unit[i]) for image, i in named.items()}
        row_of_key |= {rows["key"][i].as_py(): i for i in unit_of.values()}
        turned = decisions.decided_verdicts(unit_of, row_of_key, lambda i: int(unit[i]), decided)
        near, relations = _turned(near, relations, turned)
    component = search.components(len(sha), [exact, same_pixels, near])
    verdicts = Verdicts(
        component.copy(),
        [exact, same_pixels, near, wide],
        kept_instead=np.full(len(sha), -1, dtype=np.int64),
        equals=np.zeros(len(sha), dtype=np.int8),
        unit=unit,
        relations=relations,
        unlike=unlike,
        near=len(near),
        equal=(len(exact), len(same_pixels) - len(exact)),
        decided=turned,
    )
    for members, pairs in _multiple(component, alive, near):
        neighbours: dict[int, set[int]] = {}
        for a, b in pairs:
            neighbours.setdefault(a, set()).add(b)
            neighbours.setdefault(b, set()).add(a)
        of_row = {i: int(unit[i]) for i in members}
        links = _Near(of_row, neighbours, representatives, hashes, settings.flip)
        ranked = sorted(members, key=lambda i: _rank(rows, i))
        parts = _cut(ranked, links, settings.diameter or 2 * settings.radius)
        if len(parts) > 1:
            verdicts.chains += 1
            for part in parts:
                verdicts.cluster[part] = min(part)
        verdicts.clusters += sum(len(part) > 1 for part in parts)
        conflict = len({labels[i] for i in members}) > 1
        verdicts.conflicts += conflict
        if settings.action == "report":
            if conflict and verdicts.conflict is None and (found := _conflicts(ranked, labels, links)):
                verdicts.conflict = min(found.items())
            continue
        if conflict and settings.conflicts == "drop":
            others = _conflicts(ranked, labels, links)
            verdicts.conflicting |= others
            ranked = [i for i in ranked if i not in others]
        # compared with kept images only: along a chain, an image that resembles no kept image stays
        for i, equals, twin in _twins(ranked, sha, pixels, links):
            verdicts.equals[i], verdicts.kept_instead[i] = equals, twin
    return verdicts


def _multiple(
    component: npt.NDArray[np.int64], alive: npt.NDArray[np.int64], near: search.Pairs
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """The rows of each component of two or more rows, ascending, and its pairs.

    Args:
        component: shape (n,), the smallest row of each row's component.
        alive: shape (a,), the rows to consider.
        near: pairs of rows, shape (m, 2).
    """
    sizes = np.bincount(component[alive], minlength=len(component))
    rows = alive[sizes[component[alive]] > 1]
    rows = rows[np.argsort(component[rows], kind="stable")]
    near = near[np.argsort(component[near[:, 0]], kind="stable")]
    # rows of one component are now adjacent: cut wherever the component changes
    starts = np.flatnonzero(np.diff(component[rows], prepend=-1))
    of_pairs, names = component[near[:, 0]], component[rows[starts]]
    firsts, lasts = np.searchsorted(of_pairs, names), np.searchsorted(of_pairs, names, side="right")
    spans = zip(itertools.pairwise([*starts.tolist(), len(rows)]), firsts.tolist(), lasts.tolist(), strict=True)
    for (start, stop), first, last in spans:
        yield rows[start:stop].tolist(), near[first:last].tolist()


def _cut(ranked: Sequence[int], links: _Near, diameter: int) -> list[list[int]]:
    """Cut a component into clusters whose members are all close to the best row of the cluster.

    The best row heads the first cluster. The cluster takes the units paired with the head, and those that are reached
    through its members and are within the diameter of the head. The best remaining row heads the next cluster. The
    result depends on the ranks of the rows, not on their order in the table.

    Args:
        ranked: rows of one component, best first.
        links: pairs and distances.
        diameter: most differing bits between the head and a member that is not paired with it.

    Returns:
        The clusters, best head first; together they hold every row of `ranked` once.
    """
    by_unit: dict[int, list[int]] = {}
    for i in ranked:
        by_unit.setdefault(links.unit[i], []).append(i)
    left = dict.fromkeys(by_unit)  # units without a cluster, ordered by rank
    parts = []
    for head in by_unit:
        if head not in left:
            continue
        del left[head]
        reached, direct = [head], links.neighbours.get(head, set())
        for unit in reached:  # breadth first: `reached` grows while it is walked
            # sorted, as the order of a set must not decide which members are reached
            for other in sorted(links.neighbours.get(unit, ())):
                if other in left and (other in direct or links.distance(head, other) <= diameter):
                    del left[other]
                    reached.append(other)
        parts.append([i for unit in reached for i in by_unit[unit]])
    return parts


def _conflicts(ranked: Sequence[int], labels: Labels, links: _Near) -> dict[int, int]:
    """Rows that duplicate a row with another label -> the best such row.

    Only direct pairs count: rows that are connected through a chain of others do not conflict.
    """
    by_label: dict[int, dict[str, int]] = {}  # unit -> label -> best row of the unit with that label
    for i in ranked:
        by_label.setdefault(links.unit[i], {}).setdefault(labels[i], i)
    found = {}
    for i in ranked:
        unit = links.unit[i]
        for same in (unit, *sorted(links.neighbours.get(unit, ()))):
            other = next((j for label, j in by_label.get(same, {}).items() if label != labels[i]), None)
            if other is not None:
                found[i] = other
                break
    return found


def _twins(
    ranked: Sequence[int], sha: pa.Array | Digests, pixels: pa.Array | Digests, links: _Near
) -> Iterator[tuple[int, int, int]]:
    """Dropped rows, how each equals the kept row that it duplicates (see `Verdicts.equals`), and that row.

    Rows are visited best first. A row that duplicates no kept row is kept itself, and is not in the result.
    """
    # the kept rows, by what a later row can equal
    by_sha: dict[str, int] = {}
    by_pixels: dict[str, int] = {}
    by_unit: dict[int, tuple[int, int]] = {}  # unit -> rank and row of its best kept row
    for rank, i in enumerate(ranked):
        near = [by_unit[unit] for unit in links.neighbours.get(links.unit[i], ()) if unit in by_unit]
        its_sha, its_pixels = sha[i].as_py(), pixels[i].as_py()
        if its_sha in by_sha:
            yield i, 2, by_sha[its_sha]
        elif its_pixels in by_pixels:
            yield i, 1, by_pixels[its_pixels]
        elif near:
            yield i, 0, min(near)[1]
        else:
            by_sha.setdefault(its_sha, i)
            by_pixels.setdefault(its_pixels, i)
            by_unit.setdefault(links.unit[i], (rank, i))


def _relations(
    rows: Rows, alive: npt.NDArray[np.int64], unit: npt.NDArray[np.int64], compared: pa.Table
) -> dict[tuple[int, int], Relation]:
    """The verdicts on pairs of units.

    One image stood for all with equal pixels when pairs were compared. Another rule may have dropped that one: its
    verdicts hold for the first of the others.
    """
    is_alive = np.zeros(len(unit), dtype=np.bool_)
    is_alive[alive] = True
    keys = {key for name in ("first", "second") for key in compared[name].unique().to_pylist()}
    row_of_key = search.rows_of(rows["key"], keys)
    pixels = {row: rows["pixels_blake3"][row].as_py() for row in row_of_key.values() if not is_alive[row]}
    # the first of the alive rows: `rows_of` finds the last
    backwards = rows["pixels_blake3"].take(pa.array(alive[::-1]))
    alive_by_pixels = {
        text: int(unit[alive[len(alive) - 1 - place]])
        for text, place in search.rows_of(backwards, pixels.values()).items()
    }

    def unit_of(row: int | None) -> int:
        if row is None:  # an image of a published dataset
            return -1
        return int(unit[row]) if is_alive[row] else alive_by_pixels.get(pixels[row], -1)

    names = list(Relation._fields)
    found: dict[tuple[int, int], Relation] = {}
    columns = (compared[name].to_pylist() for name in ("first", "second", *names))
    for first, second, *values in zip(*columns, strict=True):
        a, b = sorted((unit_of(row_of_key.get(first)), unit_of(row_of_key.get(second))))
        if a >= 0 and a != b:
            relation = Relation(*values)
            found[a, b] = min(found.get((a, b), relation), relation, key=closeness)
    return found


def closeness(relation: Relation) -> tuple[int, int]:
    """Sort key of relations, the closest first."""
    return _ORDER.index(relation.verdict), -relation.inliers


def _verified(relations: Mapping[tuple[int, int], Relation], recipe: Recipe) -> tuple[search.Pairs, search.Pairs]:
    """Pairs of units that are copies, and pairs that must share a split, each of shape (m, 2)."""
    copies = [
        pair
        for pair, relation in relations.items()
        if relation.verdict in ("copy", "copy with overlay")
        and (recipe.duplicates.flip or not relation.mirrored)
        # faces of one image are samples of their own
        and not (relation.whole and recipe.crop.faces == "each")
    ]
    return _as_pairs(copies), _as_pairs(relations)


def _turned(
    near: search.Pairs, relations: Mapping[tuple[int, int], Relation], turned: Mapping[tuple[int, int], str]
) -> tuple[search.Pairs, dict[tuple[int, int], Relation]]:
    """Duplicates and relations with the verdicts that a curator decided."""
    copies = {(a, b) for a, b in near.tolist() if turned.get((a, b), "copy") == "copy"}
    copies |= {pair for pair, verdict in turned.items() if verdict == "copy"}
    now = {pair: relation for pair, relation in relations.items() if turned.get(pair) != "different"}
    for pair, verdict in turned.items():
        if verdict != "different":
            before = relations.get(pair, Relation(verdict, False, False, 0, 0.0, ""))
            how = "; ".join(filter(None, ["by decision", before.how]))
            now[pair] = before._replace(verdict=verdict, how=how)
    return _as_pairs(sorted(copies)), now


def _as_pairs(pairs: Iterable[tuple[int, int]]) -> search.Pairs:
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)


def _near(
    rows: Rows,
    representatives: npt.NDArray[np.int64],
    hashes: ImageHashes,
    recipe: Recipe,
    shared: Shared | None,
) -> tuple[search.Pairs, search.Pairs]:
    """Near duplicates by hash and thumbnail.

    Args:
        rows: the columns.
        representatives: shape (u,), one row per unit.
        hashes: their hashes.
        recipe: its `duplicates` section.
        shared: workers; None to search in this process.

    Returns:
        Pairs of rows that are confirmed near duplicates, and the wider set of pairs that must share a split; each of
        shape (m, 2).
    """
    settings = recipe.duplicates
    none = np.empty((0, 2), dtype=np.int64)
    if not settings.near or len(representatives) < 2:
        return none, none
    pairs, mirrored = hashes.pairs(settings.wide_radius, flip=settings.flip, shared=shared)
    if not len(pairs):
        return none, none
    distance = hashes.distances(pairs, mirrored)
    # load the thumbnails of images in a pair only: `local` has the pairs as indices into them, shape (m, 2)
    involved, local = np.unique(pairs, return_inverse=True)
    local = local.reshape(-1, 2)
    images = candidates.thumbnails(rows["thumbnail"], representatives[involved])
    strict = (distance <= settings.radius) & search.same_thumbnail(
        images, local, settings.mean_difference, settings.max_difference, mirrored, settings.tone
    )
    loose = strict | search.same_thumbnail(images, local, candidates.LOOSE_MEAN, 255, mirrored)
    return representatives[pairs[strict]], representatives[pairs[loose]]


def hashes_of(rows: Rows, chosen: npt.NDArray[np.int64], recipe: Recipe) -> ImageHashes:
    """The hashes that the recipe compares, of some rows."""
    if kind := recipe.duplicates.other_hash:
        taken = (rows[name].take(pa.array(chosen)).to_pylist() for name in ("hash", "hash_flip"))
        return ImageHashes.of_kind(kind, *taken)
    return ImageHashes.phashes(*(np.asarray(rows[name], dtype=np.uint64)[chosen] for name in ("phash", "phash_flip")))


def _rank(rows: Rows, i: int) -> tuple[Any, ...]:
    """Sort key, best first: most pixels, lossless before lossy, largest file, first in the source's order."""
    lossy = rows["extension"][i] not in _LOSSLESS
    width, height, size, order = (rows[name][i].item() for name in ("width", "height", "bytes", "order"))
    return (-width * height, lossy, -size, order, rows["key"][i].as_py())
