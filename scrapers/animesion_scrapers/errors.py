"""The errors that callers of this package may see; each message is one sentence fit for a terminal."""

from __future__ import annotations


class ScraperError(Exception):
    """A site could not be read: what went wrong, and where."""


class StatusError(ScraperError):
    """A site answered with an HTTP status that means no.

    Attributes:
        status: The HTTP status code.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnsafeAddressError(ScraperError):
    """A URL that must not be fetched: not http(s), or a host that is not on the public internet."""


class HostDownError(ScraperError):
    """A host that is not asked any more in this run: it failed too often in a row, or wants to be left alone."""


class LedgerError(ScraperError):
    """The ledger of a crawl cannot be used: damaged, or written by a later version."""
