"""The MediaWiki API of Wikimedia Commons: images of a category and its subcategories, and images by page id.

Categories are a graph with cycles and unrelated branches: the walk is breadth first, visits each category once and is
bounded in depth and number. The cultivar of an image is that in the name of its category. Source:
https://www.mediawiki.org/wiki/API:Categorymembers, API:Imageinfo and API:Etiquette. The categories of cultivars are
listed in `wikidata`.
"""

from __future__ import annotations

import html
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar
from urllib.parse import quote

from animesion_scrapers import cultivars, fields
from animesion_scrapers.cultivars import Cultivar
from animesion_scrapers.errors import ScraperError
from animesion_scrapers.http.limits import HostLimit
from animesion_scrapers.licences import licence_id
from animesion_scrapers.post import TAG_CATEGORIES, Post
from animesion_scrapers.sites import Site, SiteInfo, parse_post_id, unique

PAGE = 50
"""Images per page: as many as the site returns extended metadata for in one request."""

WIDTHS = (250, 330, 500, 960, 1280, 1920, 3840)
"""Widths in pixels of the scaled images that the site offers."""

_SUBCATEGORIES = 500
_IDS_PER_QUERY = 50
_IDLE_ANSWERS = 50
"""Answers in a row without anything new, after which a walk ends."""

_BUSY = frozenset({"maxlag", "ratelimited", "readonly"})
_NOT_IN_TITLES = re.compile(r"[#<>\[\]{}|\x00-\x1f\x7f]")
_LONGEST_TITLE = 255
_ELEMENT = re.compile(r"<[^>]*>")
_INFO = {
    "prop": "imageinfo",
    "iiprop": "url|size|mime|sha1|user|timestamp|extmetadata",
    "iiextmetadatafilter": "LicenseShortName|License|LicenseUrl|Artist",
}


@dataclass(frozen=True, slots=True)
class Category:
    """Root of a walk.

    Attributes:
        title: With or without `Category:`.
        cultivar: Cultivar of the images below whose own categories name none; None for unknown.
    """

    title: str
    cultivar: Cultivar | None = None


@dataclass(slots=True)
class _Found:
    """One image of a walk: its page, and the cultivars of its categories."""

    page: dict[str, Any] = field(default_factory=dict)
    cultivars: dict[Cultivar, None] = field(default_factory=dict)


