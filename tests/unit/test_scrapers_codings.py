"""Bodies that a server compresses although the crawler asks for none: decoded, capped, or refused."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import zlib
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from animesion_sample.faults import local_server
from animesion_scrapers import Crawler, Download, Downloaded, Ledger, RateLimiter, Retries, download_all
from animesion_scrapers.http.codings import CodingError, Decoder

AGENT = "animesion-tests/1.0 (tests@example.org)"
HOST = "cdn.sample-booru.invalid"
BODY = bytes(range(256)) * 40
MD5 = hashlib.md5(BODY).hexdigest()
PAGE = b"<html><title>Checking your browser</title></html>"


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


#: Name -> Content-Encoding and body.
BODIES = {
    "gzip": ("gzip", gzip.compress(BODY)),
    "upper case": (" GZIP ", gzip.compress(BODY)),
    "x-gzip": ("x-gzip", gzip.compress(BODY)),
    "members": ("gzip", gzip.compress(BODY[:5000]) + gzip.compress(BODY[5000:])),
    "deflate": ("deflate", zlib.compress(BODY)),
    "raw deflate": ("deflate", raw_deflate(BODY)),
    "identity": ("identity", BODY),
    "aws-chunked": ("aws-chunked", BODY),
    "aws-chunked and gzip": ("aws-chunked, gzip", gzip.compress(BODY)),
    "brotli": ("br", BODY),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(BODY))),
    "not gzip": ("gzip", BODY),
    "cut": ("gzip", gzip.compress(BODY)[:-12]),
    "bomb": ("gzip", gzip.compress(bytes(1 << 20)) * 4),
    "many members": ("gzip", gzip.compress(b"") * 300),
    "empty": ("gzip", gzip.compress(b"")),
    "page": ("gzip", gzip.compress(PAGE)),
}


def application(robots: bytes = b"") -> web.Application:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/robots.txt":
            return web.Response(body=robots, headers={"Content-Encoding": "gzip"})
        if request.match_info["name"] not in BODIES:
            return web.Response(status=404)
        encoding, body = BODIES[request.match_info["name"]]
        kind = "text/html" if request.match_info["name"] == "page" else "image/jpeg"
        status = 206 if "Range" in request.headers else 200
        headers = {"Content-Encoding": encoding, "Content-Type": kind}
        if status == 206:
            headers["Content-Range"] = f"bytes 0-99/{len(BODY)}"
        return web.Response(body=body[:100] if status == 206 else body, status=status, headers=headers)

    app = web.Application()
    app.router.add_get("/{name:.*}", answer)
    return app


def fetched(name: str, md5: str = "", span: tuple[int, int] | None = None) -> Downloaded:
    with local_server(application) as server:
        [result] = download_all(
            [Download("k", f"http://{HOST}/{name}", md5, image=True, span=span)],
            user_agent=AGENT,
            limiter=RateLimiter(float("inf")),
            connect_to={HOST: server.address},
            retries=Retries(attempts=2, base=0.01),
            max_bytes=1 << 20,
        )
    return result


@pytest.mark.parametrize(
    "name",
    ["gzip", "upper case", "x-gzip", "members", "deflate", "raw deflate", "identity", "aws-chunked",
     "aws-chunked and gzip"],
)  # fmt: skip
def test_a_compressed_file_is_decoded(name: str) -> None:
    assert fetched(name).content == BODY
    assert fetched(name, MD5).status == "ok"


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("brotli", "fetch failed", "the body is compressed with br, against the request"),
        ("twice", "fetch failed", "the body is compressed with gzip, gzip, against the request"),
        ("not gzip", "fetch failed", "the body is not gzip, as its header states, or is damaged"),
        ("cut", "fetch failed", "the compressed body ends early"),
        ("bomb", "too many bytes", "more than 1048576 bytes"),
        ("many members", "fetch failed", "the compressed body has more than 256 members"),
        ("empty", "empty file", "the body has 0 bytes"),
        ("page", "refused", "an HTML challenge page instead of an image"),
    ],
)
def test_other_bodies_are_faults(name: str, status: str, detail: str) -> None:
    result = fetched(name)
    assert (result.status, result.detail, result.content) == (status, detail, b"")


def test_a_compressed_challenge_in_place_of_a_known_file_is_requested_again() -> None:
    result = fetched("page", MD5)
    assert (result.detail, result.final) == ("an HTML challenge page instead of the file", False)


def test_a_compressed_piece_is_refused() -> None:
    result = fetched("gzip", span=(0, 100))
    assert (result.status, result.final) == ("fetch failed", True)
    assert result.detail == "the body is compressed, so the piece is of another file"


def test_a_compressed_robots_file_is_obeyed(tmp_path: Path) -> None:
    rules = gzip.compress(b"User-agent: *\nDisallow: /deflate\n")
    wanted = [Download(name, f"http://{HOST}/{name}", image=True) for name in ("gzip", "deflate")]
    with local_server(lambda: application(rules)) as server, Ledger(tmp_path) as ledger:
        with Crawler(
            ledger,
            user_agent=AGENT,
            limiter=RateLimiter(float("inf")),
            connect_to={HOST: server.address},
            robots=tmp_path / "robots.sqlite",
        ) as crawler:
            entries = crawler.fetch("spool", wanted)
        assert ledger.content(entries["gzip"]) == BODY
    assert (entries["deflate"].error, entries["deflate"].detail) == ("robots opt-out", "disallowed by robots.txt")


@given(
    content=st.binary(max_size=300),
    coding=st.sampled_from(["gzip", "deflate", "raw"]),
    cuts=st.lists(st.integers(0, 400), max_size=5),
)
def test_any_division_into_pieces_gives_the_content(content: bytes, coding: str, cuts: list[int]) -> None:
    packed = {"gzip": gzip.compress, "deflate": zlib.compress, "raw": raw_deflate}[coding](content)
    if coding == "raw" and packed[0] & 0x0F == 8:
        return  # cannot be told from zlib by its first byte
    places = sorted({0, len(packed), *(cut for cut in cuts if cut < len(packed))})
    decoder = Decoder(["deflate" if coding == "raw" else coding])
    assert b"".join(decoder.decode(packed[a:b], 1000) for a, b in itertools.pairwise(places)) == content
    assert decoder.is_complete


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["gzip", "deflate"]))
def test_hostile_bytes_raise_one_error(content: bytes, coding: str) -> None:
    try:
        decoded = Decoder([coding]).decode(content, 50)
    except CodingError:
        return
    assert len(decoded) <= 51
