"""Clusters of images that are the same, who of each cluster is kept, and which images must share a split.

`animesion.dedup.search` finds pairs; here the recipe's rules are applied to them. Rows are columns of plain lists, as
`animesion.pipeline.curate` loads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from animesion.config import decisions
from animesion.config.recipe import Recipe
from animesion.dedup import search
from animesion.schemas import THUMBNAIL_SIDE, DropReason

Rows = Mapping[str, Any]

#: Alternates of an image (other expression, other colours) are no duplicates, but must not straddle splits either.
#: Over the real faces, pairs this close were alternates without exception; it also leaves room for what packing
#: re-encodes.
_GROUP_RADIUS, _GROUP_MEAN = 4, 24.0

_LOSSLESS = ("png", "bmp", "tif")


@dataclass
class Verdicts:
    """What the duplicate search found, over all rows.

    Attributes:
        cluster: for each row the smallest row of its cluster of confirmed duplicates.
        related: sets of pairs of rows that must share a split.
        dropped: row -> reason, detail and the key of the image that is kept instead (empty for conflicts).
        clusters: number of clusters of two or more.
        conflicts: how many sets of connected duplicates stand under several labels.
        chains: how many sets of connected duplicates were cut, as their ends are too far apart.
    """

    cluster: npt.NDArray[np.int64]
    related: list[search.Pairs]
    dropped: dict[int, tuple[str, str, str]] = field(default_factory=dict)
    clusters: int = 0
    conflicts: int = 0
    chains: int = 0


@dataclass(frozen=True)
class _Near:
    """Near duplicates among units: a unit is all rows of equal bytes or pixels, named by the smallest.

    Attributes:
        unit: of each row.
        neighbours: of each unit that has any.
        phash: of each row that stands for a unit.
        phash_flip: of the mirror images; None when those do not count.
    """

    unit: npt.NDArray[np.int64]
    neighbours: Mapping[int, set[int]]
    phash: Sequence[int]
    phash_flip: Sequence[int] | None

    def distance(self, a: int, b: int) -> int:
        """Differing bits of two units."""
        plain = (int(self.phash[a]) ^ int(self.phash[b])).bit_count()
        if self.phash_flip is None:
            return plain
        crossed = (int(self.phash[a]) ^ int(self.phash_flip[b])), (int(self.phash_flip[a]) ^ int(self.phash[b]))
        return min(plain, *(each.bit_count() for each in crossed))


def judge(rows: Rows, alive: npt.NDArray[np.int64], labels: Sequence[str], recipe: Recipe) -> Verdicts:
    """Find clusters among the rows that are still alive and decide who stays.

    Args:
        rows: columns `key sha256 pixels_blake3 phash phash_flip thumbnail width height extension bytes order`, and
            `embedding` (an array, one row an image) where the recipe has a model for it.
        alive: rows that no other rule has dropped, ascending.
        labels: label of each row.
        recipe: its `duplicates` section matters.
    """
    settings = recipe.duplicates
    sha, pixels = rows["sha256"], rows["pixels_blake3"]
    exact = alive[search.equal_pairs([sha[i] for i in alive.tolist()])]
    same_pixels = alive[search.equal_pairs([pixels[i] for i in alive.tolist()])]
    # one of each unit stands for all, so that blank images do not pair n by n
    unit = search.components(len(sha), [exact, same_pixels])
    standing = alive[unit[alive] == alive]
    near, wide = _near(rows, standing, recipe)
    if settings.embedding.model:
        alike = standing[search.cosine_pairs(rows["embedding"][standing], settings.embedding.threshold)]
        near = np.concatenate([near, alike])
    decided = recipe.curate.decisions
    if decided:
        # what is different still shares a split: the pairs as found count there
        wide = np.concatenate([wide, near])
        place = {rows["key"][i]: i for i in alive.tolist()}
        near = decisions.decided_pairs(near, place, lambda i: int(unit[i]), decided)
    component = search.components(len(sha), [exact, same_pixels, near])
    verdicts = Verdicts(component.copy(), [exact, same_pixels, near, wide])
    neighbours: dict[int, set[int]] = {}
    for a, b in near.tolist():
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    links = _Near(unit, neighbours, rows["phash"], rows["phash_flip"] if settings.flip else None)
    for together in _several(component, alive):
        ranked = sorted(together, key=lambda i: _rank(rows, i))
        parts = _cut(ranked, links, settings.diameter or 2 * settings.radius)
        if len(parts) > 1:
            verdicts.chains += 1
            for part in parts:
                verdicts.cluster[part] = min(part)
        verdicts.clusters += sum(len(part) > 1 for part in parts)
        conflict = len({labels[i] for i in together}) > 1
        verdicts.conflicts += conflict
        if settings.action == "report":
            continue
        if conflict and settings.conflicts == "drop":
            others = _conflicts(ranked, labels, links)
            for i, other in others.items():
                verdicts.dropped[i] = (
                    DropReason.LABEL_CONFLICT,
                    f"also under {labels[other]} as {rows['key'][other]}",
                    "",
                )
            ranked = [i for i in ranked if i not in others]
        # measured against images that stay, so that a chain of look-alikes drops nobody unseen
        for i, (reason, twin) in _twins(ranked, sha, pixels, links).items():
            verdicts.dropped[i] = (reason, "", rows["key"][twin])
    return verdicts


def _several(component: npt.NDArray[np.int64], alive: npt.NDArray[np.int64]) -> list[list[int]]:
    """The rows of each component of two or more, ascending."""
    sizes = np.bincount(component[alive], minlength=len(component))
    rows = alive[sizes[component[alive]] > 1]
    rows = rows[np.argsort(component[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(component[rows])) + 1
    return [each.tolist() for each in np.split(rows, starts)] if len(rows) else []


def _cut(ranked: Sequence[int], links: _Near, diameter: int) -> list[list[int]]:
    """Clusters of connected rows in which each lies near the best, as parts of the rows given.

    The best row heads the first cluster, with what is paired with it and what it reaches through members within the
    diameter. Of the rest the best heads the next one. What comes out depends on the rows' ranks, not on their order.

    Args:
        ranked: rows of one component, best first.
        links: pairs and distances.
        diameter: most differing bits between the head and a member that is not paired with it.
    """
    by_unit: dict[int, list[int]] = {}
    for i in ranked:
        by_unit.setdefault(int(links.unit[i]), []).append(i)
    left = dict.fromkeys(by_unit)  # in order of rank
    parts = []
    for head in by_unit:
        if head not in left:
            continue
        del left[head]
        reached, direct = [head], links.neighbours.get(head, set())
        for unit in reached:
            for other in sorted(links.neighbours.get(unit, ())):
                if other in left and (other in direct or links.distance(head, other) <= diameter):
                    del left[other]
                    reached.append(other)
        parts.append([i for unit in reached for i in by_unit[unit]])
    return parts


def _conflicts(ranked: Sequence[int], labels: Sequence[str], links: _Near) -> dict[int, int]:
    """Rows that are the same image as a row of another label, and that row: the best one, not one down a chain."""
    by_label: dict[int, dict[str, int]] = {}  # unit -> label -> best of its rows
    for i in ranked:
        by_label.setdefault(int(links.unit[i]), {}).setdefault(labels[i], i)
    found = {}
    for i in ranked:
        unit = int(links.unit[i])
        for same in (unit, *sorted(links.neighbours.get(unit, ()))):
            other = next((j for label, j in by_label.get(same, {}).items() if label != labels[i]), None)
            if other is not None:
                found[i] = other
                break
    return found


def _twins(
    ranked: Sequence[int], sha: Sequence[str], pixels: Sequence[str], links: _Near
) -> dict[int, tuple[str, int]]:
    """Why and of which kept row each row is a duplicate, best first; rows that are none are kept and not in it."""
    by_sha: dict[str, int] = {}
    by_pixels: dict[str, int] = {}
    by_unit: dict[int, tuple[int, int]] = {}  # rank and row of the best that is kept
    found: dict[int, tuple[str, int]] = {}
    for rank, i in enumerate(ranked):
        near = [by_unit[unit] for unit in links.neighbours.get(int(links.unit[i]), ()) if unit in by_unit]
        if sha[i] in by_sha:
            found[i] = (DropReason.EXACT_DUPLICATE, by_sha[sha[i]])
        elif pixels[i] in by_pixels:
            found[i] = (DropReason.PIXEL_DUPLICATE, by_pixels[pixels[i]])
        elif near:
            found[i] = (DropReason.NEAR_DUPLICATE, min(near)[1])
        else:
            by_sha.setdefault(sha[i], i)
            by_pixels.setdefault(pixels[i], i)
            by_unit.setdefault(int(links.unit[i]), (rank, i))
    return found


def _near(rows: Rows, standing: npt.NDArray[np.int64], recipe: Recipe) -> tuple[search.Pairs, search.Pairs]:
    """Confirmed near-duplicate pairs, and the wider set of pairs that must share a split, as rows."""
    settings = recipe.duplicates
    none = np.empty((0, 2), dtype=np.int64)
    if not settings.near or len(standing) < 2:
        return none, none
    hashes = _column(rows["phash"], standing)
    flipped = _column(rows["phash_flip"], standing) if settings.flip else None
    pairs, mirrored = search.found_pairs(hashes, flipped, settings.radius + _GROUP_RADIUS)
    if not len(pairs):
        return none, none
    distance = search.distances(hashes, hashes if flipped is None else flipped, pairs, mirrored)
    involved, local = np.unique(pairs, return_inverse=True)
    local = local.reshape(-1, 2)
    images = thumbnails(rows["thumbnail"], standing[involved])
    strict = (distance <= settings.radius) & search.same_thumbnail(
        images, local, settings.mean_difference, settings.max_difference, mirrored, settings.tone
    )
    loose = strict | search.same_thumbnail(images, local, _GROUP_MEAN, 255, mirrored)
    return standing[pairs[strict]], standing[pairs[loose]]


def _column(values: Sequence[int], chosen: npt.NDArray[np.int64]) -> search.HashArray:
    """Some hashes of a column."""
    return np.asarray(values, dtype=np.uint64)[chosen]


def thumbnails(values: Sequence[bytes] | pa.ChunkedArray, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Some thumbnails of a column, shape (n, 768): of bytes, or of an Arrow column, which takes less memory."""
    if isinstance(values, pa.ChunkedArray):
        picked = values.take(pa.array(chosen)).to_pylist()
    else:
        picked = [values[i] for i in chosen.tolist()]
    return np.frombuffer(b"".join(picked), dtype=np.uint8).reshape(-1, 3 * THUMBNAIL_SIDE**2)


def _rank(rows: Rows, i: int) -> tuple[Any, ...]:
    """Best first: most pixels, lossless before lossy, largest file, first in the source's order."""
    lossy = rows["extension"][i] not in _LOSSLESS
    return (-rows["width"][i] * rows["height"][i], lossy, -rows["bytes"][i], rows["order"][i], rows["key"][i])
