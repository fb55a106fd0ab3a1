"""Detection of web pages and error documents that servers send in place of images, by their first bytes.

Whether an image is complete and readable is checked by its decoder.
"""

from __future__ import annotations

import re

_PAGE = re.compile(rb"<(?:!doctype\s+html|html|head|body|script|meta|title|center|h1)\b", re.IGNORECASE)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_CHALLENGE = re.compile(
    rb"just a moment|cf[-_]chl|challenge-platform|captcha|ddos[- ](?:guard|protection)|are you a (?:robot|human)"
    rb"|check(?:ing|s)? (?:if )?(?:your|the) (?:web ?)?(?:browser|connection)"
    rb"|verify(?:ing)? (?:that )?you are (?:a )?human"
    rb"|one more step|attention required|security (?:check|verification)|bot (?:check|verification|protection)"
    rb"|unusual traffic|enable javascript and cookies|_incapsula_|sucuri_|anubis_|managed challenge|__ddg\d|px-captcha",
    re.IGNORECASE,
)
_BLANK = b"\xef\xbb\xbf \t\r\n"
_HEAD = 4096


def document_kind(content: bytes) -> str:
    """`HTML page`, `XML document` or `JSON document` for bytes of that kind; empty for others, and for SVG images."""
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
    """Whether a web page is a firewall's challenge to suspected bots.

    Args:
        content: The body, or its beginning.
        mitigated: The `cf-mitigated` header, by which Cloudflare marks its challenges.
    """
    return mitigated == "challenge" or bool(_CHALLENGE.search(content[: 4 * _HEAD]))
