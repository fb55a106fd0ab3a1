"""Folders and buckets behind a URL: opened through fsspec, what goes wrong with them in one sentence.

What is read there is the business of `animesion.sources.stored`, what is written that of `animesion.publishing.object_store`.
Credentials come from the environment or the provider's own configuration, never from an address.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from animesion.errors import AnimesionError, FullDiskError, UsageError
from animesion.storage.workspace import full_disk_is_clear

SCHEMES = ("s3", "gs", "file")


def is_url(text: Path | str) -> bool:
    """Whether a place is given as a URL and not as a path."""
    return "://" in str(text)


def shown(text: str, limit: int = 120) -> str:
    """An address or a name from outside as it may stand in a message; keys before an '@' are not repeated."""
    text = re.sub(r"//[^/@]*@", "//...@", text)
    return "".join(c if c.isprintable() else "?" for c in text)[:limit]


def refuse_secrets(url: str) -> None:
    """Addresses are printed and written into files.

    Raises:
        UsageError: the address holds what may be a key or an option.
    """
    if any(c in url.partition("://")[2] for c in "@?#"):
        raise UsageError(
            f"{shown(url)} holds '@', '?' or '#': keys and options are not part of an address, "
            "keep them in the environment or in the tool's own configuration"
        )


def connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, which remembers no listings, and the path in it.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix` or `file:///folder`.

    Raises:
        UsageError: another scheme, no bucket, keys in the address, or the store's package is not installed.
    """
    scheme, _, path = url.partition("://")
    if scheme not in SCHEMES:
        raise UsageError(f"{shown(url)} is of no known store: give s3://bucket/prefix, gs://... or file:///folder")
    refuse_secrets(url)
    if scheme == "file" and not path.startswith("/"):
        raise UsageError(f"{shown(url)}: a folder is given from the root on, as in file:///data/published")
    if not path.strip("/") or (scheme != "file" and path.startswith("/")):
        raise UsageError(f"{shown(url)} names no {'folder' if scheme == 'file' else 'bucket'}")
    try:
        import fsspec

        with clear_errors(url):
            system, root = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False)
    except ImportError:
        raise UsageError(f"{scheme}:// needs a package that is not installed: pip install 'animesion[cloud]'") from None
    return system, str(root).rstrip("/")


@contextmanager
def clear_errors(url: str) -> Iterator[None]:
    """Errors of a store in one sentence; a missing file passes, for its user to judge."""
    try:
        with full_disk_is_clear(Path(url)):
            yield
    except (ImportError, FileNotFoundError, FullDiskError, AnimesionError):
        raise
    except Exception as error:  # each store's client has errors of its own
        name = type(error).__name__
        if "Credentials" in name or isinstance(error, PermissionError):
            raise AnimesionError(
                f"{url} does not let us in ({name}): check the credentials in the environment, "
                "such as AWS_PROFILE or AWS_ACCESS_KEY_ID, and what they are allowed to do"
            ) from error
        text = shown(" ".join(str(error).split()), 200) or name
        raise AnimesionError(
            f"{url} cannot be reached or refuses ({text}): run the same command again, it resumes"
        ) from error


def cache_folder(url: str, kind: str = "") -> Path:
    """The folder in the user's cache that belongs to a URL; not made here.

    Args:
        url: the address; the same one has the same folder.
        kind: what is kept there, a folder of its own.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "animesion" / kind / hashlib.sha256(url.encode()).hexdigest()[:16]
