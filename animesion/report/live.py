"""Local server of the live report: every class, cluster, drop and image of a build, and the curator's decisions.

Decisions are saved in the format of `animesion.config.decisions`. The server keeps other websites out: it answers only
requests whose Host is 127.0.0.1 or localhost, and writes only with the token that was printed at the start.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from animesion.config import settings
from animesion.config.decisions import MOST_BYTES, Decisions
from animesion.config.decisions import read as read_decisions
from animesion.dataset.dataset import Dataset
from animesion.errors import AnimesionError
from animesion.report import facts, page
from animesion.report.boxes import Boxes
from animesion.report.images import Images
from animesion.report.pairs import SERVED_SIDE, Pairs
from animesion.storage.workspace import write_atomic

#: Longest side of a served image, in pixels.
SIDE = 192

#: Most items per response.
MOST_ITEMS = 200

TOKEN_HEADER = "X-Animesion-Token"
_FOREIGN = {"cross-site", "same-site"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Browser:
    """A built dataset and the decisions about it.

    Args:
        dataset: the build.
        file: where decisions are read from and written to; it need not exist.
        audit: path of the `audit.json` of `animesion audit`, None for no findings.

    Raises:
        UsageError: a table, the audit or the file of decisions is damaged.
    """

    def __init__(self, dataset: Dataset, file: Path, audit: Path | None = None) -> None:
        self.dataset = dataset
        self.file = file
        self.images = Images(dataset)
        self.pairs, self.boxes = Pairs(self.images), Boxes(self.images)
        self.overview = facts.overview(dataset, self.images.rows, audit) | {
            "pairs": facts.pair_totals(self.pairs),
            "decidable": self.boxes.decidable,
        }
        if self.overview["audit"]:
            for each in self.overview["audit"]["items"]:
                place = self.images.places.get(each["key"])
                each["kept"] = place is not None and self.images.rows.value("kept", place)
        # without a file, start from the decisions that the build applied
        self.first = dataset.recipe.curate.decisions
        self.decisions()  # a damaged file is reported now rather than on the first request

    def decisions(self) -> tuple[Decisions, str]:
        """The decisions, and the SHA-256 of their file as their revision; empty if there is no file yet."""
        if not self.file.exists():
            return self.first, ""
        text = self.file.read_bytes()
        return read_decisions(self.file), hashlib.sha256(text).hexdigest()

    def save(self, decisions: Decisions) -> str:
        """Write decisions and return their revision. Labels that the page shows cut are written in full."""
        full = {facts.clip(info.name): info.name for info in self.dataset.classes}
        whole = {key: full.get(label, label) for key, label in decisions.label.items()}
        text = decisions.model_copy(update={"label": whole}).to_toml()
        write_atomic(self.file, text.encode())
        return hashlib.sha256(text.encode()).hexdigest()

    def html(self) -> str:
        """The page as HTML."""
        decided, revision = self.decisions()
        state = {"decisions": decided.model_dump(), "revision": revision, "file": str(self.file)}
        return page.render({**self.overview, **state}, live=True)

    @functools.cached_property
    def classes(self) -> facts.Members:
        """Row indices of each class."""
        return facts.Members(self.images.rows, len(self.dataset.classes))

    @functools.cached_property
    def clusters(self) -> list[facts.Cluster]:
        """Every cluster."""
        return facts.clusters(self.images.rows)

    @functools.cached_property
    def conflicts(self) -> list[facts.Cluster]:
        """Clusters with several labels."""
        return [each for each in self.clusters if each.conflict]

    def drops(self, reason: str) -> Sequence[int]:
        """Row indices of a drop reason."""
        rows: Sequence[int] = facts.dropped(self.images.rows, reason).tolist()
        return rows

    def pair(self, place: int) -> dict[str, Any]:
        """The entry of a pair, see `animesion.report.facts.pair`, with its number and what a decision names it by."""
        each = self.pairs.every[place]
        ids = [self.pairs.ids(i) for i in (each.first, each.second)]
        return {**facts.pair(self.images.rows, each), "number": place, "ids": ids}

    def items(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Entries of images, see `animesion.report.facts.item`."""
        items = [facts.item(self.images.rows, i) for i in rows]
        self.boxes.add(items)
        return items


