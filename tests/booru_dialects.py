"""The APIs of boorus other than Danbooru over a list of entries: Gelbooru, Safebooru.org, Moebooru and Zerochan.

Each application responds like its site, with its quirks: empty bodies, single objects, numbers as text, and search
terms of which only the last applies. Danbooru's API is in `animesion_sample.api`, servers and faults are in its
`faults`.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote_plus

from aiohttp import web

from animesion_sample.world import SamplePost, World

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

WORDS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
TAG_TYPES = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "meta": 5}
LONGEST_PAGES = {"gelbooru": 100, "safebooru": 1000, "moebooru": 1000, "zerochan": 250}
MOST_TAGS = 6
"""Most tags in a search on Moebooru, and as many excluded ones."""

DEEPEST_POST = 20_000
"""How far Gelbooru pages by number."""

_CONTENT_TYPES = {"jpg": "image/jpeg", "png": "image/png", "gif": "image/gif", "webp": "image/webp"}
_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Entry:
    """One post.

    Attributes:
        id: Number of the post.
        tags: Tags by category, with underscores; Zerochan shows them with spaces.
        content: The file.
        extension: Of the file.
        rating: `g`, `s`, `q` or `e`.
        size: Width and height in pixels.
        parent: Id of the post that this one is a version of; 0 for none.
        source: The stated source of the image.
        status: `active`, `pending`, `flagged` or `deleted`.
        visible: Whether the site returns the file's URL and digest.
    """

    id: int
    tags: Mapping[str, tuple[str, ...]]
    content: bytes
    extension: str = "png"
    rating: str = "g"
    size: tuple[int, int] = (64, 64)
    parent: int = 0
    source: str = ""
    status: str = "active"
    visible: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All tags."""
        return tuple(name for names in self.tags.values() for name in names)

    @property
    def md5(self) -> str:
        """Digest of the file."""
        return hashlib.md5(self.content, usedforsecurity=False).hexdigest()

    @property
    def created(self) -> datetime:
        """Time of the post, derived from the id."""
        return _EPOCH + timedelta(minutes=37 * self.id)


def of_world(world: World, posts: Sequence[SamplePost]) -> list[Entry]:
    """Posts of the sample world, drawn now."""
    return [
        Entry(
            id=post.id,
            tags={
                "character": post.characters,
                "copyright": post.copyrights,
                "artist": post.artists,
                "general": post.general,
            },
            content=world.file(post),
            extension=post.ext,
            rating=post.rating,
            size=post.size,
            parent=post.parent_id or 0,
            source=post.source,
            status="deleted" if post.deleted else "active",
            visible=post.visible,
        )
        for post in posts
    ]


def gelbooru(entries: Sequence[Entry], key: tuple[str, str] = ("", "")) -> web.Application:
    """Gelbooru: posts and tags of `/index.php?page=dapi&json=1`.

    `post` is absent if there are none, numbers are text, markup in tags is escaped, and tags have no categories.

    Args:
        entries: The posts; may grow while they are served.
        key: `user_id` and `api_key`, without which the response is 401 and `[]`; empty for none.
    """

    async def index(request: web.Request) -> web.Response:
        query = request.query
        if any(key) and (query.get("user_id"), query.get("api_key")) != key:
            return web.json_response([], status=401)
        limit = _limit(query.get("limit", ""), LONGEST_PAGES["gelbooru"])
        if query.get("s") == "tag":
            return web.json_response(_tags(entries, query.get("names", "").split()[:limit]))
        first = limit * int(query.get("pid", "0"))
        if first > DEEPEST_POST:
            return web.Response(text="Too deep! Pull it back some.")
        found = _by_id(entries, query["id"]) if query.get("id") else _search(entries, query.get("tags", ""))
        page = [_gelbooru_post(entry, request) for entry in found[first : first + limit]]
        attributes = {"limit": limit, "offset": first, "count": len(found)}
        return web.json_response({"@attributes": attributes} | ({"post": page} if page else {}))

    return _application(entries, {"/index.php": index})


