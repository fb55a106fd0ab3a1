"""Where images come from: the interface of a source and how one is found by name (entry points `animesion.sources`).

A source lists items in an order that depends on nothing but its content, and reads the bytes of items it listed. What an
image is worth is not its business.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, runtime_checkable

from pydantic import ValidationError

from animesion.config.recipe import Recipe
from animesion.config.settings import Section, explain
from animesion.errors import UsageError
from animesion.schemas import Item, Payload

if TYPE_CHECKING:
    from animesion_scrapers import CrawlStatus


class Source(Protocol):
    """One way to get images. Made from its options; cheap to make, does nothing until asked."""

    #: the model of the recipe's `[source]` keys besides `kind`
    Options: ClassVar[type[Section]]
    #: one line for `animesion sources`
    summary: ClassVar[str]
    #: True: listing costs requests, so it is remembered, and one process does all the reading
    remote: ClassVar[bool]
    #: sentences about what was passed over, filled while listing
    notes: list[str]

    def session(self) -> contextlib.AbstractContextManager[object]:
        """What must be open around `items` and `read`: connections, servers."""

    def items(self) -> Iterator[Item]:
        """Every image of the source, in an order that depends on its content alone.

        Raises:
            UsageError: the options point at nothing usable.
        """

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The bytes of each item, in the order given, one payload an item."""


class CrawlCounts(NamedTuple):
    """Items that did not come: those that a later run asks for again, and those that it does not."""

    failed: int
    refused: int


@runtime_checkable
class Crawled(Source, Protocol):
    """A remote source that keeps a ledger: it resumes within a part, retries what failed, and finds what is new."""

    def crawl_in(
        self, folder: Path, *, retry_refused: bool = False, watch: Callable[[CrawlStatus], None] | None = None
    ) -> None:
        """Keep the ledger in a folder; called before the session opens."""

    def items_after(self, last: Item) -> Iterator[Item]:
        """Images that came to the source after the last item of its earlier listing, in the same order."""

    def counts(self, items: Sequence[Item]) -> CrawlCounts:
        """How many of these items did not come."""

    def handed_over(self, items: Sequence[Item] | None = None) -> None:
        """The bytes of these items, or of all, are kept elsewhere now."""

    def errors(self) -> list[tuple[str, str, str, int]]:
        """State, kind, detail and number of what failed or was refused, the most frequent first."""

    def file_host(self, item: Item) -> str:
        """The host of an item's file."""

    def forecast(self, urls: Mapping[str, int]) -> tuple[int, float]:
        """Requests, and seconds at the polite pace, that fetching so many files of each host takes."""


def names() -> list[str]:
    """Names of the installed sources."""
    return sorted({point.name for point in entry_points(group="animesion.sources")})


def source_class(kind: str) -> type[Source]:
    """The class of a source.

    Raises:
        UsageError: none of that name is installed.
    """
    for point in entry_points(group="animesion.sources", name=kind):
        found: type[Source] = point.load()
        return found
    raise UsageError(f"source.kind: there is no source '{kind}'; installed are {', '.join(names())}")


def make(recipe: Recipe) -> Source:
    """The recipe's source, its options checked.

    Raises:
        UsageError: unknown source, unknown key (with the nearest valid one) or wrong value.
    """
    kind = recipe.source.kind
    found = source_class(kind)
    try:
        options = found.Options.model_validate(recipe.source.options)
    except ValidationError as error:
        hint = "; or add --sample to try the recipe on drawn images" if error.errors()[0]["type"] == "missing" else ""
        raise UsageError(
            f"recipe {recipe.name}: {explain(error, found.Options, 'source')} "
            f"(source '{kind}': set it with --set source.NAME=VALUE{hint})"
        ) from None
    return found(options)  # type: ignore[call-arg]


def clean_text(text: str, limit: int = 500) -> str:
    """Text from outside as it may stand in tables: NFC, no control characters or lone surrogates, bounded."""
    if text.isascii() and text.isprintable():  # most is, and tables may have millions of rows
        return " ".join(text.split())[:limit]
    text = text.encode("utf-8", "backslashreplace").decode()
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp", "Cs"} else c for c in text)
    return " ".join(text.split())[:limit]


def file_key(kind: str, name: bytes, stem: str) -> str:
    """A key for a file: readable where its name allows it, unique by a hash of the whole name.

    Args:
        kind: first part of the key.
        name: the file's full name inside the source.
        stem: the part of it that a reader would recognise.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (kind, slug, hashlib.sha256(name).hexdigest()[:16]) if part)
