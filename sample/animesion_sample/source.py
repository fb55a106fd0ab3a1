"""The sample world as a source: its booru is served on loopback while the source is open, and crawled like others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from animesion.config.settings import Section
from animesion.sources.danbooru import DanbooruOptions, DanbooruSource
from animesion.sources.tag_tables import TagTableOptions

if TYPE_CHECKING:
    from animesion_scrapers import RateLimiter

#: Host name that never resolves, so that provenance does not depend on the server's port.
HOST = "sample-booru.invalid"


class SampleOptions(TagTableOptions):
    """Options of the `sample` source."""

    posts: int = Field(500, ge=200, le=100_000, description="posts in the drawn booru")
    seed: int = Field(0, ge=0, description="another seed draws another world")
    faults: float = Field(
        0.0, ge=0, le=1, strict=False, description="share of the files with faults of the server, to test crawls"
    )
    deadline: float = Field(60.0, gt=0, strict=False, description="most seconds per file, without waits for a turn")
    stall: float = Field(
        20.0, gt=0, strict=False, description="seconds without progress after which a connection is replaced"
    )


class SampleSource(DanbooruSource):
    """The drawn booru."""

    Options: ClassVar[type[Section]] = SampleOptions
    summary: ClassVar[str] = "a small drawn booru on this machine, with all the troubles of real ones"

    def __init__(self, options: Any) -> None:
        site = f"http://{HOST}"
        super().__init__(
            DanbooruOptions(
                contact="user #1 of the sample world",
                url=site,
                tags="",
                faces=f"{site}/faces.tsv",
                tag_ids=f"{site}/tagIds.tsv",
                deadline=options.deadline,
                stall=options.stall,
                aliases=options.aliases,
                implications=options.implications,
                implied=options.implied,
            )
        )
        self._world = options

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Serve the world while it is crawled."""
        from animesion_sample.faults import FaultPlan
        from animesion_sample.server import serve

        plan = FaultPlan(share=self._world.faults, seed=self._world.seed) if self._world.faults else None
        # Temporary faults are counted per process.
        processes = 1 if plan else 2
        with serve(posts=self._world.posts, seed=self._world.seed, processes=processes, faults=plan) as server:
            self.connect_to = {HOST: (server.host, server.port)}
            with super().session():
                yield

    def make_limiter(self, memory: Path) -> RateLimiter:
        """A limiter without limits, as the server is on this machine."""
        from animesion_scrapers import RateLimiter

        return RateLimiter(math.inf, memory=memory)
