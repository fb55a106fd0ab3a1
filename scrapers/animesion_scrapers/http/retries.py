"""When to ask again and how long to wait first: pure rules, shared by the two HTTP clients."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses that may pass by themselves within minutes (those above 504 are Cloudflare's)."""

BACK_OFF = frozenset({429, 503, 529})
"""Statuses by which a host says that it has too much to do, so that every request to it should wait."""

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5


@dataclass(frozen=True, slots=True)
class Retries:
    """Exponential backoff with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Attributes:
        attempts: How often one thing is asked for in all.
        base: Bound in seconds of the wait before the second attempt, doubled for each one after it.
        cap: The longest wait in seconds. A host that asks for a longer one is left alone until a later run.
    """

    attempts: int = 5
    base: float = 1.0
    cap: float = 60.0

    def delay(self, attempt: int, retry_after: str = "") -> float:
        """Seconds to wait after failed attempt number `attempt` (from 0).

        Args:
            attempt: The attempt that failed.
            retry_after: The `Retry-After` header of the answer, if any: the wait is at least that, up to the cap.
        """
        backoff = random.uniform(0.0, self.base * 2.0 ** min(attempt, 30))
        return min(self.cap, max(backoff, seconds_asked(retry_after)))

    def too_long(self, retry_after: str) -> bool:
        """Whether a `Retry-After` header asks for more patience than a run has."""
        return seconds_asked(retry_after) > self.cap


def seconds_asked(retry_after: str) -> float:
    """Read a `Retry-After` header, seconds or an HTTP date; 0 when it is absent, past or nonsense."""
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


def may_pass(status: int) -> bool:
    """Whether a later run should ask again after this HTTP status; a refusal (401, 404, 410, 422, 451) is final."""
    return status in RETRIED or status >= 500


def status_text(status: int) -> str:
    """The status with its standard phrase, such as `404 Not Found`."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
