"""The web application of the sample booru: Danbooru's API over the ``DrawnFiles`` of a world.

It runs inside the server processes, which ``server`` starts and ends.
"""

from __future__ import annotations

import asyncio
import html
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from aiohttp import web

from animesion_sample.characters import BY_NAME
from animesion_sample.faults import FaultPlan, inject_faults
from animesion_sample.query import BadQueryError, TagLimitError, compile_query
from animesion_sample.store import DrawnFiles
from animesion_sample.world import Claim, SamplePost

SITE = "http://sample-booru.invalid"
"""Base URL of the files: a name that never resolves, so that provenance does not depend on the port."""

DEEPEST_PAGE = 1000
LARGEST_PAGE = 200

_REFUSED_AGENTS = re.compile(r"^(python-requests|python-urllib|python/\S+ aiohttp|$)", re.IGNORECASE)
_CONTENT_TYPES = {
    "jpg": "image/jpeg", "png": "image/png", "gif": "image/gif", "webp": "image/webp", "mp4": "video/mp4",
    "zip": "application/zip", "swf": "application/x-shockwave-flash",
}  # fmt: skip
_CATEGORIES = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "meta": 5}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_STORE = web.AppKey("store", DrawnFiles)


class ApiError(Exception):
    """An error response in the API's own format."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error, self.message = status, error, message


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        agent = request.headers.get("User-Agent", "")
        if request.path != "/" and _REFUSED_AGENTS.match(agent.strip()):
            raise ApiError(
                403, "Forbidden", "Use a User-Agent that names your tool and a contact, not a library's default"
            )
        if "cause_error" in request.query:
            status = _integer(request.query["cause_error"], "cause_error")
            raise ApiError(status if 400 <= status < 600 else 400, "CausedError", f"You asked for an error {status}.")
        return await handler(request)
    except ApiError as problem:
        body = {"success": False, "error": problem.error, "message": problem.message, "backtrace": []}
        return web.json_response(body, status=problem.status)
    except web.HTTPException as problem:
        body = {"success": False, "error": "NotFound", "message": problem.reason, "backtrace": []}
        return web.json_response(body, status=problem.status)


def _integer(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ApiError(400, "ArgumentError", f"{name} is not a number: {text[:40]!r}") from None


def _search(store: DrawnFiles, tags: str) -> list[SamplePost]:
    """The matching posts, newest first."""
    try:
        test = compile_query(tags)
    except TagLimitError as problem:
        raise ApiError(422, "PostQuery::TagLimitError", str(problem)) from None
    except BadQueryError as problem:
        raise ApiError(400, "PostQuery::Error", str(problem)) from None
    return [post for post in reversed(store.world.posts) if test(post)]


def _select_page(posts: list[SamplePost], page: str, limit: int) -> list[SamplePost]:
    """One page of posts, which are sorted newest first."""
    if page[:1] == "b":
        edge = _integer(page[1:], "page")
        return [post for post in posts if post.id < edge][:limit]
    if page[:1] == "a":
        edge = _integer(page[1:], "page")
        above = [post for post in posts if post.id > edge]
        return above[max(0, len(above) - limit) :]
    number = max(1, _integer(page, "page"))
    if number > DEEPEST_PAGE:
        raise ApiError(410, "PaginationError", f"You cannot go beyond page {DEEPEST_PAGE}.")
    return posts[(number - 1) * limit : number * limit]


def describe(post: SamplePost, claim: Claim) -> dict[str, Any]:
    """A post in the API's format; fields that the caller may not see are absent, not null."""
    rng = Random(f"{post.id}/score")
    width, height = post.size
    up = rng.randrange(0, 60)
    down = -rng.randrange(0, 4)
    meta = ("animated",) if post.trouble == "animated" else ()
    by_category = {
        "general": post.general, "artist": post.artists, "character": post.characters, "copyright": post.copyrights,
        "meta": meta,
    }  # fmt: skip
    asset: dict[str, Any] = {
        "id": post.id + 50_000, "created_at": post.created_at, "updated_at": post.created_at, "file_ext": post.ext,
        "file_size": claim.size, "image_width": width, "image_height": height, "duration": None, "status": "active",
        "is_public": post.visible,
    }  # fmt: skip
    record: dict[str, Any] = {
        "id": post.id, "created_at": post.created_at, "updated_at": post.created_at,
        "uploader_id": 1 + rng.randrange(400), "approver_id": None, "score": up + down, "up_score": up,
        "down_score": down, "fav_count": rng.randrange(0, 80), "source": post.source, "rating": post.rating,
        "image_width": width, "image_height": height, "file_ext": post.ext, "file_size": claim.size,
        "parent_id": post.parent_id, "has_children": post.has_children, "has_active_children": post.has_children,
        "has_visible_children": post.has_children, "has_large": width > 850, "pixiv_id": post.pixiv_id, "bit_flags": 0,
        "is_pending": False, "is_flagged": False, "is_deleted": post.deleted, "is_banned": not post.visible,
        "last_noted_at": None, "last_commented_at": None, "last_comment_bumped_at": None,
        "tag_count": sum(map(len, by_category.values())), "tag_string": " ".join(sorted((*post.tags, *meta))),
    }  # fmt: skip
    for category, tags in by_category.items():
        record[f"tag_count_{category}"] = len(tags)
        record[f"tag_string_{category}"] = " ".join(tags)
    if post.visible:
        url = f"{SITE}/data/original/{claim.md5[:2]}/{claim.md5[2:4]}/{claim.md5}.{post.ext}"
        record |= {"md5": claim.md5, "file_url": url, "large_file_url": url, "preview_file_url": url}
        variant = {"type": "original", "url": url, "width": width, "height": height, "file_ext": post.ext}
        asset |= {"md5": claim.md5, "file_key": claim.md5[:9], "variants": [variant]}
    record["media_asset"] = asset
    return record


