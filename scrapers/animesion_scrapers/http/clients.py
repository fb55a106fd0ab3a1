"""What both HTTP clients agree on: how they introduce themselves and whose certificates they trust."""

from __future__ import annotations

import functools
import os
import re
import ssl

import certifi

from animesion_scrapers.errors import ScraperError

_CONTACT = re.compile(r"[^\s@()]+@[^\s@()]+\.[^\s@()]+|https?://[^\s()]+|user #\d+")


def check_user_agent(user_agent: str) -> str:
    """Return the User-Agent if it says what is asking and whom to write to.

    Raises:
        ScraperError: It is empty, has no contact, poses as a browser or cannot be sent in a header.
    """
    if not user_agent.isascii() or not user_agent.isprintable():
        raise ScraperError("The User-Agent must be plain printable ASCII.")
    if not _CONTACT.search(user_agent):
        raise ScraperError(
            "The User-Agent must say whom to contact, for example 'my-crawler/1.0 (me@example.org)': "
            "sites block crawlers that cannot be reached."
        )
    if user_agent.startswith("Mozilla/"):
        raise ScraperError("The User-Agent must name your tool and not a browser: sites block crawlers in disguise.")
    return user_agent


def certificates() -> str:
    """The file of certificate authorities to trust: `SSL_CERT_FILE`, else the one that requests uses."""
    return os.environ.get("SSL_CERT_FILE") or certifi.where()


@functools.cache
def tls_context() -> ssl.SSLContext:
    """One TLS context for the whole process: building one parses every certificate and costs tens of milliseconds."""
    return ssl.create_default_context(cafile=certificates())
