"""What a host says about its paths: robots.txt (RFC 9309), with `Content-Usage`, and `/.well-known/tdmrep.json`.

Rules are parsed and cached here; `transfers` fetches the files. The robots.txt of an API is not read: it has terms of
its own. Opt-outs in responses are read in `opt_outs`.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from animesion_scrapers.http.host_memory import HostMemory
from animesion_scrapers.http.opt_outs import tdmrep_rules, usage_reservation

MAX_BYTES = 500 * 1024
"""Bytes of a robots.txt that are read; RFC 9309, 2.5 requires at least 500 KiB."""

_KEPT = 86_400.0
"""Seconds that a robots.txt is cached; RFC 9309, 2.4 allows at most a day."""

_UNREACHABLE = 600.0
"""Seconds until robots.txt is requested again from a host that failed."""

_MOST_HOSTS = 10_000
"""Hosts whose rules are kept in memory; those of others are on disk."""

_MOST_VERDICTS = 4096
"""Paths of a host whose verdict is kept."""

_QUICK = 100_000
"""Comparisons of letters that take about a millisecond."""

_LONGEST_DELAY = 60.0
"""Seconds between requests that `Crawl-delay` can ask for."""

_UNRESERVED = "-._~"
_TOKEN = re.compile(r"[A-Za-z_-]+")
_USAGES = ("content-usage", "content-signal")
"""Rules about the use of what was fetched: AIPREF's, and the one that Cloudflare's robots.txt files have."""

_PREFERENCES = re.compile(r"(?:(/\S*|\*\S*)\s+)?(.*)")


class Rules:
    """The rules of one host for one crawler.

    Attributes:
        delay: Seconds between requests from `Crawl-delay` (not part of the RFC), at most 60.
        usage: Rules about the use of the files, as opposed to access to them; None if there are none.
    """

    __slots__ = ("_evidence", "_lengths", "_prefixes", "_verdicts", "_wildcards", "delay", "usage")

    def __init__(
        self,
        patterns: Mapping[str, bool] | None = None,
        delay: float = 0.0,
        *,
        evidence: Mapping[str, str] | None = None,
        usage: Rules | None = None,
    ) -> None:
        """Index the patterns, so that a path is compared with few of them.

        Args:
            patterns: Whether each normalised path pattern allows.
            delay: Seconds between requests.
            evidence: What the file says about a pattern.
            usage: Rules about use.
        """
        self.delay = delay
        self.usage = usage
        self._evidence = evidence or {}
        self._prefixes: dict[str, bool] = {}
        self._wildcards: list[tuple[int, bool, str, str, list[str], bool]] = []
        for pattern, allow in (patterns or {}).items():
            anchored = pattern.endswith("$")
            first, *rest = (pattern[:-1] if anchored else pattern).split("*")
            if rest or anchored:
                self._wildcards.append((len(pattern), allow, pattern, first, rest, anchored))
            else:
                self._prefixes[pattern] = allow
        self._lengths = sorted({len(prefix) for prefix in self._prefixes}, reverse=True)
        self._wildcards.sort(key=lambda each: each[:2], reverse=True)
        self._verdicts: dict[str, tuple[bool, str]] = {}

    def is_quick(self, path: str) -> bool:
        """Whether `allows` takes about a millisecond at most; a hostile file makes it take some tenths of a second."""
        quick = path in self._verdicts or len(self._wildcards) * len(path) + 20 * len(path) < _QUICK
        return quick and (self.usage is None or self.usage.is_quick(path))

    def allows(self, path: str) -> bool:
        """Whether a path with its query may be fetched: the longest match decides, and `Allow` among equals."""
        return self._verdict(path)[0]

    def evidence(self, path: str) -> str:
        """What the file says about a path that it does not allow; empty for a file that says nothing more."""
        allowed, pattern = self._verdict(path)
        return "" if allowed else self._evidence.get(pattern, "")

    def _verdict(self, path: str) -> tuple[bool, str]:
        """Whether a path is allowed, and the pattern that decides."""
        if not self._prefixes and not self._wildcards:
            return True, ""
        if (known := self._verdicts.get(path)) is not None:
            return known
        if len(self._verdicts) >= _MOST_VERDICTS:
            self._verdicts.clear()
        verdict = self._verdicts[path] = self._decide(_normalise(path or "/"))
        return verdict

    def _decide(self, path: str) -> tuple[bool, str]:
        if path == "/robots.txt":
            return True, ""
        longest, verdict = 0, True
        for length in self._lengths:
            if (allow := self._prefixes.get(path[:length])) is not None and length <= len(path):
                longest, verdict = length, allow
                break
        decisive = path[:longest]
        for (
            length,
            allow,
            pattern,
            first,
            rest,
            anchored,
        ) in self._wildcards:  # longest first, and `Allow` before `Disallow`
            if length < longest or (length == longest and verdict):
                break
            if _matches(path, first, rest, anchored):
                return allow or (length == longest and verdict), pattern
        return verdict, decisive


ALLOW_ALL = Rules()
DISALLOW_ALL = Rules({"/": False})


def parse(body: bytes, product: str) -> Rules:
    """Parse the rules of a robots.txt for one crawler, in time linear in its length.

    Args:
        body: The file; bytes beyond `MAX_BYTES` and unknown lines are ignored.
        product: The crawler's product token, such as `animesion`; case-insensitive.
    """
    return _parse_text(_text(body), product)


def _text(body: bytes) -> str:
    return body[:MAX_BYTES].decode("utf-8", "replace").removeprefix("\ufeff")


def _parse_text(text: str, product: str) -> Rules:
    product = product.lower()
    own: list[tuple[str, str]] = []
    default: list[tuple[str, str]] = []
    has_own_group = False
    group_is_own = group_is_default = False
    in_rules = False
    for line in text.splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key in ("user-agent", "useragent"):
            if in_rules:  # the first user agent after a rule starts a new group
                group_is_own = group_is_default = in_rules = False
            match = _TOKEN.match(value)
            agent = match[0].lower() if match else value
            group_is_own = group_is_own or agent == product
            group_is_default = group_is_default or agent == "*"
            has_own_group = has_own_group or group_is_own
        elif key in ("allow", "disallow", "crawl-delay", *_USAGES):
            in_rules = True
            if group_is_own:
                own.append((key, value))
            if group_is_default:
                default.append((key, value))
    return _make_rules(own if has_own_group else default)


def product_token(user_agent: str) -> str:
    """The product token of a User-Agent: the part before its first slash or space."""
    match = _TOKEN.match(user_agent)
    return match[0].lower() if match else "*"


class RobotsCache:
    """The rules of hosts, cached for a day, and on disk if there is a file for them; thread-safe.

    Attributes:
        path: Of the file that has the rules.
    """

    path = "/robots.txt"
    _suffix = ""

    def __init__(self, product: str, memory: Path | None = None) -> None:
        """Start with the rules that an earlier process stored.

        Args:
            product: The crawler's product token.
            memory: An SQLite file for robots.txt files; None keeps them in memory only.
        """
        self.product = product
        self._memory = HostMemory(memory)
        self._known: OrderedDict[str, tuple[float, Rules]] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file; it opens again when needed."""
        self._memory.close()

    def at_hand(self, origin: str) -> Rules | None:
        """The rules of an origin, if they are in memory; never blocks."""
        until, rules = self._known.get(origin, (0.0, None))
        return rules if time.monotonic() < until else None

    def known(self, origin: str) -> Rules | None:
        """The rules of an origin (scheme, host and port), or None if its robots.txt must be fetched."""
        if origin not in self._known and (stored := self._memory.recall(origin + self._suffix)):
            left, text = stored
            self._add(origin, min(left, _KEPT), self._parse(text))
        return self.at_hand(origin)

    def learn(self, origin: str, status: int, body: bytes) -> Rules:
        """Add the response to a request for robots.txt.

        Args:
            origin: Scheme, host and port.
            status: The HTTP status after all redirects; 0 without a response.
            body: The file.

        Returns:
            The file's rules. A status of 400 to 499 allows everything, and a failed host nothing.
        """
        if not 200 <= status < 500:
            self._add(origin, _UNREACHABLE, DISALLOW_ALL)
            return DISALLOW_ALL
        text = _text(body) if status < 300 else ""
        rules = self._parse(text)
        self._add(origin, _KEPT, rules)
        self._memory.keep(origin + self._suffix, _KEPT, text)
        return rules

    def _parse(self, text: str) -> Rules:
        return _parse_text(text, self.product)

    def _add(self, origin: str, seconds: float, rules: Rules) -> None:
        with self._lock:
            self._known[origin] = (time.monotonic() + seconds, rules)
            self._known.move_to_end(origin)
            if len(self._known) > _MOST_HOSTS:
                self._known.popitem(last=False)