def safebooru(entries: Sequence[Entry], tag_info: bool = True) -> web.Application:
    """Safebooru.org: posts of `/index.php?page=dapi&json=1`, a bare array, or an empty body for no posts.

    The digest is named `hash`, the file's URL must be built from `directory` and `image`, and tags are only in XML.
    A search for `search_down` gets the response of a broken search engine.

    Args:
        entries: The posts; may grow while they are served.
        tag_info: Whether `fields=tag_info` is understood.
    """

    async def index(request: web.Request) -> web.Response:
        query = request.query
        if query.get("s") == "tag":
            return web.Response(text='<?xml version="1.0"?><tags type="array"/>', content_type="application/xml")
        if "search_down" in query.get("tags", ""):
            return web.Response(text='<response success="false" reason="search down"/>', content_type="text/xml")
        limit = _limit(query.get("limit", ""), LONGEST_PAGES["safebooru"])
        found = _by_id(entries, query["id"]) if query.get("id") else _search(entries, query.get("tags", ""))
        first = limit * int(query.get("pid", "0"))
        posts = [_safebooru_post(entry) for entry in found[first : first + limit]]
        if tag_info and query.get("fields") == "tag_info":
            for post, entry in zip(posts, found[first:], strict=False):
                kinds = [(kind, name) for kind, names in entry.tags.items() for name in names]
                post["tag_info"] = [
                    {"tag": name, "count": 1, "type": "tag" if kind == "general" else kind} for kind, name in kinds
                ]
        return web.json_response(posts) if posts else web.Response(body=b"", content_type="application/json")

    return _application(entries, {"/index.php": index})


def moebooru(entries: Sequence[Entry]) -> web.Application:
    """Moebooru: `/post.json`, with the types of the tags in version 2 of the API.

    Deleted posts are not listed, ratings have three values, and only the last of several `id:` terms applies.

    Args:
        entries: The posts; may grow while they are served.
    """

    async def index(request: web.Request) -> web.Response:
        query = request.query
        terms = query.get("tags", "").lower().split()
        ids = [term for term in terms if term.startswith("id:")][-1:]
        plain = [term for term in terms if not term.startswith(("id:", "order:"))]
        counted = [term.startswith("-") for term in plain if ":" not in term]
        if max(sum(counted), len(counted) - sum(counted)) > MOST_TAGS:
            return web.json_response({"success": False, "reason": "too many tags"}, status=500)
        shown = [entry for entry in entries if entry.status != "deleted"]
        found = _search(shown, " ".join([*plain, *ids]))
        limit = _limit(query.get("limit", ""), LONGEST_PAGES["moebooru"])
        page = found[limit * (max(1, int(query.get("page", "1"))) - 1) :][:limit]
        posts = [_moebooru_post(entry, request) for entry in page]
        if query.get("api_version") != "2":
            return web.json_response(posts)
        types = {name: kind for entry in page for kind, names in entry.tags.items() for name in names}
        return web.json_response({"posts": posts} | ({"tags": types} if query.get("include_tags") == "1" else {}))

    return _application(entries, {"/post.json": index})


