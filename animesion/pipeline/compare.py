"""Find copies among the images of a build, and compare them with those of published datasets, before curate decides.

Candidates come from the features; the pixels of candidates are compared in worker processes. The verdicts are written
to `features/pairs.parquet`, and reused as long as features, published datasets and settings are the same. If those have
changed, as in a build that grows, pairs of unchanged images keep their verdict, and if images were only added, the new
ones alone are looked up by their local features (`animesion.pipeline.verdicts`).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence

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
from animesion.dedup.joins import EarlierVotes
from animesion.errors import UsageError
from animesion.executors import Executor
from animesion.executors.shared import Shared
from animesion.images import codec, local_features
from animesion.images.windows import COUNT
from animesion.pipeline import embed, published, verdicts
from animesion.pipeline.columns import Columns, Stored, Thumbnails, batches, crop_of, load_columns
from animesion.schemas import FEATURES, PAIRS
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
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    parts: int,
    advance: Callable[[int], None],
    note: Callable[[str], None],
) -> Receipt:
    """Compare, write the table and commit; returns the existing receipt if it is still valid.

    Args:
        workspace: output folder whose inspect stage is done.
        recipe: the recipe, with `duplicates.copies` decided.
        executor: runs the comparisons.
        parts: number of parts.
        advance: called with the number of pairs that were compared.
        note: called with a sentence if images that were searched before have to be searched again.
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
    code = f"compare-5/pillow-{PIL.__version__}/{local_features.version()}"
    receipt = workspace.done("compare", code, digest, inputs)
    if receipt:
        return receipt
    limits = codec.Limits(recipe.filter.max_side, recipe.filter.max_pixels)
    others, notes = [], []
    for other in published.load_all(settings):
        with_features, why = published.with_features(other, settings.copies, limits, executor, lambda images: None)
        others.append(with_features)
        notes += [why] if why else []
    rows = load_columns(workspace, parts, (*_COLUMNS, *(_OTHER_HASH if settings.other_hash else ())))
    vectors = embed.read(workspace, parts, rows["key"]) if settings.embedding.model else None
    chosen = _chosen(rows)
    samples = _Samples(workspace, rows, chosen, others)
    digests = samples.digests()
    before = verdicts.earlier(workspace, code)
    local = settings.copies == "local"
    votes = verdicts.votes(before, digests) if local and before and before.params == digest else None
    if local and votes is None and workspace.receipt("compare"):
        note("all images are searched for copies again: some of those before, settings or versions have changed")
    pairs = _candidates(workspace, recipe, executor, rows, samples, vectors, votes)
    known, found = verdicts.reused(before, pairs, digests)
    new = pairs.among(~known)
    found += compare.compare(new, samples.place, samples.points.__getitem__, limits, executor, advance)
    tables = verdicts.tables(pairs, sorted(found), digests, samples.key)
    names = (verdicts.PAIRS_FILE, verdicts.COMPARED_FILE, verdicts.SEARCHED_FILE)
    outputs = {name: parquet.write(workspace.path(name), table) for name, table in zip(names, tables, strict=True)}
    facts = {
        "pairs": len(found),
        "compared": len(new.pairs),
        "searched": len(digests) if votes is None else len(votes.new),
        "notes": notes,
    }
    return workspace.commit("compare", code, digest, inputs, outputs, facts)


def _inputs(workspace: Workspace, recipe: Recipe, parts: int) -> dict[str, str]:
    inputs = {f"against/{i}": digest for i, digest in enumerate(recipe.duplicates.against_digests())}
    stages = ("inspect", "embed") if recipe.duplicates.embedding.model else ("inspect",)
    for part in range(parts):
        for stage in stages:
            receipt = workspace.receipt(f"{stage}/part-{part:05d}")
            assert receipt is not None
            inputs |= receipt.inputs | {name: known["sha256"] for name, known in receipt.outputs.items()}
    return inputs


def _chosen(rows: Columns) -> candidates.Rows:
    """The images to search: one of those with equal pixels, in an order that depends on nothing but pixels and crops.

    An order by keys would differ if the image that is chosen of several had another key after an update.
    """
    decoded = np.flatnonzero(rows["reason"].has("") & rows["seen_reason"].has(""))
    # a thousand blank images would otherwise make half a million pairs
    seen: dict[tuple[str, tuple[int, ...]], None] = {}
    first = np.ones(len(decoded), dtype=np.bool_)
    for i in np.unique(search.equal_pairs(rows["pixels_blake3"], decoded)).tolist():
        sample = rows["pixels_blake3"][i].as_py(), crop_of(rows, i) or ()
        first[np.searchsorted(decoded, i)] = sample not in seen
        seen[sample] = None
    chosen = decoded[first]
    crops = rows["crop"][chosen].T * rows["cropped"][chosen]
    found: candidates.Rows = chosen[np.lexsort((*crops, rows["pixels_blake3"].sums()[chosen]))]
    return found