class TdmCache(RobotsCache):
    """The reserved paths of hosts by the TDM Reservation Protocol, cached like robots.txt, in the same file on disk.

    Every location that matches a path counts, so a 0 for a file does not lift the 1 of its folder.
    """

    path = "/.well-known/tdmrep.json"
    _suffix = path

    def _parse(self, text: str) -> Rules:
        evidence = {_normalise(pattern): told for pattern, told in tdmrep_rules(text).items()}
        return Rules(dict.fromkeys(evidence, False), evidence=evidence)


def _make_rules(lines: list[tuple[str, str]]) -> Rules:
    patterns: dict[str, bool] = {}
    usages: dict[str, bool] = {}
    evidence: dict[str, str] = {}
    delay = 0.0
    for key, value in lines:
        if key == "crawl-delay":
            with contextlib.suppress(ValueError):
                seconds = float(value)
                delay = max(delay, min(seconds, _LONGEST_DELAY)) if seconds > 0 else delay
        elif key in _USAGES:
            if stated := _PREFERENCES.fullmatch(value):
                pattern = _normalise(stated[1] or "/")
                member = usage_reservation(stated[2])
                usages[pattern] = usages.get(pattern, True) and not member
                if member:
                    evidence.setdefault(
                        pattern, f"robots.txt: {key.title()}: {(stated[1] or '')[:80]} {member}".replace("  ", " ")
                    )
        elif value:
            pattern = _normalise(value)
            patterns[pattern] = patterns.get(pattern, False) or key == "allow"
    return Rules(patterns, delay, usage=Rules(usages, evidence=evidence) if evidence else None)


def _matches(path: str, first: str, rest: list[str], anchored: bool) -> bool:
    """Match the pieces between `*`, and a final `$`, in linear time, unlike a regular expression on a hostile file."""
    if not path.startswith(first):
        return False
    position = len(first)
    if not rest:
        return not anchored or position == len(path)
    # the leftmost match of each piece leaves most room for the next; an anchored last piece is checked at the end
    for piece in rest[:-1] if anchored else rest:
        found = path.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return not anchored or (len(path) - len(rest[-1]) >= position and path.endswith(rest[-1]))


def _normalise(path: str) -> str:
    """Percent-encode a path in the one way of RFC 9309, 2.2.2."""
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
