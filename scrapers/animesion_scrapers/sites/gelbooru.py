"""Gelbooru's dapi interface (gelbooru.com and sites that run its software): search results and posts by id.

The interface of Safebooru.org is nearly the same, and `safebooru` builds on this module. Source:
https://gelbooru.com/index.php?page=wiki&s=view&id=18780.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeVar

from animesion_scrapers import fields
from animesion_scrapers.credentials import CredentialSpec
from animesion_scrapers.errors import ScraperError, StatusError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.http.metadata import MetadataClient
from animesion_scrapers.post import FLAGS, TAG_CATEGORIES, Post
from animesion_scrapers.sites import Site, SiteInfo, parse_post_id, unique

RATINGS: Mapping[str, str] = {
    "general": "g", "safe": "s", "sensitive": "s", "questionable": "q", "explicit": "e",
    "g": "g", "s": "s", "q": "q", "e": "e",
}  # fmt: skip
"""Ratings as sites write them. Sites with three ratings use safe for general and sensitive: it maps to the stricter."""

EntryT = TypeVar("EntryT")

_TAG_TYPES = {0: "general", 1: "artist", 3: "copyright", 4: "character", 5: "meta"}
_NAMES_PER_QUERY = 100
_NAMES_LENGTH = 4000
_LONGEST_NAME = 500
_KNOWN_TAGS = 500_000
_DATE = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) (\d{1,2}) (\d\d:\d\d:\d\d) ([+-]\d\d)(\d\d) (\d{4})")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_XML_REASON = re.compile(rb"<(?:response\b[^>]{0,200}?\breason=\"([^\"<]{0,400})|error>([^<]{0,400}))")


class DapiClient(MetadataClient):
    """A client that accepts the responses of dapi that are not JSON: an empty body for no posts, and errors in XML."""

    def _parse(self, answer: Any) -> object:
        start = answer.body[:4096].lstrip()
        if not start:
            return []
        if start.startswith(b"<") and (match := _XML_REASON.search(start)):
            reason = (match[1] or match[2] or b"").decode("utf-8", "replace")
            return {"success": False, "reason": html.unescape(reason)}
        return super()._parse(answer)


class Gelbooru(Site):
    """Reads posts from a Gelbooru; use it as a context manager, or call `close`.

    Posts list their tags without categories, which are requested by name, up to 100 per request and each tag once.
    """

    info: ClassVar[SiteInfo] = SiteInfo(
        name="gelbooru",
        summary="Gelbooru: posts of a search or of given ids",
        url="https://gelbooru.com",
        limits={
            "gelbooru.com": HostLimit(1.0, 1),
            **{f"img{number}.gelbooru.com": HostLimit(1.0, 2) for number in range(1, 6)},
        },
        label_tags=("character",),
        licence="",
        terms="https://gelbooru.com/tos.php",
        credentials=CredentialSpec(
            "gelbooru.com",
            "GELBOORU_USER_ID",
            "GELBOORU_API_KEY",
            required=True,
            where="your account, Settings, Options, API Access Credentials",
            parameters=("user_id", "api_key"),
        ),
    )
    page_size: ClassVar[int] = 100
    """Posts per page."""

    def __init__(self, base_url: str = "", **settings: Any) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the site.
            settings: As for every `Site`; `login` is the user's number.

        Raises:
            ScraperError: The User-Agent names no contact, only one of `login` and `api_key` is given, or neither
                although the site requires them.
        """
        super().__init__(base_url, **settings)
        spec = self.info.credentials
        if spec and spec.required and self._host == spec.host and not settings.get("login"):
            raise ScraperError(
                f"{self._host} requires an API key ({spec.where}): "
                "set login to the user's number and api_key to the key."
            )
        self._secrets = [text for text in (settings.get("login"), settings.get("api_key")) if text]
        self._types: dict[str, str] = {}

    def _client_class(self) -> type[MetadataClient]:
        return DapiClient

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Search, newest first.

        Args:
            query: The search, as typed on the site.
            limit: Most posts.
            newer_than: Only posts with a higher id.

        Yields:
            Each post once, by descending id, even if the site's pages overlap.

        Raises:
            ScraperError: The search sets an order, the site cannot be read, or it repeats its pages.
        """
        refuse_order(query)
        size = self.page_size if limit is None else min(self.page_size, limit)

        def page(below: int) -> dict[int, dict[str, Any]]:
            tags = f"{query} id:<{below}".strip() if below else query
            return self._fetch_posts({"tags": tags, "limit": str(size)})

        pages = descending_pages(page, self._host, parse_post_id(newer_than) if newer_than else 0)
        return islice((post for entries in pages for post in self._posts(entries)), limit)

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look up posts, one per request.

        Args:
            ids: Ids of the posts, read as needed.

        Yields:
            Each post once, in the order of `ids`, without those that the site lacks.

        Raises:
            ScraperError: An id is not a positive integer, or the site cannot be read.
        """
        for number in unique(map(parse_post_id, ids)):
            found = self._fetch_posts({"id": str(number)})
            if number in found:
                yield from self._posts([found[number]])

    # -- overridden by Safebooru.org -----------------------------------------------------------------------------

    def _categories(self, entries: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
        """Category by tag of some posts; missing tags are general."""
        if len(self._types) > _KNOWN_TAGS:
            self._types.clear()
        unknown = unique(name for entry in entries for name in _names(entry) if name not in self._types)
        for batch in _batches(name for name in unknown if len(name) <= _LONGEST_NAME):
            document = self._ask({"s": "tag", "limit": str(_NAMES_PER_QUERY), "names": " ".join(batch)})
            self._types.update(dict.fromkeys(batch, "general"))
            for tag in _records(document, "tag", self._host):
                name = html.unescape(fields.text(tag.get("name")))
                if name in self._types:
                    self._types[name] = _TAG_TYPES.get(fields.parse_positive_int(tag.get("type")), "general")
        return self._types

    def _details(self, entry: Mapping[str, Any]) -> tuple[str, str]:
        """The MD5 and URL of the file."""
        return fields.match(fields.MD5, entry.get("md5")), fields.absolute_url(self._base, entry.get("file_url"))

    # -- inside --------------------------------------------------------------------------------------------------

    def _ask(self, params: Mapping[str, str]) -> object:
        reasons: list[str] = []

        def is_busy(document: object) -> bool:
            reason = _refusal_reason(document)
            reasons.append(reason)
            return bool(reason)

        query = {"page": "dapi", "q": "index", "json": "1", **params}
        try:
            return self._client.get_json(f"{self._base}/index.php", query, is_busy=is_busy)
        except StatusError as error:
            if error.status == 200 and reasons and reasons[-1]:
                raise ScraperError(f"{self._host} refused: {self._redact(reasons[-1])}.") from None
            if error.status == 401 and (spec := self.info.credentials):
                raise StatusError(f"{error} Check {spec.user} and {spec.key}.", 401) from None
            raise

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _fetch_posts(self, params: Mapping[str, str]) -> dict[int, dict[str, Any]]:
        return index_by_id(_records(self._ask({"s": "post", **params}), "post", self._host), self._host)

    def _posts(self, entries: Sequence[Mapping[str, Any]]) -> Iterator[Post]:
        categories = self._categories(entries)
        return (self._post(entry, categories) for entry in entries)

    def _post(self, entry: Mapping[str, Any], categories: Mapping[str, str]) -> Post:
        number = fields.number_text(entry.get("id"))
        tags = group_tags(_names(entry), categories)
        md5, file_url = self._details(entry)
        return Post(
            id=number,
            site=self.info.name,
            page_url=f"{self._base}/index.php?page=post&s=view&id={number}",
            file_url=file_url,
            md5=md5,
            extension=fields.extension(entry.get("image")) or fields.extension(file_url),
            width=fields.parse_positive_int(entry.get("width")),
            height=fields.parse_positive_int(entry.get("height")),
            rating=RATINGS.get(fields.text(entry.get("rating")).lower(), ""),
            tags=tags,
            parent_id=fields.number_text(entry.get("parent_id")),
            source=html.unescape(fields.text(entry.get("source"))),
            author=" ".join(tags["artist"]),
            created_at=_iso_date(entry.get("created_at")),
            flags=tuple(flag for flag in FLAGS if entry.get("status") == flag),
        )


# -- shared by boorus that are paged by id ---------------------------------------------------------------------------


def descending_pages(page: Callable[[int], Mapping[int, EntryT]], host: str, after: int) -> Iterator[list[EntryT]]:
    """Yield the pages of a listing by descending id; each is requested below the smallest id so far.

    Unlike page numbers, this is stable while new posts arrive.

    Args:
        page: Returns posts by id: the newest for 0, else those below an id; none at the end.
        host: Host of the site, for messages.
        after: Stop at this id; 0 to read all.

    Yields:
        The new posts of each page, by descending id.

    Raises:
        ScraperError: A page has only posts of earlier pages.
    """
    smallest = 0
    while found := page(smallest):
        fresh = sorted((number for number in found if not smallest or number < smallest), reverse=True)
        if not fresh:
            raise ScraperError(f"{host} answered the page below post {smallest} with posts that it had already sent.")
        newer = [found[number] for number in fresh if number > after]
        if newer:
            yield newer
        if len(newer) < len(fresh):
            return
        smallest = fresh[-1]


def refuse_order(query: str, *others: str) -> None:
    """Reject a search that sets its own order, as posts are read by descending id.

    Args:
        query: The search.
        others: Prefixes of other terms that the caller sets itself.

    Raises:
        ScraperError: The search has such a term.
    """
    for term in query.lower().split():
        if term.lstrip("-~").startswith(("sort:", "order:", *others)):
            raise ScraperError(f"The search must not contain {term[:60]}: posts are read by descending id.")


def index_by_id(entries: Iterable[object], host: str) -> dict[int, dict[str, Any]]:
    """Index the posts of a page by id.

    Raises:
        ScraperError: An entry is not a post, or has no id.
    """
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise ScraperError(f"{host} put something other than a post into its list of posts.")
        number = fields.parse_positive_int(entry.get("id"))
        if not number:
            raise ScraperError(f"{host} sent a post without a valid id.")
        found[number] = entry
    return found


def group_tags(names: Iterable[str], categories: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Group tags by category; tags of unknown category are general."""
    found: dict[str, list[str]] = {category: [] for category in TAG_CATEGORIES}
    for name in names:
        found[categories.get(name, "general")].append(name)
    return {category: tuple(tags) for category, tags in found.items()}


# -- dapi ------------------------------------------------------------------------------------------------------------


def _records(document: object, name: str, host: str) -> list[dict[str, Any]]:
    """The posts or tags of a response, which is a list, a single one or none, bare or under `name`."""
    found = document.get(name) if isinstance(document, dict) else document
    if isinstance(document, dict) and name not in document and "@attributes" not in document and document:
        raise ScraperError(f"{host} answered /index.php with something other than a list of {name}s.")
    if isinstance(found, dict):
        return [found]
    if found is None or found == "":
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ScraperError(f"{host} answered /index.php with something other than a list of {name}s.")
    return found


def _refusal_reason(document: object) -> str:
    """Why the site refuses a request with status 200; empty if it does not."""
    inner = fields.mapping(fields.mapping(document).get("@attributes")) or fields.mapping(document)
    if str(inner.get("success", "true")).lower() != "false":
        return ""
    reason = fields.text(inner.get("reason")) or fields.text(inner.get("message")) or "no reason given"
    return " ".join("".join(letter if letter.isprintable() else " " for letter in reason[:200]).split()).rstrip(".")


def _names(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return fields.words(html.unescape(fields.text(entry.get("tags"))))


def _batches(names: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for name in names:
        if len(batch) == _NAMES_PER_QUERY or length + len(name) > _NAMES_LENGTH:
            yield batch
            batch, length = [], 0
        batch.append(name)
        length += len(name) + 1
    if batch:
        yield batch


def _iso_date(value: object) -> str:
    """`Tue May 30 12:34:56 -0500 2023` as ISO 8601; month names are English whatever the locale."""
    match = _DATE.fullmatch(fields.text(value))
    if not match or match[1] not in _MONTHS:
        return fields.iso_date(value)
    month, day = _MONTHS.index(match[1]) + 1, int(match[2])
    return fields.iso_date(f"{match[6]}-{month:02d}-{day:02d}T{match[3]}{match[4]}:{match[5]}")
