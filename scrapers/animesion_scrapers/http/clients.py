"""Settings shared by both HTTP clients: the User-Agent and TLS certificates."""

from __future__ import annotations

import functools
import os
import re
import ssl

import certifi

from animesion_scrapers.errors import ScraperError

_CONTACT = re.compile(r"[^\s@()]+@[^\s@()]+\.[^\s@()]+|https?://[^\s()]+|user #\d+")


def check_user_agent(user_agent: str) -> str:
    """Return the User-Agent if it names the crawler and a contact.

    Raises:
        ScraperError: It is empty, has no contact, poses as a browser or cannot be sent in a header.
    """
    if not user_agent.isascii() or not user_agent.isprintable():
        raise ScraperError("The User-Agent must be plain printable ASCII.")
    if not _CONTACT.search(user_agent):
        raise ScraperError(
            "The User-Agent must contain a contact, for example 'my-crawler/1.0 (me@example.org)': "
            "sites block crawlers that cannot be reached."
        )
    if user_agent.startswith("Mozilla/"):
        raise ScraperError("The User-Agent must name your tool and not a browser: sites block crawlers in disguise.")
    return user_agent


def certificates() -> str:
    """File of trusted certificate authorities: `SSL_CERT_FILE`, else certifi's."""
    return os.environ.get("SSL_CERT_FILE") or certifi.where()


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The TLS context of the process; cached, as parsing all certificates takes tens of milliseconds."""
    return ssl.create_default_context(cafile=certificates())
