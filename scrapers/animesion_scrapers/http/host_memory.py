"""What is remembered of hosts from one run to the next: a small table on disk, one row a host.

Rows are written one at a time, so that neither time nor memory grows with the number of hosts. A process that is killed
loses nothing that it had written; a file that cannot be read says nothing and is begun anew. What rows mean is the
business of `limits` and `robots`.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path

_LAYOUT = """\
CREATE TABLE IF NOT EXISTS hosts (host TEXT PRIMARY KEY, until REAL NOT NULL, text TEXT NOT NULL) WITHOUT ROWID"""


class HostMemory:
    """Keeps a time and a text for each host. May be used by several threads."""

    def __init__(self, path: Path | None) -> None:
        """Open or make the file when it is first needed.

        Args:
            path: An SQLite file; None remembers nothing.
        """
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    @property
    def lasting(self) -> bool:
        """Whether anything is remembered at all."""
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
        """Write a host's row; a disk that is full or a folder that is gone is the ledger's to report."""
        if self._path is None:
            return
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._connect().execute("INSERT OR REPLACE INTO hosts VALUES (?, ?, ?)", (host, until, text))

    def close(self) -> None:
        """Close the file; it opens again when it is needed."""
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
                if isinstance(error, sqlite3.OperationalError):  # busy, or no such folder: not the file's fault
                    raise
                self._path.unlink(missing_ok=True)
                self._connection = _open(self._path)
        return self._connection


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")  # safe from kills; a power cut may cost a pause
        connection.execute(_LAYOUT)
        connection.execute("SELECT host, until, text FROM hosts LIMIT 1").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