def _limit(request: web.Request, default: int, most: int) -> int:
    return max(0, min(most, _integer(request.query.get("limit", str(default)), "limit")))


async def _posts(request: web.Request) -> web.Response:
    store = request.app[_STORE]
    found = _search(store, request.query.get("tags", ""))
    page = _select_page(found, request.query.get("page", "1"), _limit(request, 20, LARGEST_PAGE))
    claims = await asyncio.to_thread(store.claims, page)
    records = [describe(post, claims[post.id]) for post in page]
    only = request.query.get("only", "")
    if only:
        wanted = set(only.split(","))
        records = [{key: value for key, value in record.items() if key in wanted} for record in records]
    return web.json_response(records)


async def _post(request: web.Request) -> web.Response:
    store = request.app[_STORE]
    post = store.world.by_id.get(int(request.match_info["id"]))
    if post is None:
        raise ApiError(404, "ActiveRecord::RecordNotFound", "That record was not found.")
    return web.json_response(describe(post, await asyncio.to_thread(store.claim, post)))


async def _counts(request: web.Request) -> web.Response:
    found = _search(request.app[_STORE], request.query.get("tags", ""))
    return web.json_response({"counts": {"posts": len(found)}})


async def _tags(request: web.Request) -> web.Response:
    posts = request.app[_STORE].world.posts
    counts: Counter[tuple[int, str]] = Counter()
    for post in posts:
        for category, tags in (("general", post.general), ("artist", post.artists), ("copyright", post.copyrights),
                               ("character", post.characters)):  # fmt: skip
            counts.update((_CATEGORIES[category], tag) for tag in tags)
    rows: list[dict[str, Any]] = [
        {"id": number, "name": name, "post_count": count, "category": category, "created_at": posts[0].created_at,
         "updated_at": posts[-1].created_at, "is_deprecated": False,
         "words": re.findall(r"\w+", name.replace("_", " "))}
        for number, ((category, name), count) in enumerate(sorted(counts.items()), start=1)
    ]  # fmt: skip
    category_wanted = request.query.get("search[category]")
    if category_wanted is not None:
        rows = [row for row in rows if row["category"] == _integer(category_wanted, "search[category]")]
    order = request.query.get("search[order]", "")
    rows.sort(key=lambda row: (-row["post_count"], row["id"]) if order == "count" else (-row["id"], 0))
    limit, page = _limit(request, 20, 1000), max(1, _integer(request.query.get("page", "1"), "page"))
    return web.json_response(rows[(page - 1) * limit : page * limit])


async def _file(request: web.Request) -> web.Response:
    store = request.app[_STORE]
    md5 = request.match_info["md5"]
    post = await asyncio.to_thread(store.find, md5)
    if post is None or post.trouble == "not found" or not post.visible:
        raise ApiError(404, "NotFound", "There is no such file.")
    data = await asyncio.to_thread(store.file, post)
    kind = _CONTENT_TYPES.get(request.match_info["ext"], "application/octet-stream")
    return web.Response(body=data, content_type=kind)


async def _faces(request: web.Request) -> web.Response:
    data = await asyncio.to_thread(request.app[_STORE].world.faces_tsv)
    return web.Response(body=data, content_type="text/tab-separated-values", charset="utf-8")


async def _tag_ids(request: web.Request) -> web.Response:
    data = request.app[_STORE].world.tag_ids_tsv()
    return web.Response(body=data, content_type="text/tab-separated-values", charset="utf-8")


async def _home(request: web.Request) -> web.Response:
    world = request.app[_STORE].world
    names = "".join(
        f"<li><a href='/posts.json?tags={html.escape(design.name)}'>{html.escape(design.name)}</a></li>"
        for design in world.characters
        if design.name in BY_NAME
    )
    page = (
        "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>Sample booru</title>"
        f"<h1>Sample booru</h1><p>{len(world.posts)} drawn posts. None of this is real data.</p><ul>{names}</ul></html>"
    )
    return web.Response(text=page, content_type="text/html")


def application(store: DrawnFiles, faults: FaultPlan | None = None) -> web.Application:
    """The web application over a store, with the faults of a plan if there is one."""
    app = web.Application(middlewares=[inject_faults(faults), _errors] if faults else [_errors])
    app[_STORE] = store
    app.router.add_get("/", _home)
    app.router.add_get("/posts.json", _posts)
    app.router.add_get(r"/posts/{id:\d+}.json", _post)
    app.router.add_get("/counts/posts.json", _counts)
    app.router.add_get("/tags.json", _tags)
    app.router.add_get("/faces.tsv", _faces)
    app.router.add_get("/tagIds.tsv", _tag_ids)
    app.router.add_get(r"/data/original/{a:\w\w}/{b:\w\w}/{md5:[0-9a-f]{32}}.{ext:\w+}", _file)
    return app
