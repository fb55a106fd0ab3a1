"""Local server of the live report: every class, cluster, drop and image of a build, and the curator's decisions.

Decisions are saved in the format of `animesion.config.decisions`. The server keeps other websites out: it answers only
requests whose Host is 127.0.0.1 or localhost, and writes only with the token that was printed at the start.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import hmac
import json
import shlex
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from aiohttp import web
from PIL import Image
from pydantic import ValidationError

from animesion.config import settings
from animesion.config.decisions import MOST_BYTES, Decisions
from animesion.config.decisions import read as read_decisions
from animesion.dataset.dataset import Dataset
from animesion.errors import AnimesionError
from animesion.report import facts, page
from animesion.report.boxes import Boxes
from animesion.report.details import Details
from animesion.report.images import Images, large
from animesion.report.pairs import SERVED_SIDE, Pairs
from animesion.report.selection import Filter, Places, SavedFilters, matching
from animesion.storage.workspace import write_atomic

#: Longest side of a served image, in pixels.
SIDE = 192

#: Most items per response, and most images that are drawn on the map.
MOST_ITEMS, MOST_DRAWN = 200, 20_000

#: Revisions of the decisions whose images a list can be about, the latest ones.
MOST_REVISIONS = 100

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
        self.file, self._audit = file, audit
        self._state = _state(dataset.path)
        self.images = Images(dataset)
        self.pairs, self.boxes = Pairs(self.images), Boxes(self.images)
        self.details = Details(self.images, self.boxes)
        #: Filters that the curator saved, beside the decisions.
        self.filters_file = file.with_name(f"{file.stem}-filters.toml")
        #: Keys with a decision, by the revision of the decisions.
        self._decided: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()
        self._map_lock = threading.Lock()
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
        # damaged files are reported now rather than on the first request
        self._remember(*self.decisions())
        SavedFilters.read(self.filters_file)

    @property
    def outdated(self) -> bool:
        """Whether the dataset was built again since, or is being built."""
        return _state(self.dataset.path) != self._state

    def again(self) -> Browser:
        """The dataset as it is now.

        Raises:
            UsageError: as at the start; so while it is being built.
        """
        return Browser(Dataset(self.dataset.path), self.file, self._audit)

    def decisions(self) -> tuple[Decisions, str]:
        """The decisions, and the SHA-256 of their file as their revision; empty if there is no file yet."""
        if not self.file.exists():
            return self.first, ""
        text = self.file.read_bytes()
        return read_decisions(self.file), hashlib.sha256(text).hexdigest()

    def save(self, decisions: Decisions) -> tuple[str, bool]:
        """Write decisions unless they are those that are there; returns their revision, and whether they were written.

        Labels that the page shows cut are written in full.
        """
        full = {facts.clip(info.name): info.name for info in self.dataset.classes}
        whole = {key: full.get(label, label) for key, label in decisions.label.items()}
        text = decisions.model_copy(update={"label": whole}).to_toml()
        now, revision = self.decisions()
        if now.to_toml() == text:
            return revision, False
        write_atomic(self.file, text.encode())
        revision = hashlib.sha256(text.encode()).hexdigest()
        self._remember(decisions, revision)
        return revision, True

    def save_filter(self, name: str, address: str | None) -> dict[str, str]:
        """Save a filter under a name, or delete it where the address is None; returns all that are saved.

        Raises:
            UsageError: the file is damaged.
            ValidationError: a name or an address that is too long or has control characters, or too many filters.
        """
        filters = dict(SavedFilters.read(self.filters_file).filters)
        if address is None:
            filters.pop(name, None)
        else:
            filters[name] = address
        SavedFilters(filters=filters).write(self.filters_file)
        return filters

    def rebuild(self) -> str:
        """The command that builds the dataset again with the decisions, quoted for a shell."""
        recipe, decisions = (
            self.dataset.path.resolve() / "recipe.toml",
            json.dumps(str(self.file.resolve()), ensure_ascii=False),
        )
        command = ["animesion", "build", str(recipe), "--out", str(self.dataset.path.resolve())]
        return shlex.join([*command, "--set", f"curate.decisions={decisions}", "--replace"])

    def find(self, chosen: Filter, as_of: str) -> npt.NDArray[np.int64]:
        """Row indices of the images that a filter accepts; the last answers are kept.

        Args:
            chosen: the filter.
            as_of: revision of the decisions that `Filter.decided` is about, so that a list keeps its images while a
                curator goes through it; those of now if it is not known.
        """
        decided: frozenset[str] = frozenset()
        if chosen.decided:
            now, revision = self.decisions()
            self._remember(now, revision)
            decided = self._decided.get(as_of, self._decided[revision])
        return self._found(chosen, decided)

    def _remember(self, decisions: Decisions, revision: str) -> None:
        with self._lock:
            self._decided[revision] = frozenset(decisions.named())
            while len(self._decided) > MOST_REVISIONS:
                del self._decided[next(iter(self._decided))]

    def drawn(self, chosen: Filter, as_of: str) -> dict[str, Any]:
        """Places on the map of the images that a filter accepts, whose area is left out; evenly, if they are many."""
        places = self.places
        found = self.find(dataclasses.replace(chosen, area=()), as_of)
        found = found[np.isfinite(places.at[found, 0])]
        shown = found[:: -(-len(found) // MOST_DRAWN) or 1]
        labels = self.images.rows.column("label").take(pa.array(shown))
        codes = labels.indices.to_numpy()
        used, numbers = np.unique(codes, return_inverse=True)
        return {
            "kind": places.kind,
            "total": len(found),
            "keys": self.images.rows.column("key").take(pa.array(shown)).to_pylist(),
            # in ten-thousandths of the map
            "x": np.rint(places.at[shown, 0] * 1e4).astype(int).tolist(),
            "y": np.rint(places.at[shown, 1] * 1e4).astype(int).tolist(),
            "labels": [facts.clip(labels.dictionary[code].as_py()) for code in used.tolist()],
            "label": numbers.tolist(),
            "kept": self.images.rows.numbers("kept")[shown].astype(int).tolist(),
        }

    def html(self) -> str:
        """The page as HTML."""
        decided, revision = self.decisions()
        state = {
            "decisions": decided.model_dump(),
            "revision": revision,
            "file": str(self.file),
            "rebuild": self.rebuild(),
            "resized": self.dataset.recipe.pack.size > 0,
            "filters": SavedFilters.read(self.filters_file).filters,
        }
        return page.render({**self.overview, **state}, live=True)

    @property
    def places(self) -> Places:
        """Places of the images on the map; the first call computes them, and others wait for it."""
        with self._map_lock:
            return self._places

    @functools.cached_property
    def _places(self) -> Places:
        return Places(self.dataset, self.images.rows)

    @functools.cached_property
    def _found(self) -> Callable[[Filter, frozenset[str]], npt.NDArray[np.int64]]:
        def found(chosen: Filter, decided: frozenset[str]) -> npt.NDArray[np.int64]:
            return matching(self.images.rows, chosen, decided, self.places.at if chosen.area else None)

        return functools.lru_cache(maxsize=8)(found)

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

    @web.middleware
    async def current(request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Open a dataset that was built again when its page is loaded; refuse what a page from before asks for."""
        nonlocal browser
        if browser.outdated:
            if request.path != "/":
                raise web.HTTPConflict(text=f"{browser.dataset.path} was built again: load the page again")
            browser = await asyncio.to_thread(_or_refuse, browser.again)
        return await handler(request)

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

    async def images(request: web.Request) -> web.Response:
        chosen, as_of = _filter(request), request.query.get("as_of", "")
        found = await asyncio.to_thread(_or_refuse, lambda: browser.find(chosen, as_of))
        return _listed(browser, request, found)

    async def on_map(request: web.Request) -> web.Response:
        chosen, as_of = _filter(request), request.query.get("as_of", "")
        return _json(await asyncio.to_thread(_or_refuse, lambda: browser.drawn(chosen, as_of)))

    async def image(request: web.Request) -> web.Response:
        row = browser.images.rows[_place(browser, request)]
        content = await asyncio.to_thread(browser.images.thumbnail, row, SIDE)
        if content is None:
            raise web.HTTPNotFound(text="image not found")
        return web.Response(body=content, content_type="image/webp")

    async def details(request: web.Request) -> web.Response:
        place = _place(browser, request)
        return _json(await asyncio.to_thread(_or_refuse, lambda: browser.details.of(place)))

    async def original(request: web.Request) -> web.Response:
        return await at_full_size(request, browser.images.original, "the file of the source is not in raw/")

    async def sample(request: web.Request) -> web.Response:
        return await at_full_size(request, browser.images.image, "image not found")

    async def at_full_size(
        request: web.Request, read: Callable[[dict[str, Any]], Image.Image | None], missing: str
    ) -> web.Response:
        row = browser.images.rows[_place(browser, request)]

        def made() -> bytes | None:
            found = read(row)
            return None if found is None else large(found)

        content = await asyncio.to_thread(made)
        if content is None:
            raise web.HTTPNotFound(text=missing)
        return web.Response(body=content, content_type="image/jpeg")

    def may_write(request: web.Request) -> None:
        given = request.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
            raise web.HTTPForbidden(text="open the address that `animesion browse` printed: it includes the token")

    async def put_filter(request: web.Request) -> web.Response:
        may_write(request)
        try:
            body = json.loads(await request.read())
            return _json({"filters": browser.save_filter(body["name"], body["address"])})
        except (ValidationError, ValueError, TypeError, KeyError, RecursionError):
            raise web.HTTPBadRequest(text="a filter has a name of at most 100 characters and an address") from None
        except (AnimesionError, OSError) as error:
            raise web.HTTPInternalServerError(text=f"cannot save: {error}") from None

    async def put_decisions(request: web.Request) -> web.Response:
        may_write(request)
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
            saved, written = browser.save(decided)
            return _json({"revision": saved, "written": written})
        except (AnimesionError, OSError) as error:
            raise web.HTTPInternalServerError(text=str(error)) from None

    served = web.Application(middlewares=[_guard, current], client_max_size=MOST_BYTES)
    served.add_routes(
        [
            web.get("/", index),
            web.get("/api/classes/{id}", a_class),
            web.get("/api/clusters", clusters),
            web.get("/api/drops", drops),
            web.get("/api/pairs", pairs),
            web.get("/api/pairs/{number}", strip),
            web.get("/api/images", images),
            web.get("/api/map", on_map),
            web.get("/api/image/{key}", image),
            web.get("/api/details/{key}", details),
            web.get("/api/original/{key}", original),
            web.get("/api/sample/{key}", sample),
            web.put("/api/decisions", put_decisions),
            web.put("/api/filters", put_filter),
        ]
    )
    return served


def _state(folder: Path) -> tuple[int, ...]:
    """What differs once a dataset was built again; empty while there is none."""
    try:
        found = (folder / "dataset.json").stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


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


def _listed(browser: Browser, request: web.Request, rows: Sequence[int] | npt.NDArray[np.int64]) -> web.Response:
    offset, limit = _span(request)
    return _json({"total": len(rows), "items": browser.items([int(i) for i in rows[offset : offset + limit]])})


def _place(browser: Browser, request: web.Request) -> int:
    """The row of the image that a request names."""
    place = browser.images.places.get(request.match_info["key"])
    if place is None:
        raise web.HTTPNotFound(text="image not found")
    return place


def _filter(request: web.Request) -> Filter:
    try:
        return Filter.of(request.query)
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from None


def _or_refuse(work: Callable[[], Any]) -> Any:
    """The result of reading tables, or what is wrong with them as the text of an answer."""
    try:
        return work()
    except AnimesionError as error:
        raise web.HTTPInternalServerError(text=str(error)) from None


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
