"""Find copies among the images of a build, and compare them with those of published datasets, before curate decides.

Candidates come from the features; the pixels of candidates are compared in worker processes. The verdicts are written
to `features/pairs.parquet`, and reused as long as features, published datasets and settings are the same. If those have
changed, as in a build that grows, pairs of unchanged images keep their verdict (`animesion.pipeline.verdicts`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from animesion.config.recipe import Recipe
from animesion.config.settings import params_digest
from animesion.dedup import candidates, clusters, compare, search
from animesion.dedup.compare import Place
from animesion.dedup.hashes import ImageHashes
from animesion.errors import UsageError
from animesion.executors import Executor
from animesion.executors.shared import Shared
from animesion.images import codec, local_features
from animesion.images.windows import COUNT
from animesion.pipeline import embed, published, verdicts
from animesion.pipeline.columns import Columns, Stored, Thumbnails, batches, crop_of, load_columns
from animesion.schemas import COMPARED, FEATURES, PAIRS
from animesion.storage import parquet
from animesion.storage.receipts import Receipt
from animesion.storage.workspace import Workspace

#: Columns that are loaded in addition to those of curate.
_COLUMNS = ("whole_phash", "whole_phash_flip", "offset")
_OTHER_HASH = ("hash", "hash_flip", "whole_hash", "whole_hash_flip")


def wanted(recipe: Recipe) -> bool:
    """Whether pixels are compared at all."""
    return recipe.duplicates.near and recipe.duplicates.copies != "off"


def run(
    workspace: Workspace, recipe: Recipe, executor: Executor, parts: int, advance: Callable[[int], None]
) -> Receipt:
    """Compare, write the table and commit; returns the existing receipt if it is still valid.

    Args:
        workspace: output folder whose inspect stage is done.
        recipe: the recipe, with `duplicates.copies` decided.
        executor: runs the comparisons.
        parts: number of parts.
        advance: called with the number of pairs that were compared.
    """
    inputs = _inputs(workspace, recipe, parts)
    settings = recipe.duplicates
    digest = params_digest(
        {
            "copies": settings.copies,
            "hash": settings.hash,
            "radius": settings.radius,
            "embedding": settings.embedding.threshold if settings.embedding.model else 0,
            "limits": [recipe.filter.max_side, recipe.filter.max_pixels],
        }
    )
    code = f"compare-4/pillow-{PIL.__version__}/{local_features.version()}"
    receipt = workspace.done("compare", code, digest, inputs)
    if receipt:
        return receipt
    limits = codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
    others, notes = [], []
    for other in published.load_all(settings):
        known, note = published.with_features(other, settings.copies, limits, executor, lambda images: None)
        others.append(known)
        notes += [note] if note else []
    rows = load_columns(workspace, parts, (*_COLUMNS, *(_OTHER_HASH if settings.other_hash else ())))
    vectors = embed.read(workspace, parts, rows["key"]) if settings.embedding.model else None
    before = verdicts.earlier(workspace, code)
    found, compared, new = _compared(workspace, recipe, executor, rows, others, vectors, before, advance)
    outputs = {
        verdicts.PAIRS_FILE: parquet.write(workspace.path(verdicts.PAIRS_FILE), found),
        verdicts.COMPARED_FILE: parquet.write(workspace.path(verdicts.COMPARED_FILE), compared),
    }
    return workspace.commit(
        "compare", code, digest, inputs, outputs, {"pairs": len(found), "compared": new, "notes": notes}
    )


def _inputs(workspace: Workspace, recipe: Recipe, parts: int) -> dict[str, str]:
    inputs = {f"against/{i}": digest for i, digest in enumerate(recipe.duplicates.against_digests())}
    stages = ("inspect", "embed") if recipe.duplicates.embedding.model else ("inspect",)
    for part in range(parts):
        for stage in stages:
            receipt = workspace.receipt(f"{stage}/part-{part:05d}")
            assert receipt is not None
            inputs |= receipt.inputs | {name: known["sha256"] for name, known in receipt.outputs.items()}
    return inputs


def _compared(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    rows: Columns,
    others: Sequence[published.PublishedFeatures],
    vectors: embed.Vectors | None,
    before: verdicts.Earlier | None,
    advance: Callable[[int], None],
) -> tuple[pa.Table, pa.Table, int]:
    """The verdicts on all candidates, as tables of schemas `PAIRS` and `COMPARED`, and how many had none before."""
    decoded = np.flatnonzero(rows["reason"].has("") & rows["seen_reason"].has(""))
    # Images with equal pixels are one: a thousand blank images would otherwise make half a million pairs.
    seen: dict[tuple[str, tuple[int, ...]], None] = {}
    first = np.ones(len(decoded), dtype=np.bool_)
    linked = search.equal_pairs(rows["pixels_blake3"], decoded)
    for i in np.unique(linked).tolist():
        sample = rows["pixels_blake3"][i].as_py(), crop_of(rows, i) or ()
        first[np.searchsorted(decoded, i)] = sample not in seen
        seen[sample] = None
    chosen = decoded[first]
    if not len(chosen):
        return PAIRS.empty_table(), COMPARED.empty_table(), 0
    ours = len(chosen)
    local = recipe.duplicates.copies == "local"

    def column(name: str) -> Any:
        return np.concatenate([np.asarray(rows[name], dtype=np.uint64)[chosen], *(getattr(o, name) for o in others)])

    windows = _windows(rows.stored, chosen, others) if recipe.duplicates.copies == "hash" else None
    points = _points(rows.stored, chosen, others)
    side = np.repeat(np.arange(len(others) + 1), [ours, *(len(other.keys) for other in others)])
    cropped = np.flatnonzero(rows["whole_phash"].take(pa.array(chosen)).is_valid().to_numpy(zero_copy_only=False))
    kind = recipe.duplicates.other_hash
    other_hashes = [clusters.hashes_of(rows, chosen, recipe), *(other.hashes(kind) for other in others)]
    signatures = candidates.Signatures(
        candidates.Hashes(
            column("phash"),
            column("phash_flip"),
            _Thumbnails(Thumbnails(rows.stored.take(chosen)), ours, [other.thumbnails for other in others]),
            functools.reduce(operator.add, other_hashes),
        ),
        _wholes(rows, chosen[cropped], kind) if len(cropped) else None,
        cropped,
        points if local else None,
        windows=windows,
        side=side if others else None,
    )
    more = None
    if vectors is not None:
        more = search.cosine_pairs(vectors[chosen], recipe.duplicates.embedding.threshold)
    pairs = candidates.find(signatures, recipe.duplicates, more, shared=Shared(executor, workspace.root))
    starts = np.flatnonzero(np.diff(side, prepend=-1))  # where the images of each dataset begin

    def place(row: int) -> Place:
        of = int(side[row])
        return others[of - 1].places[row - int(starts[of])] if of else _place(workspace, rows, int(chosen[row]))

    def key(row: int) -> str:
        of = int(side[row])
        if of:
            return f"{others[of - 1].name}:{others[of - 1].keys[row - int(starts[of])]}"
        text: str = rows["key"][chosen[row]].as_py()
        return text

    digests = _digests(rows, chosen, others, points, place)
    known, found = verdicts.reused(before, pairs, digests)
    new = pairs.among(~known)
    limits = codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
    found += compare.compare(new, place, points.__getitem__, limits, executor, advance)
    return *verdicts.tables(pairs, sorted(found), digests, key), len(new.pairs)


class _Thumbnails:
    """Thumbnails of the images of a build, which are read when they are needed, and then those of published ones.

    Args:
        ours: of the n images of the build.
        n: their number.
        others: those of each published dataset.
    """

    def __init__(self, ours: Thumbnails, n: int, others: Sequence[pa.ChunkedArray]) -> None:
        self._ours, self._n = ours, n
        self._others = pa.chunked_array(
            [chunk for each in others for chunk in each.chunks], FEATURES.field("thumbnail").type
        )

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The thumbnails of some rows, ascending, shape (len(rows), 768)."""
        first = int(np.searchsorted(rows, self._n))
        ours = self._ours.read(rows[:first])
        if first == len(rows):
            return ours
        return np.concatenate([ours, candidates.thumbnails(self._others, rows[first:] - self._n)])


