"""The GBIF API (api.gbif.org): still images of the occurrences of a taxon, and of occurrences by key.

Occurrences come from many publishers, and their images from as many hosts. Source:
https://techdocs.gbif.org/en/openapi/v1/occurrence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar
from urllib.parse import urlencode

from animesion_scrapers import cultivars, fields
from animesion_scrapers.errors import ScraperError, StatusError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.licences import licence_id
from animesion_scrapers.post import TAG_CATEGORIES, Post
from animesion_scrapers.sites import Site, SiteInfo, check_filters

PAGE = 300
"""Occurrences per page, the most that the site returns."""

DEEPEST = 100_000
"""Most occurrences of a search that the site returns, over all pages."""

FILTERS = frozenset(
    {"license", "country", "continent", "year", "month", "basisOfRecord", "datasetKey", "publishingCountry"}
    | {"institutionCode", "establishmentMeans", "degreeOfEstablishment", "hasCoordinate", "stateProvince", "q"}
)
"""Search parameters that a caller may set; several values are separated by commas."""

_POST_ID = re.compile(r"(\d{1,18})(?:-([0-9a-f]{8}))?")
_NEAREST = 5


class Gbif(Site):
    """Reads images from GBIF; use it as a context manager, or call `close`.

    A post is one image, with the id `OCCURRENCE-DIGEST`, where the digest is the first 8 digits of the MD5 of the
    image's identifier; its parent is the occurrence.
    """

    info: ClassVar[SiteInfo] = SiteInfo(
        name="gbif",
        summary="GBIF: images of the occurrences of a taxon, or of given occurrences",
        url="https://api.gbif.org",
        limits={"api.gbif.org": HostLimit(1.0, 1)},
        label_tags=("cultivar",),
        terms="https://www.gbif.org/terms",
    )

    def __init__(
        self, base_url: str = "", *, cache: bool = False, search: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the API.
            cache: Whether files come from GBIF's cache, at most 1200 pixels wide, instead of from the publishers.
            search: Further search parameters, from `FILTERS`.
            settings: As for every `Site`.

        Raises:
            ScraperError: A parameter is not one of `FILTERS`, or the User-Agent names no contact.
        """
        self._search = check_filters(search or {}, FILTERS, "GBIF")
        super().__init__(base_url, **settings)
        self._cache = cache

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Images of the occurrences of a taxon and its descendants, in the site's order.

        Args:
            query: Key or scientific name of the taxon.
            limit: Most images.
            newer_than: Only occurrences with a higher key than that of this image. The whole search is read anyway, as
                the site does not search by key.

        Yields:
            Each image once, even if the site's pages overlap.

        Raises:
            ScraperError: There is no taxon of that name, the search has more occurrences than the site returns and
                there is no limit, or the site cannot be read.
        """
        after = _parse_id(newer_than)[0] if newer_than else 0
        if limit == 0:
            return iter(())
        return islice(self._pages(self._taxon(query), after, limit is None), limit)

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look up occurrences, one per request.

        Args:
            ids: Keys of occurrences, for all their images, or ids of posts.

        Yields:
            Each image once, in the order of `ids`, without those that the site lacks.

        Raises:
            ScraperError: An id is malformed, or the site cannot be read.
        """
        known: dict[int, list[Post]] = {}
        yielded: set[str] = set()
        for key, digest in map(_parse_id, ids):
            if key not in known:
                known[key] = self._occurrence(key)
            for post in known[key]:
                if post.id not in yielded and digest in {"", post.id.partition("-")[2]}:
                    yielded.add(post.id)
                    yield post

    def _occurrence(self, key: int) -> list[Post]:
        try:
            document = self._client.get_json(f"{self._base}/v1/occurrence/{key}", {})
        except StatusError as error:
            if error.status in {404, 410}:
                return []
            raise
        if not isinstance(document, dict) or fields.positive_int(document.get("key")) != key:
            raise ScraperError(f"{self._host} answered /v1/occurrence/{key} with something other than that occurrence.")
        return list(self._images(document))

    def _pages(self, taxon: int, after: int, whole: bool) -> Iterator[Post]:
        terms = [("mediaType", "StillImage"), ("taxonKey", str(taxon))]
        terms += [(name, each.strip()) for name, value in self._search.items() for each in value.split(",")]
        seen: set[int] = set()
        offset = 0
        while True:
            query = urlencode([*terms, ("limit", str(min(PAGE, DEEPEST - offset))), ("offset", str(offset))])
            document = self._client.get_json(f"{self._base}/v1/occurrence/search?{query}", {})
            results = document.get("results") if isinstance(document, dict) else None
            if not isinstance(document, dict) or not isinstance(results, list):
                raise ScraperError(f"{self._host} answered /v1/occurrence/search with something other than a list.")
            count = fields.positive_int(document.get("count"))
            if whole and count > DEEPEST:
                raise ScraperError(
                    f"{self._host} has {count:,} occurrences with images for this search and returns only "
                    f"{DEEPEST:,}: narrow it, by country or year for example, or set a limit."
                )
            for entry in results:
                key = fields.positive_int(entry.get("key")) if isinstance(entry, dict) else 0
                if not key:
                    raise ScraperError(f"{self._host} sent an occurrence without a valid key.")
                if key not in seen:
                    seen.add(key)
                    if key > after:
                        yield from self._images(entry)
            offset += PAGE
            if not results or document.get("endOfRecords") is True or offset >= DEEPEST:
                return

    def _taxon(self, query: str) -> int:
        """The key of the taxon."""
        name = " ".join(query.split())
        if number := fields.parse_positive_int(name):
            return number
        if not name:
            raise ScraperError("A search on GBIF needs a taxon: its scientific name, such as Rosa, or its key.")
        document = fields.mapping(
            self._client.get_json(f"{self._base}/v1/species/match", {"name": name, "strict": "true", "verbose": "true"})
        )
        key = fields.positive_int(document.get("usageKey"))
        if key and document.get("matchType") == "EXACT":
            return key
        found = [document, *_objects(document.get("alternatives"))]
        offered = ", ".join(
            f"{fields.text(each.get('scientificName'))[:80]} ({fields.positive_int(each['usageKey'])})"
            for each in found[: _NEAREST + 1]
            if fields.positive_int(each.get("usageKey"))
        )
        rest = f"; it offers {offered}." if offered else "."
        raise ScraperError(f"{self._host} has no taxon with the exact name {name[:80]!r}{rest}")

    def _images(self, entry: Mapping[str, Any]) -> Iterator[Post]:
        key = fields.positive_int(entry.get("key"))
        species = fields.text(entry.get("species"))
        # the cultivar is in the scientific name, or in a field of its own
        named = cultivars.parse(fields.text(entry.get("scientificName")))
        epithet = fields.text(entry.get("cultivarEpithet")).strip("'‘’\"“” ")
        taxon = species or fields.text(entry.get("genus"))
        if not named and epithet and taxon:
            named = cultivars.Cultivar(taxon, epithet[:100])
        tags = dict.fromkeys(TAG_CATEGORIES, ()) | {
            "species": (species,) if species else (),
            "cultivar": (str(named),) if named else (),
        }
        for medium in _unique_media(_objects(entry.get("media"))):
            kind, identifier = fields.text(medium.get("type")), fields.text(medium.get("identifier"))
            if kind not in {"StillImage", ""}:
                continue
            digest = hashlib.md5(identifier.encode(), usedforsecurity=False).hexdigest()
            cached = f"{self._base}/v1/image/cache/occurrence/{key}/media/{digest}"
            format_ = fields.text(medium.get("format")).lower().removeprefix("image/")
            stated = fields.text(medium.get("license")) or fields.text(entry.get("license"))
            authors = [
                *(fields.text(medium.get(name)) for name in ("creator", "rightsHolder")),
                *(fields.text(entry.get(name)) for name in ("rightsHolder", "recordedBy")),
            ]
            yield Post(
                id=f"{key}-{digest[:8]}",
                site=self.info.name,
                page_url=f"https://www.gbif.org/occurrence/{key}",
                file_url=cached if self._cache else identifier,
                extension=fields.match(fields.EXTENSION, {"jpeg": "jpg"}.get(format_, format_))
                or fields.extension(identifier),
                tags=tags,
                parent_id=str(key),
                author=next((name for name in authors if name), ""),
                licence=licence_id(stated),
                created_at=fields.iso_date(medium.get("created")) or fields.iso_date(entry.get("eventDate")),
            )


def _unique_media(media: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the media of an occurrence with distinct identifiers; those without one are left out."""
    seen: set[str] = set()
    for medium in media:
        identifier = fields.text(medium.get("identifier"))
        if identifier and identifier not in seen:
            seen.add(identifier)
            yield medium


def _objects(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _parse_id(value: int | str) -> tuple[int, str]:
    found = _POST_ID.fullmatch(str(value))
    if isinstance(value, bool) or not found or not int(found[1]):
        raise ScraperError(f"An id is the key of an occurrence or OCCURRENCE-DIGEST, not {str(value)[:40]!r}.")
    return int(found[1]), found[2] or ""
