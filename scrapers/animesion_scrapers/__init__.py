"""Polite crawlers for image sites, and a bulk downloader.

A site turns an API into `Post`s, the downloader turns URLs into checked bytes, and a crawl records both in a ledger.
Names load on first use, so importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from animesion_scrapers.crawl.crawler import Crawler, CrawlStatus
    from animesion_scrapers.crawl.ledger import Ledger, LedgerEntry
    from animesion_scrapers.errors import HostDownError, LedgerError, ScraperError, StatusError, UnsafeAddressError
    from animesion_scrapers.http.breakers import Breakers
    from animesion_scrapers.http.downloads import REASONS, Download, Downloaded, download, download_all
    from animesion_scrapers.http.limits import HostLimit, RateLimiter
    from animesion_scrapers.http.retries import Retries
    from animesion_scrapers.post import Post
    from animesion_scrapers.sites import Site, SiteInfo
    from animesion_scrapers.sites.danbooru import Danbooru

__all__ = [
    "REASONS",
    "Breakers",
    "CrawlStatus",
    "Crawler",
    "Danbooru",
    "Download",
    "Downloaded",
    "HostDownError",
    "HostLimit",
    "Ledger",
    "LedgerEntry",
    "LedgerError",
    "Post",
    "RateLimiter",
    "Retries",
    "ScraperError",
    "Site",
    "SiteInfo",
    "StatusError",
    "UnsafeAddressError",
    "download",
    "download_all",
]

_MODULES = {
    "Breakers": "http.breakers",
    "CrawlStatus": "crawl.crawler",
    "Crawler": "crawl.crawler",
    "Danbooru": "sites.danbooru",
    "Download": "http.downloads",
    "Downloaded": "http.downloads",
    "LedgerEntry": "crawl.ledger",
    "HostDownError": "errors",
    "HostLimit": "http.limits",
    "Ledger": "crawl.ledger",
    "LedgerError": "errors",
    "Post": "post",
    "REASONS": "http.downloads",
    "RateLimiter": "http.limits",
    "Retries": "http.retries",
    "ScraperError": "errors",
    "Site": "sites",
    "SiteInfo": "sites",
    "StatusError": "errors",
    "UnsafeAddressError": "errors",
    "download": "http.downloads",
    "download_all": "http.downloads",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
