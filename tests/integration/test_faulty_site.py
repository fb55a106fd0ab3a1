"""Builds from a faulty site: every image is accounted for, and only temporary failures are retried."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

import animesion
from animesion.pipeline import runner
from animesion_sample.faults import LASTING, LISTING, FaultPlan, local_server
from animesion_scrapers import Danbooru, RateLimiter, ScraperError

from .crawling import AGENT, HOST, QUICK, raw

FETCHED = {
    "not found",
    "refused",
    "robots opt-out",
    "checksum mismatch",
    "too many bytes",
    "unsafe address",
    "fetch failed",
    "empty file",
    "not an image",
}


def test_a_faulty_site_is_accounted_for_and_refused_files_are_retried_only_on_request(
    tmp_path: Path, asked: Counter[str]
) -> None:
    """A build with all faults: those of the world and those of the server."""
    settings = ["source.posts=200", "source.faults=0.5", "source.deadline=3", "source.stall=0.3", "classes.minimum=3"]
    recipe = animesion.load_recipe("daf-re", settings, sample=True)
    plan = FaultPlan(share=0.5, seed=0)
    first = runner.run(recipe, tmp_path, workers=1, until="curate")
    before = raw(tmp_path)
    fault = {key: plan.fault(row["file_url"].partition(".invalid")[2]) for key, row in before.items()}
    refused = {key for key in asked if fault[key] in LASTING}
    assert first.seen == first.kept + sum(first.dropped.values()) == len(before) == 200
    assert len({fault[key] for key in asked}) > 15
    assert all(not before[key]["sha256"] and before[key]["reason"] in FETCHED for key in refused)
    assert any("refused permanently" in sentence for sentence in first.crawl)

    asked.clear()
    runner.run(recipe, tmp_path, workers=1, until="fetch")
    after = raw(tmp_path)
    assert not refused & set(asked)
    for key, row in before.items():
        if row["sha256"]:
            assert (after[key]["sha256"], asked[key]) == (row["sha256"], 0)

    asked.clear()
    runner.run(recipe, tmp_path, workers=1, until="fetch", retry_failed=True)
    assert refused <= set(asked)
    assert {key for key, row in raw(tmp_path).items() if row["sha256"]} >= {
        key for key, row in after.items() if row["sha256"]
    }


def listing() -> web.Application:
    """Ten posts in pages of four."""

    async def posts(request: web.Request) -> web.Response:
        below = int(request.query.get("page", "b11")[1:])
        found = [{"id": number, "md5": f"{number:032x}", "file_url": f"/{number}.jpg"} for number in range(1, below)]
        return web.json_response(found[::-1][:4])

    app = web.Application()
    app.router.add_get("/posts.json", posts)
    return app


@pytest.mark.parametrize("fault", LISTING)
def test_a_faulty_listing_gives_each_post_once_or_one_sentence(fault: str) -> None:
    plan = FaultPlan(share=1.0, kinds=(fault,), prefix="/posts.json")
    with (
        local_server(listing, plan) as server,
        Danbooru(
            f"http://{HOST}",
            user_agent=AGENT,
            connect_to={HOST: server.address},
            limiter=RateLimiter(1e6),
            retries=QUICK,
        ) as site,
    ):
        if fault in {"invalid json", "html"}:
            with pytest.raises(ScraperError, match=rf"^{HOST} answered .*(not JSON|HTML page instead of JSON)\.$"):
                list(site.posts())
            # What is cut short may be whole the next time; a page in place of JSON is an answer.
            assert server.journal.paths["/posts.json"] == (3 if fault == "invalid json" else 1)
            return
        found = {int(post.id): post for post in site.posts()}
    assert list(found) == [number for number in range(10, 0, -1) if fault != "vanishing" or number != 7]
    hidden = [number for number, post in found.items() if not post.file_url and not post.md5]
    assert hidden == ([10, 5] if fault == "absent fields" else [])
