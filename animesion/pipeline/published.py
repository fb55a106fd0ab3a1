"""Compare a build with published datasets, so that no image is published twice.

Reads the kept images of another dataset from its `curated.parquet` and `features/`, without trusting either, and finds
the images of a build that are among them. The recipe lists the folders in `duplicates.against`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from animesion import splits
from animesion.config.recipe import DuplicatesSection, Recipe
from animesion.dataset.dataset import Dataset
from animesion.dedup import candidates, extraction, search
from animesion.dedup.clusters import Rows, hashes_of
from animesion.dedup.compare import Place
from animesion.dedup.digests import Digests
from animesion.dedup.hashes import ImageHashes, are_valid
from animesion.errors import UsageError
from animesion.images import codec
from animesion.images.other_hashes import WIDTHS
from animesion.pipeline.columns import Coded, batches, crop_of
from animesion.schemas import FEATURES, THUMBNAIL_SIDE, sample_key
from animesion.sources import families
from animesion.storage import checksums, parquet
from animesion.storage.workspace import sha256_file

if TYPE_CHECKING:
    from animesion.executors import Executor

_FEATURES = ("key", "face", "phash", "phash_flip", "thumbnail", "points", "windows", "hash_kind", "hash", "hash_flip")
#: Features that the recipe of a build may leave out.
_OPTIONAL = frozenset({"points", "windows", "hash_kind", "hash", "hash_flip"})
_NAMES = ("source", "source_id", "md5")
#: Sources whose ids are paths, which mean nothing in another dataset. Those of `urls` may be keys of a table.
_LOCAL = frozenset({"folder", "labels", "parquet", "webdataset", "indexed-tar"})
#: Overlap of two boxes in one image from which they are of one face.
_SAME_FACE = 0.5
_PART = re.compile(r"part-[0-9]{5}\.parquet")


class Texts(Sequence[str]):
    """A column of texts, each of which becomes a Python object when it is asked for."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return Texts(self.values[row])
        return self.values[row].as_py()


class Places(Sequence[Place]):
    """Where n packed images are, each of which becomes a Python object when it is asked for.

    Args:
        folder: of the dataset.
        shards: shard of each image.
        numbers: shape (n, 4), offset and size in bytes, width and height in pixels.
    """

    def __init__(self, folder: Path, shards: Coded, numbers: npt.NDArray[np.int64]) -> None:
        self._folder, self._shards, self.numbers = folder, shards, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return Place(self._folder / self._shards[row], *self.numbers[row].tolist())

    def sized(self, sizes: Sequence[tuple[int, int]]) -> Places:
        """The same places with other widths and heights."""
        sides = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        return Places(self._folder, self._shards, np.concatenate([self.numbers[:, :2], sides], axis=1))


