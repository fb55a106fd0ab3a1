"""The Danbooru API (danbooru.donmai.us and sites that run its software): search results and posts by id.

Source: https://danbooru.donmai.us/wiki_pages/help:api. Files are fetched by `downloads`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar

from animesion_scrapers import fields
from animesion_scrapers.credentials import CredentialSpec
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.post import FLAGS, TAG_CATEGORIES, Post
from animesion_scrapers.sites import Site, SiteInfo, parse_post_id, unique

PAGE = 200
"""Posts per page, the most that the site returns."""

FREE_METATAGS = frozenset(
    {"status", "rating", "limit", "is", "id", "date", "age", "filesize", "filetype", "parent", "child", "md5", "width"}
    | {"height", "duration", "mpixels", "ratio", "score", "upvote", "downvotes", "favcount", "embedded", "tagcount"}
    | {"pixiv_id", "pixiv"}
)
"""Search terms that do not count towards the site's tag limit."""

_IDS_PER_QUERY = 100
_TERM = re.compile(r'(?:[^\s"]|"[^"]*")+|"')
_RATING = re.compile("[gsqe]")


class Danbooru(Site):
    """Reads posts from a Danbooru; use it as a context manager, or call `close`."""

    info: ClassVar[SiteInfo] = SiteInfo(
        name="danbooru",
        summary="Danbooru: posts of a search or of given ids",
        url="https://danbooru.donmai.us",
        limits={
            # An address may send ten requests per second; the site asks for about one in long sessions.
            "danbooru.donmai.us": HostLimit(10.0, 1),
            "safebooru.donmai.us": HostLimit(10.0, 1),
            "cdn.donmai.us": HostLimit(10.0, 4),
        },
        label_tags=("character",),
        licence="",
        terms="https://danbooru.donmai.us/wiki_pages/help:api",
        credentials=CredentialSpec(
            "danbooru.donmai.us", "DANBOORU_LOGIN", "DANBOORU_API_KEY", where="your profile, API keys"
        ),
    )

    def __init__(self, base_url: str = "", *, tag_limit: int = 2, **settings: Any) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the site.
            tag_limit: Most tags in a search for the account: 2, or 6 for Gold.
            settings: As for every `Site`.

        Raises:
            ScraperError: The User-Agent names no contact, or only one of `login` and `api_key` is given.
        """
        super().__init__(base_url, **settings)
        self._tag_limit = tag_limit

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Search, newest first.

        Args:
            query: The search, as typed on the site.
            limit: Most posts.
            newer_than: Only posts with a higher id.

        Yields:
            Each post once, by descending id, even if the site's pages overlap.

        Raises:
            ScraperError: The search has more tags than the site allows or sets an order, the site cannot be read, or
                it repeats its pages.
        """
        self._check_search(query)
        if newer_than:
            query = f"{query} id:>{parse_post_id(newer_than)}".strip()
        return islice(self._pages(query, PAGE if limit is None else min(PAGE, limit)), limit)

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
            query = f"id:{','.join(map(str, batch))}"
            found = {int(post.id): post for post in self._page({"tags": query, "limit": str(PAGE)})}
            yield from (found[number] for number in batch if number in found)

    def _pages(self, tags: str, size: int) -> Iterator[Post]:
        params = {"tags": tags, "limit": str(size)}
        smallest: int | None = None
        while page := self._page(params):
            fresh = {int(post.id): post for post in page if smallest is None or int(post.id) < smallest}
            if not fresh:
                raise ScraperError(
                    f"{self._host} answered the page below post {smallest} with posts that it had already sent."
                )
            yield from (fresh[number] for number in sorted(fresh, reverse=True))
            smallest = min(fresh)
            params = {**params, "page": f"b{smallest}"}

    def _page(self, params: Mapping[str, str]) -> list[Post]:
        document = self._client.get_json(f"{self._base}/posts.json", params)
        if not isinstance(document, list):
            raise ScraperError(f"{self._host} answered /posts.json with something other than a list of posts.")
        return [self._post(entry) for entry in document]

    def _post(self, entry: object) -> Post:
        if not isinstance(entry, dict):
            raise ScraperError(f"{self._host} put something other than a post into its list of posts.")
        number = fields.positive_int(entry.get("id"))
        if not number:
            raise ScraperError(f"{self._host} sent a post without a valid id.")
        tags = {name: fields.words(entry.get(f"tag_string_{name}")) for name in TAG_CATEGORIES}
        return Post(
            id=str(number),
            site=self.info.name,
            page_url=f"{self._base}/posts/{number}",
            file_url=fields.absolute_url(self._base, entry.get("file_url")),
            md5=fields.match(fields.MD5, entry.get("md5")),
            extension=fields.match(fields.EXTENSION, entry.get("file_ext")),
            width=fields.positive_int(entry.get("image_width")),
            height=fields.positive_int(entry.get("image_height")),
            bytes=fields.positive_int(entry.get("file_size")),
            rating=fields.match(_RATING, entry.get("rating")),
            tags=tags,
            parent_id=fields.number_text(entry.get("parent_id")),
            source=fields.text(entry.get("source")),
            pixiv_id=fields.number_text(entry.get("pixiv_id")),
            author=" ".join(tags["artist"]),
            created_at=fields.iso_date(entry.get("created_at")),
            flags=tuple(flag for flag in FLAGS if entry.get(f"is_{flag}") is True),
        )

    def _check_search(self, tags: str) -> None:
        terms = [term.lstrip("-~(").lower() for term in _TERM.findall(tags)]
        for term in terms:
            if term.startswith(("order:", "ordfav:", "ordpool:")):
                raise ScraperError(f"The search must not contain {term}: posts are read by descending id.")
        counted = [
            term for term in terms if term.strip(")") not in ("", "or", "and") and _metatag(term) not in FREE_METATAGS
        ]
        if len(counted) > self._tag_limit:
            raise ScraperError(
                f"{self._host} allows {self._tag_limit} tags in a search and this one has {len(counted)} "
                f"({' '.join(counted)}): drop some, or filter afterwards."
            )


def _metatag(term: str) -> str:
    return term.partition(":")[0] if ":" in term else ""
