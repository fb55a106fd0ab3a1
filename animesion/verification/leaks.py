"""Find leaks between splits: same group, family or source image, equal bytes, equal or nearly equal pixels.

All functions work on arrays of all samples. `animesion.pipeline.curate` prevents leaks in a build.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from animesion import splits as split_names
from animesion.config.recipe import DuplicatesSection
from animesion.dedup import search
from animesion.dedup.hashes import ImageHashes


@dataclass(frozen=True)
class Leak:
    """Two samples of different splits, by position, and every reason why they should share a split."""

    first: int
    second: int
    why: tuple[str, ...]


@dataclass(frozen=True)
class PixelColumns:
    """Features of the decoded images.

    Attributes:
        decoded: shape (n,), whether the image decoded.
        digests: n digests of the pixels.
        hashes: perceptual hashes of the images and of the mirror images.
        thumbnails: shape (n, 768).
    """

    decoded: npt.NDArray[np.bool_]
    digests: Sequence[bytes]
    hashes: ImageHashes
    thumbnails: npt.NDArray[np.uint8]


def find(
    splits: Sequence[str],
    groups: Sequence[str],
    sources: Sequence[str],
    sha256: Sequence[bytes],
    pixels: PixelColumns | None,
    settings: DuplicatesSection,
    families: Sequence[Sequence[str]] = (),
    related: Sequence[tuple[int, int, str]] = (),
) -> list[Leak]:
    """Find leaks. Every sample that shares a value with an earlier split (train, val, test) is in a pair.

    The other sample of the pair is the first one of that split with the same value, so the number of pairs grows
    linearly with the number of samples.

    Args:
        splits: split of each of n samples.
        groups: group of each sample, empty for none.
        sources: source and id of each sample, empty for none.
        sha256: digest of each image's bytes.
        pixels: features of the images; None compares them by their bytes only.
        settings: thresholds of near duplicates.
        families: tokens of each sample's family by its name; empty if names are not compared.
        related: pairs of images whose pixels were compared, and what they are to each other.

    Returns:
        The leaks, sorted by position.
    """
    found: dict[tuple[int, int], list[str]] = {}

    def add(earlier: int, later: int, why: str) -> None:
        found.setdefault((min(earlier, later), max(earlier, later)), []).append(why)

    # A relative by name is better evidence than the first sample of a group, which may be related through many others.
    by_name = dict.fromkeys(_straddling_families(families, splits))
    of_group = {pair for pair in by_name if groups[pair[0]] and groups[pair[0]] == groups[pair[1]]}
    named = {(later, splits[earlier]) for earlier, later in of_group}
    in_groups = [pair for pair in _straddling(groups, splits) if (pair[1], splits[pair[0]]) not in named]
    for pair in dict.fromkeys([*in_groups, *(pair for pair in by_name if pair in of_group)]):
        add(*pair, "same group")
    for pair in by_name:
        add(*pair, "same family by name")
    for why, values in (("same source image", sources), ("equal bytes", sha256)):
        for pair in _straddling(values, splits):
            add(*pair, why)
    if pixels is not None:
        for earlier, later in _straddling(pixels.digests, splits):
            if sha256[earlier] != sha256[later]:
                add(earlier, later, "equal pixels")
        if settings.copies not in ("local", "hash"):  # then `related` has the pairs
            name = settings.other_hash or "pHash"
            for pair, distance in _near(pixels, splits, settings):
                add(*pair, f"near duplicates ({name} distance {distance})")
    for a, b, why in related:
        if splits[a] != splits[b]:
            add(a, b, why)
    return [Leak(*pair, tuple(why)) for pair, why in sorted(found.items())]


def straddling_counts(leaks: Sequence[Leak], splits: Sequence[str]) -> dict[str, int]:
    """Number of samples by split that are related to a sample of an earlier split: train, val, test.

    Args:
        leaks: the leaks.
        splits: split of each sample.
    """
    rank = _ranks(splits)
    related = {max((leak.first, leak.second), key=lambda i: rank[splits[i]]) for leak in leaks}
    counts = Counter(splits[i] for i in related)
    return {split: counts[split] for split in sorted(counts, key=lambda split: rank[split])}


def _ranks(splits: Sequence[str]) -> dict[str, int]:
    """The order of the splits: train, val, test, then any others by name."""
    others = sorted(set(splits).difference(split_names.SPLITS))
    return {split: rank for rank, split in enumerate([*split_names.SPLITS, *others])}


def _straddling(values: Sequence[Hashable], splits: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of samples with equal values in different splits: the first one of each earlier split and each sample."""
    rank = _ranks(splits)
    firsts: dict[Hashable, dict[str, int]] = {}
    for i, (value, split) in enumerate(zip(values, splits, strict=True)):
        if value:
            firsts.setdefault(value, {}).setdefault(split, i)
    pairs = []
    for i, (value, split) in enumerate(zip(values, splits, strict=True)):
        # almost all values are in one split only
        if value and len(first := firsts[value]) > 1:
            pairs += [(j, i) for other, j in first.items() if rank[other] < rank[split]]
    return pairs


def _straddling_families(families: Sequence[Sequence[str]], splits: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of samples that share a token in different splits, as in `_straddling`."""
    places = [(i, token) for i, tokens in enumerate(families) for token in tokens]
    pairs = _straddling([token for _, token in places], [splits[i] for i, _ in places])
    return [(places[a][0], places[b][0]) for a, b in pairs]


def _near(
    pixels: PixelColumns, splits: Sequence[str], settings: DuplicatesSection
) -> list[tuple[tuple[int, int], int]]:
    """Pairs across splits with different pixels within the thresholds, and their Hamming distance in bits."""
    # equal pixels have equal hashes: one sample per split represents them, or blank images would pair n by n
    representatives: dict[tuple[bytes, str], int] = {}
    for i in np.flatnonzero(pixels.decoded).tolist():
        representatives.setdefault((pixels.digests[i], splits[i]), i)
    rows = np.array(list(representatives.values()), dtype=np.int64)
    if len(rows) < 2:
        return []
    pairs, mirrored = pixels.hashes.take(rows).pairs(settings.radius, flip=settings.flip)
    pairs = rows[pairs]  # positions of samples, shape (m, 2)
    split_of = np.unique(np.array(splits), return_inverse=True)[1]
    across = split_of[pairs[:, 0]] != split_of[pairs[:, 1]]
    # equal pixels are reported as such
    across &= np.array([pixels.digests[a] != pixels.digests[b] for a, b in pairs.tolist()], dtype=np.bool_)
    pairs, mirrored = pairs[across], mirrored[across]
    same = search.same_thumbnail(
        pixels.thumbnails, pairs, settings.mean_difference, settings.max_difference, mirrored, settings.tone
    )
    pairs = pairs[same]
    distances = pixels.hashes.distances(pairs, mirrored[same])
    nearest: dict[tuple[int, int], int] = {}  # a pair may be close both plain and mirrored
    for (a, b), distance in zip(pairs.tolist(), distances.tolist(), strict=True):
        pair = (min(a, b), max(a, b))
        nearest[pair] = min(distance, nearest.get(pair, distance))
    return list(nearest.items())
