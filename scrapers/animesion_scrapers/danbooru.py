"""The Danbooru API (danbooru.donmai.us and sites that run its software): search results and posts by id.

Source: https://danbooru.donmai.us/wiki_pages/help:api. Files are fetched by `downloads`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from urllib.parse import urljoin, urlsplit

from animesion_scrapers.addresses import Routes
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.limits import RateLimiter
from animesion_scrapers.metadata import MetadataClient
from animesion_scrapers.post import FLAGS, TAG_CATEGORIES, Post
from animesion_scrapers.retries import Retries

PAGE = 200
"""Posts on a page, the most the site gives."""

FREE_METATAGS = frozenset(
    {"status", "rating", "limit", "is", "id", "date", "age", "filesize", "filetype", "parent", "child", "md5", "width"}
    | {"height", "duration", "mpixels", "ratio", "score", "upvote", "downvotes", "favcount", "embedded", "tagcount"}
    | {"pixiv_id", "pixiv"}
)
"""Search terms that the site does not count."""

_IDS_PER_QUERY = 100
_TERM = re.compile(r'(?:[^\s"]|"[^"]*")+|"')
_MD5 = re.compile(r"[0-9a-f]{32}")
_EXTENSION = re.compile(r"[a-z0-9]{1,8}")


class Danbooru:
    """Reads posts from a Danbooru; use it as a context manager, or call `close`."""

    def __init__(
        self,
        base_url: str = "https://danbooru.donmai.us",
        *,
        user_agent: str,
        requests_per_second: float = 1.0,
        connect_to: Mapping[str, tuple[str, int]] | None = None,
        login: str = "",
        api_key: str = "",
        timeout: float = 30.0,
        tag_limit: int = 2,
        allow_private: bool = False,
        limiter: RateLimiter | None = None,
        retries: Retries | None = None,
    ) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: The site.
            user_agent: What is asking and whom to contact, such as `my-crawler/1.0 (me@example.org)`.
            requests_per_second: The site asks for about one in long sessions. Ignored if there is a `limiter`.
            connect_to: Host names to reach at another address and port, as curl's `--connect-to`.
            login: User name, with `api_key`.
            api_key: API key of that user, sent to this site only.
            timeout: Seconds to wait for a connection and for each piece of an answer.
            tag_limit: Tags in a search that the account may use: 2, with a Gold account 6.
            allow_private: Whether the site may be on a private address.
            limiter: Shared pacing, when other clients ask the same hosts.
            retries: How often and how patiently to ask again.

        Raises:
            ScraperError: The User-Agent names no contact, or only one of `login` and `api_key` is given.
        """
        if bool(login) != bool(api_key):
            raise ScraperError("A login needs an API key and the other way round: give both or neither.")
        self._base = base_url.rstrip("/")
        self._host = urlsplit(self._base).hostname or self._base
        self._tag_limit = tag_limit
        self._client = MetadataClient(
            user_agent=user_agent,
            limiter=limiter or RateLimiter(requests_per_second),
            routes=Routes(connect_to or {}, allow_private),
            credentials=(login, api_key) if login else None,
            credentials_for=self._base,
            timeout=timeout,
            retries=retries,
        )

    def __enter__(self) -> Danbooru:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def posts(self, tags: str = "", limit: int | None = None) -> Iterator[Post]:
        """Search, newest first.

        Args:
            tags: The search, as typed on the site.
            limit: Stop after this many posts.

        Yields:
            Each post once, with falling ids, however the site's pages overlap.

        Raises:
            ScraperError: The search has more tags than the site allows or an order of its own, the site cannot be
                read, or its pages lead nowhere.
        """
        self._check_search(tags)
        return islice(self._pages(tags, PAGE if limit is None else min(PAGE, limit)), limit)

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look posts up, many a request.

        Args:
            ids: Which posts; they may be many and are read as needed.

        Yields:
            The posts in the order of `ids`, each once; one that the site does not have is left out.

        Raises:
            ScraperError: An id is not a positive whole number, or the site cannot be read.
        """
        fresh = _once_each(map(_asked_id, ids))
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
        number = _whole(entry.get("id"))
        if not number:
            raise ScraperError(f"{self._host} sent a post without a proper id.")
        tags = {name: _words(entry.get(f"tag_string_{name}")) for name in TAG_CATEGORIES}
        file_url = _text(entry.get("file_url"))
        return Post(
            id=str(number),
            site="danbooru",
            page_url=f"{self._base}/posts/{number}",
            file_url=_joined(self._base, file_url) if file_url else "",
            md5=_matching(_MD5, entry.get("md5")),
            extension=_matching(_EXTENSION, entry.get("file_ext")),
            width=_whole(entry.get("image_width")),
            height=_whole(entry.get("image_height")),
            bytes=_whole(entry.get("file_size")),
            rating=_matching(re.compile("[gsqe]"), entry.get("rating")),
            tags=tags,
            parent_id=_number_text(entry.get("parent_id")),
            source=_text(entry.get("source")),
            pixiv_id=_number_text(entry.get("pixiv_id")),
            author=" ".join(tags["artist"]),
            created_at=_date(entry.get("created_at")),
            flags=tuple(flag for flag in FLAGS if entry.get(f"is_{flag}") is True),
        )

    def _check_search(self, tags: str) -> None:
        terms = [term.lstrip("-~(").lower() for term in _TERM.findall(tags)]
        for term in terms:
            if term.startswith(("order:", "ordfav:", "ordpool:")):
                raise ScraperError(f"The search must not contain {term}: posts are read by falling id.")
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


def _once_each(numbers: Iterable[int]) -> Iterator[int]:
    seen: set[int] = set()
    for number in numbers:
        if number not in seen:
            seen.add(number)
            yield number


def _asked_id(value: int | str) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()) or not _whole(int(text[:20])):
        raise ScraperError(f"A post id is a positive whole number, not {text[:40]!r}.")
    return int(text)


def _whole(value: object) -> int:
    """A positive 64-bit number, or 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else 0


def _number_text(value: object) -> str:
    number = _whole(value)
    return str(number) if number else ""


def _text(value: object) -> str:
    """The text if it can be stored: JSON may carry halves of surrogate pairs, which no UTF-8 file takes."""
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return ""
    return value.strip()


def _words(value: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_text(value).split()))


def _matching(pattern: re.Pattern[str], value: object) -> str:
    text = _text(value).lower()
    return text if pattern.fullmatch(text) else ""


def _joined(base: str, url: str) -> str:
    try:
        return urljoin(f"{base}/", url)
    except ValueError:
        return url


def _date(value: object) -> str:
    text = _text(value)
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return ""
    return text
