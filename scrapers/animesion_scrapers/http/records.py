"""Requests and results of the downloader."""

from __future__ import annotations

from dataclasses import dataclass

OK = "ok"


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch.

    Attributes:
        key: The caller's name for it, returned with the result.
        url: URL of the file.
        md5: Expected MD5 in hexadecimal; empty to skip the check.
        bytes: Expected size, checked if there is no digest; 0 to skip the check.
        sha1: Expected SHA-1 in hexadecimal; empty to skip the check.
        image: Whether the file is an image, so that a web page, XML or JSON document in its place is a fault.
        span: First byte and number of bytes of a piece of a larger file, fetched with a Range request; None for all of
            it. Digests and size are those of the piece.
        page: URL of the page that shows the file, requested first where opt-outs are obeyed; empty for none.
    """

    key: str
    url: str
    md5: str = ""
    bytes: int = 0
    sha1: str = ""
    image: bool = False
    span: tuple[int, int] | None = None
    page: str = ""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """The result of a `Download`.

    Attributes:
        key: As in the request.
        url: As in the request.
        status: `ok`, or one of `faults.REASONS`.
        detail: Description of a failure.
        content: The file; empty unless `ok`.
        final: Whether another request is pointless, as after a 404 or after the same wrong bytes twice.
        attempts: Number of requests; 0 when the URL or its host ruled them out.
        digest: Digest of the content with its kind, such as `md5:0123...`: the expected MD5 if there was one, else
            `sha256:...`; empty unless `ok`.
    """

    key: str
    url: str
    status: str
    detail: str
    content: bytes
    final: bool = False
    attempts: int = 0
    digest: str = ""
