"""Datasets that are out already: what a new build is compared with, so that it publishes no image a second time.

Reads the kept images of another dataset's `curated.parquet` and its `features/`, nothing of which is trusted, and
finds which images of a build they hold. The recipe names the folders (`duplicates.against`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion.config.recipe import Recipe
from animesion.dataset.dataset import Dataset
from animesion.dedup import clusters, search
from animesion.dedup.clusters import Rows
from animesion.errors import UsageError
from animesion.schemas import FEATURES, THUMBNAIL_SIDE, sample_key
from animesion.storage import checksums, parquet
from animesion.storage.workspace import sha256_file

_FEATURES = ("key", "face", "phash", "phash_flip", "thumbnail")
_PART = re.compile(r"part-[0-9]{5}\.parquet")


@dataclass(frozen=True)
class PublishedFeatures:
    """The images of one published dataset.

    Attributes:
        name: of the dataset, from its `dataset.json`.
        keys: of its kept images, ascending.
        sha256: of each original's bytes, as hex.
        pixels_blake3: of each original's pixels, as hex.
        phash: shape (n,), of what was packed.
        phash_flip: shape (n,), of the mirror images.
        thumbnails: n times 768 bytes.
    """

    name: str
    keys: Sequence[str]
    sha256: Sequence[str]
    pixels_blake3: Sequence[str]
    phash: search.HashArray
    phash_flip: search.HashArray
    thumbnails: pa.ChunkedArray


def splits_of(folder: Path) -> dict[str, str]:
    """The split of each kept image of a built dataset, by key.

    Raises:
        UsageError: no dataset, or `curated.parquet` is not what its SHA256SUMS says.
    """
    _, kept = _kept(folder)
    return dict(zip(kept["key"].to_pylist(), kept["split"].to_pylist(), strict=True))


def _kept(folder: Path) -> tuple[Dataset, pa.Table]:
    dataset = Dataset(folder)
    curated = dataset.read_table("curated.parquet")
    if sha256_file(folder / "curated.parquet") != checksums.read(folder).get("curated.parquet"):
        raise UsageError(f"{folder}: curated.parquet is not the one that its SHA256SUMS names: run `animesion verify`")
    kept = curated.filter(curated["kept"])
    return dataset, kept.take(pc.sort_indices(kept, sort_keys=[("key", "ascending")]))


def load(folder: Path) -> PublishedFeatures:
    """The kept images of a built dataset.

    Args:
        folder: output folder of a finished build, with its `features/`.

    Raises:
        UsageError: no dataset, `curated.parquet` is not what its SHA256SUMS says, or features that are missing, damaged
            or of other images.
    """
    dataset, kept = _kept(folder)
    paths = sorted(path for path in (folder / "features").glob("part-*.parquet") if _PART.fullmatch(path.name))
    damaged = UsageError(
        f"{folder}: features/ is missing, damaged or of an older version, and it is what images are compared by: "
        "run its build again with this version, or copy features/ from where it was built"
    )
    try:
        features = parquet.read_many(paths, FEATURES, _FEATURES)
    except (pa.ArrowException, KeyError, ValueError, OSError):
        raise damaged from None
    named = map(sample_key, features["key"].to_pylist(), features["face"].to_pylist())
    place = {key: i for i, key in enumerate(named)}
    rows = [place.get(key) for key in kept["key"].to_pylist()]
    if None in rows:
        raise damaged
    features = features.take(pa.array(rows, pa.int64()))
    # the checksums cover curated.parquet only: features that disagree with it are of another build
    known, found = (each["phash"].combine_chunks() for each in (kept, features))
    lengths = pc.all(pc.equal(pc.binary_length(features["thumbnail"]), 3 * THUMBNAIL_SIDE**2), min_count=0).as_py()
    if any(features[name].null_count for name in _FEATURES) or not lengths or not known.equals(found):
        raise damaged
    return PublishedFeatures(
        dataset.name,
        kept["key"].to_pylist(),
        kept["sha256"].to_pylist(),
        kept["pixels_blake3"].to_pylist(),
        features["phash"].to_numpy(),
        features["phash_flip"].to_numpy(),
        features["thumbnail"],
    )


def twins(
    rows: Rows, alive: npt.NDArray[np.int64], others: Sequence[PublishedFeatures], recipe: Recipe
) -> dict[int, tuple[str, str]]:
    """The rows that a published dataset holds already.

    Args:
        rows: columns `sha256 pixels_blake3 phash phash_flip thumbnail`.
        alive: rows that no other rule has dropped.
        others: published datasets; the first that holds an image is named.
        recipe: its `duplicates` section matters.

    Returns:
        Row -> how it is the same (equal bytes, equal pixels, or differing bits) and `<dataset>:<key>`.
    """
    found: dict[int, tuple[str, str]] = {}
    for other in others:
        by_sha = _first(other.sha256)
        by_pixels = _first(other.pixels_blake3)
        rest = []
        for i in alive.tolist():
            if i in found:
                continue
            at, how = by_sha.get(rows["sha256"][i]), "equal bytes"
            if at is None:
                at, how = by_pixels.get(rows["pixels_blake3"][i]), "equal pixels"
            if at is None:
                rest.append(i)
            else:
                found[i] = (how, f"{other.name}:{other.keys[at]}")
        if recipe.duplicates.near and rest and other.keys:
            found |= _near(rows, np.array(rest, dtype=np.int64), other, recipe)
    return found


def _first(values: Sequence[str]) -> dict[str, int]:
    """The first place of each value that is not empty."""
    places: dict[str, int] = {}
    for i, value in enumerate(values):
        if value:
            places.setdefault(value, i)
    return places


def _near(
    rows: Rows, chosen: npt.NDArray[np.int64], other: PublishedFeatures, recipe: Recipe
) -> dict[int, tuple[str, str]]:
    """The chosen rows that are near duplicates of a published image: of the nearest, then of the first by key."""
    settings = recipe.duplicates
    hashes, flipped = (np.asarray(rows[name], dtype=np.uint64)[chosen] for name in ("phash", "phash_flip"))
    sets = [search.cross_pairs(hashes, other.phash, settings.radius)]
    if settings.flip:
        turned = [(hashes, other.phash_flip), (flipped, other.phash)]
        sets.append(np.unique(np.concatenate([search.cross_pairs(*p, settings.radius) for p in turned]), axis=0))
    best: dict[int, tuple[int, int]] = {}
    for mirrored, pairs in enumerate(sets):
        mine, at = np.unique(pairs[:, 0], return_inverse=True)
        theirs, place = np.unique(pairs[:, 1], return_inverse=True)
        images = np.concatenate(
            [clusters.thumbnails(rows["thumbnail"], chosen[mine]), clusters.thumbnails(other.thumbnails, theirs)]
        )
        same = search.same_thumbnail(
            images,
            np.stack([at, place + len(mine)], axis=1),
            settings.mean_difference,
            settings.max_difference,
            np.full(len(pairs), bool(mirrored)),
            settings.tone,
        )
        pairs = pairs[same]
        a, b = pairs[:, 0], pairs[:, 1]
        bits = np.bitwise_count(hashes[a] ^ (other.phash_flip if mirrored else other.phash)[b])
        if mirrored:
            bits = np.minimum(bits, np.bitwise_count(flipped[a] ^ other.phash[b]))
        for i, j, distance in zip(a.tolist(), b.tolist(), bits.tolist(), strict=True):
            best[i] = min(best.get(i, (distance, j)), (distance, j))
    return {
        int(chosen[i]): (f"{distance} bits differ", f"{other.name}:{other.keys[j]}")
        for i, (distance, j) in sorted(best.items())
    }
