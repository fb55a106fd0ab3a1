"""The client of metadata APIs against servers that mean harm, as raw bytes on loopback; and the masking of secrets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import html
import json
import math
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from animesion_scrapers import (
    Download,
    Downloaded,
    RateLimiter,
    Retries,
    ScraperError,
    StatusError,
    UnsafeAddressError,
)
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.metadata import MetadataClient
from animesion_scrapers.http.robots import RobotsCache
from animesion_scrapers.http.transfers import Transfers
from animesion_scrapers.masking import Mask, mask

HOST = "api.sample-booru.invalid"
USER, KEY = "planted-user", "PLANTED/KEY+SECRET=9981"
Answer = Callable[[socket.socket], None]


@contextlib.contextmanager
def raw_server(
    answer: Answer, tls: ssl.SSLContext | None = None, at: tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[tuple[int, list[bytes]]]:
    """A server that calls a function for each connection; yields the port and the requests."""
    requests: list[bytes] = []
    with socket.create_server(at) as listening:

        def serve_one(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(20)
                with tls.wrap_socket(connection, server_side=True) if tls else connection as wrapped:
                    requests.append(wrapped.recv(65536))
                    answer(wrapped)
                    wrapped.shutdown(socket.SHUT_WR)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve_one, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], requests
        listening.shutdown(socket.SHUT_RDWR)


def client_of(port: int, timeout: float = 5.0) -> MetadataClient:
    return MetadataClient(
        user_agent="test/1.0 (me@example.org)",
        limiter=RateLimiter(math.inf),
        routes=Routes({HOST: ("127.0.0.1", port), "other.invalid": ("127.0.0.1", port)}),
        credentials=(USER, KEY),
        credentials_for=f"http://{HOST}",
        timeout=timeout,
        retries=Retries(attempts=1),
    )


def error_of(answer: Answer, kind: type[ScraperError], timeout: float = 5.0) -> str:
    """The message of the error that an answer ends with."""
    with raw_server(answer) as (port, _), client_of(port, timeout) as client, pytest.raises(kind) as raised:
        client.get_json(f"http://{HOST}/posts.json", {"a": "b"})
    return str(raised.value)


def sent(*pieces: bytes) -> Answer:
    return lambda connection: connection.sendall(b"".join(pieces))


def dripped(start: bytes, piece: bytes, wait: float = 0.02) -> Answer:
    """A start, and then one piece after another without end."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            time.sleep(wait)

    return answer


def with_body(body: bytes, status: bytes = b"200 OK") -> Answer:
    return sent(
        b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)), body
    )


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"HTTP/1.1 200 ", b"O"),
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n[", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n", b"X: y\r\n"),
    ],
    ids=["status", "header", "interim", "body", "chunk-size", "chunks", "trailers"],
)
def test_every_part_of_an_exchange_has_one_deadline(start: bytes, piece: bytes) -> None:
    begun = time.monotonic()
    message = error_of(dripped(start, piece), ScraperError, timeout=0.1)
    assert message in {
        f"{HOST} could not be read: {why}." for why in ("the response took too long", "it stopped responding")
    }
    assert time.monotonic() - begun < 3


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The context of a server whose self-signed certificate for `HOST` is trusted."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    public, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    public.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(public))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context


def test_deadlines_and_names_hold_with_tls(certificate: ssl.SSLContext) -> None:
    def drips(connection: socket.socket) -> None:
        dripped(b"HTTP/1.1 200 OK\r\nX: ", b"a")(connection)

    def stalls(connection: socket.socket) -> None:
        time.sleep(5)

    whole = with_body(b"[1]")
    with raw_server(whole, certificate) as (port, _), client_of(port) as client:
        assert client.get_json(f"https://{HOST}/posts.json") == [1]
    for answer, tls, host, message in (
        (drips, certificate, HOST, "the response took too long"),
        (stalls, None, HOST, "it stopped responding"),  # a handshake that never comes
        (whole, certificate, "other.invalid", "its TLS certificate was not accepted"),
    ):
        with (
            raw_server(answer, tls) as (port, _),
            client_of(port, 0.2) as client,
            pytest.raises(ScraperError, match=f"^{host} could not be read: {message}"),
        ):
            client.get_json(f"https://{host}/posts.json")


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n", b"X: y\r\n" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    ],
    ids=["interim", "trailers", "headers"],
)
def test_headers_without_end_are_cut(start: bytes, piece: bytes) -> None:
    message = error_of(dripped(start, piece, 0.0), ScraperError, timeout=10.0)
    assert message.startswith(f"{HOST} could not be read: ")


