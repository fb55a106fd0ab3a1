"""Counts over listings of millions of files in little memory: a set of digests, and files by host."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class DigestSet:
    """A set of 64-bit digests in sorted arrays: 8 bytes per member, and up to 28 while the two largest arrays merge.

    With n members, the probability of any collision is about n * n / 3.7e19.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._runs: list[Digests] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, digests: Digests) -> Mask:
        """Add digests.

        Args:
            digests: Shape [n].

        Returns:
            Whether each is new, shape [n]; of equal digests only the first is.
        """
        fresh = np.zeros(len(digests), np.bool_)
        fresh[np.unique(digests, return_index=True)[1]] = True
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            fresh &= run[place] != digests
        if fresh.any():
            self._runs.append(np.sort(digests[fresh]))
        # each run stays at least twice as long as the next, so their number is logarithmic
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")
            self._runs.append(merged)
        return fresh


class HostCount(NamedTuple):
    """Requested files of one host.

    Attributes:
        host: Name of the host.
        files: Number of files.
        bytes: Sum of the announced sizes.
        unknown: Number of files without an announced size.
    """

    host: str
    files: int
    bytes: int
    unknown: int


class HostCounts:
    """Files and bytes by host, held in a dict: 200 bytes per host."""

    def __init__(self) -> None:
        """Start without hosts."""
        self._counts: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[HostCount]:
        return (HostCount(host, *counts) for host, counts in self._counts.items())

    def add(self, host: str, size: int) -> None:
        """Count one file of `size` bytes; 0 when unknown."""
        counts = self._counts.get(host)
        if counts is None:
            counts = self._counts[host] = [0, 0, 0]
        counts[0] += 1
        counts[1] += size
        counts[2] += not size

    def most_common(self, count: int) -> list[HostCount]:
        """The hosts with the most files, ties by name."""
        return heapq.nsmallest(count, self, key=lambda each: (-each.files, each.host))


def as_digests(numbers: Iterable[int]) -> Digests:
    """Integers in [0, 2**64) as an array for `DigestSet`."""
    return np.fromiter(numbers, np.uint64)
