"""Blend the training splits of several datasets by weight, with classes joined by name.

A weight is the number of passes over a dataset during one pass over the first one: with 0.5, each epoch has half of its
samples, and the next epoch the other half; with 2, every sample comes twice. Like all sampling, this is a function of
seed and epoch (`sampling.blend_draws`). Validation and test splits are those of the first dataset.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

import numpy as np

from animesion.errors import UsageError
from animesion_training.data.files import Files
from animesion_training.data.samples import DataSplits, Part, Samples, take
from animesion_training.data.seeds import IntArray


def blend(data: DataSplits, split: str, others: Mapping[str, tuple[DataSplits, float]]) -> tuple[DataSplits, list[str]]:
    """Add the split of other datasets to that of the first.

    Classes of the same name are one class. Those that the first dataset lacks follow its own, in the order in which
    they are found. Samples whose bytes are in another split of the first dataset, or in its own, are left out.

    Args:
        data: the first dataset; its weight is 1.
        split: the split of all of them.
        others: data and weight by the name that messages show.

    Returns:
        The blended data, and a sentence on each dataset that states how it was understood.

    Raises:
        UsageError: no such split, or a weight that is not positive.
    """
    first = data.select(split)
    classes, notes = list(data.classes), []
    ids = {name: i for i, name in enumerate(classes)}
    members, weights = [first], [1.0]
    for name, (other, weight) in others.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise UsageError(f"data.blend: the weight of {name} is {weight}: give a number above 0")
        samples = other.select(split)
        used = [other.classes[i] for i in np.unique(samples.labels)]
        known = sum(each in ids for each in used)
        for each in used:
            if each not in ids:
                ids[each] = len(classes)
                classes.append(each)
        own = np.array([ids.get(each, -1) for each in other.classes], dtype=np.int64)
        kept, left_out = _without_copies(samples, data)
        if not len(kept):
            raise UsageError(f"data.blend: all samples of {name} are in {data.path} already: leave it out")
        samples = take(samples, split, kept, labels=own[samples.labels])
        members.append(samples)
        weights.append(weight)
        sentence = (
            f"{name}: {len(samples):,} images with weight {weight:g}; {known} of its {len(used)} classes are joined by "
            f"name, {len(used) - known} are new"
        )
        sentence += f"; {left_out:,} images that {data.path} has already are left out" if left_out else ""
        notes.append(sentence)
    if any(each.digests is None for each in members) and not all(each.digests is None for each in members):
        notes.append("bytes are not compared with digests, because one of the blended datasets has none")
    splits = {name: samples for name, samples in data.splits.items() if name != split}
    return DataSplits(data.path, tuple(classes), {split: _join(members, weights), **splits}), notes


def _without_copies(samples: Samples, data: DataSplits) -> tuple[IntArray, int]:
    """Rows whose bytes are in no split of the data, and the number of the others; all rows without digests."""
    known = [other.digests for other in data.splits.values() if other.digests is not None and len(other)]
    if samples.digests is None or not known:
        return np.arange(len(samples)), 0
    row = np.dtype((np.void, samples.digests.shape[1]))
    theirs = np.concatenate([np.ascontiguousarray(each).view(row).ravel() for each in known])
    copies = np.isin(np.ascontiguousarray(samples.digests).view(row).ravel(), theirs)
    return np.flatnonzero(~copies), int(copies.sum())


def _join(members: Sequence[Samples], weights: Sequence[float]) -> Samples:
    file_starts = [0, *np.cumsum([int(each.files.max()) + 1 for each in members]).tolist()]
    block_starts = [0, *np.cumsum([int(each.blocks.max()) + 1 for each in members]).tolist()]
    digests = [each.digests for each in members if each.digests is not None]
    return Samples(
        members[0].split,
        np.concatenate([each.labels for each in members]),
        np.concatenate([each.files + start for each, start in zip(members, file_starts, strict=False)]),
        np.concatenate([each.offsets for each in members]),
        np.concatenate([each.sizes for each in members]),
        [key for each in members for key in each.keys],
        JoinedFiles([each.source for each in members], file_starts[:-1], block_starts[:-1]),
        np.concatenate(digests) if len(digests) == len(members) else None,
        any(each.remote for each in members),
        np.concatenate([each.blocks + start for each, start in zip(members, block_starts, strict=False)]),
        tuple(
            Part(len(each), max(1, round(weight * len(each)))) for each, weight in zip(members, weights, strict=True)
        ),
    )


class JoinedFiles:
    """The files of several datasets, numbered one after the other; implements `files.Files`.

    Args:
        sources: of the datasets.
        files: number of the first file of each.
        blocks: number of the first block of each.
    """

    def __init__(self, sources: Sequence[Files], files: Sequence[int], blocks: Sequence[int]) -> None:
        self.sources = sources
        self.files = files
        self.blocks = blocks

    def _at(self, file: int) -> tuple[Files, int]:
        number = bisect.bisect_right(self.files, file) - 1
        return self.sources[number], file - self.files[number]

    def name(self, file: int) -> str:
        """See `Files.name`."""
        source, own = self._at(file)
        return source.name(own)

    def read(self, file: int, offset: int, size: int) -> bytes:
        """See `Files.read`."""
        source, own = self._at(file)
        return source.read(own, offset, size)

    def view(self, file: int, offset: int, size: int) -> bytes | memoryview:
        """See `Files.view`."""
        source, own = self._at(file)
        return source.view(own, offset, size)

    def check(self, files: IntArray) -> None:
        """See `Files.check`."""
        owners = np.searchsorted(self.files, files, side="right") - 1
        for number, source in enumerate(self.sources):
            mine = files[owners == number]
            if len(mine):
                source.check(mine - self.files[number])

    def prefetch(self, blocks: Sequence[int]) -> None:
        """See `Files.prefetch`."""
        for block in blocks:
            number = bisect.bisect_right(self.blocks, block) - 1
            self.sources[number].prefetch([block - self.blocks[number]])

    def discard(self, file: int, offset: int) -> bool:
        """See `Files.discard`."""
        source, own = self._at(file)
        return source.discard(own, offset)
