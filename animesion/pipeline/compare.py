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
from animesion.images.local_features import Points
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

    thumbnails = pa.chunked_array(
        [
            chunk
            for each in (
                pa.chunked_array([rows["thumbnail"].take(pa.array(chosen))]),
                *(other.thumbnails for other in others),
            )
            for chunk in each.chunks
        ]
    )
    windows = None
    if recipe.duplicates.copies == "hash":
        taken = [rows["windows"].take(pa.array(chosen)), *(part for other in others for part in other.windows.chunks)]
        windows = np.concatenate([_words(part) for part in taken])
    features = rows["points"].take(pa.array(chosen)).to_pylist()
    features += [each for other in others for each in other.points.to_pylist()]
    points = [_points(each) for each in features]
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
    keys = rows["key"].take(pa.array(chosen)).to_pylist()
    keys += [f"{other.name}:{key}" for other in others for key in other.keys]
    their_places = [place for other in others for place in other.places]

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


def _words(column: pa.Array) -> npt.NDArray[np.uint64]:
    """Hashes of windows, shape (n, 91), without a Python object for each image."""
    if column.null_count:
        raise ValueError("an image has no windows")  # would be read as zeros
    values = column.cast(pa.binary(8 * COUNT)).buffers()[1] if len(column) else b""
    words: npt.NDArray[np.uint64] = np.frombuffer(values, "<u8", len(column) * COUNT).reshape(-1, COUNT)
    return words


def _points(content: bytes | None) -> Points | None:
    return None if content is None else local_features.from_bytes(content)


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
