"""Images that a command is given: files, folders, URLs or standard input, read within limits.

Addresses are checked by the downloader of `animesion_scrapers`. An image that cannot be read is a problem of that
image, not of the command. `codec` decodes them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from animesion.errors import UsageError
from animesion.images import files

_LARGEST = 64 << 20  # bytes of an image from a URL or from standard input


@dataclass(frozen=True)
class Given:
    """An image as it was given.

    Attributes:
        name: its path or URL, or `-`.
        content: its bytes.
        problem: why there are none; empty without a problem.
    """

    name: str
    content: bytes = b""
    problem: str = ""


def from_files(paths: Sequence[Path]) -> Iterator[Given]:
    """Read image files, and folders, which are searched recursively.

    Raises:
        UsageError: a path that does not exist.
    """
    for path in files.files(paths):
        content, problem = files.read(path)
        yield Given(str(path), content, problem)


def read(places: Sequence[str], *, contact: str = "", allow_private: Sequence[str] = ()) -> Iterator[Given]:
    """Read images from paths, URLs (`http:`, `https:`) and standard input (`-`).

    Args:
        places: where they are.
        contact: e-mail address or URL under which the hosts of URLs can reach the user.
        allow_private: hosts on a LAN or loopback that may be asked, each as `host:port`.

    Raises:
        UsageError: a path that does not exist, or a URL without a contact.
    """
    for place in places:
        if place == "-":
            content = sys.stdin.buffer.read(_LARGEST + 1)
            problem = "too many bytes" if len(content) > _LARGEST else "" if content else "no bytes"
            yield Given("-", b"" if problem else content, problem)
        elif place.lower().startswith(("http://", "https://")):
            yield _downloaded(place, contact, allow_private)
        elif "://" in place:
            raise UsageError(f"{place} is no image: give a path, a URL that starts with http:// or https://, or -")
        else:
            yield from from_files([Path(place)])


def _downloaded(url: str, contact: str, allow_private: Sequence[str]) -> Given:
    from animesion_scrapers import Download, ScraperError, download_all

    if not contact:
        raise UsageError(
            f"downloading {url} needs --contact: an e-mail address or URL under which its host can reach you"
        )
    try:
        [got] = download_all(
            [Download(url, url, image=True)],
            user_agent=f"animesion/{version('animesion')} ({contact})",
            max_bytes=_LARGEST,
            allow_private=allow_private,
        )
    except ScraperError as error:
        raise UsageError(f"{url}: {error}") from None
    return Given(url, got.content, "" if got.status == "ok" else f"{got.status} {got.detail}".rstrip())
