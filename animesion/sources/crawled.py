"""Base class of sources that crawl: pacing, credentials, the ledger, robots.txt, and conversion of posts to items.

A subclass names a site and adds the options of that site. The sites and their clients are in `animesion_scrapers`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from animesion.config.settings import Section
from animesion.errors import AnimesionError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import CrawlCounts, clean_text
from animesion.sources.posts import NOT_IMAGES, families
from animesion.storage.workspace import full_disk_is_clear

if TYPE_CHECKING:
    from animesion_scrapers import Breakers, Crawler, CrawlStatus, Ledger, Post, RateLimiter, Site, SiteInfo

_LARGEST_TABLE = 1 << 30


def _check_private(entries: list[str]) -> list[str]:
    """The entries, each of the form that the crawlers accept."""
    from animesion_scrapers import ScraperError
    from animesion_scrapers.http.addresses import parse_private

    for entry in entries:
        try:
            parse_private(entry)
        except ScraperError as error:
            raise ValueError(str(error).rstrip(".")) from None
    return entries


#: Option of a source that sends requests.
PrivateHosts = Annotated[
    list[str],
    AfterValidator(_check_private),
    Field(
        description="hosts on a LAN or loopback that may be crawled, each as host:port, such as booru.lan:8080; "
        "host:port:address:port connects there instead, as curl's --connect-to"
    ),
]


class CrawlOptions(Section):
    """Options of every source that crawls."""

    contact: str = Field(description="e-mail address or URL for the User-Agent, so that the site can reach you")
    limit: int = Field(0, ge=0, description="most posts; 0 for all")
    requests_per_second: float = Field(1.0, gt=0, le=10, strict=False, description="highest rate per host")
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped")
    deadline: float = Field(60.0, gt=0, strict=False, description="most seconds per file, without waits for a turn")
    stall: float = Field(
        20.0, gt=0, strict=False, description="seconds without progress after which a connection is replaced"
    )
    allow_private: PrivateHosts = Field([])
    robots: bool = Field(True, description="obey robots.txt of the hosts of the files")
    pages: bool = Field(
        False, description="request the page of each file first and obey its opt-outs: one more request for each file"
    )


class CrawledSource:
    """Posts of a site. Subclasses set `site_name`, `Options` and `summary`, and implement `posts`."""

    Options: ClassVar[type[Section]] = CrawlOptions
    summary: ClassVar[str]
    remote: ClassVar[bool] = True
    #: name of the site among `animesion_scrapers.sites`
    site_name: ClassVar[str]

    def __init__(self, options: Any) -> None:
        self.options = options
        self.notes: list[str] = []
        self.opt_outs = True
        self.connect_to: Mapping[str, tuple[str, int]] = {}
        self._folder: Path | None = None
        self._retry_refused = False
        self._watch: Callable[[CrawlStatus], None] = lambda status: None
        self._open = contextlib.ExitStack()
        self._limiter: RateLimiter | None = None
        self._breakers: Breakers | None = None
        self._kept: tuple[Ledger, Crawler] | None = None

    # -- overridden by sites -------------------------------------------------------------------------------------

    def site_class(self) -> type[Site]:
        """The class of the site."""
        from animesion_scrapers import sites

        return sites.load(self.site_name)

    def base_url(self) -> str:
        """The base URL from the options; empty for that of the site's declaration."""
        return str(getattr(self.options, "url", ""))

    def site_settings(self) -> dict[str, Any]:
        """Arguments of the site's class beyond those of every site."""
        return {}

    def posts(self, site: Site, newer_than: str) -> Iterator[Post]:
        """The posts that the options select, in any order.

        Args:
            site: The open site.
            newer_than: Id of the newest known post; empty for none.
        """
        raise NotImplementedError

    def candidates(self, post: Post) -> tuple[str, ...]:
        """Candidate labels of a post: its tags in the site's label categories."""
        return tuple(clean_text(tag) for name in self._info().label_tags for tag in post.tags.get(name, ()))

    # -- the interface of a source -------------------------------------------------------------------------------

    def crawl_in(
        self, folder: Path, *, retry_refused: bool = False, watch: Callable[[CrawlStatus], None] | None = None
    ) -> None:
        """Set the folder of the ledger, the spools and the state of hosts; without one, they last for one session.

        Args:
            folder: created when needed.
            retry_refused: whether to request again what was refused permanently in an earlier run.
            watch: called with the progress of the crawl.
        """
        self._folder = folder
        self._retry_refused = retry_refused
        self._watch = watch or self._watch

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """One limiter, one set of circuit breakers and one ledger for all requests of the session."""
        from animesion_scrapers import Breakers

        given = self._folder
        with full_disk_is_clear(given or Path(tempfile.gettempdir())), self._open:  # closing the ledger writes to it
            if self._folder is None:
                self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="animesion-crawl-")))
            self._limiter = self.make_limiter(_make_folder(self._folder) / "hosts.sqlite")
            self._breakers = Breakers()
            try:
                yield
            finally:
                self._limiter.close()
                self._limiter = self._breakers = self._kept = None
                self._folder = given

    def make_limiter(self, memory: Path) -> RateLimiter:
        """The limiter of the session."""
        return self._info().limiter(self.options.requests_per_second, memory)

    def items(self) -> Iterator[Item]:
        """All posts, by ascending id."""
        return self._items("", 0)

    def items_after(self, last: Item) -> Iterator[Item]:
        """Posts newer than the last item of an earlier listing, by ascending id."""
        return self._items(last.source_id, last.order + 1)

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """Crawl the files that the ledger lacks, several at once; then yield the payloads in the order of the items."""
        from animesion_scrapers import ScraperError

        if not items:
            return
        requests = [self._request(item) for item in items]
        spool = hashlib.sha256("\n".join(item.key for item in items).encode()).hexdigest()[:16]
        try:
            ledger, crawler = self._crawl()
            entries = crawler.fetch(spool, requests, retry_refused=self._retry_refused)
        except ScraperError as error:
            raise self._fault(error) from None
        for item in items:
            entry = entries[item.key]
            if not entry.here:
                yield Payload(reason=entry.error, detail=clean_text(entry.detail))
                continue
            content = ledger.content(entry)
            if content is None:
                raise AnimesionError(f"{self._folder}: the spool lost the bytes of {item.key}; run the command again")
            yield Payload(content, digest=entry.digest)

    def counts(self, items: Sequence[Item]) -> CrawlCounts:
        """Numbers of these items that were not downloaded."""
        if self._kept is None:
            return CrawlCounts(0, 0)
        states = Counter(entry.state for entry in self._kept[0].entries(item.key for item in items).values())
        return CrawlCounts(failed=states["failed"], refused=states["refused"])

    def release(self, items: Sequence[Item] | None = None) -> None:
        """Drop the spooled bytes of these items, or of all, which are stored elsewhere now."""
        if self._kept is not None:
            self._kept[0].hand_over(None if items is None else [item.key for item in items])

    def errors(self) -> list[tuple[str, str, str, int]]:
        """State, kind, detail and number of items that failed or were refused, most frequent first."""
        return self._kept[0].errors() if self._kept else []

    def forecast(self, urls: Mapping[str, int]) -> tuple[int, float]:
        """Number of requests, and seconds at the polite rate, for fetching files.

        Args:
            urls: Number of files by host.
        """
        limiter = self.make_limiter(Path())  # the session's would store every host
        rules = bool(self.options.robots) + self.opt_outs  # robots.txt and tdmrep.json
        # Pages are counted at the hosts of the files, as most sites have both on one domain.
        each = 2 if self.opt_outs and self.options.pages else 1
        seconds = [(files * each + rules) * limiter.interval(host) for host, files in urls.items()]
        return sum(urls.values()) * each + rules * len(urls), max(seconds, default=0.0)

    def file_host(self, item: Item) -> str:
        """The host of an item's file."""
        try:
            return urlsplit(json.loads(item.locator)["url"]).hostname or ""
        except ValueError:
            return ""

    # -- inside --------------------------------------------------------------------------------------------------

    def _items(self, newer_than: str, first: int) -> Iterator[Item]:
        from animesion_scrapers import ScraperError

        try:
            with self._site() as site:
                found = list(self.posts(site, newer_than))
        except ScraperError as error:
            raise self._fault(error) from None
        found.sort(key=lambda post: _age(post.id))
        for order, post in enumerate(found, first):
            yield self.item(post, order)

    def item(self, post: Post, order: int) -> Item:
        """Convert a post to an item."""
        failure, detail = "", ""
        if not post.file_url:
            failure = DropReason.NOT_VISIBLE
        elif post.extension in NOT_IMAGES:
            failure, detail = DropReason.UNSUPPORTED_FORMAT, post.extension
        return Item(
            key=f"{post.site}-{post.id}",
            source=post.site,
            source_id=post.id,
            locator=json.dumps({"url": post.file_url} | ({"sha1": post.sha1} if post.sha1 else {})),
            order=order,
            labels=self.candidates(post),
            families=families(post.id, post.parent_id, post.pixiv_id, post.source),
            rating=post.rating,
            flags=post.flags,
            md5=post.md5,
            bytes=post.bytes,
            page_url=clean_text(post.page_url, 1000),
            file_url=clean_text(post.file_url, 1000),
            licence=clean_text(post.licence or self._info().licence, 100),
            author=clean_text(post.author, 300),
            failure=failure,
            detail=detail,
        )

    def _request(self, item: Item) -> Any:
        from animesion_scrapers import Download

        where = json.loads(item.locator)
        page = item.page_url if self.opt_outs and self.options.pages else ""
        return Download(item.key, where["url"], item.md5, item.bytes, where.get("sha1", ""), image=True, page=page)

    def _info(self) -> SiteInfo:
        return self.site_class().info

    def _site(self) -> Site:
        from animesion_scrapers.credentials import find

        spec, url = self._info().credentials, self.base_url() or self._info().url
        # Credentials are for one site, not for others with the same software.
        found = find(spec) if spec and urlsplit(url).hostname == spec.host else None
        return self.site_class()(
            url,
            user_agent=self.user_agent(),
            limiter=self._limiter,
            breakers=self._breakers,
            connect_to=self.connect_to,
            allow_private=self.options.allow_private,
            login=found.user if found else "",
            api_key=found.key if found else "",
            **self.site_settings(),
        )

    def _crawl(self) -> tuple[Ledger, Crawler]:
        """The ledger and its crawler, opened when first needed and closed with the session."""
        from animesion_scrapers import Crawler, Ledger, RateLimiter

        if self._kept is None:
            assert self._folder is not None, "read inside the session"
            ledger = self._open.enter_context(Ledger(_make_folder(self._folder)))
            crawler = self._open.enter_context(
                Crawler(
                    ledger,
                    user_agent=self.user_agent(),
                    limiter=self._limiter or RateLimiter(self.options.requests_per_second),
                    breakers=self._breakers,
                    robots=self._folder / "robots.sqlite" if self.options.robots else False,
                    opt_outs=self._folder / "robots.sqlite" if self.opt_outs else False,
                    connect_to=self.connect_to,
                    allow_private=self.options.allow_private,
                    host_connections=self._info().connections(),
                    deadline=self.options.deadline,
                    stall=self.options.stall,
                    max_bytes=self.options.max_bytes,
                    watch=self._watch,
                )
            )
            self._kept = ledger, crawler
        return self._kept

    def user_agent(self) -> str:
        """The User-Agent: program, version and contact."""
        return f"animesion/{version('animesion')} ({self.options.contact})"

    def _lines(self, url: str) -> list[bytes]:
        """The lines of a table at a URL of the user's."""
        from animesion_scrapers import Download, download_all

        [result] = download_all(
            [Download("table", url)],
            user_agent=self.user_agent(),
            limiter=self._limiter,
            connect_to=self.connect_to,
            allow_private=self.options.allow_private,
            deadline=900.0,
            max_bytes=_LARGEST_TABLE,
        )
        if result.status != "ok":
            raise AnimesionError(f"{url}: {result.status} {result.detail}".rstrip())
        return result.content.splitlines(keepends=True)

    def _fault(self, error: Exception) -> AnimesionError:
        return AnimesionError(f"{self.base_url() or self._info().url}: {error}")


def _age(post_id: str) -> tuple[float, float, str]:
    """Sort key of post ids: numbers on almost all sites, of an image or of a set and an image, that grow with time."""
    of_set, _, of_image = post_id.partition("-")
    numbers = [int(part) if part.isascii() and part.isdecimal() else math.inf for part in (of_set, of_image)]
    return numbers[0], numbers[1], post_id


def _make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
