"""Normalisation of licence names.

Creative Commons licences become SPDX identifiers such as `CC-BY-SA-4.0`, without the version where none is stated.
Other text stays as the site writes it: a licence is never guessed.
"""

from __future__ import annotations

import re

PUBLIC_DOMAIN = "public domain"
RESERVED = "all rights reserved"

_URL = re.compile(
    r"^https?://(?:www\.)?creativecommons\.org/(licenses|publicdomain)/([a-z+-]+)(?:/(\d\.\d))?(?:/([a-z]{2,3}))?(?=/|$)"
)
_CODE = re.compile(r"cc[ _-]?(by(?:[ _-](?:nc|nd|sa)){0,2})(?:[ _-]v?(\d)[._](\d))?(?:[ _-]([a-z]{2,3}))?", re.ASCII)
_ZERO = re.compile(r"cc[ _-]?(?:0|zero)(?:[ _-]v?(\d)[._](\d))?", re.ASCII)


def licence_id(stated: str) -> str:
    """The identifier of the licence in a text or URL.

    Args:
        stated: The licence as the site states it: `cc-by-nc`, `CC BY-SA 3.0 de`, `CC_BY_4_0`,
            `http://creativecommons.org/licenses/by/4.0/legalcode`, or free text.

    Returns:
        An identifier such as `CC-BY-NC`, `CC-BY-SA-3.0-DE`, `CC0-1.0` or `public domain`; else the text on one line.
    """
    words = " ".join(stated.split())
    lower = words.lower()
    if found := _URL.match(lower):
        kind, name, version, port = found.groups()
        if kind == "publicdomain":
            return {"zero": "CC0-1.0", "mark": PUBLIC_DOMAIN}.get(name, words)
        return _spdx(name, version or "", port or "") if re.fullmatch(r"by(?:-(?:nc|nd|sa)){0,2}", name) else words
    if _ZERO.fullmatch(lower):
        return "CC0-1.0"
    if found := _CODE.fullmatch(lower):
        kinds, major, minor, port = found.groups()
        return _spdx(re.sub("[ _]", "-", kinds), f"{major}.{minor}" if major else "", port or "")
    if lower in {"public domain", "pd", "pdm", "publicdomain"}:
        return PUBLIC_DOMAIN
    return words


def _spdx(kinds: str, version: str, port: str) -> str:
    return "-".join(part for part in ("CC", kinds.upper(), version, port.upper()) if part)
