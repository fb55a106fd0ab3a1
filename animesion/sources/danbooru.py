"""Danbooru, crawled politely: posts of a query or of given ids, head boxes from a table."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from animesion import labelfiles
from animesion.errors import AnimesionError, UsageError
from animesion.records import Item, Payload
from animesion.settings import Section
from animesion.sources import clean_text, faces
from animesion.sources.posts import NOT_PICTURES, families

if TYPE_CHECKING:
    from animesion_scrapers import Post, RateLimiter

_LARGEST_TABLE = 1 << 30


class DanbooruOptions(Section):
    """Options of the `danbooru` source."""

    contact: str = Field(description="e-mail or URL that goes into the User-Agent, so that the site can reach you")
    url: str = Field("https://danbooru.donmai.us", description="the site")
    tags: str = Field("", description="search; two tags are free of charge")
    ids: str = Field("", description="file with one post id a line, instead of a search")
    limit: int = Field(0, ge=0, description="most posts; 0 for all")
    faces: str = Field("", description="faces.tsv with head boxes, a path or a URL")
    tag_ids: str = Field("", description="tagIds.tsv; orders classes by the published tag id instead of by name")
    requests_per_second: float = Field(1.0, gt=0, le=10, strict=False, description="for each host")
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are given up")


class DanbooruSource:
    """Posts of a Danbooru."""

    Options: ClassVar[type[Section]] = DanbooruOptions
    summary: ClassVar[str] = "Danbooru: posts of a search or of given ids"
    remote: ClassVar[bool] = True

    def __init__(self, options: DanbooruOptions) -> None:
        self.options = options
        self.notes: list[str] = []
        self.connect_to: Mapping[str, tuple[str, int]] = {}
        self._limiter: RateLimiter | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """One pace for everything that is asked in the session."""
        from animesion_scrapers import RateLimiter

        self._limiter = RateLimiter(self.options.requests_per_second)
        yield

    def items(self) -> Iterator[Item]:
        """Posts by ascending id."""
        from animesion_scrapers import Danbooru, ScraperError

        table = self._face_table()
        tag_ids = self._tag_ids()
        try:
            with Danbooru(
                self.options.url, user_agent=self._user_agent(), limiter=self._limiter, connect_to=self.connect_to
            ) as site:
                posts = site.posts_by_id(self._ids()) if self.options.ids else site.posts(self.options.tags)
                found = list(itertools.islice(posts, self.options.limit or None))
        except ScraperError as error:
            raise AnimesionError(f"{self.options.url}: {error}") from None
        found.sort(key=lambda post: int(post.id))
        for order, post in enumerate(found):
            yield self._item(post, order, table, tag_ids)

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """Download the originals, several at a time, in the order of the items."""
        from animesion_scrapers import Download, ScraperError, download_all

        requests = [Download(item.key, json.loads(item.locator)["url"], item.md5, item.bytes) for item in items]
        try:
            for got in download_all(
                requests,
                user_agent=self._user_agent(),
                limiter=self._limiter,
                connect_to=self.connect_to,
                max_bytes=self.options.max_bytes,
            ):
                failed = got.status != "ok"
                yield Payload(reason=got.status, detail=clean_text(got.detail)) if failed else Payload(got.content)
        except ScraperError as error:
            raise AnimesionError(f"{self.options.url}: {error}") from None

    def _item(self, post: Post, order: int, table: faces.FaceTable | None, tag_ids: Mapping[str, int]) -> Item:
        characters = tuple(clean_text(tag) for tag in post.tags["character"])
        failure, detail = "", ""
        if not post.file_url:
            failure = "not visible"
        elif post.extension in NOT_PICTURES:
            failure, detail = "unsupported format", post.extension
        return Item(
            key=f"danbooru-{int(post.id)}",
            source="danbooru",
            source_id=post.id,
            locator=json.dumps({"url": post.file_url}),
            order=order,
            labels=characters,
            families=families(post.id, post.parent_id, post.pixiv_id, post.source),
            boxes=None if table is None else table.boxes.get(int(post.id), ()),
            class_order=tag_ids.get(characters[0], -1) if len(characters) == 1 else -1,
            rating=post.rating,
            flags=post.flags,
            md5=post.md5,
            bytes=post.bytes,
            page_url=clean_text(post.page_url, 1000),
            file_url=clean_text(post.file_url, 1000),
            licence=clean_text(post.licence, 100),
            author=clean_text(post.author, 300),
            failure=failure,
            detail=detail,
        )

    def _user_agent(self) -> str:
        return f"animesion/{version('animesion')} ({self.options.contact})"

    def _ids(self) -> list[int]:
        path = Path(self.options.ids).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"source.ids: {path} cannot be read ({error}); give a text file with one id a line"
            ) from None
        for number, text in enumerate(lines, 1):
            if not (text.isascii() and text.isdecimal() and len(text) < 13):
                raise UsageError(f"source.ids: entry {number} of {path} is {text[:40]!r}, not a post id")
        return list(map(int, lines))

    def _face_table(self) -> faces.FaceTable | None:
        if not self.options.faces:
            return None
        name = self.options.faces
        return faces.load(self._lines(name) if _is_url(name) else Path(name).expanduser(), name)

    def _tag_ids(self) -> Mapping[str, int]:
        name = self.options.tag_ids
        if not name:
            return {}
        if not _is_url(name):
            return labelfiles.read_tag_ids(Path(name).expanduser())
        import tempfile

        with tempfile.NamedTemporaryFile(suffix=".tsv") as file:
            file.writelines(self._lines(name))
            file.flush()
            return labelfiles.read_tag_ids(Path(file.name))

    def _lines(self, url: str) -> list[bytes]:
        from animesion_scrapers import Download, download_all

        [got] = download_all(
            [Download("table", url)],
            user_agent=self._user_agent(),
            limiter=self._limiter,
            connect_to=self.connect_to,
            deadline=900.0,
            max_bytes=_LARGEST_TABLE,
        )
        if got.status != "ok":
            raise AnimesionError(f"{url}: {got.status} {got.detail}".rstrip())
        return got.content.splitlines(keepends=True)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))