@dataclass(frozen=True)
class PublishedFeatures:
    """The images of one published dataset.

    Attributes:
        name: name of the dataset, from its `dataset.json`; unlike that of any other, see `load_all`.
        keys: keys of the n kept images, ascending.
        sha256: digest of each original's bytes, as hex, n texts.
        pixels_blake3: digest of each original's pixels, as hex, n texts.
        phash: perceptual hash of each packed image, shape (n,).
        phash_flip: perceptual hash of each mirror image, shape (n,).
        splits: split of each image.
        names: columns `source source_id md5` of each image.
        thumbnails: 16x16 RGB thumbnail of each packed image, n times 768 bytes.
        points: local features of each image, null if its build did not search by them.
        windows: hashes of windows of each image, likewise.
        hash_kind: the `duplicates.hash` of its build, if that is not pHash; else empty.
        hash: hashes by it of each packed image, and of its mirror image; None without one.
        places: where each packed image is.
        packed: digest of each packed image's bytes, as hex, n texts.
        crops: shape (n, 4), left, top, right, bottom of each sample in pixels of its original.
        cropped: shape (n,), whether a sample is not the whole image.
        made_with: version of `points` or `windows`, see `animesion.dedup.extraction.version`; empty if unknown.
    """

    name: str
    keys: Texts
    sha256: pa.Array
    pixels_blake3: pa.Array
    phash: search.HashArray
    phash_flip: search.HashArray
    splits: Coded
    names: pa.Table
    thumbnails: pa.ChunkedArray
    points: pa.ChunkedArray
    windows: pa.ChunkedArray
    hash_kind: str
    hash: ImageHashes | None
    places: Places
    packed: Texts
    crops: npt.NDArray[np.int64]
    cropped: npt.NDArray[np.bool_]
    made_with: str

    def hashes(self, kind: str) -> ImageHashes:
        """The hashes that a recipe compares.

        Args:
            kind: its `duplicates.hash`; empty for pHash.

        Raises:
            UsageError: the dataset was built with another one.
        """
        if not kind:
            return ImageHashes.phashes(self.phash, self.phash_flip)
        if self.hash is None or self.hash_kind != kind:
            built = self.hash_kind or "phash"
            raise UsageError(
                f'duplicates.against: {self.name} was built with duplicates.hash = "{built}", which cannot be compared '
                f'with "{kind}": set duplicates.hash to "phash", which every dataset has, or build it again'
            )
        return self.hash


def load_all(settings: DuplicatesSection) -> list[PublishedFeatures]:
    """Load the datasets in `duplicates.against`, each once.

    Where several have one name, the start of the digest of its SHA256SUMS follows the name: `faces@3c27fb76`.

    Raises:
        UsageError: as `load`.
    """
    folders = dict(zip(settings.against_digests(), map(Path, settings.against), strict=True))
    loaded = {digest: load(folder) for digest, folder in folders.items()}
    count = Counter(other.name for other in loaded.values())
    return [
        replace(other, name=f"{other.name}@{digest[:8]}") if count[other.name] > 1 else other
        for digest, other in loaded.items()
    ]


def with_features(
    other: PublishedFeatures,
    copies: str,
    limits: codec.Limits,
    executor: Executor,
    advance: Callable[[int], None],
) -> tuple[PublishedFeatures, str]:
    """A dataset with the features of a search, and a note if they had to be computed from its packed images.

    Args:
        other: the dataset.
        copies: `local` or `hash`.
        limits: limits of the decoder.
        executor: runs the jobs.
        advance: called with the number of images that are done.

    Raises:
        UsageError: an image cannot be read.
    """
    version = extraction.version(copies)
    column = other.points if copies == "local" else other.windows
    if other.made_with == version and not column.null_count:
        return other, ""
    found = extraction.extract(other.places, copies, limits, executor, advance)
    content = pa.chunked_array([pa.array([each.content for each in found], pa.binary())])
    places = other.places.sized([(each.width, each.height) for each in found])
    name = "points" if copies == "local" else "windows"
    why = f"are of {other.made_with or 'an unknown version'}" if not column.null_count else "are of another search"
    note = (
        f"published datasets: the features of {other.name} {why}, so those for {version} were computed from its packed "
        "images"
    )
    return replace(other, places=places, made_with=version, **{name: content}), note


def splits_of(folder: Path) -> dict[str, str]:
    """The split of each kept image of a built dataset, by key.

    Raises:
        UsageError: there is no dataset, or `curated.parquet` does not match its SHA256SUMS.
    """
    _, kept = _kept(folder)
    return dict(zip(kept["key"].to_pylist(), kept["split"].to_pylist(), strict=True))


def _kept(folder: Path) -> tuple[Dataset, pa.Table]:
    dataset = Dataset(folder)
    curated = _listed(dataset, "curated.parquet")
    kept = curated.filter(curated["kept"])
    return dataset, kept.take(pc.sort_indices(kept, sort_keys=[("key", "ascending")]))


