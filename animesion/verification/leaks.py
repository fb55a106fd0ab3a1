"""Find leaks between splits: same group, same source image, equal bytes, equal or nearly equal pixels.

All functions work on arrays of all samples. `animesion.pipeline.curate` prevents leaks in a build.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from animesion.config.recipe import DuplicatesSection
from animesion.dedup import search


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
        phash: shape (n,), perceptual hashes.
        phash_flip: shape (n,), perceptual hashes of the mirror images.
        thumbnails: shape (n, 768).
    """

    decoded: npt.NDArray[np.bool_]
    digests: Sequence[bytes]
    phash: npt.NDArray[np.uint64]
    phash_flip: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.uint8]


def find(
    splits: Sequence[str],
    groups: Sequence[str],
    sources: Sequence[str],
    sha256: Sequence[bytes],
    pixels: PixelColumns | None,
    settings: DuplicatesSection,
) -> list[Leak]:
    """Find leaks. If many samples share a value, one pair represents them for each two splits.

    Args:
        splits: split of each of n samples.
        groups: group of each sample, empty for none.
        sources: source and id of each sample, empty for none.
        sha256: digest of each image's bytes.
        pixels: features of the images; None compares them by their bytes only.
        settings: thresholds of near duplicates.

    Returns:
        The leaks, sorted by position.
    """
    found: dict[tuple[int, int], list[str]] = {}
    for why, values in (("same group", groups), ("same source image", sources), ("equal bytes", sha256)):
        for pair in _straddling(values, splits):
            found.setdefault(pair, []).append(why)
    if pixels is not None:
        for pair in _straddling(pixels.digests, splits):
            if sha256[pair[0]] != sha256[pair[1]]:
                found.setdefault(pair, []).append("equal pixels")
        for pair, distance in _near(pixels, splits, settings):
            found.setdefault(pair, []).append(f"near duplicates (pHash distance {distance})")
    return [Leak(*pair, tuple(why)) for pair, why in sorted(found.items())]


def _straddling(values: Sequence[Hashable], splits: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of samples with equal values in different splits: for each value, the first sample of each two splits."""
    firsts: dict[Hashable, dict[str, int]] = {}
    pairs = []
    for i, (value, split) in enumerate(zip(values, splits, strict=True)):
        if not value:
            continue
        first = firsts.setdefault(value, {})
        if split not in first:
            pairs += [(other, i) for other in first.values()]
            first[split] = i
    return pairs


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
    pairs, mirrored = search.found_pairs(
        pixels.phash[rows], pixels.phash_flip[rows] if settings.flip else None, settings.radius
    )
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
    distances = search.distances(pixels.phash, pixels.phash_flip, pairs, mirrored[same])
    nearest: dict[tuple[int, int], int] = {}  # a pair may be close both plain and mirrored
    for (a, b), distance in zip(pairs.tolist(), distances.tolist(), strict=True):
        pair = (min(a, b), max(a, b))
        nearest[pair] = min(distance, nearest.get(pair, distance))
    return list(nearest.items())
