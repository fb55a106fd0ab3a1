"""The record of one image as a site describes it, common to all sites.

Crawlers fill it in from the site's metadata; the image itself is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TAG_CATEGORIES = ("general", "artist", "character", "copyright", "meta")
FLAGS = ("deleted", "banned", "pending", "flagged")


@dataclass(frozen=True, slots=True)
class Post:
    """A site's metadata of one image; unknown values are `""` or `0`, never `None`.

    Attributes:
        id: The site's own id.
        site: Short name of the site, such as `danbooru`.
        page_url: The image's page on the site.
        file_url: The original file; empty if the caller may not see it.
        md5: Lower-case hexadecimal MD5 of the original file.
        extension: File extension without the dot, lower case.
        width: Width in pixels.
        height: Height in pixels.
        bytes: Size of the original file.
        rating: `g`, `s`, `q` or `e` (general, sensitive, questionable, explicit).
        tags: Tags by category, with a key for each of `TAG_CATEGORIES`; sites other than boorus may add categories such
            as `species` and `cultivar`.
        parent_id: Id of the post of which this one is a variant.
        source: The uploader's source of the image.
        pixiv_id: Id of the work on Pixiv.
        author: Author of the image.
        licence: The licence that the site states.
        created_at: Time of the post, ISO 8601, as the site writes it.
        flags: The flags that apply, in the order of `FLAGS`.
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
