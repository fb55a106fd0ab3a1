"""Tables of tag aliases and implications, in the format of boorus' own dumps, applied to candidate labels and tags.

An alias maps a tag to its canonical one; an implication maps a tag to a more general one. Sources that crawl boorus
or read their dumps have options for both. Renaming by recipes is in `animesion.pipeline.rules`.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.sources import clean_text

Implied = Literal["keep-specific", "keep-general"]

_FORMATS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".jsonl": "", ".ndjson": "", ".json": ""}
_FROM, _TO, _STATUS = "antecedent_name", "consequent_name", "status"
_LONGEST_LINE = 1 << 16
_MOST_ROWS = 5_000_000
_SHOWN = 5
#: Longest tag in characters that is cleaned once and remembered; those of boorus have 170 at most.
_REMEMBERED = 200


class TagTableOptions(Section):
    """Options of sources whose labels are tags."""

    aliases: str = Field(
        "", description="table of tag aliases (.csv, .tsv, .jsonl; also .gz): antecedent_name, consequent_name, status"
    )
    implications: str = Field("", description="table of tag implications, in the same format")
    implied: Implied = Field(
        "keep-specific",
        description="where one label implies another: keep-specific drops the implied one, keep-general the other",
    )


@dataclass(frozen=True)
class TagTables:
    """Aliases and implications.

    Attributes:
        aliases: canonical tag by alias; never itself an alias.
        implications: tags directly implied by a tag, all with aliases resolved.
        implied: which of two labels to keep if one implies the other.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    implications: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    implied: Implied = "keep-specific"

    def labels(self, tags: Iterable[str]) -> tuple[str, ...]:
        """Candidate labels of one image, with aliases resolved, duplicates removed and implications applied.

        Args:
            tags: tags of one image, in their order.
        """
        found = tuple(dict.fromkeys(self.aliases.get(tag, tag) for tag in tags))
        if len(found) < 2 or not self.implications:
            return found
        general = {tag: self.implied_by(tag) for tag in found}
        if self.implied == "keep-general":
            return tuple(tag for tag in found if not general[tag] & set(found))
        dropped = set().union(*general.values())
        return tuple(tag for tag in found if tag not in dropped)

    def implied_by(self, tag: str) -> set[str]:
        """All tags that a tag implies, directly or not; the tag itself is no alias."""
        found: set[str] = set()
        waiting = list(self.implications.get(tag, ()))
        while waiting:
            general = waiting.pop()
            if general not in found:
                found.add(general)
                waiting += self.implications.get(general, ())
        return found


def distinct(tags: Iterable[str]) -> tuple[str, ...]:
    """The tags of one image and category, cleaned, without empty and repeated ones."""
    return tuple(dict.fromkeys(filter(None, map(clean_tag, tags))))


def clean_tag(tag: str) -> str:
    """A tag as `clean_text` cleans it; faster, as most have been seen before."""
    return _cleaned(tag) if len(tag) <= _REMEMBERED else clean_text(tag)


@functools.lru_cache(1 << 17)  # the same tags come with every other image
def _cleaned(tag: str) -> str:
    return clean_text(tag)


def load(options: TagTableOptions) -> TagTables:
    """Load the tables of the options.

    Raises:
        UsageError: a file cannot be read, a row is malformed (the message states its line), one tag is an alias of
            two, or aliases or implications form a cycle (which the message shows).
    """
    aliases = _aliases(options.aliases) if options.aliases else {}
    implications = _implications(options.implications, aliases) if options.implications else {}
    return TagTables(aliases, implications, options.implied)


def _aliases(name: str) -> dict[str, str]:
    direct: dict[str, str] = {}
    for line, tag, used in _rows(name, "source.aliases"):
        if direct.setdefault(tag, used) != used:
            raise UsageError(
                f"source.aliases: line {line} of {name} makes '{_short(tag)}' an alias of '{_short(used)}', an earlier "
                f"line of '{_short(direct[tag])}': remove one"
            )
    resolved: dict[str, str] = {}
    for tag in direct:
        chain = [tag]
        on_chain = {tag}
        while (used := direct.get(chain[-1], "")) and chain[-1] not in resolved:
            if used in on_chain:
                raise _cycle_error("source.aliases", name, [*chain[chain.index(used) :], used])
            chain.append(used)
            on_chain.add(used)
        end = resolved.get(chain[-1], chain[-1])
        resolved.update(dict.fromkeys(chain[:-1], end))
    return resolved


