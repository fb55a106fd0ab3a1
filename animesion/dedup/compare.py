"""Compare the pixels of candidate pairs, in worker processes, and give each pair a verdict.

`animesion.dedup.candidates` finds the pairs. A pair is aligned by its local features or, if it has too few and the
hashes are close, as a whole; `animesion.dedup.residual` then tells a copy from an alternate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from animesion.dedup import geometry
from animesion.dedup.candidates import Candidates
from animesion.dedup.verdict import Verdict
from animesion.errors import UsageError
from animesion.images import codec, local_features
from animesion.images.local_features import Points

if TYPE_CHECKING:  # `residual` loads OpenCV, which takes longer than a build that compares nothing
    from collections.abc import Callable

    from animesion.dedup import residual
    from animesion.executors import Executor

#: Pairs per job: about a second of work.
_JOB_PAIRS = 64

#: Images that a worker keeps while it works on a job, reduced to the area of a square of the second number.
_KEPT, _KEPT_SIDE = 256, 320


class Place(NamedTuple):
    """Where the bytes of an image are, and which part of it is the sample.

    Attributes:
        path: a file.
        offset: of the image's first byte.
        size: number of bytes.
        width: of the sample in pixels.
        height: of the sample in pixels.
        crop: left, top, right, bottom in pixels of the upright image; None for the whole image.
    """

    path: Path
    offset: int
    size: int
    width: int
    height: int
    crop: tuple[int, int, int, int] | None = None


class Pair(NamedTuple):
    """Two images to compare.

    Attributes:
        first: row of the first image.
        second: row of the second image.
        plain: whether the hashes are close.
        mirrored: whether the hashes of one and of the mirror image of the other are close.
        whole: whether the hashes of the whole images are close.
    """

    first: int
    second: int
    plain: bool
    mirrored: bool
    whole: bool


class Found(NamedTuple):
    """The verdict on a pair that is not simply different.

    Attributes:
        first: row of the first image.
        second: row of the second image.
        verdict: the verdict.
        whole: whether the whole images were compared, not the samples.
        mirrored: whether the second image is mirrored.
        inliers: local features that agree; 0 if the pair was aligned as a whole.
        residual: see `residual.Comparison`.
        how: text, see `residual.Comparison`.
        transform: see `residual.shares`.
    """

    first: int
    second: int
    verdict: Verdict
    whole: bool
    mirrored: bool
    inliers: int
    residual: float
    how: str
    transform: tuple[float, ...]


@dataclass(frozen=True)
class CompareJob:
    """Compare some pairs.

    Attributes:
        pairs: the pairs.
        places: row -> where the image is.
        points: row -> local features, for rows whose features are known.
        limits: limits of the decoder.
    """

    pairs: Sequence[Pair]
    places: dict[int, Place]
    points: dict[int, Points]
    limits: codec.Limits

    @property
    def name(self) -> str:
        """Name of the job in messages."""
        return f"comparing {len(self.pairs)} pairs from row {self.pairs[0].first}"

    def run(self) -> list[Found]:
        """Compare the pairs; pairs of different images are left out."""
        loaded = _Loaded(self.places, self.points, self.limits)
        found = (_judge(pair, loaded) for pair in self.pairs)
        return [each for each in found if each is not None]


@dataclass(frozen=True)
class _LaterJob:
    """A `CompareJob` whose images and features are looked up when it runs or is sent to a worker."""

    candidates: Candidates
    some: slice
    places: Callable[[int], Place]
    points: Callable[[int], Points | None]
    limits: codec.Limits

    def __len__(self) -> int:
        return len(self.candidates.pairs[self.some])

    def __reduce__(self) -> tuple[Any, ...]:
        job = self._job()
        return CompareJob, (job.pairs, job.places, job.points, job.limits)

    @property
    def name(self) -> str:
        """Name of the job in messages."""
        return f"comparing {len(self)} pairs from row {self.candidates.pairs[self.some.start, 0]}"

    def run(self) -> list[Found]:
        """Compare the pairs; pairs of different images are left out."""
        return self._job().run()

    def _job(self) -> CompareJob:
        rows = self.candidates.pairs[self.some]
        flags = (getattr(self.candidates, name)[self.some].tolist() for name in ("plain", "mirrored", "whole"))
        pairs = [Pair(*pair, *each) for pair, *each in zip(rows.tolist(), *flags, strict=True)]
        involved = np.unique(rows).tolist()
        known = {row: features for row in involved if (features := self.points(row)) is not None}
        return CompareJob(pairs, {row: self.places(row) for row in involved}, known, self.limits)


def decoded(place: Place, limits: codec.Limits) -> Image.Image:
    """The whole image at a place, upright, mode RGB.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.size)
        return codec.decode(content, limits, known=True).image
    except (OSError, ValueError, codec.RejectedImageError) as error:
        # the images of a build are known to decode; those of a published dataset may be missing or damaged
        raise UsageError(
            f"{place.path}: the image at byte {place.offset} cannot be compared ({error}): check the file, or set "
            'duplicates.copies to "off"'
        ) from None


