"""Ranges of files on an HTTP server: exactly the range, or nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import fsspec
import pytest

from animesion_training.data import ranges
from animesion_training.data.ranges import HttpRanges, http_ranges

CONTENT = bytes(range(256)) * 4
GOOD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 600\r\nContent-Range: bytes 100-699/1024\r\n\r\n"


class Server:
    """Answers the n-th request with the n-th list of pieces; None closes the connection."""

    def __init__(self, answers: list[list[bytes | None]]) -> None:
        self.answers = iter(answers)
        self.requests: list[bytes] = []
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection, contextlib.suppress(OSError):
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        while request := connection.recv(4096):
            self.requests.append(request)
            for piece in next(self.answers):
                if piece is None:
                    return
                connection.sendall(piece)


@contextlib.contextmanager
def answering(*answers: list[bytes | None]) -> Iterator[tuple[Server, HttpRanges, str]]:
    server = Server(list(answers))
    root = f"http://127.0.0.1:{server.port}/my data"
    try:
        yield server, HttpRanges("127.0.0.1", server.port, False, f"127.0.0.1:{server.port}"), f"{root}/a.tar"
    finally:
        server.listener.close()


def test_a_range_arrives_in_any_pieces_over_one_connection() -> None:
    body = CONTENT[100:700]
    whole: list[bytes | None] = [GOOD + body]
    cut: list[bytes | None] = [GOOD[:30], GOOD[30:] + body[:1], body[1:599], body[599:]]
    unknown: list[bytes | None] = [GOOD.replace(b"/1024", b"/*"), body]
    with answering(whole, cut, unknown) as (server, reader, url):
        for _ in range(3):
            content = reader.read(url, 1024, 100, 700)
            assert content is not None
            assert bytes(content) == body
    assert server.connections == 1
    assert server.requests[0].startswith(b"GET /my%20data/a.tar HTTP/1.1\r\n")
    assert b"\r\nRange: bytes=100-699\r\n" in server.requests[0]


@pytest.mark.parametrize(
    "answer",
    [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n", CONTENT],
        [b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"],
        [GOOD.replace(b"100-699", b"101-700"), CONTENT[101:701]],
        [GOOD.replace(b"1024", b"1025"), CONTENT[100:700]],
        [GOOD.replace(b"Length: 600", b"Length: 601"), CONTENT[100:701]],
        [GOOD.replace(b"Length: 600", b"Length: 599"), CONTENT[100:699]],
        [GOOD[:-2] + b"Content-Length: 700\r\n\r\n", CONTENT[100:700]],
        [GOOD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", b"258\r\n", CONTENT[100:700], b"\r\n0\r\n\r\n"],
        [GOOD[:-2] + b"Content-Encoding: gzip\r\n\r\n", CONTENT[100:700]],
        [GOOD + CONTENT[100:701]],  # more than it says
        [GOOD, CONTENT[100:699], None],
        [GOOD[:40], None],
        [b"A: b\r\n" * 20_000],  # a head without an end
        [b"\x16\x03\x01\x02\x00" * 99 + b"\r\n\r\n"],
        [None],
    ],
)
def test_any_other_answer_is_none_and_the_next_is_read_on_a_new_connection(answer: list[bytes | None]) -> None:
    with answering(answer, [GOOD + CONTENT[100:700]]) as (server, reader, url):
        assert reader.read(url, 1024, 100, 700) is None
        content = reader.read(url, 1024, 100, 700)
        assert content is not None
        assert bytes(content) == CONTENT[100:700]
    assert server.connections == 2


def test_a_connection_that_the_server_closes_is_opened_again() -> None:
    last: list[bytes | None] = [GOOD[:-2] + b"Connection: close\r\n\r\n" + CONTENT[100:700], None]
    with answering(last, last) as (server, reader, url):
        assert reader.read(url, 1024, 100, 700) is not None
        assert reader.read(url, 1024, 100, 700) is not None
    assert server.connections == 2


def test_a_server_of_drops_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_WHOLE", -1.0)
    drops: list[bytes | None] = [GOOD[:9], GOOD[9:], CONTENT[100:700]]
    with answering(*[drops] * 99) as (server, reader, url):
        for _ in range(70):
            assert reader.read(url, 1024, 100, 700) is None
    assert len(server.requests) == 64  # and not one more: see _MOST_REFUSALS


def test_only_plain_web_addresses_are_read_directly() -> None:
    web = fsspec.filesystem("http")
    assert http_ranges(web, "http://host:81/a/b") is not None
    assert http_ranges(web, "https://[::1]/a") is not None
    for root in ("http://me:secret@host/a", "http://host/a?version=2", "http://host/a b", "http://h\u00f6st/a"):
        assert http_ranges(web, root) is None
    assert http_ranges(fsspec.filesystem("http", headers={"Authorization": "x"}), "http://host/a") is None
    assert http_ranges(fsspec.filesystem("memory"), "/a") is None
