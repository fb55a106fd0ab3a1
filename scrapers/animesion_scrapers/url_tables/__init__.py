"""Tables of URLs (CSV, TSV, lists, JSON, Parquet) read in batches.

A table may be larger than memory and come from an untrusted source. An unreadable row becomes a `UrlRow` with a fault,
an unreadable file ends with one, and memory holds at most one batch. Fetching is in `http.downloads` and `crawl`,
counting in `counts`.
"""

from __future__ import annotations

import codecs
import functools
import glob
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from animesion_scrapers.url_tables.encodings import WORKBOOKS
from animesion_scrapers.url_tables.parquet import read_parquet
from animesion_scrapers.url_tables.text import read_json, read_separated
from animesion_scrapers.url_tables.urls import LONGEST_URL, canonical, host_of, normalise, refusal_reason

__all__ = [
    "FORMATS",
    "LONGEST_URL",
    "RECOGNISED",
    "UrlColumns",
    "UrlRow",
    "UrlTables",
    "canonical",
    "host_of",
    "normalise",
    "refusal_reason",
]

FORMATS = ("csv", "tsv", "txt", "json", "jsonl", "parquet")
"""Supported formats; all but Parquet also as `.gz`. A `txt` is a list with one URL per line."""

_SUFFIXES = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".json": "json", ".txt": "txt",
}  # fmt: skip

_COMMON = ("json", "txt")
"""Formats whose suffixes many other files have; in a folder they count only if it contains no other tables."""

_READERS: Mapping[str, Callable[[Path, ColumnMapping], Iterator[list[UrlRow]]]] = {
    "csv": functools.partial(read_separated, ","),
    "tsv": functools.partial(read_separated, "\t"),
    "txt": functools.partial(read_separated, ""),
    "json": read_json,
    "jsonl": read_json,
    "parquet": read_parquet,
}


class UrlTables:
    """One or more tables, read in the order of their names.

    Attributes:
        files: The tables.
        skipped_files: Number of other files in the same folder.
        skipped_names: Names of the first five of them.
        encodings: Encoding and number of text tables read so far that are neither UTF-8 nor UTF-16.
        recognised: Meaning and name of the columns of the tables read so far, with the number of tables that have them;
            at most 256 such mappings.
    """

    def __init__(
        self, path: str | Path, columns: UrlColumns | None = None, table_format: str = "", encoding: str = ""
    ) -> None:
        """Find the tables without reading them.

        Args:
            path: A table, a folder of tables (subfolders are ignored), or a pattern such as `urls/part-*.parquet`.
            columns: Names of the columns.
            table_format: One of `FORMATS`; by default it follows from the file name.
            encoding: Encoding of text tables without a byte order mark; empty to recognise it.

        Raises:
            ScraperError: No table was found, or its format or encoding is unknown.
        """
        if table_format and table_format not in FORMATS:
            raise ScraperError(f"There is no table format {table_format!r}: use one of {', '.join(FORMATS)}.")
        try:
            self._encoding = codecs.lookup(encoding).name if encoding else ""
        except LookupError:
            raise ScraperError(f"There is no encoding {encoding!r}: use one such as cp932 or cp1252.") from None
        self._columns = columns or UrlColumns()
        self._format = table_format
        self.files, skipped = self._find(str(path))
        self.skipped_files = len(skipped)
        self.skipped_names = skipped[:5]
        self.recognised: dict[tuple[tuple[str, str], ...], int] = {}
        self.encodings: Counter[str] = Counter()

    def batches(self, *only: str) -> Iterator[list[UrlRow]]:
        """Yield the rows of all tables in batches of a few thousand.

        Args:
            only: Meanings of the columns to read, such as `url` and `label`; none for all.
        """
        for file in self.files:
            batch: list[UrlRow] = []
            try:
                for rows in _READERS[self.format_of(file)](file, self._mapping(file.name, only)):
                    batch += rows
                    if len(batch) >= BATCH_ROWS:
                        yield batch
                        batch = []
            except UnreadableError as error:
                batch.append(UrlRow(file.name, error.line, str(error)))
            if batch:
                yield batch

    def _find(self, text: str) -> tuple[list[Path], list[str]]:
        """The tables, and the names of other files next to them."""
        path = Path(text).expanduser()
        skipped: list[str] = []
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
            tables = [file for file in files if self.format_of(file)]
            if not tables:
                raise ScraperError(f"The folder {path} contains no table ({', '.join(_SUFFIXES)}; text also .gz).")
            found = [file for file in tables if self._format or self.format_of(file) not in _COMMON] or tables
            skipped = sorted(file.name for file in set(files) - set(found))
        elif path.is_file():
            found = [path]
        elif path.exists():
            raise ScraperError(f"The path {path} is neither a file nor a folder.")
        else:
            found = [Path(name) for name in glob.glob(str(path)) if Path(name).is_file()]
            if not found:
                raise ScraperError(f"No file or folder matches {path}.")
        for file in found:
            if file.suffix.lower() in WORKBOOKS:
                raise ScraperError(f"{file.name} is a workbook: save its sheet as CSV (UTF-8) and give that.")
            if not self.format_of(file):
                raise ScraperError(
                    f"The format of {file.name} is unknown: rename it to end in {', '.join(_SUFFIXES)}, "
                    f"or set the format to one of {', '.join(FORMATS)}."
                )
        return sorted(found, key=lambda file: file.as_posix().encode("utf-8", "surrogateescape")), skipped

    def format_of(self, file: Path) -> str:
        """The format of a file by its name, unless one was set; empty if it is unknown."""
        return self._format or _SUFFIXES.get(Path(file.name.removesuffix(".gz")).suffix.lower(), "")

    def _mapping(self, file: str, only: Sequence[str]) -> ColumnMapping:
        return ColumnMapping(
            file,
            asdict(self._columns),
            self._count_mapping if not only else lambda found: None,
            encoding=self._encoding,
            report_encoding=self._count_encoding if not only else lambda encoding: None,
            only=frozenset(only),
        )

    def _count_encoding(self, encoding: str) -> None:
        self.encodings[encoding] += 1

    def _count_mapping(self, found: Mapping[str, str]) -> None:
        mapping = tuple(found.items())
        if mapping in self.recognised or len(self.recognised) < MOST_MAPPINGS:
            self.recognised[mapping] = self.recognised.get(mapping, 0) + 1
