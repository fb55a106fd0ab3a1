"""Tables of URLs (CSV, TSV, JSON lines, Parquet) read in batches.

A table may be larger than memory and come from an untrusted source. An unreadable row becomes a `UrlRow` with a fault,
an unreadable file ends with one, and memory holds at most one batch. Fetching is in `http.downloads` and `crawl`,
counting in `counts`.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from animesion_scrapers.errors import ScraperError
from animesion_scrapers.url_tables.columns import (
    BATCH_ROWS,
    MOST_MAPPINGS,
    RECOGNISED,
    ColumnMapping,
    UnreadableError,
    UrlColumns,
    UrlRow,
)
from animesion_scrapers.url_tables.parquet import read_parquet
from animesion_scrapers.url_tables.text import read_json_lines, read_separated
from animesion_scrapers.url_tables.urls import LONGEST_URL, host_of, normalise, refusal_reason

__all__ = [
    "FORMATS",
    "LONGEST_URL",
    "RECOGNISED",
    "UrlColumns",
    "UrlRow",
    "UrlTables",
    "host_of",
    "normalise",
    "refusal_reason",
]

FORMATS = ("csv", "tsv", "jsonl", "parquet")
"""Supported formats; all but Parquet also as `.gz`."""

_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

_READERS: Mapping[str, Callable[[Path, ColumnMapping], Iterator[list[UrlRow]]]] = {
    "csv": functools.partial(read_separated, ","),
    "tsv": functools.partial(read_separated, "\t"),
    "jsonl": read_json_lines,
    "parquet": read_parquet,
}


class UrlTables:
    """One or more tables, read in the order of their names.

    Attributes:
        files: The tables.
        skipped_files: Number of other files in the same folder.
        recognised: Meaning and name of the columns of the tables read so far, with the number of tables that have them;
            at most 256 such mappings.
    """

    def __init__(self, path: str | Path, columns: UrlColumns | None = None, table_format: str = "") -> None:
        """Find the tables without reading them.

        Args:
            path: A table, a folder of tables (subfolders are ignored), or a pattern such as `urls/part-*.parquet`.
            columns: Names of the columns.
            table_format: One of `FORMATS`; by default it follows from the file name.

        Raises:
            ScraperError: No table was found, or its format is unknown.
        """
        if table_format and table_format not in FORMATS:
            raise ScraperError(f"There is no table format {table_format!r}: use one of {', '.join(FORMATS)}.")
        self._columns = columns or UrlColumns()
        self._format = table_format
        self.files, self.skipped_files = self._find(str(path))
        self.recognised: dict[tuple[tuple[str, str], ...], int] = {}

    def batches(self) -> Iterator[list[UrlRow]]:
        """Yield the rows of all tables in batches of a few thousand."""
        for file in self.files:
            batch: list[UrlRow] = []
            try:
                for rows in _READERS[self._format_of(file)](file, self._mapping(file.name)):
                    batch += rows
                    if len(batch) >= BATCH_ROWS:
                        yield batch
                        batch = []
            except UnreadableError as error:
                batch.append(UrlRow(file.name, error.line, str(error)))
            if batch:
                yield batch

    def _find(self, text: str) -> tuple[list[Path], int]:
        """The tables, and the number of other files next to them."""
        path = Path(text).expanduser()
        skipped = 0
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
            found = [file for file in files if self._format_of(file)]
            skipped = len(files) - len(found)
            if not found:
                raise ScraperError(f"The folder {path} contains no table ({', '.join(_SUFFIXES)}; text also .gz).")
        elif path.is_file():
            found = [path]
        elif path.exists():
            raise ScraperError(f"The path {path} is neither a file nor a folder.")
        else:
            found = [Path(name) for name in glob.glob(str(path)) if Path(name).is_file()]
            if not found:
                raise ScraperError(f"No file or folder matches {path}.")
        for file in found:
            if not self._format_of(file):
                raise ScraperError(
                    f"The format of {file.name} is unknown: rename it to end in {', '.join(_SUFFIXES)}, "
                    f"or set the format to one of {', '.join(FORMATS)}."
                )
        return sorted(found, key=lambda file: file.as_posix().encode("utf-8", "surrogateescape")), skipped

    def _format_of(self, file: Path) -> str:
        return self._format or _SUFFIXES.get(Path(file.name.removesuffix(".gz")).suffix.lower(), "")

    def _mapping(self, file: str) -> ColumnMapping:
        return ColumnMapping(file, asdict(self._columns), self._count_mapping)

    def _count_mapping(self, found: Mapping[str, str]) -> None:
        mapping = tuple(found.items())
        if mapping in self.recognised or len(self.recognised) < MOST_MAPPINGS:
            self.recognised[mapping] = self.recognised.get(mapping, 0) + 1
