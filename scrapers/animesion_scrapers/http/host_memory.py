"""State of hosts that outlives a run: a small SQLite table with one row per host.

Rows are written one at a time, so that neither time nor memory grows with the number of hosts. Written rows survive a
kill; an unreadable file is replaced by an empty one. `limits` and `robots` define what the rows mean.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path

_LAYOUT = """\
CREATE TABLE IF NOT EXISTS hosts (host TEXT PRIMARY KEY, until REAL NOT NULL, text TEXT NOT NULL) WITHOUT ROWID"""


class HostMemory:
    """Stores a time and a text per host; thread-safe."""

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
        """Time and text of a host, or None."""
        if self._path is None or (self._connection is None and not self._path.is_file()):
            return None
        with self._lock, contextlib.suppress(sqlite3.Error, ValueError):
            row = self._connect().execute("SELECT until, text FROM hosts WHERE host = ?", (host,)).fetchone()
            return (float(row[0]), str(row[1])) if row else None
        return None

    def keep(self, host: str, until: float, text: str = "") -> None:
        """Write a host's row; a full disk or a missing folder is ignored here, as the ledger reports it."""
        if self._path is None:
            return
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._connect().execute("INSERT OR REPLACE INTO hosts VALUES (?, ?, ?)", (host, until, text))

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
        connection.execute("SELECT host, until, text FROM hosts LIMIT 1").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
