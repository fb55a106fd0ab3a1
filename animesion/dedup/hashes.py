"""Perceptual hashes of many images, by any algorithm, and the pairs of images whose hashes are close.

A pHash is one word of 64 bits, which `animesion.dedup.search` finds pairs of. Other hashes are wider (PDQ, 256 bits) or
several per image (crop-resistant, one per segment): they are searched word by word, by the same search.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from animesion.config.recipe import HASHES
from animesion.dedup import search
from animesion.dedup.search import HashArray, Pairs
from animesion.executors.shared import Shared
from animesion.images.other_hashes import MOST_SEGMENTS, WIDTHS

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Words:
    """The hashes of n images.

    Attributes:
        words: shape (m, w), w words of 64 bits per hash, first bit highest.
        starts: shape (n + 1,), the hashes of image i are the rows `starts[i]` to `starts[i + 1]`.
    """

    words: HashArray
    starts: Rows

    @classmethod
    def single(cls, hashes: HashArray) -> Self:
        """One hash of 64 bits per image, shape (n,)."""
        return cls(hashes[:, None], np.arange(len(hashes) + 1))

    @classmethod
    def of_bytes(cls, values: Sequence[bytes], width: int) -> Self:
        """Hashes as `animesion.images.other_hashes.compute` returns them, `width` bytes each."""
        words = np.frombuffer(b"".join(values), dtype=">u8").astype(np.uint64).reshape(-1, width // 8)
        return cls(words, np.cumsum([0, *(len(value) // width for value in values)]))

    @functools.cached_property
    def is_single(self) -> bool:
        """Whether each image has one hash."""
        return np.array_equal(self.starts, np.arange(len(self.words) + 1))

    def take(self, rows: Rows) -> Self:
        """The hashes of some images, in that order."""
        if self.is_single:
            return type(self)(self.words[rows], np.arange(len(rows) + 1))
        counts = self.starts[rows + 1] - self.starts[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        # the first row of each image, and the place of each hash within its image
        at = np.repeat(self.starts[rows] - starts[:-1], counts) + np.arange(starts[-1])
        return type(self)(self.words[at], starts)

    def owners(self) -> Rows:
        """The image of each hash, shape (m,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def __add__(self, other: Self) -> Self:
        starts = np.concatenate([self.starts, other.starts[1:] + len(self.words)])
        return type(self)(np.concatenate([self.words, other.words]), starts)

    def distances(self, first: Rows, other: Words, second: Rows) -> Rows:
        """Differing bits of image `first[k]` of these and image `second[k]` of the other; of their closest hashes."""
        if self.is_single and other.is_single:
            gaps = np.bitwise_count(self.words[first] ^ other.words[second])
            bits: Rows = gaps.sum(axis=1, dtype=np.int64)
            return bits
        found = []
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            ours = self.words[self.starts[a] : self.starts[a + 1], None]
            theirs = other.words[None, other.starts[b] : other.starts[b + 1]]
            found.append(np.bitwise_count(ours ^ theirs).sum(axis=2, dtype=np.int64).min())
        return np.array(found, dtype=np.int64)


@dataclass(frozen=True)
class ImageHashes:
    """The hashes of n images and of their mirror images, by one algorithm.

    Two images are as close as their closest hashes: by `crop-resistant`, one segment of each is enough, as in
    `imagehash.ImageMultiHash.matches`.

    Attributes:
        plain: hashes of the images.
        flipped: hashes of the mirror images.
        kind: the algorithm, a value of `duplicates.hash`.
    """

    plain: Words
    flipped: Words
    kind: str = "phash"

    @classmethod
    def phashes(cls, phash: HashArray, phash_flip: HashArray) -> Self:
        """pHashes, each of shape (n,)."""
        return cls(Words.single(phash), Words.single(phash_flip))

    @classmethod
    def of_kind(cls, kind: str, plain: Sequence[bytes], flipped: Sequence[bytes]) -> Self:
        """Hashes as `animesion.images.other_hashes.compute` returns them."""
        width = WIDTHS[kind]
        return cls(Words.of_bytes(plain, width), Words.of_bytes(flipped, width), kind)

    def take(self, rows: Rows) -> Self:
        """The hashes of some images, in that order."""
        return type(self)(self.plain.take(rows), self.flipped.take(rows), self.kind)

    def __add__(self, other: Self) -> Self:
        if self.kind != other.kind:
            raise ValueError(f"hashes by {self.kind} and by {other.kind} cannot be compared")
        return type(self)(self.plain + other.plain, self.flipped + other.flipped, self.kind)

    def pairs(self, radius: int, *, flip: bool, shared: Shared | None = None) -> tuple[Pairs, npt.NDArray[np.bool_]]:
        """Pairs of images whose hashes differ in at most `radius` bits; crowds as in `search.candidate_pairs`.

        Args:
            radius: at least 0.
            flip: also pair images with mirror images.
            shared: workers; None to search in this process.

        Returns:
            Pairs, shape (m, 2), rows `i < j`, and whether each is a mirrored one, shape (m,). A pair that is close both
            ways occurs twice.

        Raises:
            UsageError: there are too many images for this algorithm.
        """
        HASHES[self.kind].check(len(self.plain.starts) - 1)
        if self.plain.words.shape[1] == 1 and self.plain.is_single:
            hashes, flipped = self.plain.words[:, 0], self.flipped.words[:, 0]
            return search.found_pairs(hashes, flipped if flip else None, radius, shared)
        owners = self.plain.owners()
        plain = _of_images(owners[_close(self.plain.words, radius, shared)])
        if not flip:
            return plain, np.zeros(len(plain), dtype=np.bool_)
        both, m = self.plain + self.flipped, len(owners)
        rows = _close(both.words, radius, shared)
        rows = rows[(rows[:, 0] < m) & (rows[:, 1] >= m)]
        crossed = _of_images(np.stack([owners[rows[:, 0]], self.flipped.owners()[rows[:, 1] - m]], axis=1))
        return np.concatenate([plain, crossed]), np.arange(len(plain) + len(crossed)) >= len(plain)

    def distances(self, pairs: Pairs, mirrored: npt.NDArray[np.bool_]) -> Rows:
        """Differing bits of each pair; for mirrored pairs, between one image and the mirror image of the other.

        Args:
            pairs: shape (m, 2).
            mirrored: shape (m,).

        Returns:
            Shape (m,).
        """
        a, b = pairs[:, 0], pairs[:, 1]
        found = np.empty(len(pairs), dtype=np.int64)
        upright = ~mirrored
        found[upright] = self.plain.distances(a[upright], self.plain, b[upright])
        a, b = a[mirrored], b[mirrored]
        # a hash of the mirror image is no mirrored hash, so the two directions can differ: the smaller one counts
        ways = self.plain.distances(a, self.flipped, b), self.flipped.distances(a, self.plain, b)
        found[mirrored] = np.minimum(*ways)
        return found


def are_valid(kind: str, values: Sequence[bytes | None]) -> bool:
    """Whether all values have the length of hashes of a kind."""
    width = WIDTHS[kind]
    most = MOST_SEGMENTS * width if kind == "crop-resistant" else width
    return all(value is not None and 0 < len(value) <= most and not len(value) % width for value in values)


def _close(words: HashArray, radius: int, shared: Shared | None) -> Pairs:
    """Pairs of rows within a radius, of hashes of shape (m, w): one of the words differs in at most radius / w bits."""
    width = words.shape[1]
    columns = (np.ascontiguousarray(words[:, at]) for at in range(width))
    found = [search.candidate_pairs(column, radius // width, shared) for column in columns]
    pairs = found[0] if width == 1 else np.unique(np.concatenate(found), axis=0)
    gaps = np.bitwise_count(words[pairs[:, 0]] ^ words[pairs[:, 1]]).sum(axis=1, dtype=np.int64)
    close: Pairs = pairs[gaps <= radius]
    return close


def _of_images(pairs: Pairs) -> Pairs:
    """Pairs of images `i < j`, each once, from the images of pairs of hashes."""
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    return np.unique(pairs, axis=0).astype(np.int64).reshape(-1, 2)
