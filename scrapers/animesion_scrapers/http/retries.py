"""Rules for retries, shared by the two HTTP clients: which statuses to retry, and how long to wait."""

from __future__ import annotations

import random
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

    def delay(self, attempt: int, retry_after: str = "") -> float:
        """Seconds to wait after failed attempt number `attempt` (from 0).

        Args:
            attempt: The attempt that failed.
            retry_after: The `Retry-After` header of the response, if any: the least wait, up to the cap.
        """
        backoff = random.uniform(0.0, self.base * 2.0 ** min(attempt, 30))
        return min(self.cap, max(backoff, retry_after_seconds(retry_after)))

    def too_long(self, retry_after: str) -> bool:
        """Whether a `Retry-After` header asks for a longer wait than the cap."""
        return retry_after_seconds(retry_after) > self.cap


def retry_after_seconds(retry_after: str) -> float:
    """Seconds to wait by a `Retry-After` header (seconds or an HTTP date); 0 when absent, past or malformed."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def is_temporary(status: int) -> bool:
    """Whether a later run should retry after this HTTP status; other statuses (401, 404, 410, 422, 451) are final."""
    return status in RETRIED or status >= 500


def status_text(status: int) -> str:
    """The status with its standard phrase, such as `404 Not Found`."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
