"""Clusters of pictures that are the same, who of each cluster is kept, and which pictures must share a split.

`animesion.duplicates` finds pairs; here the recipe's rules are applied to them. Rows are columns of plain lists, as
`animesion.stages.curate` loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from animesion import decisions, duplicates
from animesion.recipe import Recipe

Columns = Mapping[str, Sequence[Any]]

#: Alternates of a picture (other expression, other colours) are no duplicates, but must not straddle splits either.
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
        dropped: row -> reason, detail and the key of the picture that is kept instead (empty for conflicts).
        clusters: number of clusters of two or more.
        conflicts: how many of them stand under several labels.
    """

    cluster: npt.NDArray[np.int64]
    related: list[duplicates.Pairs]
    dropped: dict[int, tuple[str, str, str]] = field(default_factory=dict)
    clusters: int = 0
    conflicts: int = 0


def judge(rows: Columns, alive: npt.NDArray[np.int64], labels: Sequence[str], recipe: Recipe) -> Verdicts:
    """Find clusters among the rows that are still alive and decide who stays.

    Args:
        rows: columns `key sha256 pixels_sha256 phash thumbnail width height extension bytes order`.
        alive: rows that no other rule has dropped, ascending.
        labels: label of each row.
        recipe: its `duplicates` section matters.
    """
    sha, pixels = rows["sha256"], rows["pixels_sha256"]
    exact = alive[duplicates.equal_pairs([sha[i] for i in alive])]
    same_pixels = alive[duplicates.equal_pairs([pixels[i] for i in alive])]
    # equal pixels have equal hashes: one of each stands for all, so that blank pictures do not pair n by n
    first_of: dict[str, int] = {}
    for i in alive.tolist():
        first_of.setdefault(pixels[i], i)
    near, wide = _near(rows, np.array(list(first_of.values()), dtype=np.int64), recipe)
    decided = recipe.curate.decisions
    if decided:
        # what is different still shares a split: the pairs as found count there
        wide = np.concatenate([wide, near])
        place = {rows["key"][i]: i for i in alive.tolist()}
        near = decisions.decided_pairs(near, place, lambda i: first_of[pixels[i]], decided)
    cluster = duplicates.components(len(sha), [exact, same_pixels, near])
    verdicts = Verdicts(cluster, [exact, same_pixels, near, wide])
    members: dict[int, list[int]] = {}
    for i in alive.tolist():
        members.setdefault(int(cluster[i]), []).append(i)
    neighbours: dict[int, set[int]] = {}
    for a, b in near.tolist():
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    for together in members.values():
        if len(together) == 1:
            continue
        ranked = sorted(together, key=lambda i: _rank(rows, i))
        conflict = len({labels[i] for i in together}) > 1
        verdicts.clusters += 1
        verdicts.conflicts += conflict
        if recipe.duplicates.action == "report":
            continue
        if conflict and recipe.duplicates.conflicts == "drop":
            others = _conflicts(ranked, labels, pixels, first_of, neighbours)
            for i, other in others.items():
                verdicts.dropped[i] = ("label conflict", f"also under {labels[other]} as {rows['key'][other]}", "")
            ranked = [i for i in ranked if i not in others]
        kept: list[int] = []
        for i in ranked:  # measured against pictures that stay, so that a chain of look-alikes drops nobody unseen
            reason, twin = _twin(i, kept, sha, pixels, first_of, neighbours)
            if reason:
                verdicts.dropped[i] = (reason, "", rows["key"][twin])
            else:
                kept.append(i)
    return verdicts


def _conflicts(
    ranked: Sequence[int],
    labels: Sequence[str],
    pixels: Sequence[str],
    first_of: Mapping[str, int],
    neighbours: Mapping[int, set[int]],
) -> dict[int, int]:
    """Rows that are the same picture as a row of another label, and that row: the best one, not one down a chain."""
    by_label: dict[int, dict[str, int]] = {}  # standing row -> label -> best row with these pixels
    for i in ranked:
        by_label.setdefault(first_of[pixels[i]], {}).setdefault(labels[i], i)
    found = {}
    for i in ranked:
        standing = first_of[pixels[i]]
        for same in (standing, *sorted(neighbours.get(standing, ()))):
            other = next((j for label, j in by_label.get(same, {}).items() if label != labels[i]), None)
            if other is not None:
                found[i] = other
                break
    return found


def _twin(
    i: int,
    kept: Sequence[int],
    sha: Sequence[str],
    pixels: Sequence[str],
    first_of: Mapping[str, int],
    neighbours: Mapping[int, set[int]],
) -> tuple[str, int]:
    """Why and of which kept row a row is a duplicate; an empty reason when it is none."""
    close = neighbours.get(first_of[pixels[i]], set())
    tests: dict[str, Callable[[int], bool]] = {
        "exact duplicate": lambda j: sha[j] == sha[i],
        "pixel duplicate": lambda j: pixels[j] == pixels[i],
        "near duplicate": lambda j: first_of[pixels[j]] in close,
    }
    return next(((reason, j) for reason, same in tests.items() for j in kept if same(j)), ("", -1))


def _near(rows: Columns, standing: npt.NDArray[np.int64], recipe: Recipe) -> tuple[duplicates.Pairs, duplicates.Pairs]:
    """Confirmed near-duplicate pairs, and the wider set of pairs that must share a split, as rows."""
    settings = recipe.duplicates
    none = np.empty((0, 2), dtype=np.int64)
    if not settings.near or len(standing) < 2:
        return none, none
    hashes = np.array([rows["phash"][i] for i in standing], dtype=np.uint64)
    pairs = duplicates.candidate_pairs(hashes, settings.radius + _GROUP_RADIUS)
    if not len(pairs):
        return none, none
    involved, local = np.unique(pairs, return_inverse=True)
    local = local.reshape(-1, 2)
    chosen = b"".join(rows["thumbnail"][i] for i in standing[involved])
    thumbnails = np.frombuffer(chosen, dtype=np.uint8).reshape(len(involved), -1)
    distance = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])
    strict = (distance <= settings.radius) & duplicates.same_thumbnail(
        thumbnails, local, settings.mean_difference, settings.max_difference
    )
    loose = strict | duplicates.same_thumbnail(thumbnails, local, _GROUP_MEAN, 255)
    return standing[pairs[strict]], standing[pairs[loose]]


def _rank(rows: Columns, i: int) -> tuple[Any, ...]:
    """Best first: most pixels, lossless before lossy, largest file, first in the source's order."""
    lossy = rows["extension"][i] not in _LOSSLESS
    return (-rows["width"][i] * rows["height"][i], lossy, -rows["bytes"][i], rows["order"][i], rows["key"][i])
