"""Both HTTP clients against TLS that is not right, bodies that are bombs, and names that change their address."""

from __future__ import annotations

import datetime
import gzip
import ipaddress
import math
import socket
import ssl
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from animesion_scrapers import (
    Download,
    Downloaded,
    RateLimiter,
    Retries,
    ScraperError,
    UnsafeAddressError,
    download_all,
)
from animesion_scrapers.http import addresses, clients
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.metadata import MetadataClient
from tests.unit.test_scrapers_hostile import raw_server, sent

AGENT = "test/1.0 (me@example.org)"
HOST = "tls.sample-booru.invalid"
DOCUMENT = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]"
KEY = ("user", "PLANTED-KEY-9981")


def asked(port: int, url: str, **more: Any) -> object:
    """The answer that the metadata client gets, with credentials for the host."""
    with MetadataClient(
        user_agent=AGENT,
        limiter=RateLimiter(math.inf),
        routes=Routes({HOST: ("127.0.0.1", port)}),
        credentials=KEY,
        credentials_for=f"https://{HOST}",
        timeout=5.0,
        retries=Retries(attempts=1),
        **more,
    ) as client:
        return client.get_json(url, {})


def downloaded(port: int, url: str, **more: Any) -> Downloaded:
    routes: dict[str, Any] = {"connect_to": {HOST: ("127.0.0.1", port)}} | more
    [result] = download_all(
        [Download("k", url)],
        user_agent=AGENT,
        limiter=RateLimiter(math.inf),
        retries=Retries(attempts=2, base=0.01),
        deadline=10.0,
        max_bytes=1 << 20,
        **routes,
    )
    return result


# -- TLS -------------------------------------------------------------------------------------------------------------

#: What is wrong with a certificate.
WRONG = ("expired", "not yet valid", "of another host", "self-signed", "of an unknown authority", "of an address")


