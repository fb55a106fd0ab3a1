"""The ledger of a crawl: one row an item in SQLite, and the bytes that have come in spool files beside it.

A small batch of what has come is appended to its spool with one write; then the rows that say where the bytes lie are
committed together. So a process that is killed loses at most what was in flight and the last batch. What to fetch is
left to `crawls`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from animesion_scrapers.crawl.spool import Spool
from animesion_scrapers.errors import LedgerError

PLANNED = "planned"
IN_FLIGHT = "in flight"
DONE = "done"
FAILED = "failed"
REFUSED = "refused"

STATES = (PLANNED, IN_FLIGHT, DONE, FAILED, REFUSED)
"""Known but not asked for; asked for; here, or handed over; may be asked for again; no use asking again."""

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    key TEXT PRIMARY KEY,
    request TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('planned', 'in flight', 'done', 'failed', 'refused')),
    attempts INTEGER NOT NULL,
    error TEXT NOT NULL,
    detail TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    digest TEXT NOT NULL,
    spool TEXT NOT NULL,
    offset INTEGER NOT NULL
) WITHOUT ROWID
"""
_BATCH_ROWS = 64
_BATCH_BYTES = 8 << 20
_BATCH_SECONDS = 0.05
_QUERY_KEYS = 500


class LedgerEntry(NamedTuple):
    """One item of a crawl, as the ledger's row has it.

    Attributes:
        key: The caller's name for it.
        request: What was asked for (URL and announced digests), so that a changed request starts anew.
        state: One of `STATES`.
        attempts: How often it was asked for, in all runs.
        error: Kind of the last failure, one of `faults.REASONS`; empty when there was none.
        detail: More about it, for people.
        bytes: Size of the content.
        digest: Digest of the content with its kind, such as `md5:0123...`.
        spool: Name of the spool file that holds the content; empty when none does.
        offset: Where the content begins in it.
    """

    key: str
    request: str
    state: str = PLANNED
    attempts: int = 0
    error: str = ""
    detail: str = ""
    bytes: int = 0
    digest: str = ""
    spool: str = ""
    offset: int = 0

    @property
    def here(self) -> bool:
        """Whether the content can be read from a spool."""
        return self.state == DONE and bool(self.spool)


