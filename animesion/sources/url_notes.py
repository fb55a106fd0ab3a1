"""What the listing of URL tables counts, and the notes about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from animesion.sources import clean_text
from animesion.splits import SPLIT_NAMES
from animesion.wording import amount

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
            notes.append(f"{amount(tables.skipped_files, 'other file')} of the folder skipped: {names}")
        for encoding, count in tables.encodings.items():
            notes.append(
                f"{amount(count, 'table')} read as {encoding}, not UTF-8; source.encoding sets another encoding"
            )
        if counts["unreadable"]:
            notes.append(
                f"rows that cannot be read and count as bad records: {counts['unreadable']:,} ({_some(self._faults)})"
            )
        if counts["refused"]:
            notes.append(f"{amount(counts['refused'], 'URL')} must not be fetched: {_some(self._refused)}")
        if self.repeated:
            notes.append(amount(self.repeated, "row repeats a URL and is skipped", "rows repeat a URL and are skipped"))
        if counts["conflicts"]:
            notes.append(
                f"{amount(counts['conflicts'], 'URL')} with several labels in the rows: {_some(self._conflicts)}"
            )
        if counts["splits"]:
            notes.append(f"{amount(counts['splits'], 'URL is', 'URLs are')} in several splits; the first counts")
        if self.late:
            notes.append(
                f"{amount(self.late, 'new row gives', 'new rows give')} a listed URL another label, group or split, "
                "which it does not get; build into another folder to count them"
            )
        if self.same_key:
            notes.append(f"{amount(self.same_key, 'row')} skipped, as an earlier one has the key with another URL")
        if self.usable and not self.labelled:
            notes.append("no row has a label: set source.label_column to their column, or source.label to one label")
        if counts["split"]:
            notes.append(
                f"{amount(counts['split'], 'row has', 'rows have')} a split other than {', '.join(SPLIT_NAMES)}"
            )
        for meaning, form in (
            ("md5", "32 hexadecimal digits"),
            ("sha1", "40 hexadecimal digits"),
            ("bytes", "a size"),
            ("box", "a box"),
            ("label", "text, a number, a date or a list of these"),
        ):
            if counts[meaning]:
                notes.append(f"{amount(counts[meaning], 'value')} of the column for {meaning} ignored: not {form}")
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
    other_columns = f"; {amount(others, 'table has', 'tables have')} other columns" if others else ""
    return f"columns recognised by name: {', '.join(by_name)}{other_columns}" if by_name else ""