@dataclass(frozen=True)
class ZerochanTraps:
    """Quirks of Zerochan.

    Attributes:
        aliases: Tags that redirect to others.
        raw: Ids of entries whose JSON contains a raw line break.
        gone: Ids of listed entries that are deleted.
        past_the_end: Status of a page after the last: 404, or 200 with a web page.
        deepest_page: Most pages of a listing.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    raw: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()
    past_the_end: int = 404
    deepest_page: int = 100


def zerochan(entries: Sequence[Entry], traps: ZerochanTraps | None = None) -> web.Application:
    """Zerochan: `/Tag?json&p=&l=`, with several tags separated by commas, and `/ID?json`.

    Clients without a user's name get 503. The primary tag is the first character, else the first tag.

    Args:
        entries: The posts; may grow while they are served.
        traps: Quirks of the site.
    """
    odd = traps or ZerochanTraps()

    async def index(request: web.Request) -> web.Response:
        if " - " not in request.headers.get("User-Agent", ""):
            return web.Response(status=503, text="Service Temporarily Unavailable")
        path = request.rel_url.raw_path[1:]
        if "json" not in request.query:
            return web.Response(text="<!DOCTYPE html><html><body>Zerochan</body></html>", content_type="text/html")
        if path.isdecimal():
            return _zerochan_entry([entry for entry in entries if str(entry.id) == path], request, odd)
        tags = [unquote_plus(tag) for tag in path.split(",") if tag]
        if len(tags) == 1 and tags[0] in odd.aliases:
            target = quote(odd.aliases[tags[0]].replace(" ", "+"), safe="+")
            return web.Response(status=301, headers={"Location": f"/{target}?{request.query_string}"})
        wanted = {tag.replace(" ", "_").lower() for tag in tags}
        primary = "strict" in request.query
        found = [
            entry
            for entry in sorted(entries, key=lambda entry: -entry.id)
            if wanted <= ({_primary(entry)} if primary else set(entry.names))
        ]
        limit, page = _limit(request.query.get("l", ""), LONGEST_PAGES["zerochan"]), int(request.query.get("p", "1"))
        items = [_zerochan_item(entry) for entry in found[limit * (page - 1) : limit * page]]
        if items and page <= odd.deepest_page:
            return web.json_response({"items": items})
        if odd.past_the_end == 404:
            return web.json_response({"error": "Not found"}, status=404)
        return web.Response(text="<!DOCTYPE html><html><p>Page number too high</p></html>", content_type="text/html")

    return _application(entries, {"/": index, "/{path}": index})


# -- inside ----------------------------------------------------------------------------------------------------------


def _application(entries: Sequence[Entry], routes: Mapping[str, Handler]) -> web.Application:
    async def file(request: web.Request) -> web.Response:
        for entry in entries:
            if str(entry.id) == request.match_info["id"] and entry.visible:
                kind = _CONTENT_TYPES.get(entry.extension, "application/octet-stream")
                return web.Response(body=entry.content, content_type=kind)
        return web.Response(status=404)

    app = web.Application()
    app.router.add_get(r"/images/{folder:\d+}/{id:\d+}.{ext:\w+}", file)
    for path, handler in routes.items():
        app.router.add_get(path, handler)
    return app


def _limit(text: str, most: int) -> int:
    return min(most, int(text)) if text.isdecimal() and int(text) else most


def _by_id(entries: Sequence[Entry], number: str) -> list[Entry]:
    return [entry for entry in entries if str(entry.id) == number]


def _search(entries: Sequence[Entry], tags: str) -> list[Entry]:
    """Entries with all of the tags, by descending id."""
    terms = [term for term in tags.split() if not term.startswith(("sort:", "order:"))]
    return sorted((e for e in entries if all(_holds(e, term) for term in terms)), key=lambda entry: -entry.id)


def _holds(entry: Entry, term: str) -> bool:
    if term.startswith("-"):
        return not _holds(entry, term[1:])
    name, colon, value = term.partition(":")
    if colon and name == "rating":
        return entry.rating == value[:1]
    if colon and name == "id":
        match = re.fullmatch(r"([<>]?)(=?)(\d+)", value)
        if not match:
            return str(entry.id) in value.split(",")
        edge = int(match[3])
        above, below = entry.id > edge and match[1] == ">", entry.id < edge and match[1] == "<"
        return above or below or (entry.id == edge and (not match[1] or bool(match[2])))
    return term in entry.names


def _file_url(entry: Entry, request: web.Request) -> str:
    return f"{request.scheme}://{request.host}/images/{entry.id % 1000}/{entry.id}.{entry.extension}"


def _gelbooru_post(entry: Entry, request: web.Request) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": str(entry.id), "created_at": f"{entry.created:%a %b %d %H:%M:%S +0000 %Y}", "score": "0",
        "width": str(entry.size[0]), "height": str(entry.size[1]), "md5": entry.md5, "directory": "ab/cd",
        "image": f"{entry.md5}.{entry.extension}", "rating": WORDS[entry.rating], "source": entry.source,
        "parent_id": str(entry.parent), "tags": html.escape(" ".join(entry.names)), "status": entry.status,
        "file_url": _file_url(entry, request),
    }  # fmt: skip
    return (
        record if entry.visible else {name: record[name] for name in record if name not in {"md5", "file_url", "image"}}
    )


def _safebooru_post(entry: Entry) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": entry.id, "directory": entry.id % 1000, "hash": entry.md5, "width": entry.size[0],
        "height": entry.size[1], "image": f"{entry.id}.{entry.extension}", "change": int(entry.created.timestamp()),
        "parent_id": entry.parent, "rating": "safe" if entry.rating == "s" else WORDS[entry.rating],
        "source": entry.source, "tags": f" {html.escape(' '.join(entry.names))} ", "status": entry.status,
    }  # fmt: skip
    return (
        record
        if entry.visible
        else {name: record[name] for name in record if name not in {"hash", "image", "directory"}}
    )


def _moebooru_post(entry: Entry, request: web.Request) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": entry.id, "tags": " ".join(entry.names), "created_at": int(entry.created.timestamp()), "creator_id": 1,
        "author": "uploader", "source": entry.source, "md5": entry.md5, "file_size": len(entry.content),
        "file_url": _file_url(entry, request), "rating": "s" if entry.rating == "g" else entry.rating,
        "parent_id": entry.parent or None, "status": entry.status, "width": entry.size[0], "height": entry.size[1],
    }  # fmt: skip
    return record if entry.visible else {name: record[name] for name in record if name not in {"md5", "file_url"}}


def _tags(entries: Sequence[Entry], names: Sequence[str]) -> dict[str, Any]:
    kinds = {name: kind for entry in entries for kind, found in entry.tags.items() for name in found}
    rows: list[dict[str, Any]] = [
        {"id": place, "name": html.escape(name), "count": "1", "type": str(TAG_TYPES[kinds[name]]), "ambiguous": 0}
        for place, name in enumerate(names, 1)
        if name in kinds
    ]
    attributes = {"limit": LONGEST_PAGES["gelbooru"], "offset": 0, "count": len(rows)}
    return {"@attributes": attributes} | ({"tag": rows[0] if len(rows) == 1 else rows} if rows else {})


def _primary(entry: Entry) -> str:
    return (*entry.tags.get("character", ()), *entry.names, "")[0]


def _spaced(name: str) -> str:
    return name.replace("_", " ").title()


def _zerochan_item(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id, "width": entry.size[0], "height": entry.size[1], "thumbnail": f"/t/{entry.id}.avif",
        "source": entry.source, "tag": _spaced(_primary(entry)), "tags": list(map(_spaced, entry.names)),
    }  # fmt: skip


def _zerochan_entry(found: Sequence[Entry], request: web.Request, odd: ZerochanTraps) -> web.Response:
    if not found or found[0].id in odd.gone:
        return web.json_response({"error": "Not found"}, status=404)
    entry = found[0]
    record: dict[str, Any] = {
        "id": entry.id, "width": entry.size[0], "height": entry.size[1], "source": entry.source,
        "primary": _spaced(_primary(entry)), "tags": list(map(_spaced, entry.names)),
    }  # fmt: skip
    if entry.visible:
        record |= {"full": _file_url(entry, request), "size": len(entry.content), "hash": entry.md5}
    answer = web.json_response(record)
    if entry.id in odd.raw:
        answer.text = str(answer.text).replace('"primary": "', '"primary": "\r')
    return answer
