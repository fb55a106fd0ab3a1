"""What bytes are, by their magic numbers and first words, as far as a downloader must know.

It tells an image from the web page or the error document that some servers send in its place. Whether an image is
whole and readable is left to whoever decodes it.
"""

from __future__ import annotations

import re

_PAGE = re.compile(rb"<(?:!doctype\s+html|html|head|body|script|meta|title|center|h1)\b", re.IGNORECASE)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_CHALLENGE = re.compile(
    rb"just a moment|cf[-_]chl|challenge-platform|captcha|ddos-guard|are you a robot", re.IGNORECASE
)
_BLANK = b"\xef\xbb\xbf \t\r\n"
_HEAD = 4096


def document_kind(content: bytes) -> str:
    """`HTML page`, `XML document` or `JSON document` for bytes that are one; empty for anything else.

    SVG counts as no document: it is an image.
    """
    head = content[:_HEAD].lstrip(_BLANK)
    if head[:1] in (b"{", b"["):
        return "JSON document" if head[1:64].lstrip()[:1] in (b'"', b"}", b"]", b"{", b"[") else ""
    if head[:1] != b"<":
        return ""
    head = _COMMENT.sub(b"", head).lstrip(_BLANK)
    if _PAGE.match(head):
        return "HTML page"
    if head.startswith(b"<?xml"):
        if _PAGE.search(head):
            return "HTML page"
        return "" if b"<svg" in head else "XML document"
    return ""


def is_challenge(content: bytes, mitigated: str = "") -> bool:
    """Whether a web page is one that a firewall shows to those whom it takes for robots.

    Args:
        content: The body, or its beginning.
        mitigated: The `cf-mitigated` header, by which Cloudflare says so itself.
    """
    return mitigated == "challenge" or bool(_CHALLENGE.search(content[: 4 * _HEAD]))
