"""The drawn booru as a table of URLs, for recipes that read such tables; its files are served over loopback."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from animesion.config.settings import Section
from animesion.sources.urls import UrlsOptions, UrlsSource
from animesion_sample.source import HOST

if TYPE_CHECKING:
    from animesion_scrapers import RateLimiter

_PAGE = 200


class SampleUrlsOptions(Section):
    """Options of the `sample-urls` source."""

    posts: int = Field(300, ge=200, le=100_000, description="posts in the drawn booru")
    seed: int = Field(0, ge=0, description="another seed draws another world")


class SampleUrlsSource(UrlsSource):
    """A CSV of the drawn booru's file URLs, with one character as the label."""

    Options: ClassVar[type[Section]] = SampleUrlsOptions
    summary: ClassVar[str] = "a table of URLs of the drawn booru, fetched from this machine"

    def __init__(self, options: Any) -> None:
        super().__init__(UrlsOptions(contact="user #1 of the sample world", path="urls.csv"))
        self._world = options

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Serve the world and keep the table while it is crawled."""
        from animesion_sample.server import serve

        with (
            tempfile.TemporaryDirectory(prefix="animesion-sample-") as folder,
            serve(posts=self._world.posts, seed=self._world.seed) as server,
        ):
            table = Path(folder) / "urls.csv"
            _write(table, server.url)
            self.options = self.options.model_copy(update={"path": str(table)})
            self.connect_to = {HOST: (server.host, server.port)}
            with super().session():
                yield

    def make_limiter(self, memory: Path) -> RateLimiter:
        """A limiter without limits, as the server is on this machine."""
        from animesion_scrapers import RateLimiter

        return RateLimiter(math.inf, memory=memory)


def _write(table: Path, url: str) -> None:
    """Write the booru's posts, oldest first, without those without a file or with several characters."""
    posts: list[dict[str, Any]] = []
    page = "a0"
    while True:
        request = urllib.request.Request(  # loopback, a server of ours
            f"{url}/posts.json?limit={_PAGE}&page={page}", headers={"User-Agent": "animesion sample"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.loads(answer.read())
        if not found:
            break
        posts += found
        page = f"a{max(post['id'] for post in found)}"
    posts.sort(key=lambda post: int(post["id"]))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image_url", "label", "md5"))
        for post in posts:
            label = post.get("tag_string_character", "")
            if post.get("file_url") and label and " " not in label:
                writer.writerow((post["file_url"], label, post["md5"]))
