"""The iNaturalist API (api.inaturalist.org): photos of the observations of a taxon, and of observations by id.

iNaturalist has species and lower ranks, but no cultivars; cultivated plants are `captive`. Source:
https://api.inaturalist.org/v1/docs and https://www.inaturalist.org/pages/api+recommended+practices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, Literal

from animesion_scrapers import fields
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.licences import RESERVED, licence_id
from animesion_scrapers.post import TAG_CATEGORIES, Post
from animesion_scrapers.sites import Site, SiteInfo, check_filters, unique

PAGE = 200
"""Observations per page, the most that the site returns."""

Size = Literal["original", "large", "medium", "small"]
"""Longest side of a photo: 2048, 1024, 500, 240 pixels."""

FILTERS = frozenset(
    {"quality_grade", "photo_license", "captive", "place_id", "user_id", "project_id", "month", "year", "d1", "d2"}
    | {"introduced", "native", "out_of_range", "term_id", "term_value_id", "without_taxon_id", "hrank", "lrank"}
)
"""Search parameters that a caller may set; this module sets taxon, order and paging."""

_SPECIES_LEVEL = 10
_SIZED = re.compile(r"/(?:square|thumb|small|medium|large|original)\.(?=[A-Za-z]{3,4}(?:\?|$))")
_POST_ID = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")
_NEAREST = 5


class INaturalist(Site):
    """Reads photos from iNaturalist; use it as a context manager, or call `close`.

    A post is one photo, with the id `OBSERVATION-PHOTO`; its parent is the observation.
    """

    info: ClassVar[SiteInfo] = SiteInfo(
        name="inaturalist",
        summary="iNaturalist: photos of the observations of a taxon, or of given observations",
        url="https://api.inaturalist.org",
        limits={
            # The site asks for at most 60 requests per minute and 5 GB of files per hour: four large photos per second.
            "api.inaturalist.org": HostLimit(1.0, 1),
            "inaturalist-open-data.s3.amazonaws.com": HostLimit(4.0, 4),
            "static.inaturalist.org": HostLimit(1.0, 1),
        },
        label_tags=("species",),
        terms="https://www.inaturalist.org/pages/api+recommended+practices",
    )

    def __init__(
        self, base_url: str = "", *, size: Size = "large", search: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the API.
            size: Size of the photos.
            search: Further search parameters, from `FILTERS`; `quality_grade` defaults to `research`.
            settings: As for every `Site`.

        Raises:
            ScraperError: A parameter is not one of `FILTERS`, or the User-Agent names no contact.
        """
        self._search = {"quality_grade": "research", **check_filters(search or {}, FILTERS, "iNaturalist")}
        super().__init__(base_url, **settings)
        self._size = size

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Photos of the observations of a taxon and its descendants, by ascending observation.

        Args:
            query: Number or scientific name of the taxon; a common name if only one taxon has it.
            limit: Most photos.
            newer_than: Only observations newer than that of this photo.

        Yields:
            Each photo once.

        Raises:
            ScraperError: No taxon or several have the name, the site cannot be read, or it repeats its pages.
        """
        above = _observation(newer_than) if newer_than else 0
        if limit == 0:
            return iter(())
        return islice(self._pages(self._taxon(query), above), limit)

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look up observations, 200 per request.

        Args:
            ids: Numbers of observations, for all their photos, or ids of posts.

        Yields:
            Each photo once, in the order of `ids`, without those that the site lacks.

        Raises:
            ScraperError: An id is malformed, or the site cannot be read.
        """
        fresh = unique(map(_parse_id, ids))
        yielded: set[str] = set()
        while batch := list(islice(fresh, PAGE)):
            numbers = sorted({observation for observation, _ in batch})
            document = self._page({"id": ",".join(map(str, numbers)), "per_page": str(PAGE)})
            found = {number: list(self._photos(entry)) for number, entry in document.items()}
            for observation, photo in batch:
                for post in found.get(observation, ()):
                    if post.id not in yielded and photo in {0, int(post.id.partition("-")[2])}:
                        yielded.add(post.id)
                        yield post

    def _pages(self, taxon: int, above: int) -> Iterator[Post]:
        params = {"taxon_id": str(taxon), "photos": "true", **self._search, "order_by": "id", "order": "asc"}
        while True:
            page = self._page({**params, "id_above": str(above), "per_page": str(PAGE)})
            fresh = sorted(number for number in page if number > above)
            if page and not fresh:
                raise ScraperError(
                    f"{self._host} answered the page above observation {above} with what it had already sent."
                )
            for number in fresh:
                yield from self._photos(page[number])
            if not fresh:
                return
            above = fresh[-1]

    def _page(self, params: Mapping[str, str]) -> dict[int, dict[str, Any]]:
        document = self._client.get_json(f"{self._base}/v1/observations", params)
        found: dict[int, dict[str, Any]] = {}
        for entry in self._results(document, "observations"):
            number = fields.positive_int(entry.get("id"))
            if not number:
                raise ScraperError(f"{self._host} sent an observation without a valid id.")
            found[number] = entry
        return found

    def _results(self, document: object, what: str) -> list[dict[str, Any]]:
        results = document.get("results") if isinstance(document, dict) else None
        if not isinstance(results, list) or not all(isinstance(entry, dict) for entry in results):
            raise ScraperError(f"{self._host} answered /v1/{what} with something other than a list of {what}.")
        return results

    def _taxon(self, query: str) -> int:
        """The number of the taxon."""
        name = " ".join(query.split())
        if number := fields.parse_positive_int(name):
            return number
        if not name:
            raise ScraperError(
                "A search on iNaturalist needs a taxon: its scientific name, such as Rosa, or its number."
            )
        document = self._client.get_json(f"{self._base}/v1/taxa", {"q": name, "is_active": "true", "per_page": "30"})
        taxa = [entry for entry in self._results(document, "taxa") if fields.positive_int(entry.get("id"))]
        for key in ("name", "preferred_common_name"):
            same = [entry for entry in taxa if fields.text(entry.get(key)).lower() == name.lower()]
            if len(same) == 1:
                return fields.positive_int(same[0]["id"])
            if same:
                raise ScraperError(f"{name} is the name of several taxa: {_list_taxa(same)}. Use the number of one.")
        offered = f"; it offers {_list_taxa(taxa)}" if taxa else ""
        raise ScraperError(f"{self._host} has no taxon {name[:80]!r}{offered}.")

    def _photos(self, entry: Mapping[str, Any]) -> Iterator[Post]:
        observation = fields.positive_int(entry.get("id"))
        taxon, user = fields.mapping(entry.get("taxon")), fields.mapping(entry.get("user"))
        name = fields.text(taxon.get("name"))
        level = taxon.get("rank_level")
        below = isinstance(level, (int, float)) and level <= _SPECIES_LEVEL
        hybrid = "×" in name or " x " in name
        # names below the species level are reduced to the species; those of hybrids have more words
        species = (name if hybrid else " ".join(name.split()[:2])) if below else ""
        captive = entry.get("captive") is True
        tags = dict.fromkeys(TAG_CATEGORIES, ()) | {
            "general": ("captive",) if captive else (),
            "species": (species,) if species else (),
            "taxon": (name,) if name else (),
        }
        photos = entry.get("photos")
        for photo in map(fields.mapping, photos if isinstance(photos, list) else ()):
            number = fields.positive_int(photo.get("id"))
            if not number:
                continue
            size = fields.mapping(photo.get("original_dimensions")) if self._size == "original" else {}
            url = _SIZED.sub(f"/{self._size}.", fields.absolute_url(self._base, photo.get("url")))
            yield Post(
                id=f"{observation}-{number}",
                site=self.info.name,
                page_url=f"https://www.inaturalist.org/observations/{observation}",
                file_url=url,
                extension=fields.extension(url),
                width=fields.positive_int(size.get("width")),
                height=fields.positive_int(size.get("height")),
                tags=tags,
                parent_id=str(observation),
                author=fields.text(user.get("name")) or fields.text(user.get("login")),
                licence=licence_id(fields.text(photo.get("license_code"))) or RESERVED,
                created_at=fields.iso_date(entry.get("observed_on")),
            )


def _list_taxa(taxa: list[dict[str, Any]]) -> str:
    facts = [(fields.text(e.get("name"))[:60], fields.text(e.get("rank"))[:20], e["id"]) for e in taxa[:_NEAREST]]
    return ", ".join(f"{name} ({rank}, {number})" for name, rank, number in facts)


def _parse_id(value: int | str) -> tuple[int, int]:
    found = _POST_ID.fullmatch(str(value))
    if isinstance(value, bool) or not found or not int(found[1]):
        raise ScraperError(f"An id is the number of an observation or OBSERVATION-PHOTO, not {str(value)[:40]!r}.")
    return int(found[1]), int(found[2] or 0)


def _observation(value: str) -> int:
    return _parse_id(value)[0]
