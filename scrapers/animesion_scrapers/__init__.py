"""Polite crawlers for picture sites, and a bulk downloader.

A crawler turns a site's API into `Post`s, the downloader turns URLs into checked bytes; what becomes of them is left to
the caller. Names load on first use, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from animesion_scrapers.danbooru import Danbooru
    from animesion_scrapers.downloads import REASONS, Download, Downloaded, download, download_all
    from animesion_scrapers.errors import ScraperError, StatusError, UnsafeAddressError
    from animesion_scrapers.limits import RateLimiter
    from animesion_scrapers.post import Post
    from animesion_scrapers.retries import Retries

__all__ = [
    "REASONS",
    "Danbooru",
    "Download",
    "Downloaded",
    "Post",
    "RateLimiter",
    "Retries",
    "ScraperError",
    "StatusError",
    "UnsafeAddressError",
    "download",
    "download_all",
]

_MODULES = {
    "Danbooru": "danbooru",
    "Download": "downloads",
    "Downloaded": "downloads",
    "Post": "post",
    "REASONS": "downloads",
    "RateLimiter": "limits",
    "Retries": "retries",
    "ScraperError": "errors",
    "StatusError": "errors",
    "UnsafeAddressError": "errors",
    "download": "downloads",
    "download_all": "downloads",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
