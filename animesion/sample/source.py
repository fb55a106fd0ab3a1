"""The sample world as a source: its booru is served on loopback while the source is open, and crawled like another."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from animesion.settings import Section
from animesion.sources.danbooru import DanbooruOptions, DanbooruSource

#: A name that no resolver knows: what stands in provenance is the same whatever port the server got.
HOST = "sample-booru.invalid"


class SampleOptions(Section):
    """Options of the `sample` source."""

    posts: int = Field(3000, ge=200, le=100_000, description="posts in the drawn booru")
    seed: int = Field(0, ge=0, description="another seed draws another world")


class SampleSource(DanbooruSource):
    """The drawn booru."""

    Options: ClassVar[type[Section]] = SampleOptions
    summary: ClassVar[str] = "a small drawn booru on this machine, with every trouble that real ones have"

    def __init__(self, options: SampleOptions) -> None:
        site = f"http://{HOST}"
        super().__init__(
            DanbooruOptions(
                contact="user #1 of the sample world",
                url=site,
                tags="",
                faces=f"{site}/faces.tsv",
                tag_ids=f"{site}/tagIds.tsv",
            )
        )
        self._world = options

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Serve the world; it is on this machine, so nobody has to be spared."""
        from animesion.sample.server import serve
        from animesion_scrapers import RateLimiter

        with serve(posts=self._world.posts, seed=self._world.seed) as server:
            self.connect_to = {HOST: (server.host, server.port)}
            self._limiter = RateLimiter(math.inf)
            yield
