"""The source for Danbooru: posts of a search or of given ids, with head boxes from a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from animesion.config.settings import Section
from animesion.dataset import label_files
from animesion.schemas import Item
from animesion.sources import faces
from animesion.sources.boorus import BooruOptions, BooruSource

if TYPE_CHECKING:
    from animesion_scrapers import Post, Site


class DanbooruOptions(BooruOptions):
    """Options of the `danbooru` source."""

    url: str = Field("https://danbooru.donmai.us", description="the site")
    tags: str = Field("", description="search; accounts free of charge may use two tags")
    faces: str = Field("", description="faces.tsv with head boxes, a path or a URL")
    tag_ids: str = Field("", description="tagIds.tsv; orders classes by the published tag id instead of by name")


class DanbooruSource(BooruSource):
    """Posts of a Danbooru."""

    Options: ClassVar[type[Section]] = DanbooruOptions
    summary: ClassVar[str] = "Danbooru: posts of a search or of given ids"
    site_name: ClassVar[str] = "danbooru"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._boxes: faces.FaceTable | None = None
        self._tag_ids: Mapping[str, int] = {}

    def posts(self, site: Site, newer_than: str) -> Iterator[Post]:
        """Posts of the given ids or of the search."""
        self._boxes, self._tag_ids = self._face_table(), self._class_order()
        return super().posts(site, newer_than)

    def item(self, post: Post, order: int) -> Item:
        """Convert a post to an item with its head boxes and, if it has a single label, the published id of that tag."""
        item = super().item(post, order)
        return replace(
            item,
            boxes=None if self._boxes is None else self._boxes.boxes.get(int(post.id), ()),
            class_order=self._tag_ids.get(item.labels[0], -1) if len(item.labels) == 1 else -1,
        )

    def _face_table(self) -> faces.FaceTable | None:
        if not self.options.faces:
            return None
        name = self.options.faces
        return faces.load(self._lines(name) if _is_url(name) else Path(name).expanduser(), name)

    def _class_order(self) -> Mapping[str, int]:
        name = self.options.tag_ids
        if not name:
            return {}
        if not _is_url(name):
            return label_files.read_tag_ids(Path(name).expanduser())
        import tempfile

        with tempfile.NamedTemporaryFile(suffix=".tsv") as file:
            file.writelines(self._lines(name))
            file.flush()
            return label_files.read_tag_ids(Path(file.name))


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))
