"""One module a site: `sites/NAME.py` holds the class of the site called NAME.

Here are what every site declares and does, and how one is found by name. Packages of others add sites through the
entry points `animesion_scrapers.sites`. Fetching JSON is in `metadata`, reading its values in `fields`.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

from animesion_scrapers import fields
from animesion_scrapers.credentials import CredentialSpec
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.breakers import Breakers
from animesion_scrapers.http.limits import HostLimit, RateLimiter
from animesion_scrapers.http.retries import Retries
from animesion_scrapers.post import Post

if TYPE_CHECKING:  # loading requests takes longer than listing the sites should
    from animesion_scrapers.http.metadata import MetadataClient

_GROUP = "animesion_scrapers.sites"
KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """What a site declares.

    Attributes:
        name: Its short name, `[a-z0-9_]+`; begins the keys of its images.
        summary: One line for people.
        url: Its base address, without a slash at the end.
        limits: The most that each of its hosts bears, API and files alike, by host name. The pace is one request a
            second unless the caller asks for more, and never above this.
        label_tags: Categories of `Post.tags` whose tags are candidate labels.
        licence: What holds for its files when a post states nothing, one phrase; empty when unknown.
        terms: Where its rules for crawlers stand.
        credentials: Which credentials it takes, if any.
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
        """Pacing within what is declared.

        Args:
            requests_per_second: The pace of hosts that bear it; the others get what they are declared to bear.
            memory: See `RateLimiter`.
        """
        rates = {host: min(limit.requests_per_second, requests_per_second) for host, limit in self.limits.items()}
        return RateLimiter(requests_per_second, rates, memory)

    def connections(self) -> dict[str, int]:
        """Requests in flight at once for each host."""
        return {host: limit.connections for host, limit in self.limits.items()}


class Site:
    """The base of a site's crawler: the JSON client with its pace, and what callers may ask for.

    Use it as a context manager, or call `close`. A site implements `posts` and `posts_by_id`.
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
        allow_private: bool = False,
        limiter: RateLimiter | None = None,
        breakers: Breakers | None = None,
        retries: Retries | None = None,
    ) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: The site, or one that runs the same software; by default that of `info`.
            user_agent: What is asking and whom to contact, such as `my-crawler/1.0 (me@example.org)`.
            requests_per_second: The pace for each host, as far as the site declares that the host bears it. Ignored if
                there is a `limiter`.
            connect_to: Host names to reach at another address and port, as curl's `--connect-to`.
            login: User name, with `api_key`.
            api_key: API key of that user, sent to this site only.
            timeout: Seconds to wait for a connection and for each piece of an answer.
            allow_private: Whether the site may be on a private address.
            limiter: Shared pacing, when other clients ask the same hosts.
            breakers: Shared circuit breakers, likewise.
            retries: How often and how patiently to ask again.

        Raises:
            ScraperError: The User-Agent names no contact, or only one of `login` and `api_key` is given.
        """
        if bool(login) != bool(api_key):
            raise ScraperError("A login needs an API key and the other way round: give both or neither.")
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
        """The client, for sites that send other things where JSON is due."""
        from animesion_scrapers.http.metadata import MetadataClient

        return MetadataClient

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Search.

        Args:
            query: The search, in the site's own language.
            limit: Stop after this many posts.
            newer_than: Only posts that came after the one with this id.

        Yields:
            Each post once, however the site's pages overlap.

        Raises:
            ScraperError: The site would refuse the search, cannot be read, or its pages lead nowhere.
        """
        raise NotImplementedError

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look posts up.

        Yields:
            The posts in the order of `ids`, each once; one that the site does not have is left out.

        Raises:
            ScraperError: An id is not one of this site, or the site cannot be read.
        """
        raise NotImplementedError


def names() -> list[str]:
    """Names of the sites that are here: this package's and those that other packages announce."""
    return sorted({*_own(), *(point.name for point in entry_points(group=_GROUP))})


def load(name: str) -> type[Site]:
    """The class of a site.

    Raises:
        ScraperError: There is none of that name.
    """
    if name in _own():
        module = import_module(f"{__name__}.{name}")
        return next(
            each
            for _, each in inspect.getmembers(module, inspect.isclass)
            if issubclass(each, Site) and "info" in vars(each) and each.info.name == name
        )
    for point in entry_points(group=_GROUP, name=name):
        found: type[Site] = point.load()
        return found
    raise ScraperError(f"There is no site '{name}'; known are {', '.join(names())}.")


def unique(keys: Iterable[KeyT]) -> Iterator[KeyT]:
    """Each of the keys the first time that it comes."""
    seen: set[KeyT] = set()
    for key in keys:
        if key not in seen:
            seen.add(key)
            yield key


def check_filters(given: Mapping[str, str], known: frozenset[str], site: str) -> dict[str, str]:
    """Search parameters of the caller.

    Raises:
        ScraperError: One is not known.
    """
    for name in given:
        if name not in known:
            raise ScraperError(f"{name[:60]!r} cannot be searched for on {site}; what can: {', '.join(sorted(known))}.")
    return {name: str(value) for name, value in given.items()}


def parse_post_id(value: int | str) -> int:
    """The id that a caller asks for.

    Raises:
        ScraperError: It is not a positive whole number.
    """
    number = 0 if isinstance(value, bool) else fields.parse_positive_int(value)
    if not number:
        raise ScraperError(f"A post id is a positive whole number, not {str(value)[:40]!r}.")
    return number


def _own() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]
