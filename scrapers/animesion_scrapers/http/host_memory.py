"""State of hosts that outlives a run: a small SQLite table with one row per host.

Rows are written one at a time, so that neither time nor memory grows with the number of hosts. Written rows survive a
kill; an unreadable file is replaced by an empty one. `limits` and `robots` define what the rows mean.

Only what is on disk follows the clock of the machine, which may be set at any time. A row also has the time at which it
was written, so that a clock that was set back prolongs no row beyond its length; one that was set ahead ends it early.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path

_LAYOUT = """\
CREATE TABLE IF NOT EXISTS rows (host TEXT PRIMARY KEY, since REAL NOT NULL, seconds REAL NOT NULL, text TEXT NOT NULL)
WITHOUT ROWID"""


class HostMemory:
    """Stores a text per host for some time; thread-safe."""

    def __init__(self, path: Path | None) -> None:
        """Open or create the file when first needed.

        Args:
            path: An SQLite file; None stores nothing.
        """
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    @property
    def lasting(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def recall(self, host: str) -> tuple[float, str] | None:
        """The seconds that are left of a host's row, and its text; None if there are none."""
        if self._path is None or (self._connection is None and not self._path.is_file()):
            return None
        with self._lock, contextlib.suppress(sqlite3.Error, ValueError):
            row = self._connect().execute("SELECT since, seconds, text FROM rows WHERE host = ?", (host,)).fetchone()
            passed = max(0.0, time.time() - float(row[0])) if row else 0.0
            return (float(row[1]) - passed, str(row[2])) if row and row[1] > passed else None
        return None

    def keep(self, host: str, seconds: float, text: str = "") -> None:
        """Write a host's row, which lasts for `seconds`.

        A full disk or a missing folder is ignored here, as the ledger reports it.
        """
        if self._path is None:
            return
        with self._lock, contextlib.suppress(sqlite3.Error):
            row = (host, time.time(), seconds, text)
            self._connect().execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", row)

    def close(self) -> None:
        """Close the file; it opens again when needed."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            assert self._path is not None
            try:
                self._connection = _open(self._path)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # busy, or no such folder: the file is not damaged
                    raise
                self._path.unlink(missing_ok=True)
                self._connection = _open(self._path)
        return self._connection


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")  # safe against kills; a power cut may lose a pause
        connection.execute(_LAYOUT)
        connection.execute("SELECT host, since, seconds, text FROM rows LIMIT 1").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
