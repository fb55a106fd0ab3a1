"""robots.txt, opt-outs, web pages instead of images, credentials, circuit breakers, stored rates, the ledger."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import sqlite3
import sys
import time
import types
from pathlib import Path

import pytest

from animesion_scrapers import Breakers, HostDownError, Ledger, LedgerError, RateLimiter, ScraperError, sites
from animesion_scrapers.crawl.ledger import DONE, FAILED, REFUSED
from animesion_scrapers.credentials import Credentials, CredentialSpec, find
from animesion_scrapers.http.host_memory import HostMemory
from animesion_scrapers.http.media import document_kind, is_challenge
from animesion_scrapers.http.opt_outs import page_opt_outs, robots_directive, tdmrep_rules
from animesion_scrapers.http.retries import asked_pause
from animesion_scrapers.http.robots import MAX_BYTES, RobotsCache, parse, product_token

# -- robots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("", "/anything", True),
        ("User-agent: *\nDisallow:", "/a", True),
        ("User-agent: *\nDisallow: /", "/", False),
        ("User-agent: *\nDisallow: /", "/robots.txt", True),
        # the longest match decides, and Allow among equals (RFC 9309, 2.2.2)
        ("User-agent: *\nDisallow: /page\nAllow: /p", "/page", False),
        ("User-agent: *\nAllow: /p\nDisallow: /", "/page", True),
        ("User-agent: *\nAllow: /folder\nDisallow: /folder", "/folder/page", True),
        ("User-agent: *\nDisallow: /*.json", "/posts.json?tags=a", False),
        ("User-agent: *\nDisallow: /*.json$", "/posts.json?tags=a", True),
        ("User-agent: *\nDisallow: /*.json$", "/posts.json", False),
        ("User-agent: *\nDisallow: /a*b*c$", "/aXbYc", False),
        ("User-agent: *\nDisallow: /a*b*c$", "/aXcYb", True),
        ("User-agent: *\nDisallow: /fish*", "/fish.html", False),
        ("User-agent: *\nDisallow: /fish", "/Fish", True),
        # the spelling of a path does not matter
        ("User-agent: *\nDisallow: /a%3cd.html", "/a%3Cd.html", False),
        ("User-agent: *\nDisallow: /%7Ejoe/", "/~joe/index.html", False),
        ("User-agent: *\nDisallow: /\u30c4", "/%E3%83%84", False),
        # groups
        ("User-agent: animesion\nDisallow: /\n\nUser-agent: *\nDisallow:", "/a", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: Animesion\nAllow: /", "/a", True),
        ("User-agent: other\nDisallow: /", "/a", True),
        ("User-agent: other\nUser-agent: animesion\nDisallow: /a", "/a", False),
        ("User-agent: animesion\nDisallow: /a\nUser-agent: x\nDisallow: /\nUser-agent: animesion\nDisallow: /b", "/b",
         False),
        ("User-agent: animesion/2.0 (bot)\nDisallow: /", "/a", False),
        ("User-agent: animesionbot\nDisallow: /", "/a", True),
        # noise
        ("\ufeffUser-Agent : * # all\n  DISALLOW :  /a  # no\nSitemap: http://x/\nnonsense", "/a/b", False),
        ("Disallow: /", "/a", True),
        ("User-agent: *\nDisallow: a", "/a", True),
    ],
)  # fmt: skip
def test_robots_rules(rules: str, path: str, allowed: bool) -> None:
    assert parse(rules.encode(), "animesion").allows(path) is allowed


def test_robots_files_may_be_large_hostile_or_binary() -> None:
    late = b"User-agent: *\n" + b"#" * MAX_BYTES + b"\nDisallow: /"
    assert parse(late, "animesion").allows("/a")
    start = time.process_time()
    hostile = f"User-agent: *\nDisallow: /{'a*' * 5000}b".encode()
    assert parse(hostile, "animesion").allows("/" + "a" * 50_000)
    groups = "".join(f"User-agent:a{i}\n" for i in range(18_000)) + "".join(f"Disallow:/{i}\n" for i in range(18_000))
    assert parse(groups.encode(), "animesion").allows("/a")
    wildcards = "User-agent: *\n" + "".join(f"Allow:/*{i}*z\n" for i in range(30_000))
    assert parse(wildcards.encode(), "animesion").allows("/" + "a1" * 3000)
    assert time.process_time() - start < 4
    assert parse(bytes(range(256)) * 10, "animesion").allows("/a")


def test_crawl_delay_is_read_and_bounded() -> None:
    text = b"User-agent: *\nCrawl-delay: 2.5\nDisallow: /a\nUser-agent: slow\nCrawl-delay: 86400\nUser-agent: x\n"
    assert parse(text, "animesion").delay == 2.5
    assert parse(text, "slow").delay == 60
    assert parse(b"User-agent: *\nCrawl-delay: soon", "animesion").delay == 0


@pytest.mark.parametrize(
    ("status", "allowed", "kept"),
    [
        (200, False, True),
        (404, True, True),
        (403, True, True),
        (302, True, True),
        (500, False, False),
        (0, False, False),
    ],
)
def test_rules_by_robots_status_and_which_are_cached(tmp_path: Path, status: int, allowed: bool, kept: bool) -> None:
    body = b"User-agent: *\nDisallow: /a"
    memory = tmp_path / "robots.sqlite"
    cache = RobotsCache("animesion", memory)
    assert cache.known("https://example.org") is None
    assert cache.learn("https://example.org", status, body).allows("/a") is allowed
    again = RobotsCache("animesion", memory).known("https://example.org")
    assert (again is not None) is kept
    if again:
        assert again.allows("/a") is allowed
        HostMemory(memory).keep("https://example.org", 0.0, "")
        assert RobotsCache("animesion", memory).known("https://example.org") is None
    cache.close()
    memory.write_text("{ damaged")
    assert RobotsCache("animesion", memory).known("https://example.org") is None


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], ""),
        (["all"], ""),
        (["noarchive, NoAI"], "noai"),
        (["nofollow", "noimageai"], "noimageai"),
        (["noindex"], "noindex"),
        (["none"], "none"),
        (["otherbot: noai"], ""),
        (["animesion: noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST"], ""),
        (["noai, unavailable_after: 25 Jun 2030"], "noai"),
    ],
)
def test_opt_out_headers(headers: list[str], found: str) -> None:
    assert robots_directive(headers, "animesion") == found


def test_hostile_statements_are_read_in_linear_time() -> None:
    start = time.monotonic()
    spaces = " " * 400_000
    for line in (f"a{spaces}b", "a=" * 200_000, f"/{spaces}train-ai=n", "a " * 200_000, '"' * 400_000, "/a*" * 100_000):
        usage = parse(f"User-agent: *\nContent-Usage: {line}\n".encode(), "animesion").usage
        assert (usage is not None) is ("train-ai" in line)
    rules = "".join(f"Content-Usage: /*{i}*z train-ai=n\n" for i in range(12_000))
    usage = parse(f"User-agent: *\n{rules}".encode(), "animesion").usage
    assert usage is not None
    assert usage.allows("/" + "a1" * 3000)
    for page in (b"<meta" * 60_000, b"<meta " + b"a='" * 90_000, b"<!--" * 70_000, b"<meta a=" + b" " * 250_000):
        assert page_opt_outs(page, "animesion") == []
    for depth in range(100, 1000, 50):
        deep = "[" * depth + "]" * depth
        assert tdmrep_rules(f'[{{"location": "/a", "tdm-reservation": {deep}}}]').keys() <= {"/a", "/"}
    assert tdmrep_rules("[" + "[]," * 100_000 + "[]]").keys() == {"/"}
    assert tdmrep_rules('[{"location": "/a", "tdm-reservation": ' + "9" * 200_000 + "}]").keys() <= {"/", "/a"}
    assert time.monotonic() - start < 6


def test_product_tokens() -> None:
    assert product_token("Animesion/0.1 (me@example.org)") == "animesion"
    assert product_token("/") == "*"


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", ""),
        (b"\xff\xd8\xff\xe0", ""),
        (b"\x89PNG\r\n\x1a\n<html>", ""),
        (b"<!DOCTYPE html><title>x", "HTML page"),
        (b"\xef\xbb\xbf \n<HTML lang=en>", "HTML page"),
        (b"<!-- hello -->\n<!doctype HTML>", "HTML page"),
        (b'<?xml version="1.0"?><!DOCTYPE html PUBLIC>', "HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML document"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg">', ""),
        (b"<svg>", ""),
        (b'{"success": false}', "JSON document"),
        (b"[]", "JSON document"),
        (b"{\x00\x01", ""),
    ],
)
def test_documents_are_distinguished_from_images(content: bytes, kind: str) -> None:
    assert document_kind(content) == kind


def test_challenge_pages() -> None:
    assert is_challenge(b"<title>Just a moment...</title>")
    assert is_challenge(b"<html><body>Checking your browser before accessing sample-booru.invalid</body></html>")
    assert is_challenge(b"<h1>Verify you are human by completing the action below.</h1>")
    assert is_challenge(b"<title>DDoS protection by example</title>")
    assert is_challenge(b"<h1>Forbidden</h1>", "challenge")
    assert not is_challenge(b"<h1>Forbidden</h1>")


# -- credentials -----------------------------------------------------------------------------------------------------

SPEC = CredentialSpec("booru.example", "BOORU_LOGIN", "BOORU_KEY", where="your profile")


def test_credentials_are_read_from_the_environment_then_netrc(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine other.example login a password b\nmachine booru.example login miku password s3cret\n")
    netrc.chmod(0o600)
    assert find(SPEC, {"BOORU_LOGIN": "rin", "BOORU_KEY": "k"}, netrc) == Credentials("rin", "k")
    assert find(SPEC, {}, netrc) == Credentials("miku", "s3cret")
    assert find(SPEC, {"NETRC": str(netrc)}) == Credentials("miku", "s3cret")
    assert find(SPEC, {}, tmp_path / "absent") is None


def test_credentials_are_never_shown(tmp_path: Path) -> None:
    assert "s3cret" not in repr(Credentials("miku", "s3cret"))
    netrc = tmp_path / "netrc"
    netrc.write_text("machine booru.example login miku passwort s3cret\n")
    netrc.chmod(0o600)
    with pytest.raises(ScraperError, match=r"cannot be read at line \d+") as caught:
        find(SPEC, {}, netrc)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_half_a_credential_and_a_missing_required_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScraperError, match="BOORU_KEY is set and BOORU_LOGIN is not"):
        find(SPEC, {"BOORU_KEY": "k"}, tmp_path / "absent")
    required = CredentialSpec("booru.example", "BOORU_LOGIN", "BOORU_KEY", required=True, where="your profile")
    with pytest.raises(ScraperError, match=r"requires an API key \(your profile\): set BOORU_LOGIN and BOORU_KEY"):
        find(required, {}, tmp_path / "absent")


def test_credentials_are_read_from_an_installed_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = types.ModuleType("keyring")
    keyring.get_credential = lambda host, user: types.SimpleNamespace(  # type: ignore[attr-defined]
        username="miku", password=f"key of {host}"
    )
    monkeypatch.setitem(sys.modules, "keyring", keyring)
    assert find(SPEC, {}, tmp_path / "absent") == Credentials("miku", "key of booru.example")

    def locked(host: str, user: str | None) -> None:
        raise RuntimeError("no session to unlock")

    keyring.get_credential = locked  # type: ignore[attr-defined]
    assert find(SPEC, {}, tmp_path / "absent") is None


# -- sites -----------------------------------------------------------------------------------------------------------


def test_every_site_is_found_by_its_name_and_declares_itself() -> None:
    assert "danbooru" in sites.names()
    for name in sites.names():
        info = sites.load(name).info
        assert info.name == name
        assert info.summary
        assert info.url.startswith("https://")
        assert not info.url.endswith("/")
        assert info.limits, "a site says what its hosts bear"
        assert all(limit.requests_per_second > 0 and limit.connections > 0 for limit in info.limits.values())
        assert info.label_tags
        assert info.terms.startswith("https://")
    with pytest.raises(ScraperError, match=r"no site 'boru': use one of .*danbooru"):
        sites.load("boru")


def test_the_rate_is_the_users_up_to_the_limit_of_the_host() -> None:
    info = sites.load("danbooru").info
    assert info.limiter().interval("cdn.donmai.us") == pytest.approx(1.05)
    assert info.limiter(10).interval("danbooru.donmai.us") == pytest.approx(0.105)
    assert info.limiter(100).interval("danbooru.donmai.us") == pytest.approx(0.105)
    assert info.limiter(0.5).interval("danbooru.donmai.us") == pytest.approx(2.1)
    assert info.limiter(100).interval("mirror.example") == pytest.approx(0.0105)


# -- breakers --------------------------------------------------------------------------------------------------------


def test_a_circuit_opens_is_probed_once_and_closes() -> None:
    breakers = Breakers(failures=3, cooldown=0.05, longest_cooldown=0.15, probes=3)
    for _ in range(2):
        assert breakers.delay("a") == 0
        breakers.report("a", False)
    breakers.report("a", True)  # only failures in a row count
    for _ in range(3):
        assert breakers.state("a") == "closed"
        breakers.report("a", False)
    assert breakers.state("a") == "open"
    assert 0 < breakers.delay("a") <= 0.05
    assert breakers.delay("b") == 0
    time.sleep(0.06)
    assert breakers.delay("a") == 0  # the probe
    assert breakers.state("a") == "half-open"
    assert breakers.delay("a") > 0  # everybody else waits for it
    breakers.report("a", False)
    assert 0.05 < breakers.delay("a") <= 0.1  # twice as long
    time.sleep(0.11)
    assert breakers.delay("a") == 0
    breakers.report("a", True)
    assert breakers.state("a") == "closed"
    assert breakers.opened() == {"a": 1}


def test_a_host_whose_probes_fail_is_given_up() -> None:
    breakers = Breakers(failures=1, cooldown=0.01, longest_cooldown=0.01, probes=2)
    breakers.report("a", False)
    for _ in range(2):
        time.sleep(0.015)
        assert breakers.delay("a") == 0
        breakers.report("a", False)
    assert breakers.state("a") == "given up"
    with pytest.raises(HostDownError):
        breakers.delay("a")
    with pytest.raises(ValueError, match="above zero"):
        Breakers(failures=0)


# -- paces that are remembered ---------------------------------------------------------------------------------------


def test_a_pause_is_remembered_and_a_fast_pace_is_not_written_for_every_turn(tmp_path: Path) -> None:
    memory = tmp_path / "hosts.sqlite"
    limiter = RateLimiter(1000, memory=memory)
    writes = set()
    for _ in range(50):
        limiter.wait("a.example")
        with contextlib.closing(sqlite3.connect(memory)) as database:
            writes |= set(database.execute("SELECT * FROM rows"))
    assert len(writes) <= 2
    limiter.pause("b.example", 500)
    after = RateLimiter(1000, memory=memory)
    assert 490 < after.held("B.example") <= 500
    assert after.held("a.example") == 0
    limiter.close()
    after.close()
    assert [path.name for path in tmp_path.iterdir()] == ["hosts.sqlite"]


@pytest.mark.parametrize("text", ["", "{", "SQLite format 3\0", "x" * 9000])
def test_a_damaged_memory_is_replaced(tmp_path: Path, text: str) -> None:
    memory = tmp_path / "hosts.sqlite"
    memory.write_text(text)
    assert RateLimiter(1000, memory=memory).held("a.example") == 0
    RateLimiter(1000, memory=memory).pause("a.example", 50)
    assert 40 < RateLimiter(1000, memory=memory).held("a.example") <= 50


def test_no_host_is_held_for_more_than_a_day(tmp_path: Path) -> None:
    memory = tmp_path / "hosts.sqlite"
    HostMemory(memory).keep("a.example", 99_999_999_999.0)
    assert RateLimiter(1000, memory=memory).held("a.example") <= 86_400


@pytest.mark.parametrize(
    ("shift", "left"),
    [(-86_400.0 * 365, 300.0), (-3600.0, 300.0), (100.0, 200.0), (3600.0, 0.0), (86_400.0 * 365, 0.0)],
)
def test_a_clock_that_is_set_prolongs_no_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, left: float
) -> None:
    memory, clock = tmp_path / "hosts.sqlite", time.time
    limiter, cache = RateLimiter(1000, memory=memory), RobotsCache("animesion", memory)
    limiter.pause("a.example", 300)
    cache.learn("https://a.example", 200, b"User-agent: *\nDisallow: /a")
    monkeypatch.setattr("time.time", lambda: clock() + shift)
    # the process that runs goes on as before
    assert 299 < limiter.held("a.example") <= 300
    assert cache.at_hand("https://a.example") is not None
    limiter.pause("b.example", 100)
    # the next one may wait the whole pause again, but no longer
    after = RateLimiter(1000, memory=memory)
    assert after.held("a.example") == pytest.approx(left, abs=1)
    assert after.held("b.example") == pytest.approx(100, abs=1)
    known = RobotsCache("animesion", memory).known("https://a.example")
    assert (known is None) is (shift > 86_400)


def test_a_pause_until_a_date_is_counted_from_the_date_of_the_host() -> None:
    until = {"Retry-After": "Mon, 01 Jan 2001 00:02:00 GMT"}
    assert asked_pause(until | {"Date": "Mon, 01 Jan 2001 00:00:00 GMT"}) == 120
    assert asked_pause(until | {"Date": "Mon, 01 Jan 2001 00:03:00 GMT"}) == 0
    assert asked_pause(until | {"Date": "yesterday"}) == asked_pause(until) == 0  # long past by the clock here


def test_hosts_in_any_number_are_remembered_and_few_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("animesion_scrapers.http.limits._MOST_HOSTS", 50)
    monkeypatch.setattr("animesion_scrapers.http.limits._IDLE", 0.0)
    monkeypatch.setattr("animesion_scrapers.http.robots._MOST_HOSTS", 50)
    limiter = RateLimiter(1e4, memory=tmp_path / "hosts.sqlite")
    cache = RobotsCache("animesion", tmp_path / "robots.sqlite")
    limiter.pause("h0.example", 100)
    limiter.slow("h1.example", 5.0)
    for number in range(500):
        if number > 1:
            limiter.wait(f"h{number}.example")
        cache.learn(f"https://h{number}.example", 200, b"User-agent: *\nDisallow: /%d" % number)
    assert len(limiter._buckets) <= 55
    assert len(cache._known) == 50
    assert limiter.held("h0.example") > 90
    assert limiter.interval("h1.example") == 5.0
    rules = cache.known("https://h3.example")
    assert rules is not None
    assert not rules.allows("/3")
    assert rules.allows("/4")


def test_a_crawl_delay_slows_a_host_and_never_speeds_it_up() -> None:
    limiter = RateLimiter(10)
    limiter.slow("a", 3.0)
    limiter.slow("a", 0.01)
    assert limiter.interval("a") == 3.0


# -- ledger ----------------------------------------------------------------------------------------------------------


def test_a_ledger_outlives_its_process(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.plan({"a": "1", "b": "2", "c": "3", "d": "4"})
        entries = ledger.entries("abcd")
        ledger.keep(entries["a"], "part", b"hello", "md5:5d41402abc4b2a76b9719d911017c592", attempts=2)
        ledger.fail(entries["b"], "timed out", "slow", final=False, attempts=3)
        ledger.fail(entries["c"], "not found", "HTTP 404", final=True, attempts=1)
        ledger.begin(entries["d"])
    with Ledger(tmp_path) as ledger:
        found = ledger.entries("abcde")
        assert [(e.state, e.attempts, e.error) for e in found.values()] == [
            (DONE, 2, ""), (FAILED, 3, "timed out"), (REFUSED, 1, "not found"), ("planned", 0, "")]  # fmt: skip
        assert ledger.content(found["a"]) == b"hello"
        assert ledger.counts() == {DONE: 1, FAILED: 1, REFUSED: 1, "planned": 1}
        assert ledger.errors() == [("failed", "timed out", "slow", 1), ("refused", "not found", "HTTP 404", 1)]
        ledger.plan({"a": "1", "c": "another"})
        assert [e.state for e in ledger.entries("ac").values()] == [DONE, "planned"]


def test_a_spool_goes_when_all_that_it_holds_is_kept_elsewhere(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.plan({"a": "1", "b": "2"})
        for key, entry in ledger.entries("ab").items():
            ledger.keep(entry, "part", key.encode(), "md5:0", attempts=1)
        ledger.hand_over(["a"])
        assert (tmp_path / "part.spool").exists()
        assert [e.here for e in ledger.entries("ab").values()] == [False, True]
        ledger.hand_over()
        assert not (tmp_path / "part.spool").exists()


def test_a_full_disk_keeps_the_bytes_written_before(tmp_path: Path) -> None:
    bodies = {f"item-{number}": bytes([number]) * 50_000 for number in range(10)}
    digests = {key: f"md5:{hashlib.md5(content).hexdigest()}" for key, content in bodies.items()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def keep_all(ledger: Ledger) -> None:
        for key, content in bodies.items():
            ledger.begin(entries[key])
            ledger.keep(entries[key], "part", content, digests[key], attempts=1)
        ledger.commit()

    with Ledger(tmp_path) as ledger:
        ledger.plan(dict.fromkeys(bodies, "1"))
        entries = ledger.entries(bodies)
        resource.setrlimit(resource.RLIMIT_FSIZE, (320_000, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                keep_all(ledger)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with Ledger(tmp_path) as ledger:
        found = ledger.entries(bodies)
        done = [key for key, entry in found.items() if entry.state == DONE]
        assert done == list(bodies)[:6]
        for key in set(bodies) - set(done):
            assert found[key].state == "planned"
            ledger.keep(found[key], "part", bodies[key], digests[key], attempts=1)
    with Ledger(tmp_path) as ledger:
        assert {key: ledger.content(entry) for key, entry in ledger.entries(bodies).items()} == bodies


def test_damaged_and_later_ledgers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match=r"cannot be read .*remove that folder"):
        Ledger(tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    database = sqlite3.connect(tmp_path / "ledger.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()
    with pytest.raises(LedgerError, match="later version"):
        Ledger(tmp_path)
