"""Safebooru.org's dapi interface, as far as it differs from Gelbooru's (`safebooru.donmai.us` is a Danbooru).

Responses are a bare array of posts, or empty for no posts, and have no tag categories in JSON. Source:
https://safebooru.org/index.php?page=help&topic=dapi.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from animesion_scrapers import fields
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.post import TAG_CATEGORIES
from animesion_scrapers.sites import SiteInfo
from animesion_scrapers.sites.gelbooru import Gelbooru

_FOLDER = re.compile(r"\w{1,40}(?:/\w{1,40}){0,3}")
_IMAGE = re.compile(r"\w[\w.-]{0,200}")
_TYPES = {"metadata": "meta", "tag": "general"}


class Safebooru(Gelbooru):
    """Reads posts from Safebooru.org; use it as a context manager, or call `close`.

    Its tag interface returns only XML and one tag per request, so categories come from `tag_info`, which not all sites
    of this software send. Without it, all tags are general.
    """

    info: ClassVar[SiteInfo] = SiteInfo(
        name="safebooru",
        summary="Safebooru.org: posts of a search or of given ids",
        url="https://safebooru.org",
        limits={"safebooru.org": HostLimit(1.0, 2)},
        label_tags=("character",),
        licence="",
        terms="https://safebooru.org/index.php?page=help&topic=dapi",
    )
    page_size: ClassVar[int] = 500
    """Posts per page. The site allows up to 1000, but occasionally times out then."""

    def _ask(self, params: Mapping[str, str]) -> object:
        return super()._ask({**params, "fields": "tag_info"})

    def _categories(self, entries: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for entry in entries:
            tags = entry.get("tag_info")
            for tag in map(fields.mapping, tags if isinstance(tags, list) else ()):
                kind = fields.text(tag.get("type"))
                kind = _TYPES.get(kind, kind)
                found[html.unescape(fields.text(tag.get("tag")))] = kind if kind in TAG_CATEGORIES else "general"
        return found

    def _details(self, entry: Mapping[str, Any]) -> tuple[str, str]:
        md5, file_url = super()._details(entry)
        folder = fields.number_text(entry.get("directory")) or fields.match(_FOLDER, entry.get("directory"))
        image = fields.text(entry.get("image"))
        if not file_url and folder and _IMAGE.fullmatch(image):
            file_url = f"{self._base}/images/{folder}/{image}"
        return md5 or fields.match(fields.MD5, entry.get("hash")), file_url
