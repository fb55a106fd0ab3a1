"""Opt-outs on a loopback site: one host for each case, one build of all of them."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web
from multidict import CIMultiDict
from PIL import Image, PngImagePlugin

import animesion
from animesion import sources
from animesion.images import opt_outs
from animesion.pipeline import runner
from animesion.schemas import DropReason
from animesion_sample.faults import LocalServer, local_server
from animesion_scrapers import Crawler, Download, Ledger, RateLimiter

from .crawling import AGENT, raw

ROBOTS, USAGE, TDM = DropReason.ROBOTS_OPT_OUT, DropReason.USAGE_OPT_OUT, DropReason.TDM_OPT_OUT
METADATA, C2PA = DropReason.METADATA_OPT_OUT, DropReason.C2PA_OPT_OUT
KEPT = ""
PLUS = "http://ns.useplus.org/ldf/xmp/1.0/"
VOCABULARY = "http://ns.useplus.org/ldf/vocab/"
EVERYBODY = "User-agent: *\n"


def pixels(kind: str = "PNG", **extra: Any) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((24, 24), 90).convert("RGB").save(stream, kind, **extra)
    return stream.getvalue()


def xmp(attributes: str = "", body: str = "", before: str = "") -> bytes:
    return (
        f'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>{before}<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/"'
        f' xmlns:p="{PLUS}" xmlns:t="http://www.w3.org/ns/tdmrep/"'
        ' xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f'<rdf:Description rdf:about="" {attributes}>{body}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def mining(term: str) -> bytes:
    return xmp(f'p:DataMining="{VOCABULARY}{term}"')


def compressed_png(packet: bytes) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet.decode(), zip=True)
    return pixels(pnginfo=info)


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def extended_jpeg(packet: bytes) -> bytes:
    head = b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 32 + struct.pack(">I", len(packet))
    half = len(packet) // 2
    parts = [(half, packet[half:]), (0, packet[:half])]  # in any order
    cut = b"".join(segment(0xE1, head + struct.pack(">I", offset) + part) for offset, part in parts)
    whole = pixels("JPEG")
    return whole[:2] + cut + whole[2:]


def box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload) + 8) + kind + payload


def superbox(kind: bytes, label: bytes, *boxes: bytes) -> bytes:
    described = box(b"jumd", kind + b"\0\x11\0\x10\x80\0\0\xaa\0\x38\x9bq" + b"\3" + label + b"\0")
    return box(b"jumb", described + b"".join(boxes))


def manifest(label: bytes, kind: bytes = b"c2ma") -> bytes:
    assertion = superbox(b"cbor", label, box(b"cbor", b"\xa1gentries\xa0"))
    return superbox(b"c2pa", b"c2pa", superbox(kind, b"urn:c2pa:1", superbox(b"c2as", b"c2pa.assertions", assertion)))


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    whole = pixels()
    chunk = struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))
    return whole[:33] + chunk + whole[33:]


def c2pa_jpeg(store: bytes) -> bytes:
    half = store.index(b"training") + 3  # within the label
    head = store[:8]
    parts = [store[:half], head + store[half:]]
    cut = b"".join(segment(0xEB, b"JP\0\1" + struct.pack(">I", i + 1) + part) for i, part in enumerate(parts))
    whole = pixels("JPEG")
    return whole[:2] + cut + whole[2:]


class Case(NamedTuple):
    reason: str
    evidence: str = ""
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = ()
    body: bytes = b""
    robots: str = ""
    tdmrep: bytes = b""
    page: str = ""
    page_headers: Mapping[str, str] | Sequence[tuple[str, str]] = ()


LATER = (
    '[{"location": "/x", "tdm-reservation": 1}, {"location": "/img/*.png$", "tdm-reservation": 1, "tdm-policy": "p"}]'
)
CASES = {
    "nothing": Case(KEPT),
    # robots.txt and X-Robots-Tag
    "robots-disallow": Case(ROBOTS, "disallowed by robots.txt", robots=EVERYBODY + "Disallow: /img/"),
    "robots-other": Case(KEPT, robots="User-agent: GPTBot\nDisallow: /\n"),
    "tag-noai": Case(ROBOTS, "X-Robots-Tag: noai", {"X-Robots-Tag": "noai"}),
    "tag-noimageai": Case(ROBOTS, "X-Robots-Tag: noimageai", {"X-Robots-Tag": "all, NoImageAI"}),
    "tag-other": Case(KEPT, headers={"X-Robots-Tag": "otherbot: noai"}),
    # Content-Usage
    "usage-header": Case(USAGE, "Content-Usage: train-ai=n", {"Content-Usage": "search=y, train-ai=n"}),
    "usage-allows": Case(KEPT, headers={"Content-Usage": "train-ai=y, search=n"}),
    "usage-broader": Case(USAGE, "Content-Usage: bots=n", {"Content-Usage": "bots=n"}),
    "usage-inherits": Case(KEPT, headers={"Content-Usage": "bots=n, train-ai=y"}),
    "usage-genai": Case(USAGE, "Content-Usage: train-genai=n", {"Content-Usage": "train-ai=y, train-genai=n"}),
    "usage-twice": Case(
        USAGE, "Content-Usage: train-ai=n", [("Content-Usage", "train-ai=y"), ("Content-Usage", "train-ai=n")]
    ),
    "usage-robots": Case(
        USAGE, "robots.txt: Content-Usage: train-ai=n", robots=EVERYBODY + "Allow: /\nContent-Usage: train-ai=n"
    ),
    "usage-path": Case(
        USAGE, "robots.txt: Content-Usage: /img/ ai=n", robots=EVERYBODY + "Content-Usage: /img/ ai=n\nAllow: /"
    ),
    "usage-longest": Case(
        KEPT, robots=EVERYBODY + "Content-Usage: train-ai=n\nContent-Usage: /img/ train-ai=y\nAllow: /"
    ),
    "usage-own-group": Case(
        KEPT, robots=EVERYBODY + "Content-Usage: train-ai=n\n\nUser-agent: animesion\nContent-Usage: train-ai=y\n"
    ),
    "usage-signal": Case(
        USAGE, "robots.txt: Content-Signal: ai-train=no", robots=EVERYBODY + "Content-Signal: search=yes,ai-train=no"
    ),
    # TDMRep
    "tdm-header": Case(TDM, "tdm-reservation: 1", {"TDM-Reservation": "1"}),
    "tdm-policy": Case(
        TDM, "tdm-reservation: 1 (policy https://x/p)", {"tdm-reservation": "1", "tdm-policy": "https://x/p"}
    ),
    "tdm-zero": Case(KEPT, headers={"tdm-reservation": "0"}),
    "tdm-odd": Case(TDM, "tdm-reservation: yes", {"tdm-reservation": "yes"}),
    "tdm-file": Case(
        TDM,
        "tdmrep.json: /: tdm-reservation: 1 (policy https://x/p)",
        tdmrep=b'[{"location": "/", "tdm-reservation": 1, "tdm-policy": "https://x/p"}]',
    ),
    "tdm-file-pattern": Case(TDM, "tdmrep.json: /img/*.png$: tdm-reservation: 1 (policy p)", tdmrep=LATER.encode()),
    "tdm-file-elsewhere": Case(KEPT, tdmrep=b'[{"location": "/other/", "tdm-reservation": 1}]'),
    "tdm-file-broken": Case(TDM, "tdmrep.json: not readable as JSON", tdmrep=b'[{"location": "/", '),
    "tdm-file-deep": Case(TDM, "tdmrep.json: not readable as JSON", tdmrep=b"[" * 200_000),
    "tdm-file-form": Case(TDM, "tdmrep.json: an entry without location", tdmrep=b'[{"tdm-reservation": 1}]'),
    "tdm-file-page": Case(KEPT, tdmrep=b"<!doctype html><p>this site answers everything"),
    # pages
    "page-noai": Case(ROBOTS, "its page: meta robots: noai", page='<META content="index, NOAI" name=robots>'),
    "page-tdm": Case(
        TDM,
        "its page: meta tdm-reservation: 1 (policy https://x/p)",
        page='<meta name="tdm-reservation" content="&#49;"><meta name="tdm-policy" content="https://x/p">',
    ),
    "page-header": Case(
        USAGE, "its page: Content-Usage: train-ai=n", page=" ", page_headers={"Content-Usage": "train-ai=n"}
    ),
    "page-comment": Case(
        KEPT, page='<!-- <meta name="robots" content="noai"> --><meta name="robots" content="noindex">'
    ),
    "page-as-file": Case(ROBOTS, "meta robots: noai", body=b'<html><meta name="robots" content="noai"></html>'),
    # inside the file
    "xmp-png": Case(
        METADATA,
        f"XMP: plus:DataMining: {VOCABULARY}DMI-PROHIBITED",
        body=png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + mining("DMI-PROHIBITED")),
    ),
    "xmp-png-compressed": Case(
        METADATA, "XMP: plus:DataMining", body=compressed_png(mining("DMI-PROHIBITED-AIMLTRAINING"))
    ),
    "xmp-jpeg": Case(
        METADATA, "XMP: plus:DataMining", body=pixels("JPEG", xmp=mining("DMI-PROHIBITED-GENAIMLTRAINING"))
    ),
    "xmp-jpeg-extended": Case(METADATA, "XMP: plus:DataMining", body=extended_jpeg(mining("DMI-PROHIBITED"))),
    "xmp-webp": Case(
        METADATA, "XMP: plus:DataMining", body=pixels("WEBP", xmp=mining("DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING"))
    ),
    "xmp-tiff": Case(METADATA, "XMP: plus:DataMining", body=pixels("TIFF", tiffinfo={700: mining("DMI-PROHIBITED")})),
    "xmp-element": Case(
        METADATA,
        "XMP: plus:DataMining",
        body=pixels("JPEG", xmp=xmp(body=f'<p:DataMining rdf:resource="{VOCABULARY}DMI-PROHIBITED-SEECONSTRAINT"/>')),
    ),
    "xmp-allowed": Case(KEPT, body=pixels("JPEG", xmp=mining("DMI-ALLOWED"))),
    "xmp-keyword": Case(
        METADATA,
        "XMP: li: noai",
        body=pixels("WEBP", xmp=xmp(body="<dc:subject><rdf:Bag><rdf:li>NoAI</rdf:li></rdf:Bag></dc:subject>")),
    ),
    "xmp-tdm": Case(METADATA, "XMP: tdm:reservation: 1", body=pixels("JPEG", xmp=xmp('t:reservation="1"'))),
    "xmp-source-type": Case(
        KEPT,
        body=pixels(
            "JPEG",
            xmp=xmp('e:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"'),
        ),
    ),
    "xmp-entities": Case(
        METADATA,
        "XMP: a packet that is no XML",
        body=pixels("JPEG", xmp=xmp('p:DataMining="&a;"', before='<!DOCTYPE x [<!ENTITY a "DMI-PROHIBITED">]>')),
    ),
    "xmp-damaged": Case(METADATA, "XMP: a packet that is no XML", body=pixels("JPEG", xmp=mining("DMI-X")[:-60])),
    "xmp-deep": Case(
        METADATA,
        "XMP: a packet of more than 100 levels",
        body=pixels("JPEG", xmp=xmp(body="<p:DataMining>" * 500 + "</p:DataMining>" * 500)),
    ),
    "c2pa-jpeg": Case(C2PA, "C2PA: c2pa.training-mining, which", body=c2pa_jpeg(manifest(b"c2pa.training-mining"))),
    "c2pa-png": Case(
        C2PA, "C2PA: cawg.training-mining__1, which", body=png_chunk(b"caBX", manifest(b"cawg.training-mining__1"))
    ),
    "c2pa-compressed": Case(
        C2PA, "C2PA: a compressed manifest, which", body=png_chunk(b"caBX", manifest(b"?", b"c2cm"))
    ),
    "c2pa-other": Case(KEPT, body=png_chunk(b"caBX", manifest(b"c2pa.actions"))),
    # the most restrictive wins, and everything that the response says is reported
    "order-headers": Case(
        USAGE,
        "Content-Usage: train-ai=n; tdm-reservation: 1",
        {"X-Robots-Tag": "all", "Content-Usage": "train-ai=n", "tdm-reservation": "1"},
    ),
    "order-file-over-header": Case(
        TDM, "tdmrep.json: /", {"tdm-reservation": "0"}, tdmrep=b'[{"location": "/", "tdm-reservation": 1}]'
    ),
    "order-header-over-file": Case(
        TDM, "tdm-reservation: 1", {"tdm-reservation": "1"}, tdmrep=b'[{"location": "/", "tdm-reservation": 0}]'
    ),
    "order-in-tdm-file": Case(
        TDM,
        "tdmrep.json: /:",
        tdmrep=b'[{"location": "/img/", "tdm-reservation": 0}, {"location": "/", "tdm-reservation": 1}]',
    ),
    "order-metadata": Case(
        METADATA,
        "XMP: plus:DataMining",
        {"Content-Usage": "train-ai=y"},
        pixels("JPEG", xmp=mining("DMI-PROHIBITED")),
    ),
    "order-usage": Case(
        USAGE,
        "Content-Usage: train-ai=n",
        {"Content-Usage": "train-ai=n"},
        robots=EVERYBODY + "Content-Usage: train-ai=y",
    ),
}


def application() -> web.Application:
    async def answer(request: web.Request) -> web.Response:
        case = CASES[request.host.partition(".")[0]]
        if request.path == "/robots.txt" and case.robots:
            return web.Response(body=case.robots.encode(), content_type="text/plain")
        if request.path == "/.well-known/tdmrep.json" and case.tdmrep:
            return web.Response(body=case.tdmrep, content_type="application/json")
        if request.path == "/page" and case.page:
            return web.Response(body=case.page.encode(), headers=dict(case.page_headers), content_type="text/html")
        if request.path == "/img/a.png":
            return web.Response(body=case.body or pixels(), headers=CIMultiDict(case.headers), content_type="image/png")
        return web.Response(status=404)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    return app


def hosts(server: LocalServer) -> dict[str, tuple[str, int]]:
    return {f"{case}.invalid": server.address for case in CASES}


def build(server: LocalServer, folder: Path, *settings: str) -> tuple[dict[str, dict[str, Any]], Any]:
    """Rows by case, and the result of the build."""
    folder.mkdir(exist_ok=True)
    lines = [f"http://{name}.invalid/img/a.png,a" for name, case in CASES.items() if not case.page]
    (folder / "t.csv").write_text("\n".join(["url,label", *lines]) + "\n")
    recipe = animesion.load_recipe(
        "urls",
        [
            f"source.path={folder / 't.csv'}",
            "source.contact=me@example.org",
            "source.requests_per_second=10",
            *settings,
        ],
    )
    made = sources.make

    def with_hosts(recipe: Any) -> Any:
        source: Any = made(recipe)
        source.connect_to = hosts(server)
        return source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "make", with_hosts)
        # What is reported without the extra; with it, see the unit tests.
        patch.setattr(opt_outs, "_LIBRARY", "no_such_module")
        result = runner.run(recipe, folder / "out", workers=1, until="fetch", replace=True)
    rows = raw(folder / "out").values()
    return {row["file_url"].partition("//")[2].partition(".")[0]: row for row in rows}, result


@pytest.fixture(scope="module")
def site() -> Any:
    with local_server(application) as server:
        yield server


@pytest.fixture(scope="module")
def rows(site: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found, result = build(site, tmp_path_factory.mktemp("opt-outs"))
    expected = Counter(case.reason for case in CASES.values() if case.reason)
    told = next(sentence for sentence in result.crawl if "refused permanently" in sentence)
    assert sum(expected.values()) >= 40
    assert all(reason in told for reason in (ROBOTS, USAGE, TDM))
    assert set(expected) == {ROBOTS, USAGE, TDM, METADATA, C2PA}
    return found | with_pages(site, tmp_path_factory.mktemp("pages"))


def with_pages(server: LocalServer, folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of the cases with a page, by a crawl that requests it."""
    wanted = [
        Download(name, f"http://{name}.invalid/img/a.png", image=True, page=f"http://{name}.invalid/page")
        for name, case in CASES.items()
        if case.page
    ]
    limiter = RateLimiter(float("inf"))
    with (
        Ledger(folder) as ledger,
        Crawler(ledger, user_agent=AGENT, limiter=limiter, connect_to=hosts(server)) as crawler,
    ):
        entries = crawler.fetch("part", wanted)
    assert {entry.state for entry in entries.values() if entry.error} == {"refused"}
    return {
        name: {"reason": entry.error, "detail": entry.detail, "sha256": entry.digest} for name, entry in entries.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_an_opt_out_on_a_loopback_site(rows: dict[str, dict[str, Any]], name: str) -> None:
    case, row = CASES[name], rows[name]
    assert row["reason"] == case.reason, row["detail"]
    assert row["detail"].startswith(case.evidence)
    assert bool(row["sha256"]) is (case.reason == KEPT)


def test_the_page_lists_every_case() -> None:
    text = (Path(__file__).parents[2] / "docs" / "crawling.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 4]
    listed = {name: index for row in rows for index in (2, 3) for name in re.findall(r"`([a-z0-9-]+)`", row[index])}
    assert {name: listed.get(name) for name in CASES} == {n: 2 if case.reason else 3 for n, case in CASES.items()}
    assert f"each of these {len(CASES)} cases" in text


def test_the_switch_turns_every_opt_out_off_and_on_again(
    site: LocalServer, rows: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    ignored, result = build(site, tmp_path, "filter.opt_outs=false")
    assert {name for name, row in ignored.items() if row["reason"]} == {"robots-disallow", "page-as-file"}
    assert result.notes[-1].startswith("filter.opt_outs is false")
    assert ignored["page-as-file"]["reason"] == "not an image"
    # What was fetched without asking is not taken over: the hosts are asked now.
    obeyed, _ = build(site, tmp_path, "source.robots=false")
    dropped = {name for name, row in rows.items() if row["reason"]}
    unasked = {name for name, case in CASES.items() if case.page}
    in_robots = {"robots-disallow", "usage-robots", "usage-path", "usage-signal"}
    assert {name for name, row in obeyed.items() if row["reason"]} == dropped - unasked - in_robots