class Commons(Site):
    """Reads images from Wikimedia Commons; use it as a context manager, or call `close`.

    A post is one image with the id of its page. Its tag categories are `cultivar`, such as `Rosa 'Peace'`, and `taxon`,
    the cultivar's genus or species; an image in the categories of several cultivars has all of them.

    Attributes:
        notes: Sentences about the categories that a walk left out.
    """

    info: ClassVar[SiteInfo] = SiteInfo(
        name="commons",
        summary="Wikimedia Commons: images of a category and its subcategories, or of given page ids",
        url="https://commons.wikimedia.org",
        limits={
            "commons.wikimedia.org": HostLimit(1.0, 1),
            # Two connections at once and 25 Mbit/s are allowed.
            "upload.wikimedia.org": HostLimit(2.0, 2),
        },
        label_tags=("cultivar",),
        terms="https://foundation.wikimedia.org/wiki/Policy:Wikimedia_Foundation_User-Agent_Policy",
    )

    def __init__(
        self, base_url: str = "", *, depth: int = 5, most_categories: int = 2000, width: int = 0, **settings: Any
    ) -> None:
        """Prepare to read; nothing is sent yet.

        Args:
            base_url: URL of the wiki.
            depth: Levels of subcategories that a walk descends; 0 for the requested categories alone.
            most_categories: Most categories that a walk visits.
            width: Width in pixels of the files, one of `WIDTHS`; 0 for the originals. Smaller originals are not scaled.
            settings: As for every `Site`.

        Raises:
            ScraperError: The site does not offer the width, or the User-Agent names no contact.
        """
        if width and width not in WIDTHS:
            raise ScraperError(f"Wikimedia offers images {', '.join(map(str, WIDTHS))} pixels wide, not {width}.")
        super().__init__(base_url, **settings)
        self._depth = depth
        self._most = most_categories
        self._width = width
        self.notes: list[str] = []

    def posts(self, query: str = "", limit: int | None = None, newer_than: str = "") -> Iterator[Post]:
        """Images of categories and their subcategories, by ascending page id.

        Args:
            query: Title of the category, or several separated by `|`.
            limit: Most images; the walk stops when they are found.
            newer_than: Only images with a higher page id. The whole tree is walked anyway.

        Yields:
            Each image once.

        Raises:
            ScraperError: All categories are empty, a title is malformed, or the site cannot be read.
        """
        return self.posts_below([Category(title) for title in query.split("|")], limit, newer_than)

    def posts_below(
        self, categories: Sequence[Category], limit: int | None = None, newer_than: str = ""
    ) -> Iterator[Post]:
        """As `posts`, for categories whose cultivars may be known.

        Raises:
            ScraperError: All categories are empty, a title is malformed, or the site cannot be read.
        """
        after = parse_post_id(newer_than) if newer_than else 0
        roots = [Category(_title(each.title, "Category"), each.cultivar) for each in categories]
        if limit != 0:
            found = self._walk(roots, limit, after)
            chosen = sorted(number for number in found if number > after)
            yield from (self._post(found[number]) for number in chosen[:limit])

    def posts_by_id(self, ids: Iterable[int | str]) -> Iterator[Post]:
        """Look up images by page id, 50 per request; their cultivars are unknown.

        Yields:
            Each image once, in the order of `ids`, without those that the site lacks.

        Raises:
            ScraperError: An id is not a positive integer, or the site cannot be read.
        """
        fresh = unique(map(parse_post_id, ids))
        while batch := list(islice(fresh, _IDS_PER_QUERY)):
            found = self._files({"pageids": "|".join(map(str, batch))})
            yield from (self._post(_Found(found[number])) for number in batch if number in found)

    def posts_by_title(self, files: Mapping[str, Cultivar | None]) -> Iterator[Post]:
        """Look up images by title, 50 per request.

        Args:
            files: Cultivar by title, with or without `File:`; None for unknown.

        Yields:
            The images of each request by ascending page id, without those that the site lacks.

        Raises:
            ScraperError: A title is malformed, or the site cannot be read.
        """
        wanted = {_title(title, "File"): cultivar for title, cultivar in files.items()}
        titles = iter(wanted)
        while batch := list(islice(titles, _IDS_PER_QUERY)):
            found = self._files({"titles": "|".join(batch)})
            for number in sorted(found):
                cultivar = wanted.get(fields.text(found[number].get("title")))
                yield self._post(_Found(found[number], {cultivar: None} if cultivar else {}))

    # -- the walk ------------------------------------------------------------------------------------------------

    def _walk(self, roots: Sequence[Category], limit: int | None, after: int) -> dict[int, _Found]:
        """Images below the root categories, by page id."""
        found: dict[int, _Found] = {}
        ancestors: dict[Cultivar, set[Cultivar]] = {}
        waiting = deque((each.title, each.cultivar, 0) for each in roots)
        seen = {each.title for each in roots}
        empty: list[str] = []
        deeper = 0
        visited = 0
        while waiting:
            title, inherited, depth = waiting.popleft()
            if visited == self._most:
                self._note(f"the walk stopped after {visited} categories; at least {len(waiting) + 1} were left out")
                break
            visited += 1
            cultivar = cultivars.parse(title.partition(":")[2]) or inherited
            if cultivar and inherited and cultivar != inherited:
                ancestors.setdefault(cultivar, set()).update({inherited} | ancestors.get(inherited, set()))
            files = self._files({"generator": "categorymembers", "gcmtitle": title, "gcmtype": "file"})
            for number, page in files.items():
                each = found.setdefault(number, _Found())
                each.page = page
                if cultivar:
                    each.cultivars[cultivar] = None
            below = self._subcategories(title)
            if not depth and not files and not below:
                empty.append(title)
            fresh = [name for name in below if name not in seen]
            if depth == self._depth and fresh:
                deeper += len(fresh)
                continue
            seen.update(fresh)
            waiting.extend((name, _inherit(cultivar, name), depth + 1) for name in fresh)
            if limit is not None and sum(number > after for number in found) >= limit:
                break
        if len(empty) == len(seen):
            raise ScraperError(f"{self._host} has nothing in {empty[0]}: check the spelling of the category.")
        if empty:
            rest = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            self._note(f"{self._host} has nothing in {empty[0]}{rest}")
        if deeper:
            self._note(f"the walk left out categories deeper than {self._depth} levels: {deeper}, and those below them")
        # a sport's category is below that of its parent cultivar: an image in both shows the sport
        for each in found.values():
            general = {cultivar for named in each.cultivars for cultivar in ancestors.get(named, ())}
            each.cultivars = {named: None for named in each.cultivars if named not in general}
        return found

    def _subcategories(self, title: str) -> list[str]:
        params = {"list": "categorymembers", "cmtitle": title, "cmtype": "subcat", "cmlimit": str(_SUBCATEGORIES)}
        names: list[str] = []
        for query in self._answers(params):
            members = query.get("categorymembers")
            for entry in members if isinstance(members, list) else ():
                name = fields.text(fields.mapping(entry).get("title"))
                if name.startswith("Category:"):
                    names.append(name)
        return names

    def _files(self, params: Mapping[str, str]) -> dict[int, dict[str, Any]]:
        """Pages of images by id, with their metadata, which may be spread over several responses."""
        paging = {"gcmlimit": str(PAGE)} if "generator" in params else {}
        scaled = {"iiurlwidth": str(self._width)} if self._width else {}
        found: dict[int, dict[str, Any]] = {}
        for query in self._answers({**params, **paging, **scaled, **_INFO}):
            pages = query.get("pages")
            for page in pages.values() if isinstance(pages, dict) else pages if isinstance(pages, list) else ():
                number = fields.positive_int(fields.mapping(page).get("pageid"))
                if number and fields.text(page.get("title")).startswith("File:"):
                    found[number] = {**found.get(number, {}), **page}
        return found

    def _answers(self, params: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Yield the `query` of each response, following `continue` to the end."""
        basic = {"action": "query", "format": "json", "maxlag": "5"}
        place: dict[str, str] = {}
        places: set[str] = set()
        answers: set[int] = set()
        idle = 0
        while True:
            document = self._client.get_json(f"{self._base}/w/api.php", {**basic, **params, **place}, is_busy=_is_busy)
            if not isinstance(document, dict):
                raise ScraperError(f"{self._host} answered /w/api.php with something other than an object.")
            if "error" in document:
                error = fields.mapping(document["error"])
                message = " ".join(fields.text(error.get("info")).split())[:200]
                code = fields.text(error.get("code"))[:40]
                raise ScraperError(f"{self._host} refuses the request ({code}): {message}")
            query = fields.mapping(document.get("query"))
            yield query
            more = fields.mapping(document.get("continue"))
            place = {name: str(value) for name, value in more.items() if isinstance(value, (str, int))}
            if not place:
                return
            # An empty answer with a new place is proper, as the wiki filters what it has read: so are a few in a row.
            answer = hash(repr(query))
            idle = idle + 1 if not query or answer in answers else 0
            answers.add(answer)
            if repr(place) in places or idle > _IDLE_ANSWERS:
                raise ScraperError(f"{self._host} answered /w/api.php with what it had already sent.")
            places.add(repr(place))

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    # -- one image ---------------------------------------------------------------------------------------------

    def _post(self, found: _Found) -> Post:
        page = found.page
        infos = page.get("imageinfo")
        info = fields.mapping(infos[0]) if isinstance(infos, list) and infos else {}
        metadata = fields.mapping(info.get("extmetadata"))
        title = fields.text(page.get("title"))
        original, width = fields.absolute_url(self._base, info.get("url")), fields.positive_int(info.get("width"))
        scaled = fields.absolute_url(self._base, info.get("thumburl")) if 0 < self._width < width else ""
        names = tuple(map(str, found.cultivars))
        tags = dict.fromkeys(TAG_CATEGORIES, ()) | {
            "cultivar": names,
            "taxon": tuple(dict.fromkeys(cultivar.taxon for cultivar in found.cultivars)),
        }
        return Post(
            id=str(page["pageid"]),
            site=self.info.name,
            page_url=f"{self._base}/wiki/{quote(title.replace(' ', '_'), safe=':')}",
            file_url=scaled or original,
            sha1="" if scaled else fields.match(fields.SHA1, info.get("sha1")),
            extension=fields.extension(original),
            width=fields.positive_int(info.get("thumbwidth")) if scaled else width,
            height=fields.positive_int(info.get("thumbheight")) if scaled else fields.positive_int(info.get("height")),
            bytes=0 if scaled else fields.positive_int(info.get("size")),
            tags=tags,
            author=_plain(_value(metadata, "Artist")) or fields.text(info.get("user")),
            licence=licence_id(_plain(_value(metadata, "LicenseShortName")) or _plain(_value(metadata, "License"))),
            created_at=fields.iso_date(info.get("timestamp")),
        )


def _is_busy(document: object) -> bool:
    return fields.mapping(fields.mapping(document).get("error")).get("code") in _BUSY


def _inherit(cultivar: Cultivar | None, title: str) -> Cultivar | None:
    """The cultivar of the category above if the title contains its epithet, as other branches are unrelated."""
    return cultivar if cultivar and cultivar.epithet.lower() in title.lower() else None


def _title(text: str, namespace: str) -> str:
    """Normalise a title as the wiki does, with its namespace."""
    name = " ".join(text.replace("_", " ").split())
    if name[: len(namespace) + 1].lower() == f"{namespace.lower()}:":
        name = name[len(namespace) + 1 :].strip()
    if not name or _NOT_IN_TITLES.search(name) or len(name.encode()) > _LONGEST_TITLE:
        raise ScraperError(
            f"{text[:60]!r} is not a title on Wikimedia Commons: use one such as {namespace}:Rosa 'Peace'."
        )
    return f"{namespace}:{name[0].upper()}{name[1:]}"


def _value(metadata: Mapping[str, Any], name: str) -> str:
    return fields.text(fields.mapping(metadata.get(name)).get("value"))


def _plain(text: str) -> str:
    """The text of a snippet of HTML, on one line."""
    return " ".join(html.unescape(_ELEMENT.sub(" ", text[:10_000])).split())