def _windows(
    stored: Stored, chosen: npt.NDArray[np.int64], others: Sequence[published.PublishedFeatures]
) -> npt.NDArray[np.uint64]:
    """The hashes of windows of the chosen images, and then of published ones, shape (n, 91)."""
    found = np.empty((len(chosen) + sum(len(other.keys) for other in others), COUNT), dtype=np.uint64)
    for at, values in stored.read("windows", chosen):
        if pc.any(pc.not_equal(pc.binary_length(values).fill_null(0), 8 * COUNT)).as_py():
            raise parquet.damaged(stored.path(stored.part[chosen[at[0]]]), "windows")
        found[at] = _content(values).view("<u8").reshape(-1, COUNT)
    start = len(chosen)
    for other in others:
        for chunk in other.windows.chunks:
            found[start : start + len(chunk)] = _content(chunk).view("<u8").reshape(-1, COUNT)
            start += len(chunk)
    return found


def _points(
    stored: Stored, chosen: npt.NDArray[np.int64], others: Sequence[published.PublishedFeatures]
) -> local_features.PointSets:
    """The local features of the chosen images, and then of published ones; of a search by hashes, there are none."""
    # twice, as what was read once would have to wait in memory until all lengths are known
    theirs = [chunk for other in others for chunk in other.points.chunks]
    sizes = np.zeros(len(chosen), dtype=np.int64)
    known = np.zeros(len(chosen), dtype=np.bool_)
    for at, values in stored.read("points", chosen):
        sizes[at], known[at] = _lengths(values)
    lengths, are_known = zip((sizes, known), *map(_lengths, theirs), strict=True)
    found = local_features.PointSets.empty(
        np.concatenate(lengths) // local_features.POINT.itemsize, np.concatenate(are_known)
    )
    if known.any():
        for at, values in stored.read("points", chosen):
            found.set(at.tolist(), values.to_pylist())
    start = len(chosen)
    for chunk in theirs:
        found.set(range(start, start + len(chunk)), (value.as_py() for value in chunk))
        start += len(chunk)
    return found