def _listed(dataset: Dataset, name: str) -> pa.Table:
    table = dataset.read_table(name)
    if sha256_file(dataset.path / name) != checksums.read(dataset.path).get(name):
        raise UsageError(f"{dataset.path}: {name} does not match its SHA256SUMS: run `animesion verify`")
    return table


def load(folder: Path) -> PublishedFeatures:
    """Load the kept images of a built dataset.

    Args:
        folder: output folder of a finished build, with its `features/`.

    Raises:
        UsageError: there is no dataset, a table does not match its SHA256SUMS, or the features are missing, damaged or
            of other images.
    """
    dataset, kept = _kept(folder)
    paths = sorted(path for path in (folder / "features").glob("part-*.parquet") if _PART.fullmatch(path.name))
    damaged = UsageError(
        f"{folder}: features/ is missing, damaged or of an older version, but images are compared by it: "
        "run its build again with this version, or copy features/ from where it was built"
    )
    try:
        features = parquet.read_many(paths, FEATURES, _FEATURES)
    except (UsageError, pa.ArrowException, KeyError, ValueError, OSError):
        raise damaged from None
    rows = pc.index_in(kept["key"], value_set=_sample_keys(features)).combine_chunks()
    if rows.null_count:
        raise damaged
    features = features.take(rows)
    # SHA256SUMS covers curated.parquet but not features/; hashes that disagree mean features of another build.
    curated_phash, phash = (each["phash"].combine_chunks() for each in (kept, features))
    # features of local points and of windows may be absent, but not of another size
    odd = pc.or_(
        pc.not_equal(pc.bit_wise_and(pc.binary_length(features["points"]), 15), 0),
        pc.greater(pc.binary_length(features["points"]), 16 * 200),
    )
    odd_windows = pc.not_equal(pc.binary_length(features["windows"]), 8 * 91)
    if pc.any(odd, min_count=0).as_py() or pc.any(odd_windows, min_count=0).as_py():
        raise damaged
    has_length = pc.equal(pc.binary_length(features["thumbnail"]), 3 * THUMBNAIL_SIDE**2)
    needed = [name for name in _FEATURES if name not in _OPTIONAL]
    complete = pc.all(has_length, min_count=0).as_py() and not any(features[name].null_count for name in needed)
    kind, other = _other_hashes(features, damaged)
    if not complete or not curated_phash.equals(phash):
        raise damaged
    crops = np.asarray(kept["crop"].combine_chunks().flatten(), dtype=np.int64).reshape(-1, 4)
    whole = np.zeros_like(crops)
    whole[:, 2], whole[:, 3] = kept["width"].to_numpy(), kept["height"].to_numpy()
    return PublishedFeatures(
        dataset.name,
        Texts(kept["key"].combine_chunks()),
        kept["sha256"].combine_chunks(),
        kept["pixels_blake3"].combine_chunks(),
        features["phash"].to_numpy(),
        features["phash_flip"].to_numpy(),
        Coded.of(kept["split"]),
        kept.select(_NAMES),
        features["thumbnail"],
        features["points"],
        features["windows"],
        kind,
        other,
        *_places(dataset, kept),
        crops,
        (crops != whole).any(axis=1),
        _made_with(dataset),
    )


def _sample_keys(features: pa.Table) -> pa.Array:
    """The key of each sample: that of its image, unless it is one of its faces."""
    keys = features["key"].combine_chunks()
    rows = np.flatnonzero(features["face"].to_numpy() > 0)
    if not len(rows):
        return keys
    names, faces = (features[name].take(pa.array(rows)).to_pylist() for name in ("key", "face"))
    mask = np.zeros(len(keys), dtype=np.bool_)
    mask[rows] = True
    return pc.replace_with_mask(keys, mask, pa.array(map(sample_key, names, faces), keys.type))


