"""Crawlers of sites, one module per site: `sites/NAME.py` defines the class of the site NAME.

This module defines their base classes and the lookup by name. Other packages add sites with the entry points
`animesion_scrapers.sites`. JSON is fetched in `http.metadata`, and its values are read with `fields`.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

from animesion_scrapers import fields, plugins
from animesion_scrapers.credentials import CredentialSpec
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.breakers import Breakers
from animesion_scrapers.http.limits import HostLimit, RateLimiter
from animesion_scrapers.http.retries import Retries
from animesion_scrapers.post import Post

if TYPE_CHECKING:  # importing requests would slow down listing the sites
    from animesion_scrapers.http.metadata import MetadataClient

_GROUP = "animesion_scrapers.sites"
KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """Declaration of a site.

    Attributes:
        name: Short name, `[a-z0-9_]+`; prefix of the keys of its images.
        summary: One-line description.
        url: Base URL, without a trailing slash.
        limits: Limits of its API and file hosts, by host name. The rate is one request per second unless the caller
            sets another, and never above the limit.
        label_tags: Categories of `Post.tags` whose tags are candidate labels.
        licence: Licence of files whose post states none, one phrase; empty when unknown.
        terms: URL of its rules for crawlers.
        credentials: The credentials that it accepts, if any.
    """

    name: str
    summary: str
    url: str
    limits: Mapping[str, HostLimit] = field(default_factory=dict)
    label_tags: tuple[str, ...] = ("character",)
    licence: str = ""
    terms: str = ""
    credentials: CredentialSpec | None = None

    def limiter(self, requests_per_second: float = 1.0, memory: Path | None = None) -> RateLimiter:
        """Make a limiter within the declared limits.

        Args:
            requests_per_second: Requested rate; hosts with a lower limit get that limit.
            memory: See `RateLimiter`.
        """
        rates = {host: min(limit.requests_per_second, requests_per_second) for host, limit in self.limits.items()}
        return RateLimiter(requests_per_second, rates, memory)

    def connections(self) -> dict[str, int]:
        """Most requests in flight at once, by host."""
        return {host: limit.connections for host, limit in self.limits.items()}


class Site:
    """Base class of a site's crawler, with a paced JSON client. Subclasses implement `posts` and `posts_by_id`.

    Use it as a context manager, or call `close`.
    """

    info: ClassVar[SiteInfo]

    def __init__(
        self,
        base_url: str = "",
        *,
        user_agent: str,
        requests_per_second: float = 1.0,
        connect_to: Mapping[str, tuple[str, int]] | None = None,
        login: str = "",
        api_key: str = "",
        timeout: float = 30.0,
        allow_private: bool | Sequence[str] = False,
        limiter: RateLimiter | None = None,
        breakers: Breakers | None = None,
        retries: Retries | None = None,
    ) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the site, or of one with the same software; by default that of `info`.
            user_agent: Name of the crawler with a contact, such as `my-crawler/1.0 (me@example.org)`.
            requests_per_second: Rate per host, up to the limit that the site declares; ignored if there is a `limiter`.
            connect_to: Address and port to connect to instead of a host, as curl's `--connect-to`.
            login: User name, with `api_key`.
            api_key: API key of that user, sent to this site only.
            timeout: Seconds to wait for a connection and for each piece of a response.
            allow_private: Whether hosts may be on private addresses; or those that may, each as `host:port`.
            limiter: Pacing by host, shared with other clients of the same hosts.
            breakers: Circuit breakers by host, shared likewise.
            retries: Number of attempts and the waits between them.

        Raises:
            ScraperError: The User-Agent names no contact, or only one of `login` and `api_key` is given.
        """
        if bool(login) != bool(api_key):
            raise ScraperError("A login needs an API key and vice versa: set both or neither.")
        self._base = (base_url or self.info.url).rstrip("/")
        self._host = urlsplit(self._base).hostname or self._base
        self._client = self._client_class()(
            user_agent=user_agent,
            limiter=limiter or self.info.limiter(requests_per_second),
            routes=Routes(connect_to or {}, allow_private),
            credentials=(login, api_key) if login else None,
            credentials_for=self._base,
            credential_parameters=self.info.credentials.parameters if self.info.credentials else None,
            timeout=timeout,
            retries=retries,
            breakers=breakers,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _client_class(self) -> type[MetadataClient]:
        """The class of the client; sites whose responses are not always JSON override it."""
        from animesion_scrapers.http.metadata import MetadataClient

        return MetadataClient

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Search.

        Args:
            query: The search, in the site's own syntax.
            limit: Most posts.
            newer_than: Only posts newer than the one with this id.

        Yields:
            Each post once, even if the site's pages overlap.

        Raises:
            ScraperError: The site does not support the search, cannot be read, or repeats its pages.
        """
        raise NotImplementedError

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look up posts.

        Yields:
            Each post once, in the order of `ids`, without those that the site lacks.

        Raises:
            ScraperError: An id is malformed, or the site cannot be read.
        """
        raise NotImplementedError


def names() -> list[str]:
    """Names of the installed sites, from this package and from entry points."""
    return sorted({*_own(), *(point.name for point in plugins.points(_GROUP))})


@functools.cache  # sources ask once per post
def load(name: str) -> type[Site]:
    """The class of a site.

    Raises:
        ScraperError: There is no site of that name.
    """
    if name in _own():
        module = import_module(f"{__name__}.{name}")
        return next(
            each
            for _, each in inspect.getmembers(module, inspect.isclass)
            if issubclass(each, Site) and "info" in vars(each) and each.info.name == name
        )
    for point in plugins.points(_GROUP, name):
        found: type[Site] = point.load()
        return found
    raise ScraperError(f"There is no site '{name}': use one of {', '.join(names())}.")


def unique(keys: Iterable[KeyT]) -> Iterator[KeyT]:
    """Yield the distinct keys, in order of first occurrence."""
    seen: set[KeyT] = set()
    for key in keys:
        if key not in seen:
            seen.add(key)
            yield key


def check_filters(given: Mapping[str, str], known: frozenset[str], site: str) -> dict[str, str]:
    """Return the caller's search parameters with their values as text.

    Raises:
        ScraperError: One is not in `known`.
    """
    for name in given:
        if name not in known:
            raise ScraperError(f"{name[:60]!r} is not a search parameter of {site}: use {', '.join(sorted(known))}.")
    return {name: str(value) for name, value in given.items()}


def parse_post_id(value: int | str) -> int:
    """Parse the id of a post.

    Raises:
        ScraperError: It is not a positive integer.
    """
    number = 0 if isinstance(value, bool) else fields.parse_positive_int(value)
    if not number:
        raise ScraperError(f"A post id is a positive integer, not {str(value)[:40]!r}.")
    return number


def _own() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]