class Certificates:
    """A certificate authority that the clients trust, and the certificates of servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = self._make("authority", None)
        self.unknown = self._make("unknown", None)

    def context(self, fault: str) -> ssl.SSLContext:
        """The TLS of a server whose certificate has a fault; empty for a good one."""
        signer = {"self-signed": None, "of an unknown authority": self.unknown}.get(fault, self.authority)
        self._make(f"leaf {fault}", signer, fault)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"leaf {fault}.pem", self.folder / f"leaf {fault}.key")
        return context

    def _make(self, name: str, signer: tuple[Any, Any] | None, fault: str = "") -> tuple[Any, Any]:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        first, last = {"expired": (-20, -10), "not yet valid": (10, 20)}.get(fault, (-10, 10))
        names: list[Any] = [x509.DNSName("other.invalid" if fault == "of another host" else HOST)]
        if fault == "of an address":
            names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(signer[0].subject if signer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=first))
            .not_valid_after(now + datetime.timedelta(days=last))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=not name.startswith("leaf"), path_length=None), critical=True)
        )
        certificate = built.sign(signer[1] if signer else key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        (self.folder / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
        (self.folder / f"{name}.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return certificate, key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    pytest.importorskip("cryptography")
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def certificates(made: Certificates, monkeypatch: pytest.MonkeyPatch) -> Iterator[Certificates]:
    monkeypatch.setenv("SSL_CERT_FILE", str(made.folder / "authority.pem"))
    clients.tls_context.cache_clear()
    yield made
    clients.tls_context.cache_clear()


def test_a_certificate_that_is_right_is_accepted(certificates: Certificates) -> None:
    with raw_server(sent(DOCUMENT), certificates.context("")) as (port, requests):
        assert asked(port, f"https://{HOST}/") == []
        assert downloaded(port, f"https://{HOST}/a").content == b"[]"
    assert len(requests) == 2


@pytest.mark.parametrize("fault", WRONG)
def test_a_certificate_that_is_wrong_ends_the_connection_before_a_request(
    certificates: Certificates, fault: str
) -> None:
    with raw_server(sent(DOCUMENT), certificates.context(fault)) as (port, requests):
        with pytest.raises(ScraperError, match=rf"^{HOST} could not be read: its TLS certificate was not accepted\.$"):
            asked(port, f"https://{HOST}/")
        result = downloaded(port, f"https://{HOST}/a")
    assert (result.status, result.detail) == ("fetch failed", "the TLS connection was not accepted")
    assert not any(requests)


def test_a_server_that_speaks_no_tls_gets_no_request(certificates: Certificates) -> None:
    with raw_server(sent(DOCUMENT)) as (port, requests):
        with pytest.raises(ScraperError, match="could not be read"):
            asked(port, f"https://{HOST}/")
        assert downloaded(port, f"https://{HOST}/a").status == "fetch failed"
    assert not any(b"HTTP/1.1" in request or b"PLANTED" in request for request in requests)


def test_no_redirect_leads_from_https_to_http(certificates: Certificates) -> None:
    with raw_server(sent(DOCUMENT)) as (plain, heard):
        answer = b"HTTP/1.1 302 X\r\nLocation: http://%s:%d/x\r\nContent-Length: 0\r\n\r\n" % (HOST.encode(), plain)
        with raw_server(sent(answer), certificates.context("")) as (port, _):
            with pytest.raises(UnsafeAddressError, match=f"a redirect from {HOST} from https to http"):
                asked(port, f"https://{HOST}/")
            result = downloaded(port, f"https://{HOST}/a")
    assert (result.status, result.detail, result.final) == ("unsafe address", "redirected from https to http", True)
    assert not heard


# -- bombs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip", "deflate", "gzip, br", "x-unknown"])
def test_a_body_that_decodes_to_gigabytes_costs_no_memory(coding: str) -> None:
    zeros = bytes(1 << 26)
    body = {
        "br": lambda: pa.compress(zeros, "brotli", asbytes=True),
        "zstd": lambda: pa.compress(zeros, "zstd", asbytes=True) * 16,
        "gzip": lambda: gzip.compress(zeros) * 16,
        "deflate": lambda: zlib.compress(zeros),
    }.get(coding, lambda: b"\x1f\x8b" * 99)()
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (coding.encode(), len(body))
    with raw_server(sent(head, body)) as (port, requests):
        tracemalloc.start()
        with pytest.raises(ScraperError) as raised:
            asked(port, f"http://{HOST}/", max_bytes=1 << 20)
        result = downloaded(port, f"http://{HOST}/a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20
    if coding in ("gzip", "deflate"):
        assert str(raised.value) == f"{HOST} sent a response of more than 1048576 bytes."
        assert result.status == "too many bytes"
    else:
        refused = f"the body is compressed with {coding}, against the request"
        assert str(raised.value) == f"{HOST} could not be read: {refused}."
        assert (result.status, result.detail) == ("fetch failed", refused)
    assert b"Accept-Encoding: gzip, deflate\r\n" in requests[0]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address, 127.0.0.2")
def test_a_name_that_changes_its_address_leads_nowhere_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding, live: 127.0.0.2 plays the public internet, and 127.0.0.1 the machine itself."""
    resolve, name = socket.getaddrinfo, "rebind.invalid"
    answers: list[list[str]] = []

    def rebinding(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != name:
            return resolve(host, port, *args, **kwargs)
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.2")
    with raw_server(sent(DOCUMENT)) as (port, inside):
        url = f"http://{name}:{port}/a"
        again = b"HTTP/1.1 302 X\r\nLocation: %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % url.encode()
        with raw_server(sent(again), at=("127.0.0.2", port)) as (_, outside):
            # public for the first request, the machine itself for the second
            answers[:] = [["127.0.0.2"], ["127.0.0.1"]]
            with pytest.raises(UnsafeAddressError, match=r"the host is not on the public internet\.$"):
                asked(port, url)
            assert len(outside) == 1
            answers[:] = [["127.0.0.2"], ["127.0.0.1"]]
            assert downloaded(port, url, connect_to={}).status in ("unsafe address", "fetch failed")
            # both at once: the public one is tried, and no other
            answers[:] = [["127.0.0.1", "127.0.0.2"]]
            before = len(outside)
            with pytest.raises(ScraperError, match="redirected /a more than 5 times"):
                asked(port, url)
            assert downloaded(port, url, connect_to={}).detail == "redirected more than 5 times"
            assert len(outside) == before + 12
        # the public one refuses the connection, and the machine itself is next in the list
        answers[:] = [["127.0.0.2", "127.0.0.1"]]
        with pytest.raises(ScraperError, match="no connection could be made"):
            asked(port, url)
        assert downloaded(port, url, connect_to={}).detail == "no connection could be made"
    assert not inside
