"""One image as a site describes it, in the same shape whatever the site.

A crawler fills it in from what the site says; nothing here has looked at the image itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TAG_CATEGORIES = ("general", "artist", "character", "copyright", "meta")
FLAGS = ("deleted", "banned", "pending", "flagged")


@dataclass(frozen=True, slots=True)
class Post:
    """What a site says about one image; `""` and `0` stand for unknown, never `None`.

    Attributes:
        id: The site's own id.
        site: Short name of the site, such as `danbooru`.
        page_url: The page a person would open.
        file_url: The original file; empty when the caller may not see it.
        md5: Lower-case hexadecimal MD5 of the original file.
        extension: File extension without the dot, lower case.
        width: Width in pixels.
        height: Height in pixels.
        bytes: Size of the original file.
        rating: `g`, `s`, `q` or `e` (general, sensitive, questionable, explicit).
        tags: Tags by category, with a key for each of `TAG_CATEGORIES`; sites that are no boorus may add categories,
            such as `species` and `cultivar`.
        parent_id: Id of the post that this one is a variant of.
        source: Where the uploader found the image.
        pixiv_id: Id of the work on Pixiv.
        author: Who made the image.
        licence: The licence the site states.
        created_at: When it was posted, ISO 8601, as the site writes it.
        flags: Those of `FLAGS` that hold, in that order.
        sha1: Lower-case hexadecimal SHA-1 of the original file.
    """

    id: str
    site: str
    page_url: str = ""
    file_url: str = ""
    md5: str = ""
    extension: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
    rating: str = ""
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(TAG_CATEGORIES, ()))
    parent_id: str = ""
    source: str = ""
    pixiv_id: str = ""
    author: str = ""
    licence: str = ""
    created_at: str = ""
    flags: tuple[str, ...] = ()
    sha1: str = ""