def application(browser: Browser, token: str) -> web.Application:
    """Create the server.

    Args:
        browser: the build to serve.
        token: secret that requests must send to write.
    """

    async def index(request: web.Request) -> web.Response:
        text = await asyncio.to_thread(browser.html)
        policy = f"{page.policy(live=True)}; frame-ancestors 'none'"
        return web.Response(
            text=text, content_type="text/html", charset="utf-8", headers={"Content-Security-Policy": policy}
        )

    async def a_class(request: web.Request) -> web.Response:
        label = _integer(request.match_info["id"], len(browser.classes) - 1)
        return _listed(browser, request, browser.classes[label].tolist())

    async def clusters(request: web.Request) -> web.Response:
        found = browser.conflicts if request.query.get("conflicts") == "1" else browser.clusters
        offset, limit = _span(request)
        shown = [
            {
                "name": cluster.name,
                "conflict": cluster.conflict,
                "members": browser.items(cluster.rows[:MOST_ITEMS]),
                "more": max(0, len(cluster.rows) - MOST_ITEMS),
            }
            for cluster in found[offset : offset + limit]
        ]
        return _json({"total": len(found), "items": shown})

    async def drops(request: web.Request) -> web.Response:
        return _listed(browser, request, browser.drops(request.query.get("reason", "")))

    async def pairs(request: web.Request) -> web.Response:
        places = browser.pairs.of_kind.get(request.query.get("kind", ""), [])
        offset, limit = _span(request)
        return _json({"total": len(places), "items": [browser.pair(i) for i in places[offset : offset + limit]]})

    async def strip(request: web.Request) -> web.Response:
        place = _integer(request.match_info["number"], len(browser.pairs.every) - 1)
        content = await asyncio.to_thread(browser.pairs.strip, browser.pairs.every[place], SERVED_SIDE)
        if content is None:
            raise web.HTTPNotFound(text="image not found")
        return web.Response(body=content, content_type="image/webp")

    async def image(request: web.Request) -> web.Response:
        place = browser.images.places.get(request.match_info["key"])
        row = None if place is None else browser.images.rows[place]
        content = None if row is None else await asyncio.to_thread(browser.images.thumbnail, row, SIDE)
        if content is None:
            raise web.HTTPNotFound(text="image not found")
        return web.Response(body=content, content_type="image/webp")

    async def boxes(request: web.Request) -> web.Response:
        return _json({"boxes": browser.boxes.of(a_row(request))})

    async def whole(request: web.Request) -> web.Response:
        content = await asyncio.to_thread(browser.boxes.whole, a_row(request))
        if content is None:
            raise web.HTTPNotFound(text="the whole image is not in raw/")
        return web.Response(body=content, content_type="image/webp")

    def a_row(request: web.Request) -> dict[str, Any]:
        place = browser.images.places.get(request.match_info["key"])
        if place is None or not browser.boxes.decidable:
            raise web.HTTPNotFound(text="image not found")
        return browser.images.rows[place]

    async def put_decisions(request: web.Request) -> web.Response:
        given = request.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
            raise web.HTTPForbidden(text="open the address that `animesion browse` printed: it includes the token")
        try:
            body = json.loads(await request.read())
            decided = settings.check(Decisions, body["decisions"], "decisions")
            revision = body["revision"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise web.HTTPBadRequest(text="the request body is not JSON with decisions and a revision") from None
        except AnimesionError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        # no await from here on: no other request can write between the check and the save
        try:
            if browser.decisions()[1] != revision:
                raise web.HTTPConflict(text=f"{browser.file} was changed in the meantime: load the page again")
            return _json({"revision": browser.save(decided)})
        except AnimesionError as error:
            raise web.HTTPInternalServerError(text=str(error)) from None

    served = web.Application(middlewares=[_guard], client_max_size=MOST_BYTES)
    served.add_routes(
        [
            web.get("/", index),
            web.get("/api/classes/{id}", a_class),
            web.get("/api/clusters", clusters),
            web.get("/api/drops", drops),
            web.get("/api/pairs", pairs),
            web.get("/api/pairs/{number}", strip),
            web.get("/api/image/{key}", image),
            web.get("/api/boxes/{key}", boxes),
            web.get("/api/whole/{key}", whole),
            web.put("/api/decisions", put_decisions),
        ]
    )
    return served


@web.middleware
async def _guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Refuse requests from other websites, and under other host names (DNS rebinding)."""
    port = request.transport.get_extra_info("sockname")[1] if request.transport else 0
    own = {f"127.0.0.1:{port}", f"localhost:{port}"}
    # a link from another site may open the page itself, but nothing below it
    foreign = request.headers.get("Sec-Fetch-Site") in _FOREIGN and request.path != "/"
    origin = request.headers.get("Origin")
    response: web.StreamResponse
    if request.headers.get("Host") not in own:
        response = web.Response(status=421, text="this server answers only as 127.0.0.1 and localhost")
    elif foreign or (origin is not None and origin.removeprefix("http://") not in own):
        response = web.Response(status=403, text="this server answers only its own page")
    else:
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = web.Response(status=error.status, text=error.text)
    response.headers.update(_HEADERS)
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    return response


def _listed(browser: Browser, request: web.Request, rows: Sequence[int]) -> web.Response:
    offset, limit = _span(request)
    return _json({"total": len(rows), "items": browser.items(rows[offset : offset + limit])})


def _span(request: web.Request) -> tuple[int, int]:
    offset = _integer(request.query.get("offset", "0"), 10**9)
    return offset, max(1, _integer(request.query.get("limit", "60"), MOST_ITEMS))


def _integer(text: str, most: int) -> int:
    """Parse a whole number from 0 to `most`."""
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= most):
        raise web.HTTPBadRequest(text=f"expected a whole number from 0 to {most}")
    return int(text)


def _json(value: Any) -> web.Response:
    return web.Response(text=page.as_json(value), content_type="application/json", charset="utf-8")
