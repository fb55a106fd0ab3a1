"""Progress lines of commands on a stderr that is not a terminal."""

from __future__ import annotations

import time

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
    assert second == "fetch: 300 of 1,000; 4.0/s, 0:02:55 left"
    assert last == "fetch: 1,000 images, 100.0 s"


def test_an_estimate_settles_within_ten_seconds_and_follows_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = progress.Rate(0.0)
    assert rate.per_second(0.0, 0) == 0
    done = 0
    shown = {}
    for tick in range(8 * 4, 100 * 4):  # workers start for 8 seconds, then 40 images a second, later 10
        now = tick / 4
        done += 10 if now < 60 else 2
        rate.add(now, done)
        shown[now] = rate.per_second(now, done)
    assert shown[8.0] == 1.25
    assert all(38 <= shown[now] <= 42 for now in shown if 12.25 <= now < 60)
    assert all(7 <= shown[now] <= 9 for now in shown if now >= 91)


def test_a_stage_that_counts_nothing_shows_that_it_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.5)
    with progress.for_terminal() as shown:
        shown.started("curate", None)
        shown.status("pairs")
        time.sleep(2.5)
        shown.finished("curate")
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first in ("curate: 1 s so far; pairs", "curate: 2 s so far; pairs")
    assert last.startswith("curate: ")
    assert last.endswith(" s")


def test_short_loops_print_nothing_and_long_ones_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress.counted(range(5), "detect")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""
    now = [100.0]
    monkeypatch.setattr("animesion.cli.progress.time.monotonic", lambda: now[0])
    for _ in progress.counted(range(50), "detect", 50):
        now[0] += 0.5
    assert capsys.readouterr().err.splitlines() == [
        "detect: 20 of 50; 2.0/s, 0:00:15 left",
        "detect: 40 of 50; 2.0/s, 0:00:05 left",
        "detect: 50 images, 25.0 s",
    ]
    monkeypatch.setenv("RANK", "1")
    for _ in progress.counted(range(50), "detect", 50):
        now[0] += 0.5
    assert capsys.readouterr().err == ""
