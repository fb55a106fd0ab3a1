"""Sources for boorus: their base class, Gelbooru, Safebooru.org, Moebooru sites and Zerochan.

Each adds a few options to `CrawledSource`; the clients of the sites are in `animesion_scrapers.sites`. Danbooru, with
tables of head boxes and tag ids, is in `danbooru`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import TAG_CATEGORIES, Item
from animesion.sources import clean_text, tag_tables
from animesion.sources.crawled import CrawledSource, CrawlOptions
from animesion.sources.tag_tables import TagTableOptions, TagTables, distinct

if TYPE_CHECKING:
    from animesion_scrapers import Post, Site

_LONGEST_LINE = 1000


class BooruOptions(TagTableOptions, CrawlOptions):
    """Options of every booru."""

    tags: str = Field("", description="search, as typed on the site")
    ids: str = Field("", description="file with one post id per line, instead of a search")


class GelbooruOptions(BooruOptions):
    """Options of the `gelbooru` source."""

    url: str = Field("https://gelbooru.com", description="the site; credentials are sent only to gelbooru.com")


class SafebooruOptions(BooruOptions):
    """Options of the `safebooru` source."""

    url: str = Field("https://safebooru.org", description="the site")
    characters: str = Field(
        "", description="file with one character tag per line: labels where the site's tags have no categories"
    )


class MoebooruOptions(BooruOptions):
    """Options of the `moebooru` source."""

    url: str = Field("https://yande.re", description="the site: yande.re, konachan.com, konachan.net or another")
    tags: str = Field("", description="search, as typed on the site; without id: and order:")


class ZerochanOptions(BooruOptions):
    """Options of the `zerochan` source."""

    url: str = Field("https://www.zerochan.net", description="the site")
    username: str = Field(
        min_length=1, description="your user name on Zerochan; the site bans crawlers whose User-Agent has none"
    )
    tags: str = Field("", description="a tag such as Hatsune Miku, or several separated by commas")
    strict: bool = Field(False, description="only entries whose primary tag is the requested one")


class BooruSource(CrawledSource):
    """Posts of a search or of given ids, with labels resolved by tables of aliases and implications."""

    Options: ClassVar[type[Section]] = BooruOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.with_tags = False
        self._tables = TagTables()

    def tag_tables(self) -> TagTables:
        """The tables of the options."""
        return tag_tables.load(self.options)

    def item(self, post: Post, order: int) -> Item:
        """Convert a post to an item, with its tags if they are asked for."""
        item = super().item(post, order)
        return replace(item, tags=self.tags_of(post)) if self.with_tags else item

    def tags_of(self, post: Post) -> dict[str, tuple[str, ...]]:
        """The post's tags by category; those of a category that only this site has are general."""
        own = [tag for name in self._info().label_tags if name not in TAG_CATEGORIES for tag in post.tags[name]]
        listed = {**post.tags, "general": (*own, *post.tags["general"])}
        return {name: distinct(listed.get(name, ())) for name in TAG_CATEGORIES}

    def posts(self, site: Site, newer_than: str) -> Iterator[Post]:
        """Posts of the given ids or of the search."""
        self._tables = self.tag_tables()
        most = self.options.limit or None
        if not self.options.ids:
            return site.posts(self.options.tags, most, newer_than)
        ids = (number for number in self._ids() if number > int(newer_than or 0))
        return itertools.islice(site.posts_by_id(ids), most)

    def candidates(self, post: Post) -> tuple[str, ...]:
        """The post's tags in the site's label categories, resolved by the tables."""
        return self._tables.labels(super().candidates(post))

    def _ids(self) -> Iterator[int]:
        for number, text in _entries(self.options.ids, "source.ids"):
            if not (text.isascii() and text.isdecimal() and len(text) < 13 and int(text)):
                raise UsageError(f"source.ids: line {number} of {self.options.ids} is {text[:40]!r}, not a post id")
            yield int(text)


class GelbooruSource(BooruSource):
    """Posts of Gelbooru."""

    Options: ClassVar[type[Section]] = GelbooruOptions
    summary: ClassVar[str] = "Gelbooru: posts of a search or of given ids; needs an API key"
    site_name: ClassVar[str] = "gelbooru"


class SafebooruSource(BooruSource):
    """Posts of Safebooru.org."""

    Options: ClassVar[type[Section]] = SafebooruOptions
    summary: ClassVar[str] = "Safebooru.org: posts of a search or of given ids"
    site_name: ClassVar[str] = "safebooru"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._characters: frozenset[str] = frozenset()

    def posts(self, site: Site, newer_than: str) -> Iterator[Post]:
        """Posts of the given ids or of the search."""
        if self.options.characters:
            self._characters = frozenset(
                clean_text(name) for _, name in _entries(self.options.characters, "source.characters")
            )
        return super().posts(site, newer_than)

    def candidates(self, post: Post) -> tuple[str, ...]:
        """Character tags, by the site's categories and by the file of characters."""
        named = (clean_text(tag) for tag in post.tags["general"]) if self._characters else ()
        found = (*post.tags["character"], *(tag for tag in named if tag in self._characters))
        return self._tables.labels(clean_text(tag) for tag in found)

    def tags_of(self, post: Post) -> dict[str, tuple[str, ...]]:
        """The post's tags, with those in the file of characters among the characters."""
        tags = super().tags_of(post)
        named = tuple(tag for tag in tags["general"] if tag in self._characters)
        general = tuple(tag for tag in tags["general"] if tag not in self._characters)
        return tags | {"general": general, "character": distinct((*tags["character"], *named))}


class MoebooruSource(BooruSource):
    """Posts of yande.re, konachan.com and other Moebooru sites."""

    Options: ClassVar[type[Section]] = MoebooruOptions
    summary: ClassVar[str] = "yande.re, konachan.com and other Moebooru sites: posts of a search or of given ids"
    site_name: ClassVar[str] = "moebooru"


class ZerochanSource(BooruSource):
    """Entries of Zerochan; the primary tag is the label."""

    Options: ClassVar[type[Section]] = ZerochanOptions
    summary: ClassVar[str] = "Zerochan: entries under a tag or of given ids; the primary tag is the label"
    site_name: ClassVar[str] = "zerochan"

    def user_agent(self) -> str:
        """The User-Agent with the user's name, which the site requires."""
        return f"{super().user_agent()} - {self.options.username.strip()}"

    def site_settings(self) -> dict[str, Any]:
        """Whether a search is strict."""
        return {"strict": self.options.strict}


def _entries(name: str, option: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, with their numbers."""
    path = Path(name).expanduser()
    try:
        with path.open(encoding="utf-8-sig") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise UsageError(f"{option}: line {number} of {path} is longer than {_LONGEST_LINE} characters")
                if text := line.strip():
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option}: {path} cannot be read ({error}); use a text file with one entry per line"
        ) from None
