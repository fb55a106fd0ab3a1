"""The ledger of a crawl: one row per item in SQLite, and the downloaded bytes in spool files next to it.

Bytes are appended to a spool in small batches with one write each, and the rows with their offsets are committed
afterwards. A killed process therefore loses at most the items in flight and the last batch. Requests are made in
`crawler`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from animesion_scrapers.crawl.spool import Spool
from animesion_scrapers.errors import LedgerError

PLANNED = "planned"
IN_FLIGHT = "in flight"
DONE = "done"
FAILED = "failed"
REFUSED = "refused"

STATES = (PLANNED, IN_FLIGHT, DONE, FAILED, REFUSED)
"""Not requested yet; requested; downloaded or stored elsewhere; failed but worth a retry; failed permanently."""

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

_SMALL = 1 << 20
"""Free bytes of a disk below which an error of reading or writing is that of a full disk."""


class LedgerEntry(NamedTuple):
    """One item of a crawl: a row of the ledger.

    Attributes:
        key: The caller's name for it.
        request: URL, expected digests and size; an item whose request changed is planned again.
        state: One of `STATES`.
        attempts: Number of requests over all runs.
        error: Kind of the last failure, one of `faults.REASONS`; empty if there was none.
        detail: Description of that failure.
        bytes: Size of the content.
        digest: Digest of the content with its kind, such as `md5:0123...`.
        spool: Name of the spool file with the content; empty if there is none.
        offset: Start of the content in the spool, in bytes.
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
    """The ledger in a folder, for one process at a time. Use it as a context manager, or call `close`."""

    def __init__(self, folder: Path) -> None:
        """Open or create it. Items that an earlier process left in flight are planned again.

        Args:
            folder: Folder of `ledger.sqlite` and the spool files; created if missing.

        Raises:
            LedgerError: It is damaged, or was written by a later version.
            OSError: The disk is full or fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._started: dict[str, LedgerEntry] = {}
        self._ended: dict[str, LedgerEntry] = {}
        self._ended_bytes = 0
        self._committed = time.monotonic()
        self._fresh: set[str] = set()
        self._spools: dict[str, Spool] = {}
        # Used by one thread at a time: the caller's, or the event loop's while the caller waits for it.
        self._database = sqlite3.connect(
            folder / "ledger.sqlite", check_same_thread=False, isolation_level=None, factory=_Database
        )
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            # Safe against kills; after a power cut, digests show which spooled bytes are intact.
            self._database.execute("PRAGMA synchronous = NORMAL")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise LedgerError(f"The ledger in {folder} was written by a later version: use that version.")
            self._database.execute(_SCHEMA)
            self._database.execute(f"PRAGMA user_version = {_VERSION}")
            self._database.execute("UPDATE items SET state = 'planned' WHERE state = 'in flight'")
        except (sqlite3.DatabaseError, LedgerError, OSError) as error:
            self._database.close()
            if not isinstance(error, sqlite3.DatabaseError):
                raise
            raise LedgerError(
                f"The ledger in {folder} cannot be read ({error}): remove that folder to start the crawl again."
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
        """Add items; a known item is unchanged unless its request has changed.

        Args:
            requests: Requests by key.

        Returns:
            Entries by key.
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
        """Entries by key, without unknown items."""
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
        """Number of items by state."""
        self.commit()
        return Counter(dict(self._database.execute("SELECT state, count(*) FROM items GROUP BY state").fetchall()))

    def errors(self) -> list[tuple[str, str, str, int]]:
        """State, kind, detail and number of items that failed or were refused, most frequent first."""
        self.commit()
        return self._database.execute(
            "SELECT state, error, detail, count(*) FROM items WHERE state IN ('failed', 'refused') "
            "GROUP BY state, error, detail ORDER BY count(*) DESC, state, error, detail"
        ).fetchall()

    # -- changes of state ----------------------------------------------------------------------------------------

    def begin(self, entry: LedgerEntry) -> None:
        """Record that an item is requested."""
        self._started[entry.key] = LedgerEntry(
            entry.key, entry.request, IN_FLIGHT, entry.attempts, entry.error, entry.detail
        )

    def fail(self, entry: LedgerEntry, error: str, detail: str, *, final: bool, attempts: int) -> None:
        """Record a failed item, after `attempts` more requests."""
        state = REFUSED if final else FAILED
        self._end(LedgerEntry(entry.key, entry.request, state, entry.attempts + attempts, error, detail))

    def keep(self, entry: LedgerEntry, spool: str, content: bytes, digest: str, *, attempts: int) -> None:
        """Record a downloaded item and append its content to a spool.

        The bytes are written in batches, at the latest with the next commit.

        Args:
            entry: The item.
            spool: Name of the spool file, without folder or extension; created if missing.
            content: The bytes.
            digest: Their digest with its kind, such as `md5:0123...`.
            attempts: Number of further requests.

        Raises:
            OSError: The disk is full. Bytes written before that are kept.
        """
        offset = self._spool(spool).append(content)
        size = len(content)
        self._fresh.add(entry.key)
        self._ended_bytes += size
        self._end(
            LedgerEntry(entry.key, entry.request, DONE, entry.attempts + attempts, "", "", size, digest, spool, offset)
        )

    def content(self, entry: LedgerEntry) -> bytes | None:
        """The content of an item in a spool; None if the bytes there are missing or damaged.

        Bytes written by an earlier process are checked against their digest, as a power cut may have lost some.
        """
        try:
            content = self._spool(entry.spool).read(entry.offset, entry.bytes)
        except OSError:
            return None
        whole = len(content) == entry.bytes
        if whole and entry.key not in self._fresh:
            kind, _, expected = entry.digest.partition(":")
            whole = hashlib.new(kind, content, usedforsecurity=False).hexdigest() == expected
        if not whole:
            return None
        self._fresh.add(entry.key)
        return content

    def hand_over(self, keys: Iterable[str] | None = None) -> None:
        """Record that content is stored elsewhere, and remove spools without other content.

        Args:
            keys: Keys of the items; None for all items.
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
        """Write all changes since the last commit.

        Raises:
            OSError: The disk is full. Bytes written before that are kept.
        """
        self._commit_ended()
        if self._started:
            with _transaction(self._database):
                self._write(self._started.values())
            self._started.clear()

    # -- inside --------------------------------------------------------------------------------------------------

    def _end(self, entry: LedgerEntry) -> None:
        self._started.pop(entry.key, None)  # most end before the next commit: their start need not be written
        self._ended[entry.key] = entry
        if (
            len(self._ended) >= _BATCH_ROWS
            or self._ended_bytes >= _BATCH_BYTES
            or time.monotonic() - self._committed > _BATCH_SECONDS
        ):
            self._commit_ended()

    def _commit_ended(self) -> None:
        """Write the bytes first, then the rows with their offsets."""
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


class _Database(sqlite3.Connection):
    """A connection whose errors of a full or failing disk are those of files, as of the spools."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self._file = path

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            raise self._fault(error) from None

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().executemany(*arguments)
        except sqlite3.OperationalError as error:
            raise self._fault(error) from None

    def _fault(self, error: sqlite3.OperationalError) -> Exception:
        code = error.sqlite_errorcode & 0xFF  # without the detail, such as IOERR_SHMSIZE on a full disk
        if code not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            return error
        if code == sqlite3.SQLITE_READONLY:
            number = errno.EROFS
        elif code == sqlite3.SQLITE_FULL or shutil.disk_usage(self._file.parent).free < _SMALL:
            number = errno.ENOSPC
        else:
            number = errno.EIO
        return OSError(number, os.strerror(number), str(self._file))


class _transaction:  # noqa: N801 (reads as a keyword)
    """A transaction as a context manager; `contextlib.contextmanager` would cost more than the transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN")

    def __exit__(self, kind: object, *exception: object) -> None:
        if not kind:
            self._database.execute("COMMIT")
        elif self._database.in_transaction:  # SQLite ends it itself when the disk is full
            self._database.execute("ROLLBACK")