class _Loaded:
    """Decoded images by row, reduced; the last `_KEPT` are kept."""

    def __init__(self, places: dict[int, Place], points: dict[int, Points], limits: codec.Limits) -> None:
        self._places, self._points, self._limits = places, points, limits
        self._extracted: dict[int, Points] = {}
        self._kept: OrderedDict[tuple[int, bool], Image.Image] = OrderedDict()

    def image(self, row: int, *, whole: bool = False) -> Image.Image:
        """A copy of the sample of a row, or of the whole image."""
        key = (row, whole)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        from animesion.dedup import residual

        place = self._places[row]
        image = decoded(place, self._limits)
        if place.crop is not None and not whole:
            image = image.crop(place.crop)
        self._kept[key] = copy = residual.reduced(image, _KEPT_SIDE)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return copy

    def points(self, row: int) -> tuple[Points, tuple[int, int]]:
        """The local features of the sample of a row, and the size of the image that they were extracted from."""
        if row in self._points:
            place = self._places[row]
            return self._points[row], (place.width, place.height)
        image = self.image(row)
        if row not in self._extracted:
            self._extracted[row] = local_features.extract(image)
        return self._extracted[row], image.size


def _judge(pair: Pair, loaded: _Loaded) -> Found | None:
    """The verdict on a pair; None if the images are different."""
    from animesion.dedup import residual

    first, second = pair.first, pair.second
    (points, size), (others, other_size) = loaded.points(first), loaded.points(second)
    match = geometry.match(points, others, (size, other_size))
    compared: list[tuple[bool, int, residual.Comparison]] = []
    if match is not None:
        outcome = residual.compare(loaded.image(first), loaded.image(second), match)
        compared.append((match.mirrored, match.inliers, outcome))
    if not compared or compared[0][2].verdict is Verdict.ALTERNATE:
        # aligned as a whole: images with few features, or whose features a template shares
        for mirrored in [False] * pair.plain + [True] * pair.mirrored:
            images = loaded.image(first), loaded.image(second)
            known = geometry.stretched(images[0].size, images[1].size, mirrored=mirrored)
            outcome = residual.compare(*images, known)
            # a worse alignment has more noise, in which a change would be lost
            if match is None or outcome.alike >= compared[0][2].alike:
                compared.append((mirrored, 0, outcome))
    best = min(compared, key=lambda each: (each[2].verdict.rank, each[2].residual), default=None)
    if pair.whole and (best is None or best[2].verdict.rank > Verdict.OVERLAY.rank):
        images = loaded.image(first, whole=True), loaded.image(second, whole=True)
        outcome = residual.compare(*images, geometry.stretched(images[0].size, images[1].size, mirrored=False))
        if outcome.verdict in (Verdict.COPY, Verdict.OVERLAY):
            return _found(pair, (False, 0, outcome), whole=True)
    if best is None or best[2].verdict is Verdict.DIFFERENT:
        return None
    return _found(pair, best, whole=False)


def _found(pair: Pair, compared: tuple[bool, int, residual.Comparison], *, whole: bool) -> Found:
    mirrored, inliers, outcome = compared
    values = outcome.verdict, whole, mirrored, inliers, outcome.residual, outcome.how, outcome.transform
    return Found(pair.first, pair.second, *values)


def compare(
    candidates: Candidates,
    places: Callable[[int], Place],
    points: Callable[[int], Points | None],
    limits: codec.Limits,
    executor: Executor,
    advance: Callable[[int], None] = lambda pairs: None,
) -> list[Found]:
    """Compare all candidates.

    Args:
        candidates: the pairs.
        places: where the image of a row is.
        points: local features of a row; None if they are not known.
        limits: limits of the decoder.
        executor: runs the jobs.
        advance: called with the number of pairs that were compared.

    Returns:
        The verdicts, by rows ascending; pairs of different images are left out.
    """
    jobs = [
        _LaterJob(candidates, slice(start, start + _JOB_PAIRS), places, points, limits)
        for start in range(0, len(candidates.pairs), _JOB_PAIRS)
    ]
    found: list[Found] = []

    def finished(job: Any, result: list[Found]) -> None:
        found.extend(result)
        advance(len(job))

    executor.run(jobs, finished)
    return sorted(found)