class _Samples:
    """The images that are searched: n of the build, and then those of published datasets.

    Args:
        workspace: the output folder.
        rows: of the build.
        chosen: shape (n,), those of them that are searched.
        others: the published datasets.
    """

    def __init__(
        self,
        workspace: Workspace,
        rows: Columns,
        chosen: candidates.Rows,
        others: Sequence[published.PublishedFeatures],
    ) -> None:
        self._workspace, self._rows, self.chosen, self.others = workspace, rows, chosen, others
        self.points = _points(rows.stored, chosen, others)
        self.side = np.repeat(np.arange(len(others) + 1), [len(chosen), *(len(other.keys) for other in others)])
        # where the images of each dataset begin
        self._starts = np.searchsorted(self.side, np.arange(len(others) + 1)).tolist()

    def place(self, row: int) -> Place:
        """Where an image is."""
        of = int(self.side[row])
        if of:
            found: Place = self.others[of - 1].places[row - self._starts[of]]
            return found
        return _place(self._workspace, self._rows, int(self.chosen[row]))

    def key(self, row: int) -> str:
        """Its key; that of a published image begins with the name of its dataset."""
        of = int(self.side[row])
        if of:
            return f"{self.others[of - 1].name}:{self.others[of - 1].keys[row - self._starts[of]]}"
        text: str = self._rows["key"][self.chosen[row]].as_py()
        return text

    def column(self, name: str) -> npt.NDArray[np.uint64]:
        """A hash of all of them, shape (m,)."""
        ours = np.asarray(self._rows[name], dtype=np.uint64)[self.chosen]
        return np.concatenate([ours, *(getattr(other, name) for other in self.others)])

    def digests(self) -> pa.Array:
        """`verdicts.digest` of each, as a column of 16 bytes."""
        found = bytearray()
        for row, (pixels, crop, size) in enumerate(itertools.chain(self._ours(), self._theirs())):
            features = self.points[row]
            found += verdicts.digest(pixels, crop, size, None if features is None else features.tobytes())
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(self.side), [None, pa.py_buffer(bytes(found))])

    def _ours(self) -> Iterator[_Known]:
        for some in batches(len(self.chosen)):
            rows = self.chosen[some]
            crops, cropped = self._rows["crop"][rows].tolist(), self._rows["cropped"][rows].tolist()
            texts = self._rows["pixels_blake3"].take(pa.array(rows)).to_pylist()
            for pixels, crop, is_cropped in zip(texts, crops, cropped, strict=True):
                left, top, right, bottom = crop
                yield pixels, tuple(crop) if is_cropped else None, (right - left, bottom - top)

    def _theirs(self) -> Iterator[_Known]:
        for other in self.others:
            for place, digest in zip(other.places, other.packed, strict=True):
                yield f"packed {digest}", place.crop, (place.width, place.height)


#: Digest of the pixels of a sample, its crop, and its width and height.
_Known = tuple[str, "tuple[int, ...] | None", tuple[int, int]]


def _candidates(
    workspace: Workspace,
    recipe: Recipe,
    executor: Executor,
    rows: Columns,
    samples: _Samples,
    vectors: embed.Vectors | None,
    votes: EarlierVotes | None,
) -> candidates.Candidates:
    """The pairs that are worth comparing."""
    chosen, others = samples.chosen, samples.others
    local = recipe.duplicates.copies == "local"
    cropped = np.flatnonzero(rows["whole_phash"].take(pa.array(chosen)).is_valid().to_numpy(zero_copy_only=False))
    kind = recipe.duplicates.other_hash
    other_hashes = [clusters.hashes_of(rows, chosen, recipe), *(other.hashes(kind) for other in others)]
    signatures = candidates.Signatures(
        candidates.Hashes(
            samples.column("phash"),
            samples.column("phash_flip"),
            _Thumbnails(Thumbnails(rows.stored.take(chosen)), len(chosen), [other.thumbnails for other in others]),
            functools.reduce(operator.add, other_hashes),
        ),
        _wholes(rows, chosen[cropped], kind) if len(cropped) else None,
        cropped,
        samples.points if local else None,
        windows=None if local else _windows(rows.stored, chosen, others),
        side=samples.side if others else None,
    )
    more = None
    if vectors is not None:
        more = search.cosine_pairs(vectors[chosen], recipe.duplicates.embedding.threshold)
    shared = Shared(executor, workspace.root)
    found = candidates.find(signatures, recipe.duplicates, more, votes=votes, shared=shared)
    # `how` says what was done to the second image, in the order of keys
    return found.turned(np.concatenate([chosen, len(rows["key"]) + np.arange(len(samples.side) - len(chosen))]))


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