def _implications(name: str, aliases: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for _, tag, general in _rows(name, "source.implications"):
        tag, general = aliases.get(tag, tag), aliases.get(general, general)
        if tag != general:  # aliases may have made them equal
            found.setdefault(tag, {})[general] = None
    graph = {tag: tuple(general) for tag, general in found.items()}
    if cycle := _find_cycle(graph):
        raise _cycle_error("source.implications", name, cycle)
    return graph


def _find_cycle(graph: Mapping[str, tuple[str, ...]]) -> list[str]:
    """A cycle of tags, with the first one repeated at the end; empty if there is none. Depth-first, not recursive."""
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        on_path: set[str] = set()
        steps: list[Iterator[str]] = [iter((start,))]
        while steps:
            tag = next(steps[-1], None)
            if tag is None:
                steps.pop()
                if path:
                    on_path.discard(path[-1])
                    done.add(path.pop())
            elif tag in on_path:
                return [*path[path.index(tag) :], tag]
            elif tag not in done:
                path.append(tag)
                on_path.add(tag)
                steps.append(iter(graph.get(tag, ())))
    return []


def _cycle_error(option: str, name: str, tags: list[str]) -> UsageError:
    shown = [*tags[:_SHOWN], "...", tags[-1]] if len(tags) > _SHOWN + 1 else tags
    return UsageError(f"{option}: {name} has a cycle ({' -> '.join(map(_short, shown))}): remove one row")


# -- files -----------------------------------------------------------------------------------------------------------


def _rows(name: str, option: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, antecedent and consequent of each active row of a table."""
    path = Path(name).expanduser()
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind not in _FORMATS:
        raise UsageError(f"{option}: the format of {path} is unknown: rename it to end in {', '.join(_FORMATS)}")
    records = _records(_lines(path, option), _FORMATS[kind])
    rows = 0
    while True:
        try:
            line, record = next(records)
        except StopIteration:
            return
        except _RowError as error:
            raise UsageError(f"{option}: line {error.line} of {path} {error}") from None
        rows += 1
        if rows > _MOST_ROWS:
            raise UsageError(f"{option}: {path} has more than {_MOST_ROWS:,} rows, more than any booru")
        if record.get(_STATUS, "active") != "active":
            continue
        tag, other = record.get(_FROM), record.get(_TO)
        if not (isinstance(tag, str) and isinstance(other, str) and tag.strip() and other.strip()):
            raise UsageError(f"{option}: line {line} of {path} has no {_FROM} or no {_TO}: correct or remove it")
        yield line, clean_text(tag), clean_text(other)


class _RowError(Exception):
    """A line cannot be read; the text states why, to follow the line's number."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def _records(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not separator:
        for line, text in lines:
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                raise _RowError(line, "is not JSON: write one object per line") from None
            if not isinstance(record, dict):
                raise _RowError(line, "is not a JSON object: write one object per line")
            yield line, record
        return
    header: list[str] = []
    for line, text in lines:
        try:
            values = next(csv.reader([text], delimiter=separator, strict=True))
        except (csv.Error, StopIteration):
            raise _RowError(line, "has quotes that do not match") from None
        if not header:
            header = [value.strip().lower() for value in values]
            if not {_FROM, _TO} <= set(header):
                raise _RowError(line, f"is not a header with the columns {_FROM} and {_TO}")
        elif len(values) != len(header):
            raise _RowError(line, f"has {len(values)} columns, the header has {len(header)}")
        else:
            yield line, dict(zip(header, values, strict=True))


def _lines(path: Path, option: str) -> Iterator[tuple[int, str]]:
    """Yield lines that are not blank, with their numbers, from 1."""
    number = 0
    try:
        with contextlib.closing(_opened(path)) as file:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise _RowError(number, f"is longer than {_LONGEST_LINE:,} bytes")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError:
        raise _RowError(number, "is not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        why = clean_text(getattr(error, "strerror", None) or str(error), 120)
        raise UsageError(f"{option}: {path} cannot be read ({why})") from None


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _short(tag: str) -> str:
    return tag if len(tag) <= 60 else f"{tag[:60]}..."
