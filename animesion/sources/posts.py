"""Families and file types of booru posts, from crawls and dumps."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

#: Extensions of files on these sites that are not still images, and are not requested.
NOT_IMAGES = frozenset(
    {
        "mp4",
        "webm",
        "swf",
        "zip",
        "ugoira",
        "avi",
        "mpg",
        "mpeg",
        "wmv",
        "pdf",
        "rar",
        "psd",
        "svg",
        "djvu",
        "xcf",
        "stl",
    }
    | {"ogg", "oga", "ogv", "wav", "mp3", "flac", "mid", "mov"}
)

_PIXIV_FILE = re.compile(r"/(\d{4,})_(?:p|ugoira|big_p)?\d*\.\w+$")
_PIXIV_WORK = re.compile(r"(?:/artworks/|illust_id=)(\d{4,})")


def families(post: str, parent: str, pixiv: str, source: str) -> tuple[str, ...]:
    """Tokens of the families of a post: itself, its parent, and its original work.

    Args:
        post: id of the post.
        parent: id of its parent; empty or `0` for none.
        pixiv: id of the Pixiv work; empty or `0` for none.
        source: the uploader's source, usually a URL.
    """
    tokens = [f"post:{post}"]
    if parent not in {"", "0"}:
        tokens.append(f"post:{parent}")
    if pixiv in {"", "0"} and source:
        match = _PIXIV_WORK.search(source) or ("pximg" in source and _PIXIV_FILE.search(source)) or None
        pixiv = match[1] if match else ""
    if pixiv not in {"", "0"}:
        tokens.append(f"pixiv:{pixiv}")
    elif url := _work_url(source):
        tokens.append(f"url:{url}")
    return tuple(tokens)


def _work_url(source: str) -> str:
    """The source URL reduced to the part that identifies a work; empty for a bare site or free text."""
    if "/" not in source:
        return ""
    try:
        parts = urlsplit(source.strip())
    except ValueError:
        return ""
    path = parts.path.rstrip("/")
    if parts.scheme not in {"http", "https"} or not parts.netloc or path.count("/") < 2:
        return ""
    # images of one tweet have paths below that of the tweet
    path = re.sub(r"(/status/\d+)/photo/\d+$", r"\1", path)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.netloc.lower().removeprefix('www.')}{path}{query}"[:300]
