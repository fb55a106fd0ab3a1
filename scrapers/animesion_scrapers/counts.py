"""Keeping count of millions in little memory: which digests came before, how much is wanted of which host.

What is counted is the caller's business; nothing here reads tables or asks hosts.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from animesion_scrapers.errors import ScraperError

Digests = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

_HELD_HOSTS = 50_000
"""Hosts that are counted in memory."""


class DigestSet:
    """A set of 64-bit digests in sorted arrays: 8 bytes a member, up to 28 for a moment when the two largest merge.

    With n members, the chance that any two different things share a digest is about n * n / 3.7e19.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._runs: list[Digests] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, digests: Digests) -> Mask:
        """Take in digests; tells of each whether it is new, the first time that it comes."""
        fresh = np.zeros(len(digests), np.bool_)
        fresh[np.unique(digests, return_index=True)[1]] = True
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            fresh &= run[place] != digests
        if fresh.any():
            self._runs.append(np.sort(digests[fresh]))
        # each run is at least twice as long as the next, so there are few
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")
            self._runs.append(merged)
        return fresh


class HostCount(NamedTuple):
    """What is wanted of one host.

    Attributes:
        host: Its name.
        files: How many files.
        bytes: Their bytes, as far as announced.
        unknown: Files whose size is not announced.
    """

    host: str
    files: int
    bytes: int
    unknown: int


class HostCounts:
    """Files and bytes by host, exact for any number of hosts: what is beyond 50,000 hosts lies in a temporary file."""

    def __init__(self) -> None:
        """Begin with no host; call `close` at the end, or use it as a context manager."""
        self._held: dict[str, list[int]] = {}
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> HostCounts:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def add(self, host: str, size: int) -> None:
        """Count a file of so many bytes, 0 when unknown.

        Raises:
            ScraperError: There is no room for the temporary file.
        """
        held = self._held.get(host)
        if held is None:
            if len(self._held) >= _HELD_HOSTS:
                self._spill()
            held = self._held[host] = [0, 0, 0]
        held[0] += 1
        held[1] += size
        held[2] += not size

    def most_asked(self, count: int) -> list[HostCount]:
        """The hosts with most files, then by name."""
        if self._database is None:
            return sorted(self._counts(), key=lambda each: (-each.files, each.host))[:count]
        self._spill()
        rows = self._database.execute("SELECT * FROM hosts ORDER BY files DESC, host LIMIT ?", (count,))
        return [HostCount(*row) for row in rows]

    def batches(self, size: int = 10_000) -> Iterator[list[HostCount]]:
        """All hosts, so many at a time."""
        if self._database is None:
            counts = self._counts()
            yield from (counts[start : start + size] for start in range(0, len(counts), size))
            return
        self._spill()
        cursor = self._database.execute("SELECT * FROM hosts")
        while rows := cursor.fetchmany(size):
            yield [HostCount(*row) for row in rows]

    def _counts(self) -> list[HostCount]:
        return [HostCount(host, *held) for host, held in self._held.items()]

    def _spill(self) -> None:
        try:
            if self._database is None:
                self._database = sqlite3.connect("", isolation_level=None)  # removed when it is closed
                self._database.execute("PRAGMA journal_mode = OFF")
                self._database.execute("PRAGMA cache_size = -16000")
                self._database.execute(
                    "CREATE TABLE hosts (host TEXT PRIMARY KEY, files INTEGER, bytes INTEGER, unknown INTEGER) "
                    "WITHOUT ROWID"
                )
            self._database.execute("BEGIN")
            self._database.executemany(
                "INSERT INTO hosts VALUES (?, ?, ?, ?) ON CONFLICT (host) DO UPDATE SET files = files + "
                "excluded.files, bytes = bytes + excluded.bytes, unknown = unknown + excluded.unknown",
                sorted((host, *held) for host, held in self._held.items()),
            )
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise ScraperError(f"The temporary count of hosts cannot be written ({error}): set TMPDIR.") from None
        self._held.clear()


def as_digests(numbers: Iterable[int]) -> Digests:
    """Whole numbers below 2 to the power of 64 as an array for `DigestSet`."""
    return np.fromiter(numbers, np.uint64)
