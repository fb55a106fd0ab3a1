"""Sources for plants: Wikimedia Commons with Wikidata, GBIF and iNaturalist.

Each adds a few options to `CrawledSource`; the clients of the sites are in `animesion_scrapers.sites`. Commons has
cultivars, in the names of its categories; GBIF has a few, and iNaturalist only species.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.sources import clean_text
from animesion.sources.crawled import CrawledSource, CrawlOptions

if TYPE_CHECKING:
    from animesion_scrapers import Post, RateLimiter, Site
    from animesion_scrapers.sites.commons import Category, Commons


class PlantOptions(CrawlOptions):
    """Options of every source of plants."""

    label: Literal["cultivar", "species", "taxon"] = Field(
        "cultivar", description="the name of the plant that is the label"
    )


class INaturalistOptions(PlantOptions):
    """Options of the `inaturalist` source."""

    url: str = Field("https://api.inaturalist.org", description="the API")
    taxon: str = Field(description="scientific name or number")
    label: Literal["species", "taxon"] = Field("species", description="the species, or the most specific name")
    size: Literal["original", "large", "medium", "small"] = Field(
        "large", description="longest side of the files: 2048, 1024, 500 or 240 pixels"
    )
    search: dict[str, str] = Field(
        {}, description="further search parameters, such as {photo_license='cc0,cc-by', quality_grade='research'}"
    )


class GbifOptions(PlantOptions):
    """Options of the `gbif` source."""

    url: str = Field("https://api.gbif.org", description="the API")
    taxon: str = Field(description="scientific name or key")
    label: Literal["cultivar", "species"] = Field(
        "cultivar", description="the cultivar, which few records have, or the species"
    )
    cache: bool = Field(
        False, description="fetch files from GBIF's cache, at most 1200 pixels wide, instead of from the publishers"
    )
    search: dict[str, str] = Field(
        {}, description="further search parameters, such as {country='PT', year='2020,2024'}"
    )


class CommonsOptions(PlantOptions):
    """Options of the `commons` source."""

    url: str = Field("https://commons.wikimedia.org", description="the wiki")
    category: str = Field("", description="title of the root category, or several separated by |")
    wikidata: str = Field(
        "", description="item of a taxon, such as Q34687 for Rosa, whose cultivars' categories are roots"
    )
    wikidata_url: str = Field("https://query.wikidata.org", description="Wikidata's SPARQL service")
    label: Literal["cultivar", "taxon"] = Field("cultivar", description="the cultivar, or its genus or species")
    depth: int = Field(5, ge=0, le=20, description="levels of subcategories below the roots")
    categories: int = Field(2000, ge=1, le=100_000, description="most categories to visit")
    width: Literal[0, 250, 330, 500, 960, 1280, 1920, 3840] = Field(
        0, description="width of the files in pixels; 0 for the originals, the only ones with a digest"
    )


class PlantSource(CrawledSource):
    """Images of a taxon."""

    Options: ClassVar[type[Section]] = PlantOptions

    def candidates(self, post: Post) -> tuple[str, ...]:
        """The post's names of the kind set by `source.label`."""
        return tuple(clean_text(name) for name in post.tags.get(self.options.label, ()))

    def posts(self, site: Site, newer_than: str) -> Iterator[Post]:
        """Posts of the taxon."""
        return site.posts(self.options.taxon, self.options.limit or None, newer_than)


class INaturalistSource(PlantSource):
    """Photos of iNaturalist."""

    Options: ClassVar[type[Section]] = INaturalistOptions
    summary: ClassVar[str] = "iNaturalist: photos of the observations of a taxon"
    site_name: ClassVar[str] = "inaturalist"

    def site_settings(self) -> dict[str, Any]:
        """Size of the files and further search parameters."""
        return {"size": self.options.size, "search": self.options.search}


class GbifSource(PlantSource):
    """Images of GBIF."""

    Options: ClassVar[type[Section]] = GbifOptions
    summary: ClassVar[str] = "GBIF: images of the occurrences of a taxon"
    site_name: ClassVar[str] = "gbif"

    def site_settings(self) -> dict[str, Any]:
        """Whether files come from the cache, and further search parameters."""
        return {"cache": self.options.cache, "search": self.options.search}


class CommonsSource(PlantSource):
    """Images of Wikimedia Commons."""

    Options: ClassVar[type[Section]] = CommonsOptions
    summary: ClassVar[str] = "Wikimedia Commons: images of cultivars, by category or by a taxon of Wikidata"
    site_name: ClassVar[str] = "commons"

    def site_settings(self) -> dict[str, Any]:
        """Bounds of the walk and width of the files."""
        return {
            "depth": self.options.depth,
            "most_categories": self.options.categories,
            "width": self.options.width,
        }

    def make_limiter(self, memory: Any) -> RateLimiter:
        """The limiter of the session, with the limits of Wikidata."""
        from animesion_scrapers import RateLimiter
        from animesion_scrapers.wikidata import LIMITS

        limits = {**self._info().limits, **LIMITS}
        pace = self.options.requests_per_second
        return RateLimiter(pace, {host: min(pace, limit.requests_per_second) for host, limit in limits.items()}, memory)

    def posts(self, site: Site, newer_than: str) -> Iterator[Post]:
        """Images below the categories, and single images listed in Wikidata."""
        from animesion_scrapers.sites.commons import Category

        commons = cast("Commons", site)
        roots = [Category(title) for title in self.options.category.split("|") if title.strip()]
        files: dict[str, Any] = {}
        if self.options.wikidata:
            known, files = self._known_cultivars()
            roots += known
        if not roots and not files:
            raise UsageError(
                "source.category and source.wikidata are empty or have no results: set a category such as "
                'source.category="Rosa cultivars", or the item of a taxon such as source.wikidata=Q34687'
            )
        most = self.options.limit or None
        after = int(newer_than or 0)
        below = commons.posts_below(roots, most, newer_than) if roots else iter(())
        named = (post for post in commons.posts_by_title(files) if int(post.id) > after)
        seen: set[str] = set()
        for post in itertools.islice(itertools.chain(below, named), most):
            if post.id not in seen:
                seen.add(post.id)
                yield post
        self.notes += [note for note in commons.notes if note not in self.notes]

    def _known_cultivars(self) -> tuple[list[Category], dict[str, Any]]:
        """Categories of cultivars in Wikidata, and images of cultivars without a category."""
        from animesion_scrapers import wikidata
        from animesion_scrapers.http.addresses import Routes
        from animesion_scrapers.http.metadata import MetadataClient
        from animesion_scrapers.sites.commons import Category

        categories: list[Category] = []
        files: dict[str, Any] = {}
        with MetadataClient(
            user_agent=self.user_agent(),
            limiter=self._limiter or self.make_limiter(None),
            routes=Routes(self.connect_to, self.options.allow_private),
            timeout=wikidata.TIMEOUT,
            breakers=self._breakers,
        ) as client:
            for each in wikidata.known_cultivars(
                client, self.options.wikidata, base_url=self.options.wikidata_url, most=self.options.categories
            ):
                if each.category:
                    categories.append(Category(each.category, each.cultivar))
                elif each.file:
                    files[each.file] = each.cultivar
        self.notes.append(
            f"Wikidata has {len(categories)} cultivars of {self.options.wikidata} with a category on Commons and "
            f"{len(files)} with only an image"
        )
        return categories, files