def _other_hashes(features: pa.Table, damaged: UsageError) -> tuple[str, ImageHashes | None]:
    """The hash in addition to pHash, and its values; they are hostile, so their lengths are checked."""
    kinds = set(features["hash_kind"].to_pylist())
    if kinds <= {None}:
        return "", None
    [kind, *others] = kinds
    values = [features[name].to_pylist() for name in ("hash", "hash_flip")]
    if others or kind not in WIDTHS or not all(are_valid(kind, each) for each in values):
        raise damaged
    return kind, ImageHashes.of_kind(kind, *values)


def _made_with(dataset: Dataset) -> str:
    """The version of the features in `dataset.json`; empty if it has none, or is not the file that SHA256SUMS lists."""
    path = dataset.path / "dataset.json"
    try:
        if sha256_file(path) != checksums.read(dataset.path).get("dataset.json"):
            return ""
        version = json.loads(path.read_bytes())["made_with"]["copies"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return version if isinstance(version, str) and re.fullmatch(r"[a-z0-9./-]{1,80}", version) else ""


def _places(dataset: Dataset, kept: pa.Table) -> tuple[Places, Texts]:
    """Where the packed image of each kept row is, by the dataset's index, and the digest of its bytes."""
    index = _listed(dataset, "index.parquet")
    rows = pc.index_in(kept["key"], value_set=index["key"].combine_chunks()).combine_chunks()
    if rows.null_count:
        key = kept["key"].filter(rows.is_null())[0].as_py()
        raise UsageError(f"{dataset.path}: index.parquet does not have {key}: run `animesion verify`")
    index = index.take(rows)
    crops = np.asarray(kept["crop"].combine_chunks().flatten(), dtype=np.int64).reshape(-1, 4)
    columns = [index["offset"].to_numpy(), index["size"].to_numpy(), *(crops[:, 2:] - crops[:, :2]).T]
    places = Places(dataset.path, Coded.of(index["shard"]), np.stack(columns, axis=1).astype(np.int64))
    return places, Texts(index["sha256"].combine_chunks())


def relatives(rows: Rows, split_of: npt.NDArray[np.int8], other: PublishedFeatures) -> dict[int, int]:
    """Find the rows whose file, post or work a published dataset has in another split.

    Args:
        rows: columns `source source_id md5 families`.
        split_of: place in `SPLITS` of the split of each row, -1 for a dropped one, shape (n,).
        other: the published dataset.

    Returns:
        By row, the position of the first such image.
    """
    firsts: dict[str, dict[str, int]] = {}
    for some in batches(len(other.keys)):
        named = zip(*(other.names[name][some].to_pylist() for name in _NAMES), strict=True)
        for place, names in zip(range(some.start, some.stop), named, strict=True):
            for token in _tokens(*names):
                firsts.setdefault(token, {}).setdefault(other.splits[place], place)
    found: dict[int, int] = {}
    for some in batches(len(rows["key"])):
        texts = [rows[name][some].to_pylist() for name in ("source_id", "md5", "families")]
        for i, source_id, md5, related in zip(range(some.start, some.stop), *texts, strict=True):
            if split_of[i] < 0:
                continue
            source, split = rows["source"][i], splits.SPLITS[split_of[i]]
            tokens = [*_tokens(source, source_id, md5), *related]
            # a post's own number counts within its site; that of its parent is a token of the row
            tokens += [f"id:{source}:{token[5:]}" for token in related if re.fullmatch("post:[0-9]+", token)]
            places = [place for token in tokens for theirs, place in firsts.get(token, {}).items() if theirs != split]
            if places:
                found[i] = min(places)
    return found


def _tokens(source: str, source_id: str, md5: str) -> list[str]:
    """Tokens that mean the same in every dataset: of the image, of its file, and of the post or work in its name."""
    token = families.read(*families.named(source_id, "")).token
    tokens = [token]
    # `danbooru_123_face0.jpg` is of the post that a crawl or dump has as 123
    if match := re.fullmatch("post:([a-z0-9.]+)-([0-9]+)", token):
        tokens.append(f"id:{match[1]}:{match[2]}")
    if source not in _LOCAL and (source != "urls" or "://" in source_id):
        tokens.append(f"id:{source}:{source_id}")
    tokens.append(f"file:{md5}" if md5 else "")
    return [token for token in tokens if token]


def twins(
    rows: Rows,
    alive: npt.NDArray[np.int64],
    others: Sequence[PublishedFeatures],
    recipe: Recipe,
    compared: pa.Table | None = None,
) -> dict[int, tuple[str, str]]:
    """Find the rows whose image is in a published dataset.

    Args:
        rows: columns `sha256 pixels_blake3 phash phash_flip thumbnail face crop`. Where each face is a sample, equal
            bytes or pixels are those of the whole image: the other dataset has a face if it has that part of the image.
        alive: rows that no other rule has dropped.
        others: published datasets; the first one that has an image counts.
        recipe: its `duplicates` section matters.
        compared: verdicts on pairs, of schema `PAIRS`; None if no pixels were compared.

    Returns:
        By row, the kind of match (`equal bytes`, `equal pixels`, `copy` or `<n> bits differ`) and `<dataset>:<key>`.
    """
    verified = {} if compared is None else _copies(rows, compared, recipe)
    matches: dict[int, tuple[str, str]] = {}
    left = alive  # rows without a match
    for other in others:
        is_bytes, by_sha256 = _equal(rows["sha256"], left, other.sha256)
        is_pixels, by_pixels = _equal(rows["pixels_blake3"], left, other.pixels_blake3)
        for i in left[is_bytes | is_pixels].tolist():
            crop = crop_of(rows, i) if rows["face"][i] else None
            position, kind = _first_with(other, by_sha256.get(rows["sha256"][i].as_py(), ()), crop), "equal bytes"
            if position is None:
                position = _first_with(other, by_pixels.get(rows["pixels_blake3"][i].as_py(), ()), crop)
                kind = "equal pixels"
            if position is not None:
                matches[i] = (kind, f"{other.name}:{other.keys[position]}")
        left = np.setdiff1d(left, [*matches], assume_unique=True)
        if compared is not None:
            pixels = [digest for name, digest, _ in verified if name == other.name]
            for i in left[_among(rows["pixels_blake3"], left, pixels)].tolist():
                sample = other.name, rows["pixels_blake3"][i].as_py(), crop_of(rows, i) or ()
                key, how = verified.get(sample, ("", ""))
                if key:
                    matches[i] = (how, key)
        elif recipe.duplicates.near and len(left) and other.keys:
            matches |= _near_matches(rows, left, other, recipe)
        left = np.setdiff1d(left, [*matches], assume_unique=True)
    return matches


def _equal(
    values: pa.Array | Digests, chosen: npt.NDArray[np.int64], theirs: pa.Array
) -> tuple[npt.NDArray[np.bool_], dict[str, list[int]]]:
    """Which of the chosen texts are among theirs, shape of `chosen`, and the positions there of each that is."""
    wanted = values.take(pa.array(chosen))
    is_there = pc.is_in(wanted, value_set=theirs.cast(values.type))
    is_there = pc.and_(is_there, pc.greater(pc.binary_length(wanted), 0))
    shared = pc.unique(wanted.filter(is_there))
    places = np.flatnonzero(pc.is_in(theirs, value_set=shared.cast(theirs.type)).to_numpy(zero_copy_only=False))
    positions: dict[str, list[int]] = {}
    for place, text in zip(places.tolist(), theirs.take(pa.array(places)).to_pylist(), strict=True):
        positions.setdefault(text, []).append(place)
    return is_there.to_numpy(zero_copy_only=False), positions


def _among(values: pa.Array | Digests, chosen: npt.NDArray[np.int64], wanted: Iterable[str]) -> npt.NDArray[np.bool_]:
    """Which of the chosen texts are among the wanted ones, shape of `chosen`."""
    texts = pa.array(list(wanted), values.type)
    found: npt.NDArray[np.bool_] = pc.is_in(values.take(pa.array(chosen)), value_set=texts).to_numpy(
        zero_copy_only=False
    )
    return found


def _copies(rows: Rows, compared: pa.Table, recipe: Recipe) -> dict[tuple[str, str, tuple[int, ...]], tuple[str, str]]:
    """Verified copies: dataset, digest of the pixels of ours and crop -> `<dataset>:<key>` and what was done to it."""
    across = pc.or_(pc.match_substring(compared["first"], ":"), pc.match_substring(compared["second"], ":"))
    compared = compared.filter(across)
    keys = (key for name in ("first", "second") for key in compared[name].to_pylist())
    row_of_key = search.rows_of(rows["key"], keys)
    found: dict[tuple[str, str, tuple[int, ...]], tuple[str, str]] = {}
    for pair in compared.to_pylist():
        first, second = sorted((pair["first"], pair["second"]), key=lambda key: ":" in key)
        copy = pair["verdict"] in ("copy", "copy with overlay") and (recipe.duplicates.flip or not pair["mirrored"])
        if not copy or ":" in first:
            continue
        row = row_of_key[first]
        how = f"{pair['verdict']}: {pair['how']}" if pair["how"] else pair["verdict"]
        # one sample stood for all with equal pixels and the same crop when pairs were compared
        sample = second.partition(":")[0], rows["pixels_blake3"][row].as_py(), crop_of(rows, row) or ()
        found[sample] = min(found.get(sample, (second, how)), (second, how))
    return found


def _first_with(other: PublishedFeatures, positions: Sequence[int], face: Sequence[int] | None) -> int | None:
    """The first of some samples of one image that shows a face of it; None if none does.

    Args:
        other: the published dataset.
        positions: of the samples.
        face: left, top, right and bottom in pixels of the image; None for an image whose faces are not told apart.
    """
    if face is None:
        return positions[0] if positions else None
    return next(
        (i for i in positions if not other.cropped[i] or _overlap(other.crops[i].tolist(), face) >= _SAME_FACE), None
    )


def _overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """Area that two boxes share over the area that they cover together, 0 to 1."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / (areas - width * height)


def _near_matches(
    rows: Rows, chosen: npt.NDArray[np.int64], other: PublishedFeatures, recipe: Recipe
) -> dict[int, tuple[str, str]]:
    """The chosen rows that are near duplicates of a published image; of several, the nearest and then the first key."""
    settings = recipe.duplicates
    n = len(chosen)
    hashes = hashes_of(rows, chosen, recipe) + other.hashes(settings.other_hash)
    pairs, mirrored = hashes.pairs(settings.radius, flip=settings.flip)
    across = (pairs[:, 0] < n) & (pairs[:, 1] >= n)
    pairs, mirrored = pairs[across], mirrored[across]
    # The fine check takes one list of thumbnails, so each image is loaded once and theirs follow ours.
    ours, our_place = np.unique(pairs[:, 0], return_inverse=True)
    theirs, their_place = np.unique(pairs[:, 1] - n, return_inverse=True)
    thumbnails = np.concatenate(
        [candidates.thumbnails(rows["thumbnail"], chosen[ours]), candidates.thumbnails(other.thumbnails, theirs)]
    )
    confirmed = search.same_thumbnail(
        thumbnails,
        np.stack([our_place, their_place + len(ours)], axis=1),
        settings.mean_difference,
        settings.max_difference,
        mirrored,
        settings.tone,
    )
    pairs, mirrored = pairs[confirmed], mirrored[confirmed]
    best: dict[int, tuple[int, int]] = {}  # position in `chosen` -> (bits that differ, position in `other`)
    for (i, j), distance in zip(pairs.tolist(), hashes.distances(pairs, mirrored).tolist(), strict=True):
        best[i] = min(best.get(i, (distance, j - n)), (distance, j - n))
    return {
        int(chosen[i]): (f"{distance} bits differ", f"{other.name}:{other.keys[j]}")
        for i, (distance, j) in sorted(best.items())
    }
