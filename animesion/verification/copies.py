"""Search the images of several splits for copies of one another, by the pixels that were packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from animesion.config.recipe import DuplicatesSection
from animesion.dedup import candidates, compare, geometry
from animesion.dedup.compare import Found, Place
from animesion.dedup.verdict import Verdict
from animesion.images import codec, local_features
from animesion.images.windows import COUNT

if TYPE_CHECKING:
    from animesion.dataset.dataset import Dataset
    from animesion.executors import Executor
    from animesion.progress import Progress
    from animesion.verification.scan import Contents

#: Local features that must agree beyond those that a build asks for, where splits come from the search of the build:
#: packing changes images a little, and a pair just below a limit in one place may be just above it in the other.
_MARGIN = 5


class Related(NamedTuple):
    """Two samples by position, and what they are to each other."""

    first: int
    second: int
    why: str


def find(
    dataset: Dataset,
    found: Contents,
    settings: DuplicatesSection,
    limits: codec.Limits,
    executor: Executor,
    progress: Progress,
) -> list[Related]:
    """Pairs of images in different splits that show one drawing.

    Args:
        dataset: the dataset.
        found: its samples, with the features that `settings.copies` asks for.
        settings: the `duplicates` section of the recipe, with `copies` decided.
        limits: limits of the decoder.
        executor: runs the comparisons.
        progress: receives progress events.
    """
    result = found.result
    if settings.copies == "off" or len(set(found.splits)) < 2:
        return []
    # equal pixels are reported as such: one sample per split stands for them
    firsts: dict[tuple[bytes, str], int] = {}
    for i in np.flatnonzero(result.decoded).tolist():
        firsts.setdefault((result.pixels[i], found.splits[i]), i)
    chosen = np.array(list(firsts.values()), dtype=np.int64)
    if len(chosen) < 2:
        return []
    points = None
    if settings.copies == "local":
        sets = [local_features.from_bytes(result.points[i]) for i in chosen.tolist()]
        points = local_features.PointSets.of(sets)
    windows = None
    if settings.copies == "hash":
        windows = np.frombuffer(b"".join(result.windows[i] for i in chosen.tolist()), dtype=np.uint64).reshape(
            -1, COUNT
        )
    strict = dataset.split_strategy in ("grouped", "by-class")
    hashes = candidates.Hashes(
        result.phash[chosen],
        result.phash_flip[chosen],
        result.thumbnails[chosen],
        result.image_hashes(settings.other_hash).take(chosen),
    )
    every = candidates.find(candidates.Signatures(hashes, points=points, windows=windows), settings, strict=strict)
    split = np.unique(np.array(found.splits), return_inverse=True)[1][chosen]
    digests = [result.pixels[i] for i in chosen.tolist()]
    across = split[every.pairs[:, 0]] != split[every.pairs[:, 1]]
    across &= np.array([digests[a] != digests[b] for a, b in every.pairs.tolist()], dtype=np.bool_)

    def place(row: int) -> Place:
        i = int(chosen[row])
        offset, size, *_ = found.places[i]
        width, height = result.sizes[i].tolist()
        return Place(dataset.path / found.shards[i], offset, size, width, height)

    def known(row: int) -> local_features.Points | None:
        return None if points is None else points[row]

    wanted = every.among(across)
    progress.started("copies", len(wanted.pairs))
    compared = compare.compare(wanted, place, known, limits, executor, progress.advanced)
    progress.finished("copies")
    return [
        Related(int(chosen[each.first]), int(chosen[each.second]), _why(each))
        for each in compared
        if not strict or _is_sure(each)
    ]


def _is_sure(found: Found) -> bool:
    if found.verdict in (Verdict.COPY, Verdict.OVERLAY) and not found.inliers:
        return True
    return found.inliers >= geometry.INLIERS + _MARGIN


def _why(found: Found) -> str:
    names = {Verdict.PART: "parts of one image", Verdict.ALTERNATE: "alternates of one drawing"}
    what = names.get(found.verdict, found.verdict.value)
    return f"{what} ({found.how})" if found.how else what
