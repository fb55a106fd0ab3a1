"""Sources of images: their interface, and the lookup by name (entry points `animesion.sources`).

A source lists items in an order that depends only on its content, and reads the bytes of listed items. Images are
judged in later stages.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, runtime_checkable

from pydantic import ValidationError

from animesion.config.recipe import Recipe
from animesion.config.settings import Section, explain, nearest
from animesion.errors import UsageError
from animesion.schemas import Item, Payload
from animesion_scrapers import plugins

if TYPE_CHECKING:
    from animesion.sources.tag_tables import TagTables
    from animesion_scrapers import CrawlStatus


class Source(Protocol):
    """A source of images, made from its options; construction is cheap and opens nothing."""

    #: model of the keys of the recipe's `[source]` table, without `kind`
    Options: ClassVar[type[Section]]
    #: one-line description for `animesion sources`
    summary: ClassVar[str]
    #: whether listing costs requests; the listing is then stored, and a single process reads all items
    remote: ClassVar[bool]
    #: sentences about skipped files and similar, filled while listing
    notes: list[str]

    def session(self) -> contextlib.AbstractContextManager[object]:
        """A context that must be open around `items` and `read`, with connections and servers."""

    def items(self) -> Iterator[Item]:
        """All images of the source, in an order that depends only on its content.

        Raises:
            UsageError: the options do not point to usable data.
        """

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The bytes of the items, in their order, one payload per item."""


class CrawlCounts(NamedTuple):
    """Numbers of items that were not downloaded.

    Attributes:
        failed: items that a later run requests again.
        refused: items that a later run does not request again.
    """

    failed: int
    refused: int


@runtime_checkable
class Crawled(Source, Protocol):
    """A remote source with a ledger: it resumes within a part, retries failed items and lists new ones.

    Attributes:
        opt_outs: whether the opt-outs of hosts and pages are obeyed, from `filter.opt_outs`.
    """

    opt_outs: bool

    def crawl_in(
        self, folder: Path, *, retry_refused: bool = False, watch: Callable[[CrawlStatus], None] | None = None
    ) -> None:
        """Set the folder of the ledger; called before the session opens."""

    def items_after(self, last: Item) -> Iterator[Item]:
        """Images added to the source after the last item of an earlier listing, in the same order."""

    def counts(self, items: Sequence[Item]) -> CrawlCounts:
        """Numbers of these items that were not downloaded."""

    def release(self, items: Sequence[Item] | None = None) -> None:
        """Allow the ledger to drop the bytes of these items, or of all, which are stored elsewhere now."""

    def errors(self) -> list[tuple[str, str, str, int]]:
        """State, kind, detail and number of items that failed or were refused, most frequent first."""

    def file_host(self, item: Item) -> str:
        """The host of an item's file."""

    def forecast(self, urls: Mapping[str, int]) -> tuple[int, float]:
        """Number of requests, and seconds at the polite rate, for fetching these numbers of files by host."""


@runtime_checkable
class Tagged(Source, Protocol):
    """A source whose images have tags.

    Attributes:
        with_tags: whether items carry their tags, from `tags.categories`; they make a listing slower and larger.
    """

    with_tags: bool

    def tag_tables(self) -> TagTables:
        """The aliases and implications of the tags, which are applied to those of the items later.

        Raises:
            UsageError: a table cannot be read.
        """


@runtime_checkable
class Stamped(Source, Protocol):
    """A local source that can tell whether its listing may have changed, for less than listing costs."""

    def stamp(self) -> str:
        """A digest that differs if the listing may differ; empty if that cannot be told."""


def names() -> list[str]:
    """Names of the installed sources."""
    return sorted({point.name for point in plugins.points("animesion.sources")})


def source_class(kind: str) -> type[Source]:
    """The class of a source.

    Raises:
        UsageError: no source of that name is installed.
    """
    for point in plugins.points("animesion.sources", kind):
        found: type[Source] = point.load()
        return found
    near = nearest(kind, names())
    raise UsageError(f"source.kind: there is no source '{kind}'{near}; installed are {', '.join(names())}")


def make(recipe: Recipe) -> Source:
    """The recipe's source, with validated options.

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
    source: Source = found(options)  # type: ignore[call-arg]
    if isinstance(source, Crawled):
        source.opt_outs = recipe.filter.opt_outs
    if isinstance(source, Tagged):
        source.with_tags = bool(recipe.tags.categories)
    elif recipe.tags.categories:
        raise UsageError(
            f"tags.categories: source '{kind}' lists no tags: leave it empty, or use a source of boorus or of a dump"
        )
    return source


def clean_text(text: str, limit: int = 500) -> str:
    """Clean untrusted text for tables: NFC, no control characters or lone surrogates, at most `limit` characters."""
    if text.isascii() and text.isprintable():  # the common case, and tables may have millions of rows
        return " ".join(text.split())[:limit]
    text = text.encode("utf-8", "backslashreplace").decode()
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp", "Cs"} else c for c in text)
    return " ".join(text.split())[:limit]


def file_key(kind: str, name: bytes, stem: str) -> str:
    """A key for a file: readable by its stem, and unique by a hash of its full name.

    Args:
        kind: first part of the key.
        name: full name of the file inside the source.
        stem: recognisable part of the name.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (kind, slug, hashlib.sha256(name).hexdigest()[:16]) if part)
