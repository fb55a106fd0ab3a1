"""The Moebooru API (yande.re, konachan.com, konachan.net and sites that run its software): searches and posts by id.

Uses version 2 of `/post.json`, whose response with `include_tags=1` includes the type of each tag of its posts
(`Post.batch_api_data` in the software's source), so that tags need no requests of their own. Source:
https://yande.re/help/api and https://github.com/moebooru/moebooru.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar

from animesion_scrapers import fields
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.post import FLAGS, Post
from animesion_scrapers.sites import Site, SiteInfo, parse_post_id, unique
from animesion_scrapers.sites.gelbooru import (
    RATINGS,
    descending_pages,
    group_tags,
    index_by_id,
    refuse_order,
)

PAGE = 100
"""Posts per page; the software allows up to 1000, its sites often fewer."""

_IDS_PER_QUERY = 100
_TYPES = {"artist": "artist", "circle": "artist", "copyright": "copyright", "character": "character"}
_META_TYPES = ("faults", "style", "meta")


class Moebooru(Site):
    """Reads posts from a Moebooru; use it as a context manager, or call `close`."""

    info: ClassVar[SiteInfo] = SiteInfo(
        name="moebooru",
        summary="yande.re, konachan.com and other Moebooru sites: posts of a search or of given ids",
        url="https://yande.re",
        limits={
            "yande.re": HostLimit(1.0, 1),
            "files.yande.re": HostLimit(1.0, 2),
            "konachan.com": HostLimit(1.0, 2),
            "konachan.net": HostLimit(1.0, 2),
        },
        label_tags=("character",),
        licence="",
        terms="https://yande.re/help/api",
    )

    def __init__(self, base_url: str = "", *, tag_limit: int = 6, **settings: Any) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the site.
            tag_limit: Most tags in a search, and as many excluded ones; by default that of the software.
            settings: As for every `Site`.

        Raises:
            ScraperError: The User-Agent names no contact, or only one of `login` and `api_key` is given.
        """
        super().__init__(base_url, **settings)
        self._tag_limit = tag_limit

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Search, newest first.

        Args:
            query: The search, as typed on the site, without `id:`.
            limit: Most posts.
            newer_than: Only posts with a higher id.

        Yields:
            Each post once, by descending id, even if the site's pages overlap.

        Raises:
            ScraperError: The search has more tags than the site allows, sets an order or a range of ids, the site
                cannot be read, or it repeats its pages.
        """
        self._check_search(query)
        size = PAGE if limit is None else min(PAGE, limit)

        def page(below: int) -> dict[int, Post]:
            # The order is explicit because a search for a pool has another default.
            return self._page(f"{query} {f'id:<{below} ' if below else ''}order:id_desc".strip(), size)

        pages = descending_pages(page, self._host, parse_post_id(newer_than) if newer_than else 0)
        return islice((post for found in pages for post in found), limit)

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look up posts, 100 per request.

        Args:
            ids: Ids of the posts, read as needed.

        Yields:
            Each post once, in the order of `ids`, without those that the site lacks.

        Raises:
            ScraperError: An id is not a positive integer, or the site cannot be read.
        """
        fresh = unique(map(parse_post_id, ids))
        while batch := list(islice(fresh, _IDS_PER_QUERY)):
            found = self._page(f"id:{','.join(map(str, batch))}", _IDS_PER_QUERY)
            yield from (found[number] for number in batch if number in found)

    def _page(self, tags: str, size: int) -> dict[int, Post]:
        params = {"tags": tags, "limit": str(size), "api_version": "2", "include_tags": "1"}
        document = fields.mapping(self._client.get_json(f"{self._base}/post.json", params))
        posts, types = document.get("posts"), document.get("tags")
        if not isinstance(posts, list) or not isinstance(types, (dict, list)) or (posts and not types):
            raise ScraperError(
                f"{self._host} answered /post.json with something other than version 2 of the API, posts and tags."
            )
        categories = {name: _category(kind) for name, kind in fields.mapping(types).items()}
        return {number: self._post(entry, categories) for number, entry in index_by_id(posts, self._host).items()}

    def _post(self, entry: Mapping[str, Any], categories: Mapping[str, str]) -> Post:
        number = fields.number_text(entry.get("id"))
        tags = group_tags(fields.words(entry.get("tags")), categories)
        file_url = fields.absolute_url(self._base, entry.get("file_url"))
        return Post(
            id=number,
            site=self.info.name,
            page_url=f"{self._base}/post/show/{number}",
            file_url=file_url,
            md5=fields.match(fields.MD5, entry.get("md5")),
            extension=fields.match(fields.EXTENSION, entry.get("file_ext")) or fields.extension(file_url),
            width=fields.parse_positive_int(entry.get("width")),
            height=fields.parse_positive_int(entry.get("height")),
            bytes=fields.parse_positive_int(entry.get("file_size")),
            rating=RATINGS.get(fields.text(entry.get("rating")).lower(), ""),
            tags=tags,
            parent_id=fields.number_text(entry.get("parent_id")),
            source=fields.text(entry.get("source")),
            author=" ".join(tags["artist"]),
            created_at=fields.unix_date(entry.get("created_at")),
            flags=tuple(flag for flag in FLAGS if entry.get("status") == flag),
        )

    def _check_search(self, query: str) -> None:
        # The site applies only the last id: term, and pages need one.
        refuse_order(query, "id:")
        terms = [term for term in query.split() if ":" not in term]
        excluded = sum(term.startswith("-") for term in terms)
        for count, what in ((len(terms) - excluded, "tags"), (excluded, "excluded tags")):
            if count > self._tag_limit:
                raise ScraperError(
                    f"{self._host} allows {self._tag_limit} {what} in a search and this one has {count}: "
                    "drop some, or filter afterwards."
                )


def _category(kind: object) -> str:
    return "meta" if kind in _META_TYPES else _TYPES.get(fields.text(kind), "general")
