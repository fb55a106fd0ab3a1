"""Errors of this package; each message is one sentence for the terminal."""

from __future__ import annotations


class ScraperError(Exception):
    """A site, table or setting cannot be used."""


class StatusError(ScraperError):
    """A site refused a request, or kept failing, with an HTTP status.

    Attributes:
        status: The HTTP status code.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnsafeAddressError(ScraperError):
    """A URL that must not be fetched: not http(s), or a host that is not on the public internet."""


class HostDownError(ScraperError):
    """A host gets no more requests in this run: it failed too often in a row, or asked for a long pause."""


class LedgerError(ScraperError):
    """The ledger of a crawl cannot be used: damaged, or written by a later version."""