class Ledger:
    """The ledger in a folder; one process at a time. Use it as a context manager, or call `close`."""

    def __init__(self, folder: Path) -> None:
        """Open or make it. Items that were in flight when an earlier process ended are planned again.

        Args:
            folder: Where `ledger.sqlite` and the spool files lie; made when missing.

        Raises:
            LedgerError: It is damaged, or was written by a later version.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._begun: dict[str, LedgerEntry] = {}
        self._ended: dict[str, LedgerEntry] = {}
        self._ended_bytes = 0
        self._committed = time.monotonic()
        self._fresh: set[str] = set()
        self._spools: dict[str, Spool] = {}
        # Used by one thread at a time: the caller's, or the event loop's while the caller waits for it.
        self._database = sqlite3.connect(folder / "ledger.sqlite", check_same_thread=False, isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            # A killed process loses nothing by this; after a power cut, digests tell which bytes are whole.
            self._database.execute("PRAGMA synchronous = NORMAL")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise LedgerError(f"The ledger in {folder} was written by a later version: use that one.")
            self._database.execute(_SCHEMA)
            self._database.execute(f"PRAGMA user_version = {_VERSION}")
            self._database.execute("UPDATE items SET state = 'planned' WHERE state = 'in flight'")
        except (sqlite3.DatabaseError, LedgerError) as error:
            self._database.close()
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(
                f"The ledger in {folder} cannot be read ({error}): remove that folder, and the crawl starts without it."
            ) from None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit and close."""
        try:
            self.commit()
        finally:
            self._database.close()
            for spool in self._spools.values():
                spool.close()
            self._spools.clear()

    # -- items ---------------------------------------------------------------------------------------------------

    def plan(self, requests: Mapping[str, str]) -> dict[str, LedgerEntry]:
        """Take items in; one that is known stays as it is, unless it is now asked for in another way.

        Args:
            requests: What is asked for, by key.

        Returns:
            Their entries.
        """
        entries = self.entries(requests)
        fresh = {
            key: LedgerEntry(key, request)
            for key, request in requests.items()
            if key not in entries or entries[key].request != request
        }
        with _transaction(self._database):
            self._write(fresh.values())
        return entries | fresh

    def entries(self, keys: Iterable[str]) -> dict[str, LedgerEntry]:
        """The entries of these items; those that are not known are left out."""
        self.commit()
        wanted = list(keys)
        found: dict[str, LedgerEntry] = {}
        for start in range(0, len(wanted), _QUERY_KEYS):
            some = wanted[start : start + _QUERY_KEYS]
            marks = ",".join("?" * len(some))
            rows = self._database.execute(f"SELECT * FROM items WHERE key IN ({marks})", some)
            found.update((row[0], LedgerEntry._make(row)) for row in rows)
        return found

    def counts(self) -> Counter[str]:
        """How many items are in each state."""
        self.commit()
        return Counter(dict(self._database.execute("SELECT state, count(*) FROM items GROUP BY state").fetchall()))

    def errors(self) -> list[tuple[str, str, str, int]]:
        """State, kind, detail and number of the items that failed or were refused, the most frequent first."""
        self.commit()
        return self._database.execute(
            "SELECT state, error, detail, count(*) FROM items WHERE state IN ('failed', 'refused') "
            "GROUP BY state, error, detail ORDER BY count(*) DESC, state, error, detail"
        ).fetchall()

    # -- what happens to them ------------------------------------------------------------------------------------

    def begin(self, entry: LedgerEntry) -> None:
        """Note that an item is asked for."""
        self._begun[entry.key] = LedgerEntry(
            entry.key, entry.request, IN_FLIGHT, entry.attempts, entry.error, entry.detail
        )

    def fail(self, entry: LedgerEntry, error: str, detail: str, *, final: bool, attempts: int) -> None:
        """Note that an item did not come; `attempts` more were made."""
        state = REFUSED if final else FAILED
        self._end(LedgerEntry(entry.key, entry.request, state, entry.attempts + attempts, error, detail))

    def keep(self, entry: LedgerEntry, spool: str, content: bytes, digest: str, *, attempts: int) -> None:
        """Note that an item came, and where in a spool its content lies; `attempts` more were made.

        The bytes are written with those of the items that follow, by the next commit at the latest.

        Args:
            entry: The item.
            spool: Name of the spool file, without folder or extension; made when missing.
            content: The bytes.
            digest: Their digest with its kind, such as `md5:0123...`.
            attempts: How often it was asked for.

        Raises:
            OSError: The disk is full. What there was room for is kept.
        """
        offset = self._spool(spool).append(content)
        size = len(content)
        self._fresh.add(entry.key)
        self._ended_bytes += size
        self._end(
            LedgerEntry(entry.key, entry.request, DONE, entry.attempts + attempts, "", "", size, digest, spool, offset)
        )

    def content(self, entry: LedgerEntry) -> bytes | None:
        """The content of an item that `entries` says is here; None when the spool does not hold the bytes that came.

        Bytes that an earlier process wrote are checked, as a power cut may have cost some of them.
        """
        try:
            content = self._spool(entry.spool).read(entry.offset, entry.bytes)
        except OSError:
            return None
        whole = len(content) == entry.bytes
        if whole and entry.key not in self._fresh:
            kind, _, due = entry.digest.partition(":")
            whole = hashlib.new(kind, content, usedforsecurity=False).hexdigest() == due
        if not whole:
            return None
        self._fresh.add(entry.key)
        return content

    def hand_over(self, keys: Iterable[str] | None = None) -> None:
        """Note that content is kept elsewhere now, and remove spools that nothing needs any more.

        Args:
            keys: Whose content; None for that of all items.
        """
        self.commit()
        with _transaction(self._database):
            if keys is None:
                self._database.execute("UPDATE items SET spool = '' WHERE spool != ''")
            else:
                self._database.executemany("UPDATE items SET spool = '' WHERE key = ?", ((key,) for key in keys))
        needed = {row[0] for row in self._database.execute("SELECT DISTINCT spool FROM items WHERE spool != ''")}
        for path in self._folder.glob("*.spool"):
            if path.stem not in needed:
                if path.stem in self._spools:
                    self._spools.pop(path.stem).close()
                path.unlink()

    def commit(self) -> None:
        """Write down what has happened since the last time.

        Raises:
            OSError: The disk is full. What there was room for is kept.
        """
        self._commit_ended()
        if self._begun:
            with _transaction(self._database):
                self._write(self._begun.values())
            self._begun.clear()

    # -- inside --------------------------------------------------------------------------------------------------

    def _end(self, entry: LedgerEntry) -> None:
        self._begun.pop(entry.key, None)  # most end before anyone could have seen that they had begun
        self._ended[entry.key] = entry
        if (
            len(self._ended) >= _BATCH_ROWS
            or self._ended_bytes >= _BATCH_BYTES
            or time.monotonic() - self._committed > _BATCH_SECONDS
        ):
            self._commit_ended()

    def _commit_ended(self) -> None:
        """The bytes first, then the rows that say where they lie."""
        full: OSError | None = None
        for name, spool in self._spools.items():
            try:
                spool.flush()
            except OSError as error:
                full = error
                lost = [e.key for e in self._ended.values() if e.spool == name and e.offset + e.bytes > spool.end]
                for key in lost:
                    del self._ended[key]
        if self._ended:
            with _transaction(self._database):
                self._write(self._ended.values())
            self._ended.clear()
        self._ended_bytes = 0
        self._committed = time.monotonic()
        if full:
            raise full

    def _write(self, entries: Iterable[LedgerEntry]) -> None:
        self._database.executemany("REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", entries)

    def _spool(self, name: str) -> Spool:
        spool = self._spools.get(name)
        if spool is None:
            spool = self._spools[name] = Spool(self._folder / f"{name}.spool")
        return spool


class _transaction:  # noqa: N801 (reads as a keyword)
    """All or nothing; `contextlib.contextmanager` would cost more than the transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN")

    def __exit__(self, kind: object, *exception: object) -> None:
        self._database.execute("ROLLBACK" if kind else "COMMIT")
