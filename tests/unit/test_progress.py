"""Progress lines of a build on a stderr that is not a terminal."""

from __future__ import annotations

import pytest

from animesion.cli import progress
from animesion.pipeline.fetch import CrawlProgress
from animesion_scrapers import CrawlStatus


def test_a_crawl_shows_its_rate_its_time_left_and_hosts_out_of_the_ordinary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("animesion.cli.progress.time.monotonic", lambda: now[0])
    with progress.for_terminal() as shown:
        shown.started("fetch", 1000)
        crawling = CrawlProgress(shown.advanced, shown.status)
        now[0] += 50.0
        crawling(
            CrawlStatus(
                finished=100,
                failures={("timed out", ""): 3},
                hosts={"cdn.example": "half-open"},
                circuits_opened={"cdn.example": 2},
            )
        )
        now[0] += 50.0
        crawling(CrawlStatus(finished=300))
        # The part held 500 images, of which the crawl has reported 300.
        crawling.part_done(500)
        shown.finished("fetch")
    first, second, last = [line for line in capsys.readouterr().err.splitlines() if "fetch" in line]
    assert first == (
        "fetch: 100 of 1,000; 2.0/s, 0:07:30 left; 3 failed; cdn.example half-open; circuit of cdn.example opened 2x"
    )
    assert second == "fetch: 300 of 1,000; 3.0/s, 0:03:53 left"
    assert last == "fetch: 1,000 images, 100.0 s"