@pytest.mark.parametrize("encoding", [b"", b"Content-Encoding: gzip\r\n"])
def test_the_body_of_a_redirect_is_not_read(encoding: bytes) -> None:
    bomb = gzip.compress(bytes(1 << 24))
    first = b"HTTP/1.1 302 Found\r\nLocation: /next\r\n" + encoding + b"\r\n"

    def answer(connection: socket.socket) -> None:
        if len(requests) > 1:
            with_body(b"[1]")(connection)
            return
        connection.sendall(first + bomb)
        while True:
            connection.sendall(bytes(1 << 16))

    with raw_server(answer) as (port, requests), client_of(port, 1.0) as client:
        assert client.get_json(f"http://{HOST}/posts.json") == [1]
    assert [request.split()[1] for request in requests] == [b"/posts.json", b"/next"]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (b"http://[::1", f"Refused to follow a redirect from {HOST} to a malformed URL."),
        (b"http://x:99999/", f"Refused to follow a redirect from {HOST} to a malformed URL."),
        (b"http://..example/", "Refused to fetch a malformed URL."),
        (b"http://127.1/", "Refused to fetch from 127.1: the host is neither a name nor an address in its usual form."),
        (b"\xff\xfe\x00http://x", f"{HOST} redirected /"),
    ],
)
def test_redirects_to_malformed_urls(location: bytes, message: str) -> None:
    kind = ScraperError if message.startswith(HOST) else UnsafeAddressError
    assert error_of(sent(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n"), kind).startswith(message)


def test_a_hostile_robots_file_does_not_hold_up_other_hosts() -> None:
    """The verdict on this path takes some tenths of a second, in which the event loop has to run."""
    robots = RobotsCache("test")
    lines = "".join(f"Allow: *{'a' * 20}{number}\n" for number in range(15_000))
    body = f"User-agent: *\n{lines}Disallow: /\n".encode()
    path = "/" + "a" * 8000

    async def ticks_during(item: Download) -> tuple[Downloaded, int]:
        transfers = Transfers(
            user_agent="test/1.0 (me@example.org)",
            limiter=RateLimiter(math.inf),
            routes=Routes({HOST: ("127.0.0.1", 9)}),
            connections=1,
            per_host=1,
            deadline=0.2,  # less than the verdict takes, which does not count
            max_bytes=1,
            retries=Retries(attempts=1),
            robots=robots,
        )
        fetching = asyncio.create_task(transfers.fetch(item))
        ticks = 0
        while not fetching.done():
            await asyncio.sleep(0.005)
            ticks += 1
        await transfers.close()
        return fetching.result(), ticks

    robots.learn(f"http://{HOST}", 200, body)
    rules = robots.known(f"http://{HOST}")
    assert rules is not None
    assert not rules.is_quick(path)
    assert rules.is_quick("/short")
    result, ticks = asyncio.run(ticks_during(Download("k", f"http://{HOST}{path}")))
    assert (result.status, result.detail) == ("robots opt-out", "disallowed by robots.txt")
    assert ticks >= 5
    assert rules.is_quick(path)  # the verdict is kept


def test_documents_of_very_many_values_are_not_parsed() -> None:
    for body in (b"[" + b"[]," * 600_000 + b"1]", b"[" * 600_000, b"[" + b'{"a":1},' * 600_000 + b"1]"):
        tracemalloc.start()
        message = error_of(with_body(body), ScraperError)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert message == f"{HOST} answered /posts.json with more than 500,000 values."
        assert peak < 8 * len(body) + (1 << 20)
    large = json.dumps([{"id": number, "tags": "a b"} for number in range(100_000)]).encode()
    with raw_server(with_body(large)) as (port, _), client_of(port) as client:
        document = client.get_json(f"http://{HOST}/posts.json")
    assert isinstance(document, list)
    assert len(document) == 100_000


def test_what_a_site_echoes_is_masked() -> None:
    basic = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
    alone = base64.b64encode(KEY.encode()).decode()
    text = f"bad Authorization Basic {basic}, {KEY}, {quote(KEY)}, {quote_plus(KEY)}, {alone}"
    body = json.dumps({"message": text}).encode().replace(b"/", b"\\/")
    message = error_of(with_body(body, b"401 Unauthorized"), StatusError)
    assert (
        message == f"{HOST} answered 401 Unauthorized to /posts.json: bad Authorization Basic ***, ***, ***, ***, ***."
    )
    assert "PLANTED" not in error_of(
        sent(b"HTTP/1.1 302 X\r\nLocation: /%s\r\n\r\n" % quote(KEY).encode()), ScraperError
    )
    # masked before it is cut, not after
    body = json.dumps({"message": "a" * 190 + KEY}).encode()
    assert error_of(with_body(body, b"401 Unauthorized"), StatusError).endswith("a***.")


def everywhere(secret: str) -> list[str]:
    raw = secret.encode()
    return [
        secret,
        secret.upper(),
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        quote(quote(secret)),
        "".join(f"%{byte:02X}" for byte in raw),
        json.dumps(secret)[1:-1],
        json.dumps(json.dumps(secret))[3:-3],
        json.dumps(secret)[1:-1].replace("/", "\\/"),
        "".join(f"\\u{ord(letter):04x}" for letter in secret),
        html.escape(secret),
        "".join(f"&#{ord(letter)};" for letter in secret),
        raw.hex(),
        *(base64.b64encode(b"x" * before + raw + after).decode() for before in range(4) for after in (b"", b":yz")),
        base64.urlsafe_b64encode(raw).decode().rstrip("="),
        quote(base64.b64encode(b"user:" + raw).decode(), safe=""),
    ]


@pytest.mark.parametrize("secret", [KEY, "ключ-?&=é", 'q"\\uote<>&', "0123456789abcdef" * 3])
def test_secrets_are_masked_in_every_form(secret: str) -> None:
    hide = Mask("someone", secret)
    for text in everywhere(secret):
        masked = hide(f"before [{text}] after")
        assert masked.startswith("before [")
        assert masked.endswith("] after")
        assert "***" in masked
        # nothing but the letters around it in Base64 is left
        assert len(masked) <= len("before [***] after") + 10, (text, masked)


def test_words_that_only_look_like_a_secret_stay() -> None:
    hide = Mask("me", "k3y")
    assert hide("some men met me with k3y, not k3ys") == "some men met *** with ***, not k3ys"
    assert Mask("", "")("nothing to hide") == "nothing to hide"


def test_what_looks_like_a_secret_is_masked_without_knowing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "GET https://u:p@host/x?sig=abc#y Bearer abcdef123 hf_abcdEFGH"
    assert mask(text) == "GET https://***@host/x?*** Bearer *** ***"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    assert mask(f"refused {quote(KEY)} here") == "refused *** here"
    assert mask("is this basic? yes: a@b.org") == "is this basic? yes: a@b.org"


@pytest.mark.parametrize("text", ["\\", "%25", "&#000", "a", "://a", "//", "Basic ", "UExB", "?"])
def test_masking_takes_linear_time(text: str) -> None:
    start = time.monotonic()
    Mask(USER, KEY)(text * 20_000)
    assert time.monotonic() - start < 2
