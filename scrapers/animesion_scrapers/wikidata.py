"""Cultivars in Wikidata, with their categories and images on Wikimedia Commons.

The query of the SPARQL service (query.wikidata.org) selects items that are instances of cultivar (Q4886) or of a
subclass, below a parent taxon (P171, P279), with their Commons category (P373), image (P18) and name (P225, else the
label). Source: https://www.wikidata.org/wiki/Wikidata:SPARQL_query_service. Images are read in `sites.commons`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from animesion_scrapers import cultivars, fields
from animesion_scrapers.cultivars import Cultivar
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.http.metadata import MetadataClient

URL = "https://query.wikidata.org"
LIMITS: Mapping[str, HostLimit] = {"query.wikidata.org": HostLimit(1.0, 1)}
"""The service allows 60 seconds of query time per minute."""

TIMEOUT = 75.0
"""Seconds to wait for a response; the service aborts queries after 60."""

PAGE = 1000

_ITEM = re.compile(r"Q[1-9]\d{0,11}")
_QUERY = """\
SELECT ?item (SAMPLE(?n) AS ?name) (SAMPLE(?l) AS ?label) (SAMPLE(?c) AS ?category) (SAMPLE(?p) AS ?image) WHERE {{
  ?item wdt:P31/wdt:P279* wd:Q4886 ; (wdt:P171|wdt:P279)+ wd:{parent} .
  OPTIONAL {{ ?item wdt:P225 ?n . }}
  OPTIONAL {{ ?item rdfs:label ?l . FILTER(LANG(?l) IN ("en", "mul")) }}
  OPTIONAL {{ ?item wdt:P373 ?c . }}
  OPTIONAL {{ ?item wdt:P18 ?p . }}
  FILTER(BOUND(?c) || BOUND(?p))
}} GROUP BY ?item ORDER BY ?item LIMIT {limit} OFFSET {offset}"""


@dataclass(frozen=True, slots=True)
class KnownCultivar:
    """One item of Wikidata.

    Attributes:
        item: Its id, such as `Q165`.
        cultivar: The cultivar in its name or label; None if neither has the form of a cultivar name.
        category: Title of its category on Commons, without `Category:`; empty for none.
        file: Title of an image on Commons, without `File:`; empty for none.
    """

    item: str
    cultivar: Cultivar | None
    category: str
    file: str


def known_cultivars(
    client: MetadataClient, parent: str, *, base_url: str = URL, most: int = 10_000
) -> Iterator[KnownCultivar]:
    """Cultivars below a taxon that have a category or an image on Commons, by item.

    Args:
        client: A client with a timeout of `TIMEOUT` seconds and a limiter that keeps `LIMITS`.
        parent: Item of the taxon, such as `Q34687` for Rosa.
        base_url: URL of the service.
        most: Most items to yield.

    Raises:
        ScraperError: `parent` is not an item, the service cannot be read, or it sends a full page without a new item,
            as one that ignores `OFFSET` does for ever; it times out on taxa with very many cultivars.
    """
    if not _ITEM.fullmatch(parent):
        raise ScraperError(f"{parent[:40]!r} is not an item of Wikidata: use one such as Q34687 (Rosa).")
    seen: set[str] = set()
    offset = 0
    while len(seen) < most:
        rows = _rows(client, base_url, _QUERY.format(parent=parent, limit=PAGE, offset=offset))
        before = len(seen)
        for row in rows:
            item = _value(row, "item").rpartition("/")[2]
            if not _ITEM.fullmatch(item) or item in seen or len(seen) == most:
                continue
            seen.add(item)
            named = cultivars.parse(_value(row, "name")) or cultivars.parse(_value(row, "label"))
            yield KnownCultivar(item, named, _value(row, "category"), _file(_value(row, "image")))
        if len(rows) < PAGE:
            return
        if len(seen) == before:
            host = urlsplit(base_url).hostname
            raise ScraperError(f"{host} answered the page from row {offset} with what it had already sent.")
        offset += PAGE


def _rows(client: MetadataClient, base_url: str, query: str) -> list[Mapping[str, Any]]:
    document = client.get_json(f"{base_url}/sparql", {"query": query, "format": "json"})
    results = fields.mapping(fields.mapping(document).get("results")).get("bindings")
    if not isinstance(results, list):
        host = urlsplit(base_url).hostname
        raise ScraperError(f"{host} sent a response to /sparql without results.")
    return [fields.mapping(row) for row in results]


def _value(row: Mapping[str, Any], name: str) -> str:
    return fields.text(fields.mapping(row.get(name)).get("value"))


def _file(url: str) -> str:
    """The file title of a URL such as `http://commons.wikimedia.org/wiki/Special:FilePath/Rosa%20Peace.jpg`."""
    return unquote(url.rpartition("/Special:FilePath/")[2]) if "/Special:FilePath/" in url else ""
