"""The Zerochan API (www.zerochan.net): entries under a tag and entries by id.

A listing has neither the file nor its digest, so each entry takes a further request. Source:
https://www.zerochan.net/api.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any, ClassVar
from urllib.parse import quote_plus

from animesion_scrapers import fields
from animesion_scrapers.errors import ScraperError, StatusError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.http.metadata import MetadataClient
from animesion_scrapers.post import TAG_CATEGORIES, Post
from animesion_scrapers.sites import Site, SiteInfo, parse_post_id, unique
from animesion_scrapers.sites.gelbooru import index_by_id

PAGE = 250
"""Entries per page, the most that the site returns."""

DEEPEST_PAGE = 100
"""Most pages of a listing that the site returns."""

_AGENT = re.compile(r"\S.* - \S+")
_GONE = frozenset({404, 410})


class ZerochanClient(MetadataClient):
    """A client that accepts Zerochan's invalid JSON with raw control characters, and its HTML page for the end."""

    def _parse(self, answer: Any) -> object:
        if answer.is_html and b"page number too high" in answer.body[:1_000_000].lower():
            return {"items": []}
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(answer.body, strict=False)
        return super()._parse(answer)


class Zerochan(Site):
    """Reads entries from Zerochan; use it as a context manager, or call `close`.

    Tags have no categories. The primary tag, under which the site files the image (usually a character, sometimes a
    series or an artist), has the category `primary` and is the label.
    """

    info: ClassVar[SiteInfo] = SiteInfo(
        name="zerochan",
        summary="Zerochan: entries under a tag or of given ids",
        url="https://www.zerochan.net",
        limits={
            # The site allows 60 requests per minute and bans clients that exceed them.
            "www.zerochan.net": HostLimit(1.0, 1),
            "static.zerochan.net": HostLimit(1.0, 2),
        },
        label_tags=("primary",),
        licence="",
        terms="https://www.zerochan.net/api",
    )

    def __init__(self, base_url: str = "", *, user_agent: str, strict: bool = False, **settings: Any) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the site.
            user_agent: `Project - Username` with a contact, such as `my-crawler/1.0 (me@example.org) - Miku`; the site
                bans clients without a user name.
            strict: Whether a search returns only entries whose primary tag is the requested one.
            settings: As for every `Site`.

        Raises:
            ScraperError: The User-Agent does not have that form or names no contact.
        """
        if not _AGENT.fullmatch(user_agent):
            raise ScraperError(
                "Zerochan bans crawlers whose User-Agent does not end in a user's name: "
                "set it to 'my-crawler/1.0 (me@example.org) - Username' with your name on Zerochan."
            )
        super().__init__(base_url, user_agent=user_agent, **settings)
        self._flags = "json&strict" if strict else "json"

    def _client_class(self) -> type[MetadataClient]:
        return ZerochanClient

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Search, newest first.

        Args:
            query: A tag such as `Hatsune Miku`, or several separated by commas; empty for all entries.
            limit: Most entries.
            newer_than: Only entries with a higher id.

        Yields:
            Each entry once, even if the site's pages overlap, without those deleted in the meantime.

        Raises:
            ScraperError: The search is malformed, the site has nothing under the tag or cannot be read, or it repeats
                its pages.
        """
        path = _path(query)
        size = PAGE if limit is None else min(PAGE, limit)
        listed = self._list_entries(path, size, parse_post_id(newer_than) if newer_than else 0)
        return islice(self._look_up(listed), limit)

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look up entries, one per request.

        Args:
            ids: Ids of the entries, read as needed.

        Yields:
            Each entry once, in the order of `ids`, without those that the site lacks.

        Raises:
            ScraperError: An id is not a positive integer, or the site cannot be read.
        """
        return self._look_up((number, {}) for number in unique(map(parse_post_id, ids)))

    def _list_entries(self, path: str, size: int, after: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        seen: set[int] = set()
        full = False
        for page in count(1):
            found = self._page(path, page, size)
            if not found:
                if full and page > DEEPEST_PAGE:
                    raise ScraperError(
                        f"{self._host} returns only {page - 1} pages of /{path} and has more: narrow the search."
                    )
                return
            fresh = sorted(found.keys() - seen, reverse=True)
            if not fresh:
                raise ScraperError(f"{self._host} answered page {page} of /{path} with what it had already sent.")
            seen.update(fresh)
            full = len(found) >= size
            yield from ((number, found[number]) for number in fresh if number > after)
            if fresh[-1] <= after:
                return

    def _page(self, path: str, page: int, size: int) -> dict[int, dict[str, Any]]:
        params = {"p": str(page), "l": str(size), "s": "id"}
        try:
            document = self._client.get_json(f"{self._base}/{path}?{self._flags}", params)
        except StatusError as error:
            if error.status not in _GONE:
                raise
            if page == 1:
                raise ScraperError(f"{self._host} has nothing under /{path}: check the spelling of the tag.") from None
            return {}
        except ScraperError as error:
            raise _on_page(error, page) from None
        items = document.get("items") if isinstance(document, dict) else None
        if isinstance(items, dict):
            items = [items]
        if not isinstance(items, list):
            raise ScraperError(f"{self._host} answered page {page} of /{path} with something other than a list.")
        return index_by_id(items, self._host)

    def _look_up(self, listed: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Post]:
        for number, entry in listed:
            try:
                document = self._client.get_json(f"{self._base}/{number}?json", {})
            except StatusError as error:
                if error.status in _GONE:
                    continue
                raise
            if not isinstance(document, dict) or fields.parse_positive_int(document.get("id")) != number:
                raise ScraperError(f"{self._host} answered /{number} with something other than that entry.")
            yield self._post({**entry, **document})

    def _post(self, entry: Mapping[str, Any]) -> Post:
        number = fields.number_text(entry.get("id"))
        file_url = fields.absolute_url(self._base, entry.get("full"))
        primary = fields.text(entry.get("primary")) or fields.text(entry.get("tag"))
        listed = entry.get("tags")
        names = unique(map(fields.text, listed if isinstance(listed, list) else ()))
        tags = dict.fromkeys(TAG_CATEGORIES, ()) | {
            "general": tuple(name for name in names if name and name != primary),
            "primary": (primary,) if primary else (),
        }
        return Post(
            id=number,
            site=self.info.name,
            page_url=f"{self._base}/{number}",
            file_url=file_url,
            md5=fields.match(fields.MD5, entry.get("hash")) or fields.match(fields.MD5, entry.get("md5")),
            extension=fields.extension(file_url),
            width=fields.parse_positive_int(entry.get("width")),
            height=fields.parse_positive_int(entry.get("height")),
            bytes=fields.parse_positive_int(entry.get("size")),
            tags=tags,
            source=fields.text(entry.get("source")),
        )


def _path(query: str) -> str:
    """A search as a path: encoded tags, separated by commas."""
    tags = [" ".join(tag.split()) for tag in query.split(",")]
    if not query.strip():
        return ""
    if not all(tags) or any(tag.strip(".") == "" for tag in tags):
        raise ScraperError(f"A search on Zerochan is one tag or several separated by commas, not {query[:60]!r}.")
    if len(tags) == 1 and tags[0].isdecimal():
        raise ScraperError(f"{tags[0][:60]!r} is the number of an entry, not a tag: look it up by its id.")
    return ",".join(quote_plus(tag) for tag in tags)


def _on_page(error: ScraperError, page: int) -> ScraperError:
    """The same fault, with the page number if the fault is in the response and not in the host."""
    if type(error) is not ScraperError:
        return error
    return ScraperError(f"{str(error).rstrip('.')} (page {page}).")
