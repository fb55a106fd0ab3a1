"""Masking of secrets in texts for the terminal, logs and files: keys that are known, and what looks like one.

Messages quote what sites and stores send, and a site may send back the key that it was sent, in any encoding.
"""

from __future__ import annotations

import base64
import functools
import html
import os
import re

MASK = "***"

#: What follows a scheme of HTTP authentication, tokens of the Hugging Face Hub and keys of AWS.
_TOKENS = re.compile(
    r"(?i:(?<=\bbasic )|(?<=\bbearer ))[^\s\"',;]{6,}|\bhf_[A-Za-z0-9]{4,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}"
)
#: User and password, and the query, in a URL.
_USER = re.compile(r"(?<=//)[^/@\s]{0,500}@")
_QUERY = re.compile(r"(://[^\s?#]{0,500}\?)[^\s\"'>]+")
_SHORT = 4


class Mask:
    """Replaces secrets in texts by `***`."""

    def __init__(self, *secrets: str) -> None:
        """Prepare the patterns.

        Args:
            secrets: Known secrets, such as the user and the key of a site. They are found as they are, percent-encoded,
                escaped for JSON or HTML, in hexadecimal, and in Base64 with or without other text around them. One of
                fewer than four letters is masked where it is a word of its own.
        """
        forms = [form for secret in secrets if secret for form in _forms(secret)]
        # longest first: an alternation takes the first that matches
        self._known = re.compile("|".join(sorted(forms, key=len, reverse=True)), re.IGNORECASE) if forms else None

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        if self._known is not None:
            text = self._known.sub(MASK, text)
        text = _TOKENS.sub(MASK, text)
        return _QUERY.sub(rf"\1{MASK}", _USER.sub(f"{MASK}@", text))


_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def mask(text: str) -> str:
    """The text without what looks like a secret, and without the keys of stores in the environment."""
    return _of_environment(tuple(os.environ.get(name, "") for name in _VARIABLES))(text)


@functools.lru_cache(maxsize=8)
def _of_environment(secrets: tuple[str, ...]) -> Mask:
    return Mask(*secrets)


def _forms(secret: str) -> list[str]:
    """Patterns of a secret in every encoding."""
    plain = _spelled(secret)
    if len(secret) < _SHORT:
        return [rf"(?<!\w){plain}(?!\w)"]
    return [plain, re.escape(secret.encode().hex()), *_base64_forms(secret.encode())]


def _spelled(secret: str) -> str:
    """A pattern in which each character may be encoded on its own: encoders differ in which ones they leave as is."""
    return "".join(map(_letter, secret))


def _letter(letter: str) -> str:
    # Repeats are bounded, so that the time is linear in the text.
    code = ord(letter)
    units = letter.encode("utf-16-be").hex()
    forms = [
        rf"\\{{0,4}}{re.escape(letter)}",
        # encoded twice, `%2D` is `%252D`
        "".join(f"%(?:25){{0,2}}{byte:02x}" for byte in letter.encode()),
        "".join(rf"\\{{1,4}}u{units[at : at + 4]}" for at in range(0, len(units), 4)),
        rf"&\#0{{0,4}}{code};?",
        rf"&\#x0{{0,4}}{code:x};?",
    ]
    if (named := html.escape(letter)) != letter:
        forms.append(re.escape(named))
    if letter == " ":
        forms.append(r"\+")
    return f"(?:{'|'.join(forms)})"


def _base64_forms(secret: bytes) -> list[str]:
    """Patterns of the Base64 letters that a secret alone decides, for its three positions in a longer text."""
    found = []
    for offset in range(3):
        whole = base64.b64encode(bytes(offset) + secret).decode()
        first, last = -(-offset * 8 // 6), (offset + len(secret)) * 8 // 6
        letters = whole[first:last]
        if len(letters) >= _SHORT:
            spelled = (
                rf"(?:{_letter(each)}|{'-' if each == '+' else '_'})" if each in "+/" else each for each in letters
            )
            # with the letters next to them, which have bits of the secret too
            found.append(r"[\w+/-]?" + "".join(spelled) + r"[\w+/-]?(?:=|%3d){0,2}")
    return found
