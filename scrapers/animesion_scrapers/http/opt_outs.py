"""Machine-readable opt-outs of hosts: in headers, in `/.well-known/tdmrep.json` and in the HTML of pages.

Read here are `X-Robots-Tag`, AIPREF's `Content-Usage` (draft-ietf-aipref-attach and draft-ietf-aipref-vocab), the TDM
Reservation Protocol (W3C community group report, 2024) and `noai` in robots metas. Where several of them speak, the
most restrictive wins: one reservation is enough, and no other statement lifts it. The rules of robots.txt are in
`robots`; what image files say themselves is not read in this package.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

ROBOTS = "robots opt-out"
USAGE = "usage opt-out"
TDM = "tdm opt-out"

PAGE_BYTES = 256 * 1024
"""Bytes of a page in which metas are looked for."""

DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of `X-Robots-Tag` that keep a file out of a dataset."""

_PAGE_DIRECTIVES = frozenset({"noai", "noimageai", "noimageindex"})
"""Directives of a page's meta that keep its images out; `noindex` is about the page itself."""

_TRAINING = frozenset({"train-ai", "ai-train", "train-genai", "genai"})
"""Categories of use that a dataset is made for, or that nobody can keep it from."""

_BROADER = frozenset({"ai", "tdm", "bots", "all"})
"""Categories that include training, and decide where none of `_TRAINING` is stated."""

