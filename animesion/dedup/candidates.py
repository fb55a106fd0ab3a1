"""Candidates for copies among many images: by hash, by hashes of windows, by local features, by the whole image.

A candidate is a pair that is worth comparing. `animesion.dedup.compare` reads the pixels of candidates and gives each a
verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from animesion.config.recipe import DuplicatesSection
from animesion.dedup import joins, search
from animesion.dedup.hashes import ImageHashes
from animesion.executors.shared import Shared
from animesion.images import local_features
from animesion.images.local_features import PointSets
from animesion.schemas import THUMBNAIL_SIDE

#: Mean absolute difference of thumbnails within which images are compared.
LOOSE_MEAN = 24.0

#: Differing bits of a hash and that of a window, and local features that agree; the second values are strict.
_WINDOW_RADIUS, _STRICT_WINDOW_RADIUS = 8, 4
_VOTES, _STRICT_VOTES = 3, 5


Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Hashes:
    """Hashes and thumbnails of n images.

    Attributes:
        phash: shape (n,), perceptual hashes.
        phash_flip: shape (n,), of the mirror images.
        thumbnails: n times 768 bytes.
        other: hashes by another algorithm, which are searched instead; None for pHashes.
    """

    phash: npt.NDArray[np.uint64]
    phash_flip: npt.NDArray[np.uint64]
    thumbnails: Sequence[bytes] | pa.Array | pa.ChunkedArray | npt.NDArray[np.uint8]
    other: ImageHashes | None = None


@dataclass(frozen=True)
class Signatures:
    """What n images are searched by.

    Attributes:
        sample: hashes of the samples.
        whole: hashes of the whole images of some samples that are crops; None if no sample is one.
        cropped: rows of the samples in `whole`, ascending.
        points: local features of each sample; None if they are not searched.
        windows: shape (n, 91), hashes of windows; None if they are not searched.
        side: shape (n,), 0 for an image of this build, a positive number for those of one published dataset; images of
            two datasets, or of one, are not compared with one another.
    """

    sample: Hashes
    whole: Hashes | None = None
    cropped: npt.NDArray[np.int64] | None = None
    points: PointSets | None = None
    windows: npt.NDArray[np.uint64] | None = None
    side: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Candidates:
    """Pairs of rows that are worth comparing, ascending, each once.

    Attributes:
        pairs: shape (m, 2), rows `i < j`, unless they were turned.
        plain: shape (m,), whether the hashes and thumbnails of the samples are close.
        mirrored: shape (m,), whether those of one and of the mirror image of the other are.
        whole: shape (m,), whether those of the whole images are.
        points: shape (m,), whether the local features agree.
        mirrored_points: shape (m,), whether those of one and of the mirror image of the other do.
    """

    pairs: search.Pairs
    plain: npt.NDArray[np.bool_]
    mirrored: npt.NDArray[np.bool_]
    whole: npt.NDArray[np.bool_]
    points: npt.NDArray[np.bool_]
    mirrored_points: npt.NDArray[np.bool_]

    def among(self, chosen: npt.NDArray[np.bool_] | Rows) -> Candidates:
        """The chosen pairs only, in the order of their places if these are given."""
        return Candidates(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def turned(self, ranks: Rows) -> Candidates:
        """The pairs with the row of the lower rank first, ascending.

        Args:
            ranks: shape (n,), of each row.
        """
        swapped = ranks[self.pairs[:, 0]] > ranks[self.pairs[:, 1]]
        pairs = np.where(swapped[:, None], self.pairs[:, ::-1], self.pairs)
        return replace(self, pairs=pairs).among(np.lexsort((pairs[:, 1], pairs[:, 0])))


def find(
    signatures: Signatures,
    settings: DuplicatesSection,
    more: search.Pairs | None = None,
    *,
    strict: bool = False,
    votes: joins.EarlierVotes | None = None,
    shared: Shared | None = None,
) -> Candidates:
    """All candidates among some images.

    Args:
        signatures: of n images with different pixels.
        settings: the hash and its radius.
        more: pairs that another search found, shape (k, 2), or None.
        strict: leave out what is close to the limits, which a search among slightly changed images could miss.
        votes: what the search by local features found among some of the images, by the same settings; None if they
            have not been searched.
        shared: workers for the search by hashes; None to search in this process.
    """
    n = len(signatures.sample.phash)
    radius = settings.radius if strict else settings.wide_radius
    plain, mirrored, unlike = _close(signatures.sample, radius, shared)
    whole = np.empty((0, 2), dtype=np.int64)
    if signatures.whole is not None and signatures.cropped is not None:
        whole = signatures.cropped[_close(signatures.whole, radius, shared)[0]]
    voted = [np.empty((0, 2), dtype=np.int64)] * 2
    if signatures.points is not None:
        voted = _voted(signatures.points, _STRICT_VOTES if strict else _VOTES, votes)
    others = [np.empty((0, 2), dtype=np.int64) if more is None else np.sort(more, axis=1)]
    if settings.hash == "crop-resistant":
        others.append(unlike)
    if signatures.windows is not None:
        bits = _STRICT_WINDOW_RADIUS if strict else _WINDOW_RADIUS
        inside, _ = joins.window_pairs(signatures.sample.phash, signatures.windows, bits, shared)
        others.append(np.sort(inside, axis=1))
    # a pair is one integer, i * n + j
    codes = [pairs[:, 0] * n + pairs[:, 1] for pairs in (plain, mirrored, whole, *voted, np.concatenate(others))]
    every = np.unique(np.concatenate(codes))
    pairs = np.stack([every // max(1, n), every % max(1, n)], axis=1)
    flags = [np.isin(every, code) for code in codes[:5]]
    if signatures.side is not None:
        a, b = signatures.side[pairs[:, 0]], signatures.side[pairs[:, 1]]
        wanted = (a == 0) | (b == 0)
        pairs, flags = pairs[wanted], [flag[wanted] for flag in flags]
    return Candidates(pairs, *flags)


def _close(hashes: Hashes, radius: int, shared: Shared | None) -> tuple[search.Pairs, search.Pairs, search.Pairs]:
    """Pairs with close hashes, each of shape (m, 2): plain ones and mirrored ones with similar thumbnails, others."""
    given = hashes.other or ImageHashes.phashes(hashes.phash, hashes.phash_flip)
    found, mirrored = given.pairs(radius, flip=True, shared=shared)
    if not len(found):
        return found, found, found
    # only the thumbnails of images in a pair: `local` has the pairs as indices into them, shape (m, 2)
    involved, local = np.unique(found, return_inverse=True)
    images = thumbnails(hashes.thumbnails, involved)
    alike = search.same_thumbnail(images, local.reshape(-1, 2), LOOSE_MEAN, 255, mirrored)
    return found[alike & ~mirrored], found[alike & mirrored], found[~alike]


def _voted(points: PointSets, votes: int, earlier: joins.EarlierVotes | None) -> list[search.Pairs]:
    """Pairs of images with several similar local features in a similar arrangement, plain ones and mirrored ones.

    Returns:
        Each of shape (m, 2).
    """
    together = points.points
    image = np.repeat(np.arange(len(points)), np.diff(points.ends, prepend=0))
    pairs, mirrored = joins.vote_pairs(
        np.ascontiguousarray(together["code"]),
        image,
        np.ascontiguousarray(together["size"]),
        np.ascontiguousarray(together["angle"]),
        int(local_features.MIRRORED_BITS),
        votes=votes,
        earlier=earlier,
    )
    return [pairs[~mirrored], pairs[mirrored]]


class Stored(Protocol):
    """Thumbnails that are not in memory."""

    def read(self, rows: npt.NDArray[np.int64], /) -> npt.NDArray[np.uint8]:
        """The thumbnails of some rows, shape (len(rows), 768)."""


def thumbnails(
    values: Sequence[bytes] | pa.Array | pa.ChunkedArray | npt.NDArray[np.uint8] | Stored,
    chosen: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    """The chosen thumbnails, shape (len(chosen), 768).

    Args:
        values: bytes per row, an array of shape (n, 768), an Arrow column, which takes less memory, or what reads them.
        chosen: rows.
    """
    if isinstance(values, np.ndarray):
        return values[chosen]
    if not isinstance(values, (Sequence, pa.Array, pa.ChunkedArray)):
        return values.read(chosen)
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        picked = values.take(pa.array(chosen)).to_pylist()
    else:
        picked = [values[i] for i in chosen.tolist()]
    return np.frombuffer(b"".join(picked), dtype=np.uint8).reshape(-1, 3 * THUMBNAIL_SIDE**2)