def _lengths(values: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Bytes of each value, 0 for a null, and which are none; shape (n,) each."""
    sizes = pc.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return sizes, values.is_valid().to_numpy(zero_copy_only=False)


def _content(values: pa.Array) -> npt.NDArray[np.uint8]:
    """The bytes of all values, one after another."""
    ends = np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + len(values) + 1]
    return np.frombuffer(values.buffers()[2], dtype=np.uint8)[ends[0] : ends[-1]]


def _digests(
    rows: Columns,
    chosen: npt.NDArray[np.int64],
    others: Sequence[published.PublishedFeatures],
    points: local_features.PointSets,
    place: Callable[[int], Place],
) -> pa.Array:
    """`verdicts.digest` of each image, as a column of 16 bytes."""

    def pixels() -> Iterator[str]:
        for some in batches(len(chosen)):
            yield from rows["pixels_blake3"].take(pa.array(chosen[some])).to_pylist()
        for other in others:
            yield from (f"packed {digest}" for digest in other.packed)

    found = bytearray()
    for row, of_pixels in enumerate(pixels()):
        where, features = place(row), points[row]
        size = where.width, where.height
        found += verdicts.digest(of_pixels, where.crop, size, None if features is None else features.tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(points), [None, pa.py_buffer(bytes(found))])


def _wholes(rows: Columns, chosen: candidates.Rows, kind: str) -> candidates.Hashes:
    taken = (rows[f"whole_{name}"].take(pa.array(chosen)) for name in ("phash", "phash_flip"))
    other = None
    if kind:
        values = (rows[name].take(pa.array(chosen)).to_pylist() for name in ("whole_hash", "whole_hash_flip"))
        other = ImageHashes.of_kind(kind, *values)
    plain, flipped = (each.to_numpy(zero_copy_only=False) for each in taken)
    return candidates.Hashes(plain, flipped, Thumbnails(rows.stored.take(chosen), "whole_thumbnail"), other)


def _place(workspace: Workspace, rows: Columns, i: int) -> Place:
    left, top, right, bottom = rows["crop"][i].tolist()  # the whole image where it is not cropped
    path = workspace.path(f"raw/part-{rows['part'][i]:05d}.tar")
    offset, size = rows["offset"][i].item(), rows["bytes"][i].item()
    return Place(path, offset, size, right - left, bottom - top, crop_of(rows, i))


def read(workspace: Workspace) -> pa.Table:
    """The verdicts.

    Raises:
        UsageError: the stage was not run.
    """
    if workspace.receipt("compare") is None:
        raise UsageError("images have not been compared: run the build again")
    return parquet.read(workspace.path(verdicts.PAIRS_FILE), PAIRS)
