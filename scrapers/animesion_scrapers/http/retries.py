"""Rules for retries, shared by the two HTTP clients: which statuses to retry, and how long to wait."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Temporary statuses, retried within a run (those above 504 are Cloudflare's)."""

BACK_OFF = frozenset({429, 503, 529})
"""Statuses of an overloaded host, to which all requests pause."""

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5


@dataclass(frozen=True, slots=True)
class Retries:
    """Exponential backoff with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Attributes:
        attempts: Most requests for one item.
        base: Upper bound in seconds of the wait before the second attempt, doubled for each later attempt.
        cap: Longest wait in seconds. A host that asks for a longer one gets no more requests in this run.
    """

    attempts: int = 5
    base: float = 1.0
    cap: float = 60.0

    def delay(self, attempt: int, asked: float = 0.0) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 0).

        Args:
            attempt: The attempt that failed.
            asked: Seconds that the host asked for, see `asked_pause`: the least wait, up to the cap.
        """
        backoff = random.uniform(0.0, self.base * 2.0 ** min(attempt, 30))
        return min(self.cap, max(backoff, asked))

    def too_long(self, asked: float) -> bool:
        """Whether a host asks for a longer wait than the cap."""
        return asked > self.cap


def asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the `Retry-After` header of a response; 0 when absent, past or malformed.

    The header is a number of seconds or a date. A date is compared with the `Date` of the same response, which has the
    clock of the host: that of this machine may be hours off, or be set while it waits.
    """
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    until = _http_date(text)
    now = _http_date(headers.get("Date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds()) if until else 0.0


def _http_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date.replace(tzinfo=UTC) if date.tzinfo is None else date


def is_temporary(status: int) -> bool:
    """Whether a later run should retry after this HTTP status; other statuses (401, 404, 410, 422, 451) are final."""
    return status in RETRIED or status >= 500


def status_text(status: int) -> str:
    """The status with its standard phrase, such as `404 Not Found`."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