_NO = frozenset({"n", "no", "?0"})
_MEMBER = re.compile(r'([A-Za-z*][A-Za-z0-9_.*-]{0,63})\s{0,9}=\s{0,9}("[^"]{0,64}"|[^,;\s"]{1,64})')
_LONGEST = 200
_META = re.compile(rb"<meta\b([^<>]{1,4096}+)>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"""([A-Za-z-]{1,40})\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""")


class OptOut(NamedTuple):
    """A reservation that was found.

    Attributes:
        reason: `ROBOTS`, `USAGE` or `TDM`.
        evidence: What was said, and where.
    """

    reason: str
    evidence: str


class Headers(Protocol):
    """The headers of a response, of which each may occur several times."""

    def getall(self, key: str, default: tuple[str, ...], /) -> Iterable[str]:
        """All values of a header."""


def robots_directive(headers: Iterable[str], product: str) -> str:
    """The directive of the `X-Robots-Tag` headers that keeps a file out of datasets; empty when there is none.

    Args:
        headers: Values of the headers; one that starts with a crawler's name applies to that crawler only.
        product: This crawler's product token.
    """
    for header in headers:
        agent, colon, rest = header.partition(":")
        if colon and "," not in agent:
            if agent.strip().lower() not in (product.lower(), "*"):
                continue
            header = rest
        for directive in header.lower().split(","):
            if directive.strip() in DIRECTIVES:
                return directive.strip()
    return ""


def usage_reservation(preferences: str) -> str:
    """The member of a `Content-Usage` value that reserves training, such as `train-ai=n`; empty when there is none.

    A preference about training decides over one about a broader category, of which it is a part: `bots=n, train-ai=y`
    reserves nothing. Of two about training, the stricter one decides. Unknown categories are ignored.

    Args:
        preferences: A dictionary of RFC 9651, such as `search=y, train-ai=n`, or its members by `;`.
    """
    broader, stated = "", False
    for name, value in _MEMBER.findall(preferences):
        category, preference = name.lower(), value.strip('"').lower()
        if category in _TRAINING:
            stated = True
            if preference in _NO:
                return f"{category}={preference}"
        elif category in _BROADER and preference in _NO:
            broader = broader or f"{category}={preference}"
    return "" if stated else broader


def header_opt_outs(headers: Headers, product: str) -> list[OptOut]:
    """The reservations in the headers of a response.

    Args:
        headers: Of the response.
        product: This crawler's product token.
    """
    found = []
    if directive := robots_directive(headers.getall("X-Robots-Tag", ()), product):
        found.append(OptOut(ROBOTS, f"X-Robots-Tag: {directive}"))
    if member := usage_reservation(",".join(headers.getall("Content-Usage", ()))):
        found.append(OptOut(USAGE, f"Content-Usage: {member}"))
    for value in headers.getall("tdm-reservation", ()):
        if is_reserved(value):
            policy = next(iter(headers.getall("tdm-policy", ())), "")
            found.append(OptOut(TDM, tdm_evidence("tdm-reservation", value, policy)))
            break
    return found


def is_reserved(value: object) -> bool:
    """Whether a `tdm-reservation` reserves: anything but 0, as a value that nobody defined is no permission."""
    return str(value).strip().lower() not in {"0", "", "none", "false", "0.0"}


def tdm_evidence(where: str, value: object, policy: object) -> str:
    """One line for a TDM reservation, with the URL of its policy if it names one."""
    text = f"{where}: {_line(value, 20)}"
    return f"{text} (policy {_line(policy)})" if isinstance(policy, str) and policy.strip() else text


def page_opt_outs(page: bytes, product: str) -> list[OptOut]:
    """The reservations in the metas of an HTML page: `robots`, the crawler's own name, and `tdm-reservation`.

    Args:
        page: The page; bytes beyond `PAGE_BYTES` are ignored.
        product: This crawler's product token.
    """
    found, tdm, policy = [], "", ""
    for name, content in _metas(page[:PAGE_BYTES]):
        if name in {"robots", product.lower()}:
            directives = {directive.strip() for directive in content.lower().split(",")}
            if named := sorted(directives & _PAGE_DIRECTIVES):
                found.append(OptOut(ROBOTS, f"meta {name}: {', '.join(named)}"))
        elif name == "tdm-reservation" and is_reserved(content):
            tdm = tdm or content
        elif name == "tdm-policy":
            policy = policy or content
    return [*found, OptOut(TDM, tdm_evidence("meta tdm-reservation", tdm, policy))] if tdm else found


def tdmrep_rules(text: str) -> Mapping[str, str]:
    """The reserved locations of a `/.well-known/tdmrep.json`, each with the evidence; a 0 is no rule.

    Something that is no JSON at all, such as the page that a host sends for every path, reserves nothing. JSON that is
    damaged, too deep or not of the protocol's form reserves everything: somebody wanted to say something.
    """
    stripped = text.lstrip("\ufeff \t\r\n")
    if stripped[:1] not in ("[", "{"):
        return {}
    try:
        document = json.loads(stripped)
    except (ValueError, RecursionError):
        return {"/": "tdmrep.json: not readable as JSON, so everything counts as reserved"}
    rules: dict[str, str] = {}
    for entry in document if isinstance(document, list) else [document]:
        location = entry.get("location") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(location, str) or "tdm-reservation" not in entry:
            return {"/": "tdmrep.json: an entry without location and tdm-reservation, so everything counts as reserved"}
        value = entry["tdm-reservation"]
        if isinstance(value, (list, dict)):  # deep ones cannot even be printed
            value = "no number"
        if is_reserved(value):
            pattern = location if location.startswith(("/", "*")) else f"/{location}"
            where = f"tdmrep.json: {_line(location, 80)}: tdm-reservation"
            rules.setdefault(pattern, tdm_evidence(where, value, entry.get("tdm-policy")))
    return rules


def _metas(page: bytes) -> Iterable[tuple[str, str]]:
    """Name and content of each meta outside comments, in linear time."""
    if page[:2] in (b"\xff\xfe", b"\xfe\xff"):
        page = page.decode("utf-16", "replace").encode()
    for match in _META.finditer(_without_comments(page)):
        attributes: dict[str, str] = {}
        for name, value in _ATTRIBUTE.findall(match[1].decode("utf-8", "replace")):
            attributes.setdefault(name.lower(), html.unescape(value.strip("\"'")).strip())
        yield attributes.get("name", "").lower(), attributes.get("content", "")


def _without_comments(page: bytes) -> bytes:
    pieces, at = [], 0
    while (start := page.find(b"<!--", at)) >= 0:
        pieces.append(page[at:start])
        end = page.find(b"-->", start + 4)
        if end < 0:  # browsers end such a comment with the page
            return b"".join(pieces)
        at = end + 3
    pieces.append(page[at:])
    return b"".join(pieces)


def _line(value: object, longest: int = _LONGEST) -> str:
    text = str(value)[: longest + 1]
    return "".join(letter if letter.isprintable() else "?" for letter in text.strip())[:longest]
