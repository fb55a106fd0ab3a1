"""What the listing of URL tables counts, and the notes about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from animesion.sources import clean_text
from animesion.splits import SPLIT_NAMES

if TYPE_CHECKING:
    from animesion_scrapers.url_tables import UrlRow, UrlTables

_EXAMPLES = 5
"""Rows that a note lists; the raw tables have all of them."""


class UrlSummary:
    """Counts for the notes, with the first examples."""

    def __init__(self) -> None:
        self.usable = self.repeated = self.same_key = self.labelled = self.late = 0
        self._conflicts: list[str] = []
        self._faults: list[str] = []
        self._refused: list[str] = []
        self._counts: Counter[str] = Counter()

    def add_unreadable(self, row: UrlRow) -> str:
        """Count a row with a fault and return its place and fault."""
        where = f"{clean_text(row.file, 100)}, line {row.line}" if row.line else clean_text(row.file, 100)
        text = f"{where}: {clean_text(row.fault, 300)}"
        self._counts["unreadable"] += 1
        if len(self._faults) < _EXAMPLES:
            self._faults.append(text)
        return text

    def add_merged(self, url: str, labels: Sequence[str], splits: Sequence[str]) -> None:
        """Count a URL whose rows differ."""
        if len(labels) > 1:
            self._counts["conflicts"] += 1
            if len(self._conflicts) < _EXAMPLES:
                self._conflicts.append(f"{url[:200]} ({', '.join(labels[:_EXAMPLES])})")
        self._counts["splits"] += len(splits) > 1

    def add_item(self, row: UrlRow, labels: Sequence[str], refused: str) -> None:
        """Count a row with an item."""
        if refused:
            self._counts["refused"] += 1
            if len(self._refused) < _EXAMPLES:
                self._refused.append(f"{clean_text(row.file, 100)}, line {row.line}: {refused}")
        else:
            self.usable += 1
        self.labelled += bool(labels)
        self._counts["split"] += bool(row.split) and row.split.lower() not in SPLIT_NAMES
        self._counts.update(row.ignored)

    def first_fault(self) -> str:
        """The first fault in brackets, as the end of a sentence; empty if there is none."""
        first = next(iter([*self._faults, *self._refused]), "")
        hint = "; save the tables as UTF-8, or set source.encoding" if "not UTF-8" in first else ""
        return f" ({first}{hint})" if first else ""

    def sentences(self, tables: UrlTables, named: Collection[str]) -> list[str]:
        """The notes.

        Args:
            tables: The tables that were read.
            named: Meanings whose column is set in the options.
        """
        counts = self._counts
        notes = [_recognised(tables, named)]
        if tables.skipped_files:
            names = ", ".join(clean_text(name, 60) for name in tables.skipped_names)
            notes.append(f"{tables.skipped_files:,} other file(s) of the folder are skipped: {names}")
        for encoding, count in tables.encodings.items():
            notes.append(f"{count:,} table(s) are read as {encoding}, not UTF-8; source.encoding sets another encoding")
        if counts["unreadable"]:
            notes.append(
                f"{counts['unreadable']:,} row(s) cannot be read and count as bad records: {_some(self._faults)}"
            )
        if counts["refused"]:
            notes.append(f"{counts['refused']:,} URL(s) must not be fetched: {_some(self._refused)}")
        if self.repeated:
            notes.append(f"{self.repeated:,} row(s) repeat a URL and are skipped")
        if counts["conflicts"]:
            notes.append(f"{counts['conflicts']:,} URL(s) have several labels in their rows: {_some(self._conflicts)}")
        if counts["splits"]:
            notes.append(f"{counts['splits']:,} URL(s) are in several splits; the first counts")
        if self.late:
            notes.append(
                f"{self.late:,} new row(s) give a listed URL another label, group or split, which it does not get; "
                "build into another folder to count them"
            )
        if self.same_key:
            notes.append(f"{self.same_key:,} row(s) repeat a key with another URL and are skipped")
        if self.usable and not self.labelled:
            notes.append("no row has a label: set source.label_column to their column, or source.label to one label")
        if counts["split"]:
            notes.append(f"{counts['split']:,} row(s) have a split other than {', '.join(SPLIT_NAMES)}")
        for meaning, form in (
            ("md5", "32 hexadecimal digits"),
            ("sha1", "40 hexadecimal digits"),
            ("bytes", "a size"),
            ("box", "a box"),
            ("label", "text, a number, a date or a list of these"),
        ):
            if counts[meaning]:
                notes.append(f"{counts[meaning]:,} value(s) of the column for {meaning} are not {form} and are ignored")
        return [note for note in notes if note]


def _some(examples: Sequence[str]) -> str:
    return "; ".join(examples)


def _recognised(tables: UrlTables, named: Collection[str]) -> str:
    """The note about columns that were recognised by name."""
    if not tables.recognised:
        return ""
    most = max(tables.recognised, key=lambda mapping: tables.recognised[mapping])
    by_name = [f"{meaning} from '{clean_text(name, 60)}'" for meaning, name in most if meaning not in named]
    others = len(tables.recognised) - 1
    return (
        f"columns recognised by name: {', '.join(by_name)}{f'; {others} table(s) have other columns' * bool(others)}"
        if by_name
        else ""
    )
