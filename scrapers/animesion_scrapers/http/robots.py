"""The Robots Exclusion Protocol (RFC 9309) and the opt-outs of `X-Robots-Tag`: what a site asks crawlers to leave.

Rules are parsed and kept here; `transfers` fetches the files. APIs have rules of their own and are not looked up.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from animesion_scrapers.http.host_memory import HostMemory

MAX_BYTES = 500 * 1024
"""Bytes of a robots.txt that are read; RFC 9309, 2.5 asks for at least 500 KiB."""

_KEPT = 86_400.0
"""Seconds that a robots.txt is used; RFC 9309, 2.4 says at most a day."""

_UNREACHABLE = 600.0
"""Seconds after which a host that could not say what it allows is asked again."""

_MOST_HOSTS = 10_000
"""Hosts whose rules are held in memory; the others' are on disk."""

_LONGEST_DELAY = 60.0
_UNRESERVED = "-._~"
_TOKEN = re.compile(r"[A-Za-z_-]+")
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of `X-Robots-Tag` that keep a file out of a dataset."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What one host allows one crawler.

    Attributes:
        patterns: Normalised path patterns, each with whether it allows.
        delay: Seconds that `Crawl-delay` (no part of the RFC) asks to leave between requests, at most 60.
    """

    patterns: tuple[tuple[str, bool], ...] = ()
    delay: float = 0.0

    def allows(self, path: str) -> bool:
        """Whether a path, with its query, may be fetched: the longest pattern decides, and among equals `Allow`."""
        if not self.patterns:
            return True
        path = _normal(path or "/")
        if path == "/robots.txt":
            return True
        best = max(
            ((len(pattern), allow) for pattern, allow in self.patterns if _matches(pattern, path)), default=(0, True)
        )
        return best[1]


ALLOW_ALL = Rules()
DISALLOW_ALL = Rules((("/", False),))


def parse(body: bytes, product: str) -> Rules:
    """The rules of a robots.txt for a crawler.

    Args:
        body: The file; what lies beyond `MAX_BYTES` is not read, and lines that mean nothing are passed over.
        product: The crawler's product token, such as `animesion`; compared without regard to case.
    """
    own: list[tuple[str, str]] = []
    other: list[tuple[str, str]] = []
    found = False
    agents: list[str] = []
    in_rules = False
    for line in body[:MAX_BYTES].decode("utf-8", "replace").removeprefix("\ufeff").splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key in ("user-agent", "useragent"):
            if in_rules:
                agents, in_rules = [], False
            match = _TOKEN.match(value)
            agents.append(value if value == "*" or not match else match[0].lower())
            found = found or agents[-1] == product.lower()
        elif key in ("allow", "disallow", "crawl-delay"):
            in_rules = True
            if product.lower() in agents:
                own.append((key, value))
            if "*" in agents:
                other.append((key, value))
    return _rules(own if found else other)


def product_token(user_agent: str) -> str:
    """The product token of a User-Agent: what stands before its first slash or blank."""
    match = _TOKEN.match(user_agent)
    return match[0].lower() if match else "*"


def opt_out(headers: Iterable[str], product: str) -> str:
    """The directive of the `X-Robots-Tag` headers by which a file is kept from datasets; empty when there is none.

    Args:
        headers: Their values. One may begin with the name of the crawler that it is meant for.
        product: This crawler's product token.
    """
    for header in headers:
        agent, colon, rest = header.partition(":")
        if colon and "," not in agent:
            if agent.strip().lower() not in (product.lower(), "*"):
                continue
            header = rest
        for directive in header.lower().split(","):
            if directive.strip() in OPT_OUTS:
                return directive.strip()
    return ""


class RobotsCache:
    """The rules of hosts that have been asked, kept for a day, on disk when there is a file for it."""

    def __init__(self, product: str, memory: Path | None = None) -> None:
        """Take up what an earlier process knew.

        Args:
            product: The crawler's product token.
            memory: An SQLite file to keep robots.txt files in.
        """
        self.product = product
        self._memory = HostMemory(memory)
        self._known: OrderedDict[str, tuple[float, Rules]] = OrderedDict()

    def close(self) -> None:
        """Close the file that remembers; it opens again when it is needed."""
        self._memory.close()

    def known(self, origin: str) -> Rules | None:
        """The rules of an origin (scheme, host and port), or None when its robots.txt must be fetched."""
        if origin not in self._known and (kept := self._memory.recall(origin)):
            until, text = kept
            self._take(origin, min(until, time.time() + _KEPT), parse(text.encode(), self.product))
        until, rules = self._known.get(origin, (0.0, None))
        return rules if time.time() < until else None

    def learn(self, origin: str, status: int, body: bytes) -> Rules:
        """Take in the answer to a request for robots.txt.

        Args:
            origin: Scheme, host and port.
            status: The HTTP status at the end of all redirects; 0 when there was no answer.
            body: The file.

        Returns:
            The file's rules; all is allowed after a status of 400 to 499, and nothing when the host failed.
        """
        now = time.time()
        if not 200 <= status < 500:
            self._take(origin, now + _UNREACHABLE, DISALLOW_ALL)
            return DISALLOW_ALL
        text = body[:MAX_BYTES].decode("utf-8", "replace") if status < 300 else ""
        rules = parse(text.encode(), self.product)
        self._take(origin, now + _KEPT, rules)
        self._memory.keep(origin, now + _KEPT, text)
        return rules

    def _take(self, origin: str, until: float, rules: Rules) -> None:
        self._known[origin] = (until, rules)
        self._known.move_to_end(origin)
        if len(self._known) > _MOST_HOSTS:
            self._known.popitem(last=False)


def _rules(lines: list[tuple[str, str]]) -> Rules:
    patterns: dict[str, bool] = {}
    delay = 0.0
    for key, value in lines:
        if key == "crawl-delay":
            with contextlib.suppress(ValueError):
                seconds = float(value)
                delay = max(delay, min(seconds, _LONGEST_DELAY)) if seconds > 0 else delay
        elif value:
            pattern = _normal(value)
            patterns[pattern] = patterns.get(pattern, False) or key == "allow"
    return Rules(tuple(patterns.items()), delay)


def _matches(pattern: str, path: str) -> bool:
    """Match `*` and a final `$` in time linear in both, unlike a regular expression on a hostile file."""
    anchored = pattern.endswith("$")
    first, *rest = (pattern[:-1] if anchored else pattern).split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    if not rest:
        return not anchored or position == len(path)
    for piece in rest[:-1] if anchored else rest:
        found = path.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return not anchored or (len(path) - len(rest[-1]) >= position and path.endswith(rest[-1]))


def _normal(path: str) -> str:
    """One spelling for all ways to percent-encode a path (RFC 9309, 2.2.2)."""
    pieces = re.split(r"(%[0-9A-Fa-f]{2})", path)
    out = []
    for piece in pieces:
        if len(piece) == 3 and piece[0] == "%":
            byte = unquote_to_bytes(piece)
            letter = byte.decode("latin-1")
            out.append(letter if letter.isascii() and (letter.isalnum() or letter in _UNRESERVED) else piece.upper())
        else:
            out.append(quote(piece, safe="/?&=:;,+!*'()@$~%#[]|^`{}<>\"\\ "))
    return "".join(out)
