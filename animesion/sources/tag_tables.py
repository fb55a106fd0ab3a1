"""Tables of tag aliases and implications, in the shape of boorus' own dumps, and what they make of candidate labels.

An alias leads from a tag to the one that is used for it; an implication from a tag to a more general one. Sources that
crawl boorus take both as options. What a recipe itself renames is in `animesion.pipeline.rules`.
"""

from __future__ import annotations

import contextlib
import csv
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


class TagTableOptions(Section):
    """Options of sources whose labels are tags."""

    aliases: str = Field(
        "", description="table of tag aliases (.csv, .tsv, .jsonl; also .gz): antecedent_name, consequent_name, status"
    )
    implications: str = Field("", description="table of tag implications, of the same form")
    implied: Implied = Field(
        "keep-specific",
        description="of labels of which one implies another: keep-specific drops the implied, keep-general the others",
    )


@dataclass(frozen=True)
class TagTables:
    """Aliases and implications, ready to be asked.

    Attributes:
        aliases: the tag that is used for each aliased one; never itself an alias.
        implications: tags that a tag implies directly, all of them resolved by the aliases.
        implied: which of two labels stays when one implies the other.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    implications: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    implied: Implied = "keep-specific"

    def labels(self, tags: Iterable[str]) -> tuple[str, ...]:
        """Candidate labels of one image: aliases resolved, each once, and one of each pair that implies another.

        Args:
            tags: tags of one image, in their order.
        """
        found = tuple(dict.fromkeys(self.aliases.get(tag, tag) for tag in tags))
        if len(found) < 2 or not self.implications:
            return found
        general = {tag: self._implied_by(tag) for tag in found}
        if self.implied == "keep-general":
            return tuple(tag for tag in found if not general[tag] & set(found))
        dropped = set().union(*general.values())
        return tuple(tag for tag in found if tag not in dropped)

    def _implied_by(self, tag: str) -> set[str]:
        """All that a tag implies, over any number of steps."""
        found: set[str] = set()
        waiting = list(self.implications.get(tag, ()))
        while waiting:
            general = waiting.pop()
            if general not in found:
                found.add(general)
                waiting += self.implications.get(general, ())
        return found


def load(options: TagTableOptions) -> TagTables:
    """The tables that the options name.

    Raises:
        UsageError: a file cannot be read, a row is wrong (named by its line), one tag is an alias of two, or aliases
            or implications go round in a circle (which is shown).
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
                f"line of '{_short(direct[tag])}': leave one out"
            )
    resolved: dict[str, str] = {}
    for tag in direct:
        chain = [tag]
        on_chain = {tag}
        while (used := direct.get(chain[-1], "")) and chain[-1] not in resolved:
            if used in on_chain:
                raise _circle("source.aliases", name, [*chain[chain.index(used) :], used])
            chain.append(used)
            on_chain.add(used)
        end = resolved.get(chain[-1], chain[-1])
        resolved.update(dict.fromkeys(chain[:-1], end))
    return resolved


def _implications(name: str, aliases: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for _, tag, general in _rows(name, "source.implications"):
        tag, general = aliases.get(tag, tag), aliases.get(general, general)
        if tag != general:  # an alias may have made them one
            found.setdefault(tag, {})[general] = None
    graph = {tag: tuple(general) for tag, general in found.items()}
    if circle := _find_circle(graph):
        raise _circle("source.implications", name, circle)
    return graph


def _find_circle(graph: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Tags of which each implies the next and the last is the first; empty when there are none such."""
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


def _circle(option: str, name: str, tags: list[str]) -> UsageError:
    shown = [*tags[:_SHOWN], "...", tags[-1]] if len(tags) > _SHOWN + 1 else tags
    return UsageError(f"{option}: {name} goes round in a circle ({' -> '.join(map(_short, shown))}): take one row out")


# -- files -----------------------------------------------------------------------------------------------------------


def _rows(name: str, option: str) -> Iterator[tuple[int, str, str]]:
    """Line, antecedent and consequent of each active row of a table, read in a stream."""
    path = Path(name).expanduser()
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind not in _FORMATS:
        raise UsageError(f"{option}: the name of {path} does not tell its format: end it in {', '.join(_FORMATS)}")
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
            raise UsageError(f"{option}: {path} has more than {_MOST_ROWS:,} rows; no booru has so many")
        if record.get(_STATUS, "active") != "active":
            continue
        tag, other = record.get(_FROM), record.get(_TO)
        if not (isinstance(tag, str) and isinstance(other, str) and tag.strip() and other.strip()):
            raise UsageError(f"{option}: line {line} of {path} has no {_FROM} or no {_TO}: correct it or take it out")
        yield line, clean_text(tag), clean_text(other)


class _RowError(Exception):
    """A line that cannot be read; the text says why, after the line's name."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def _records(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not separator:
        for line, text in lines:
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                raise _RowError(line, "is not JSON: write one object a line") from None
            if not isinstance(record, dict):
                raise _RowError(line, "is not a JSON object: write one object a line")
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
                raise _RowError(line, f"is no header with the columns {_FROM} and {_TO}")
        elif len(values) != len(header):
            raise _RowError(line, f"has {len(values)} columns, the header has {len(header)}")
        else:
            yield line, dict(zip(header, values, strict=True))


def _lines(path: Path, option: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers, from 1."""
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
