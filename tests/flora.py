"""The APIs of iNaturalist, GBIF, Wikimedia Commons and Wikidata over a small invented flora.

Each application responds like its site, with its quirks: cycles and unrelated branches of categories, responses in
several parts, errors with status 200, markup in authors' names, media on other hosts. Servers and faults are in
`animesion_sample.faults`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any
from urllib.parse import quote

from aiohttp import web
from PIL import Image, ImageDraw

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LONGEST_PAGES = {"inaturalist": 200, "gbif": 300, "commons": 50, "subcategories": 500}
"""Most entries per response; tests reduce them."""

DEEPEST_OCCURRENCE = 100_000
_LICENCES = ("cc0", "cc-by", "cc-by-sa", "cc-by-nc", "")
_SHOWN = {"cc0": "CC0", "cc-by": "CC BY 4.0", "cc-by-sa": "CC BY-SA 3.0 de", "cc-by-nc": "CC BY-NC 2.0", "": ""}
_LEGAL = {
    "cc0": "http://creativecommons.org/publicdomain/zero/1.0/legalcode",
    "cc-by": "http://creativecommons.org/licenses/by/4.0/legalcode",
    "cc-by-sa": "https://creativecommons.org/licenses/by-sa/4.0/",
    "cc-by-nc": "http://creativecommons.org/licenses/by-nc/4.0/",
    "": "© the garden, ask first",
}


@dataclass(frozen=True)
class Plant:
    """One image of a plant.

    Attributes:
        id: Number of the observation, the occurrence and the page.
        taxon: A name such as `Rosa gallica`.
        cultivar: The epithet; empty for none.
        licence: `cc0`, `cc-by`, `cc-by-sa`, `cc-by-nc` or empty for none.
        photos: Number of images on iNaturalist and GBIF.
        author: The photographer.
    """

    id: int
    taxon: str = "Rosa gallica"
    cultivar: str = ""
    licence: str = "cc-by"
    photos: int = 1
    author: str = "Ada Green"

    @property
    def name(self) -> str:
        """Taxon and cultivar."""
        return f"{self.taxon} '{self.cultivar}'" if self.cultivar else self.taxon

    @cached_property
    def images(self) -> tuple[bytes, ...]:
        """The drawn files: a flower with colour and number of petals by the name."""
        return tuple(_flower(self.name, self.id, number) for number in range(self.photos))


def plants(count: int, cultivars: Sequence[str] = ("Peace", "Iceberg", "Kanzan")) -> list[Plant]:
    """A number of plants that cycles through cultivars and licences."""
    return [
        Plant(
            id=number,
            taxon="Prunus serrulata" if (name := cultivars[number % len(cultivars)]) == "Kanzan" else "Rosa gallica",
            cultivar=name,
            licence=_LICENCES[number // len(cultivars) % len(_LICENCES)],
            photos=1 + (number % 5 == 0),
        )
        for number in range(1, count + 1)
    ]


# -- iNaturalist -----------------------------------------------------------------------------------------------------


def inaturalist(flora: Sequence[Plant]) -> web.Application:
    """`/v1/observations` by `id_above` or `id`, `/v1/taxa`, and the photos in each size.

    Args:
        flora: The plants; may grow while they are served.
    """

    async def observations(request: web.Request) -> web.Response:
        query = request.query
        found = sorted(flora, key=lambda plant: plant.id)
        if query.get("id"):
            wanted = set(query["id"].split(","))
            found = [plant for plant in found if str(plant.id) in wanted]
        else:
            number = int(query["taxon_id"])
            names = {name for name, key in _taxa(flora).items() if key == number}
            found = [plant for plant in found if any(plant.taxon.startswith(name) for name in names)]
            if query.get("photo_license"):
                allowed = set(query["photo_license"].split(","))
                found = [plant for plant in found if plant.licence in allowed]
        above, limit = int(query.get("id_above", "0")), int(query.get("per_page", "30"))
        page = [plant for plant in found if plant.id > above][: min(limit, LONGEST_PAGES["inaturalist"])]
        results = [_observation(plant, request) for plant in page]
        return web.json_response({"total_results": len(found), "page": 1, "per_page": limit, "results": results})

    async def taxa(request: web.Request) -> web.Response:
        asked = request.query.get("q", "").lower()
        results = [
            {"id": key, "name": name, "rank": "species" if " " in name else "genus"}
            | ({"preferred_common_name": "French Rose"} if name == "Rosa gallica" else {})
            for name, key in _taxa(flora).items()
            if name.lower().startswith(asked[:3]) or (asked == "french rose" and name == "Rosa gallica")
        ]
        return web.json_response({"total_results": len(results), "page": 1, "per_page": 30, "results": results})

    return _application(flora, {"/v1/observations": observations, "/v1/taxa": taxa})


def _observation(plant: Plant, request: web.Request) -> dict[str, Any]:
    key = _taxa([plant])[plant.taxon]
    return {
        "id": plant.id, "uuid": f"{plant.id:032x}", "quality_grade": "research", "observed_on": "2024-06-01",
        "captive": bool(plant.cultivar), "license_code": plant.licence or None,
        "taxon": {"id": key, "name": plant.taxon, "rank": "species", "rank_level": 10, "ancestor_ids": [1, key]},
        "user": {"login": plant.author.lower().replace(" ", "_"), "name": plant.author},
        "photos": [
            {
                "id": 10 * plant.id + number, "license_code": plant.licence or None,
                "attribution": f"(c) {plant.author}, some rights reserved",
                "url": f"{_here(request)}/photos/{10 * plant.id + number}/square.jpg",
                "original_dimensions": {"width": 96, "height": 72},
            }
            for number in range(plant.photos)
        ],
    }  # fmt: skip


# -- GBIF ------------------------------------------------------------------------------------------------------------


def gbif(flora: Sequence[Plant], extra: int = 0) -> web.Application:
    """`/v1/occurrence/search` by offset, `/v1/occurrence/KEY`, `/v1/species/match`, the image cache.

    Args:
        flora: The plants; may grow while they are served.
        extra: Number of occurrences that are counted but missing.
    """

    async def search(request: web.Request) -> web.Response:
        query = request.query
        limit, offset = min(int(query.get("limit", "20")), LONGEST_PAGES["gbif"]), int(query.get("offset", "0"))
        if limit + offset > DEEPEST_OCCURRENCE:
            return web.json_response({"message": "Max offset of 100000 exceeded"}, status=400)
        number = int(query["taxonKey"])
        names = {name for name, key in _taxa(flora).items() if key == number}
        found = [plant for plant in flora if any(plant.taxon.startswith(name) for name in names)]
        if licences := query.getall("license", []):
            spelled = {"CC0_1_0": "cc0", "CC_BY_4_0": "cc-by", "CC_BY_NC_4_0": "cc-by-nc"}
            found = [plant for plant in found if plant.licence in {spelled.get(name) for name in licences}]
        page = found[offset : offset + limit]
        return web.json_response(
            {
                "offset": offset, "limit": limit, "endOfRecords": offset + limit >= len(found),
                "count": len(found) + extra, "results": [_occurrence(plant, request) for plant in page], "facets": [],
            }
        )  # fmt: skip

    async def one(request: web.Request) -> web.Response:
        for plant in flora:
            if str(plant.id) == request.match_info["key"]:
                return web.json_response(_occurrence(plant, request))
        return web.json_response({"message": "not found"}, status=404)

    async def match(request: web.Request) -> web.Response:
        name = request.query.get("name", "")
        taxa = _taxa(flora)
        near = [
            {"usageKey": key, "scientificName": each, "matchType": "FUZZY"}
            for each, key in taxa.items()
            if each[:3].lower() == name[:3].lower()
        ]
        if name in taxa:
            return web.json_response({"usageKey": taxa[name], "scientificName": name, "matchType": "EXACT"})
        return web.json_response({"confidence": 100, "matchType": "NONE", "alternatives": near, "synonym": False})

    async def cache(request: web.Request) -> web.Response:
        for plant in flora:
            for number in range(plant.photos):
                identifier = f"{_here(request)}/photos/{10 * plant.id + number}/original.jpg"
                digest = hashlib.md5(identifier.encode(), usedforsecurity=False).hexdigest()
                if (str(plant.id), digest) == (request.match_info["key"], request.match_info["digest"]):
                    return web.Response(body=plant.images[number], content_type="image/jpeg")
        return web.Response(status=404)

    return _application(
        flora,
        {
            "/v1/occurrence/search": search,
            r"/v1/occurrence/{key:\d+}": one,
            "/v1/species/match": match,
            r"/v1/image/cache/occurrence/{key:\d+}/media/{digest}": cache,
        },
    )


def _occurrence(plant: Plant, request: web.Request) -> dict[str, Any]:
    record: dict[str, Any] = {
        "key": plant.id, "scientificName": f"{plant.taxon} L.", "species": plant.taxon, "genus": plant.taxon.split()[0],
        "taxonKey": _taxa([plant])[plant.taxon], "taxonRank": "SPECIES", "license": _LEGAL[plant.licence],
        "eventDate": "2024-06-01", "recordedBy": plant.author,
        "media": [
            {
                "type": "StillImage", "format": "image/jpeg",
                "identifier": f"{_here(request)}/photos/{10 * plant.id + number}/original.jpg",
                "license": _LEGAL[plant.licence], "creator": plant.author,
            }
            for number in range(plant.photos)
        ],
    }  # fmt: skip
    if plant.cultivar:
        record["cultivarEpithet"] = plant.cultivar
    return record


# -- Wikimedia Commons and Wikidata ----------------------------------------------------------------------------------


@dataclass
class Wiki:
    """Content and quirks of a Commons.

    Attributes:
        flora: The files; each is in the category of its name.
        tree: Subcategories by category, all titles without `Category:`; may have cycles.
        within: Ids of further files by category.
        lagging: Number of requests that get `maxlag` first.
        parts: Whether metadata of files is sent in a second response.
        error: Code and sentence of the error that all requests get, with status 200.
    """

    flora: Sequence[Plant]
    tree: Mapping[str, Sequence[str]] = field(default_factory=dict)
    within: Mapping[str, Sequence[int]] = field(default_factory=dict)
    lagging: int = 0
    parts: bool = False
    error: tuple[str, str] = ("", "")

    def files(self, category: str) -> list[Plant]:
        """The files in a category."""
        more = self.within.get(category, ())
        return [plant for plant in self.flora if plant.name == category or plant.id in more]


def wiki_of(flora: Sequence[Plant]) -> Wiki:
    """A wiki with a tree from `Plants` over taxa to cultivars, and from there in a cycle back."""
    taxa = sorted({plant.taxon for plant in flora})
    tree: dict[str, list[str]] = {"Plants": taxa}
    for taxon in taxa:
        tree[taxon] = sorted({plant.name for plant in flora if plant.taxon == taxon and plant.cultivar})
        for name in tree[taxon]:
            tree[name] = ["Plants"]
    return Wiki(flora, tree)


def commons(wiki: Wiki) -> web.Application:
    """`/w/api.php`: members of categories, files by page id and by title, and the files themselves."""

    async def api(request: web.Request) -> web.Response:
        query = request.query
        if wiki.lagging:
            wiki.lagging -= 1
            record = {"error": {"code": "maxlag", "info": "Waiting for a database server: 6 seconds lagged."}}
            return web.json_response(record, headers={"Retry-After": "1"})
        if wiki.error[0]:
            return web.json_response({"error": {"code": wiki.error[0], "info": wiki.error[1]}})
        if query.get("list") == "categorymembers":
            return web.json_response(_subcategories(wiki, query))
        return web.json_response(_files(wiki, request))

    async def sparql(request: web.Request) -> web.Response:
        found = re.search(r"wd:(Q\d+) \.\n", request.query["query"])
        limit, offset = (int(each) for each in re.findall(r"(?:LIMIT|OFFSET) (\d+)", request.query["query"]))
        names = sorted({plant.name for plant in wiki.flora if plant.cultivar}) if found and found[1] == "Q34687" else []
        rows = [_item(wiki, place, name) for place, name in enumerate(names, 1)]
        record = {"head": {"vars": ["item"]}, "results": {"bindings": rows[offset : offset + limit]}}
        return web.json_response(record, content_type="application/sparql-results+json")

    return _application(wiki.flora, {"/w/api.php": api, "/sparql": sparql})


def _subcategories(wiki: Wiki, query: Mapping[str, str]) -> dict[str, Any]:
    names = list(wiki.tree.get(query["cmtitle"].removeprefix("Category:"), ()))
    limit = min(int(query["cmlimit"]), LONGEST_PAGES["subcategories"])
    first = int(query.get("cmcontinue", "0"))
    members = [{"ns": 14, "title": f"Category:{name}"} for name in names[first : first + limit]]
    record: dict[str, Any] = {"batchcomplete": "", "query": {"categorymembers": members}}
    if first + limit < len(names):
        record["continue"] = {"cmcontinue": str(first + limit), "continue": "-||"}
    return record


def _files(wiki: Wiki, request: web.Request) -> dict[str, Any]:
    query = request.query
    if "gcmtitle" in query:
        found = wiki.files(query["gcmtitle"].removeprefix("Category:"))
    elif "pageids" in query:
        found = [plant for plant in wiki.flora if str(plant.id) in query["pageids"].split("|")]
    else:
        found = [plant for plant in wiki.flora if _title(plant) in query["titles"].split("|")]
    limit = min(int(query.get("gcmlimit", "500")), LONGEST_PAGES["commons"])
    first = int(query.get("gcmcontinue", "0"))
    page = found[first : first + limit]
    if not page:
        return {"batchcomplete": ""}
    second = "iistart" in query
    pages = {
        str(plant.id): {"pageid": plant.id, "ns": 6, "title": _title(plant), "imagerepository": "local"}
        | ({"imageinfo": [_imageinfo(plant, request)]} if second or not wiki.parts else {})
        for plant in page
    }
    record: dict[str, Any] = {"query": {"pages": pages}}
    if wiki.parts and not second:
        return record | {"continue": {"iistart": "20240601", "gcmcontinue": str(first), "continue": "||"}}
    if first + limit < len(found):
        record["continue"] = {"gcmcontinue": str(first + limit), "continue": "gcmcontinue||"}
    return record


def _title(plant: Plant) -> str:
    return f"File:{plant.name} {plant.id}.jpg"


def _imageinfo(plant: Plant, request: web.Request) -> dict[str, Any]:
    content = plant.images[0]
    record: dict[str, Any] = {
        "user": "Uploader", "size": len(content), "width": 96, "height": 72, "mime": "image/jpeg",
        "url": f"{_here(request)}/photos/{10 * plant.id}/original.jpg",
        "descriptionurl": f"{_here(request)}/wiki/{quote(_title(plant))}", "timestamp": "2024-06-01T12:00:00Z",
        "sha1": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
        "extmetadata": {
            "LicenseShortName": {"value": _SHOWN[plant.licence], "source": "commons-desc-page"},
            "Artist": {"value": f'<a href="//example.org/x" title="User">{plant.author} &amp; friends</a>'},
        },
    }  # fmt: skip
    if (width := int(request.query.get("iiurlwidth", "0"))) and width < record["width"]:
        record |= {"thumburl": f"{_here(request)}/photos/{10 * plant.id}/small.jpg", "thumbwidth": width}
    return record


def _item(wiki: Wiki, place: int, name: str) -> dict[str, Any]:
    """An item of Wikidata; every third has an image instead of a category, and a label instead of a taxon name."""
    item: dict[str, Any] = {"item": {"type": "uri", "value": f"http://www.wikidata.org/entity/Q{1000 + place}"}}
    if place % 3:
        return item | {
            "name": {"type": "literal", "value": name},
            "category": {"type": "literal", "value": name},
        }
    title = next(_title(plant) for plant in wiki.flora if plant.name == name).removeprefix("File:")
    return item | {
        "label": {"type": "literal", "value": name, "xml:lang": "en"},
        "image": {"type": "uri", "value": f"http://commons.wikimedia.org/wiki/Special:FilePath/{quote(title)}"},
    }


# -- inside ----------------------------------------------------------------------------------------------------------


def _application(flora: Sequence[Plant], routes: Mapping[str, Handler]) -> web.Application:
    async def photo(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        for plant in flora:
            if plant.id == number // 10 and number % 10 < plant.photos:
                return web.Response(body=plant.images[number % 10], content_type="image/jpeg")
        return web.Response(status=404)

    app = web.Application()
    app.router.add_get(r"/photos/{number:\d+}/{size:\w+}.jpg", photo)
    for path, handler in routes.items():
        app.router.add_get(path, handler)
    return app


def _here(request: web.Request) -> str:
    return f"{request.scheme}://{request.host}"


def _taxa(flora: Sequence[Plant]) -> dict[str, int]:
    """Numbers of taxa, including genera."""
    names = sorted({name for plant in flora for name in (plant.taxon, plant.taxon.split()[0])})
    return {name: int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[:6], 16) + 1 for name in names}


def _flower(name: str, number: int, view: int) -> bytes:
    digest = hashlib.sha256(name.encode()).digest()
    turn = hashlib.sha256(f"{name}/{number}/{view}".encode()).digest()
    image = Image.new("RGB", (96, 72), (40 + turn[0] // 4, 90 + turn[1] // 4, 40 + turn[2] // 4))
    draw = ImageDraw.Draw(image)
    x, y, radius = 30 + turn[3] % 36, 26 + turn[4] % 20, 12 + turn[5] % 10
    petals = 4 + digest[3] % 9
    for petal in range(petals):
        start = 360 * petal / petals + turn[6] % 90
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.pieslice(box, start, start + 250 / petals, fill=(digest[0], digest[1] // 2, digest[2]))
    draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(230, 200, 60))
    for speck in turn[7:27]:
        draw.point((speck % 96, (speck * 7) % 72), fill=(speck, speck, 90))
    out = BytesIO()
    image.save(out, "JPEG", quality=92)
    return out.getvalue()
