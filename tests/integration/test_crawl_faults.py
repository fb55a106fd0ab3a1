"""Every fault of a server ends in a row of the ledger: each alone, and all at random."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from animesion_sample.faults import LASTING, PASSING, FaultPlan, LocalServer, local_server, self_signed
from animesion_scrapers import REASONS, Breakers, Download
from animesion_scrapers.crawl.ledger import DONE, FAILED, REFUSED
from animesion_scrapers.http.clients import tls_context

from .crawling import application, crawl, wanted

EXPECTED = {
    "401": ("refused", REFUSED, "HTTP 401 Unauthorized"),
    "402": ("refused", REFUSED, "HTTP 402 Payment Required"),
    "403 challenge": ("refused", REFUSED, "HTTP 403 Forbidden with an HTML challenge page"),
    "404": ("not found", REFUSED, "HTTP 404 Not Found"),
    "410": ("not found", REFUSED, "HTTP 410 Gone"),
    "422": ("fetch failed", REFUSED, "HTTP 422 Unprocessable"),
    "451": ("not found", REFUSED, "HTTP 451 Unavailable For Legal Reasons"),
    "wrong md5": ("checksum mismatch", REFUSED, "the MD5 is "),
    "wrong type": ("not an image", REFUSED, "a JSON document"),
    "challenge": ("fetch failed", FAILED, "an HTML challenge page instead of the file"),
    "empty": ("empty file", REFUSED, "the body has 0 bytes"),
    "endless": ("too many bytes", REFUSED, "more than 200000 bytes"),
    "redirect loop": ("fetch failed", REFUSED, "redirected more than 5 times"),
    "private redirect": ("unsafe address", REFUSED, "the host is not on the public internet"),
    "file redirect": ("unsafe address", REFUSED, "only http and https are fetched, not file"),
    "compressed": ("too many bytes", REFUSED, "more than 200000 bytes"),
    "noai": ("robots opt-out", REFUSED, "X-Robots-Tag: noai"),
    "429": ("fetch failed", FAILED, "HTTP 429 Too Many Requests"),
    "429 wait": ("fetch failed", FAILED, "HTTP 429 Too Many Requests"),
    "500": ("fetch failed", FAILED, "HTTP 500 Internal Server Error"),
    "503": ("fetch failed", FAILED, "HTTP 503 Service Unavailable"),
    "drip": ("timed out", FAILED, "no complete answer within the deadline"),
    "stall": ("timed out", FAILED, "no complete answer within the deadline"),
    "silent": ("timed out", FAILED, "no complete answer within the deadline"),
    "reset": ("fetch failed", FAILED, "the connection broke off"),
    "truncated": ("fetch failed", FAILED, "the connection broke off"),
    "garbage": ("fetch failed", FAILED, "the answer is not proper HTTP"),
}


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server(application) as running:
        yield running


@pytest.mark.parametrize("fault", sorted({*LASTING, *PASSING} - {"wrong length"}))
def test_a_fault_that_lasts_ends_in_a_row_with_its_reason(server: LocalServer, tmp_path: Path, fault: str) -> None:
    [request] = wanted(1)
    md5 = "" if fault == "wrong type" else request.md5
    url = f"{request.url}?fault={fault.replace(' ', '%20')}&times=99"
    start = time.monotonic()
    [entry] = crawl(server, tmp_path, [Download("post-0", url, md5, image=True)]).values()
    error, state, detail = EXPECTED[fault]
    assert (entry.error, entry.state) == (error, state)
    assert entry.detail.startswith(detail)
    assert entry.error in REASONS
    if state == REFUSED:
        # Wrong bytes are believed when they come twice, a refusal at once.
        assert entry.attempts == (2 if fault in {"wrong md5", "wrong type", "empty"} else 1)
    assert time.monotonic() - start < 8


def test_a_challenge_in_place_of_an_unknown_file_is_a_refusal(server: LocalServer, tmp_path: Path) -> None:
    [request] = wanted(1)
    url = f"{request.url}?fault=challenge&times=99"
    [entry] = crawl(server, tmp_path, [Download("post-0", url, image=True)]).values()
    assert (entry.error, entry.state, entry.attempts) == ("refused", REFUSED, 2)
    assert entry.detail == "an HTML challenge page instead of an image"


def test_a_known_file_behind_a_challenge_is_fetched_by_the_next_run(server: LocalServer, tmp_path: Path) -> None:
    [request] = wanted(1)
    url = f"{request.url}?fault=challenge&times=3"
    known = [Download("post-0", url, request.md5, image=True)]
    [entry] = crawl(server, tmp_path, known).values()
    assert (entry.error, entry.state, entry.attempts) == ("fetch failed", FAILED, 3)
    [entry] = crawl(server, tmp_path, known).values()
    assert (entry.state, entry.attempts) == (DONE, 4)


@pytest.mark.parametrize("fault", sorted(set(PASSING) - {"drip"}))
def test_a_fault_that_passes_costs_an_attempt_and_no_image(server: LocalServer, tmp_path: Path, fault: str) -> None:
    [request] = wanted(1)
    url = f"{request.url}?fault={fault.replace(' ', '%20')}"
    [entry] = crawl(server, tmp_path, [Download("post-0", url, request.md5, image=True)]).values()
    # A body that is whole although its header lies needs no second attempt: the checksum says so.
    assert (entry.state, entry.attempts) == (DONE, 1 if fault == "wrong length" else 2)


def random_crawl(tmp_path: Path, count: int, certificate: tuple[Path, Path] | None = None) -> dict[str, Any]:
    plan = FaultPlan(share=0.4, seed=3)
    requests = wanted(count, scheme="https" if certificate else "http")
    with local_server(application, plan, certificate) as server:
        first = crawl(server, tmp_path, requests)
        asked = server.journal.paths.copy()
        again = crawl(server, tmp_path, requests)
        settled = server.journal.paths.copy()
        third = crawl(server, tmp_path, requests)
        assert server.journal.paths == settled, "a third run asked for something"
    fault = {request.key: plan.fault(f"/data/{request.key.removeprefix('post-')}.jpg") for request in requests}
    assert list(first) == [request.key for request in requests]
    for key, entry in first.items():
        assert entry.state in {DONE, FAILED, REFUSED}, key
        assert entry.state == DONE or entry.error in REASONS, key
        path = f"/data/{key.removeprefix('post-')}.jpg"
        if entry.state != FAILED:
            assert settled[path] == asked[path], f"{key} was asked for again"
    for key, entry in again.items():
        assert entry.state == (REFUSED if fault[key] in LASTING else DONE), (key, fault[key], entry)
        if fault[key] in LASTING:
            # With a checksum at hand, a page in place of the file is still named for what it is.
            assert entry.error == EXPECTED[fault[key]][0], (key, fault[key], entry)
    assert {key: entry.state for key, entry in third.items()} == {key: entry.state for key, entry in again.items()}
    states = [entry.state for entry in first.values()]
    return {
        "first": {state: states.count(state) for state in (DONE, FAILED, REFUSED)},
        "after the second": sum(entry.state == DONE for entry in again.values()),
        "kinds": len({name for name in fault.values() if name}),
    }


def test_a_crawl_with_every_fault_at_random_ends_and_a_rerun_gets_the_rest(tmp_path: Path) -> None:
    found = random_crawl(tmp_path, 300)
    assert found["kinds"] == len(LASTING) + len(PASSING)
    assert found["first"][FAILED] > 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_five_thousand_images_with_every_fault(
    tmp_path: Path, scheme: str, certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    found = random_crawl(tmp_path, 5000, certificate if scheme == "https" else None)
    with capsys.disabled():
        print(f"\n5,000 over {scheme}: {json.dumps(found)}, {time.monotonic() - start:.1f} s")


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    try:
        made = self_signed(tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("SSL_CERT_FILE", str(made[0]))
    tls_context.cache_clear()
    yield made
    tls_context.cache_clear()


def test_https_with_a_trusted_certificate_and_not_with_another(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = wanted(20, scheme="https")
    with local_server(application, certificate=certificate) as server:
        assert {entry.state for entry in crawl(server, tmp_path / "a", requests).values()} == {DONE}
        monkeypatch.delenv("SSL_CERT_FILE")
        tls_context.cache_clear()
        breakers = Breakers(failures=100)
        refused = crawl(server, tmp_path / "b", requests, breakers=breakers, robots=False, opt_outs=False)
    assert {(entry.state, entry.detail) for entry in refused.values()} == {
        (FAILED, "the TLS connection was not accepted")
    }
