"""Open folders and buckets behind a URL with fsspec, and turn their errors into one sentence.

`animesion.sources.stored` reads from them, and `animesion.publishing.object_store` writes to them. Credentials come
from the environment or the provider's own configuration, never from an address.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from animesion.errors import AnimesionError, UsageError
from animesion.storage.workspace import full_disk_is_clear
from animesion_scrapers.masking import mask

SCHEMES = ("s3", "gs", "file")
#: Schemes of the places that are read: `hf://datasets/owner/name`, too, which is published to by other means.
READABLE = (*SCHEMES, "hf")

#: A repository of the Hub with a revision, whose '@' separates no key.
_REVISION = re.compile(r"hf://datasets/[\w.-]+/[\w.-]+@[\w.~%-]+(/[^@?#]*)?")


def is_url(text: Path | str) -> bool:
    """Whether a text is a URL and not a path."""
    return "://" in str(text)


def shown(text: str, limit: int = 120) -> str:
    """An external address or name for a message: without secrets, printable, and cut to `limit`."""
    return "".join(c if c.isprintable() else "?" for c in mask(text))[:limit]


def refuse_secrets(url: str) -> None:
    """Check that an address has no credentials, because addresses are printed and written into files.

    Raises:
        UsageError: the address has a character that separates keys or options from it.
    """
    if any(c in url.partition("://")[2] for c in "@?#") and not _REVISION.fullmatch(url):
        raise UsageError(
            f"{shown(url)} contains '@', '?' or '#': keys and options are not part of an address, "
            "set them in the environment or in the provider's own configuration"
        )


def connect(url: str, schemes: Sequence[str] = SCHEMES) -> tuple[Any, str]:
    """The file system of a URL, without a cache of listings, and the path in it.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix` or `file:///folder`.
        schemes: schemes that are accepted; `READABLE` for a place that is only read.

    Raises:
        UsageError: unknown scheme, no bucket, keys in the address, or the store's package is not installed.
    """
    scheme, _, path = url.partition("://")
    if scheme not in schemes:
        raise UsageError(f"{shown(url)} is not a supported store: use s3://bucket/prefix, gs://... or file:///folder")
    refuse_secrets(url)
    if scheme == "hf" and not re.match(r"datasets/[\w.-]+/[\w.-]+", path):
        raise UsageError(f"{shown(url)} is not a dataset of the Hub: give hf://datasets/owner/name/folder")
    if scheme == "file" and not path.startswith("/"):
        raise UsageError(f"{shown(url)}: the path of a folder must be absolute, as in file:///data/published")
    if not path.strip("/") or (scheme != "file" and path.startswith("/")):
        raise UsageError(f"{shown(url)} has no {'folder' if scheme == 'file' else 'bucket'}")
    try:
        import fsspec

        with clear_errors(url):
            system, root = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False)
    except ImportError:
        raise UsageError(f"{scheme}:// needs a package that is not installed: pip install 'animesion[cloud]'") from None
    return system, str(root).rstrip("/")


@contextmanager
def clear_errors(url: str) -> Iterator[None]:
    """Turn errors of a store into one sentence, except for a missing file, which callers handle.

    Raises:
        AnimesionError: access is denied, or the store cannot be reached or refuses.
    """
    try:
        with full_disk_is_clear(url):
            yield
    except (ImportError, FileNotFoundError, AnimesionError):
        raise
    except Exception as error:  # each store's client has its own errors
        name = type(error).__name__
        if "Credentials" in name or isinstance(error, PermissionError):
            raise AnimesionError(
                f"{url} denies access ({name}): check the credentials in the environment, "
                "such as AWS_PROFILE or AWS_ACCESS_KEY_ID, and their permissions"
            ) from error
        text = shown(" ".join(str(error).split()), 200) or name
        raise AnimesionError(
            f"{url} cannot be reached or refuses the request ({text}): run the same command again, it resumes"
        ) from error


def cache_folder(url: str, kind: str = "") -> Path:
    """The folder in the user's cache that belongs to a URL; it is not created here.

    Args:
        url: the address; equal addresses have the same folder.
        kind: subfolder for one kind of content, such as `datasets`.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "animesion" / kind / hashlib.sha256(url.encode()).hexdigest()[:16]
