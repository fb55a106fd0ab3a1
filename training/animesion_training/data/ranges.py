"""Ranges of files on an HTTP server, over connections that stay open.

fsspec reads any URL, but its event loop, its client and its copies of what arrives take as long as decoding a third of
the images, and they hold the interpreter lock meanwhile. `remote` asks here first. Whatever is not simply the wanted
range of the file (a redirect, an error, an encoding, a proxy, credentials) is left to fsspec.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
import weakref
from typing import Any
from urllib.parse import quote, urlsplit

#: Seconds without a byte, and for a whole range; fsspec allows the same 5 minutes.
_SILENCE, _WHOLE = 60.0, 300.0
_MOST_HEAD = 2**15
#: Answers in a row that were something else, after which the server is not asked again.
_MOST_REFUSALS = 64
#: Fields of which a second one makes the answer ambiguous.
_ONCE = ("content-length", "content-range")


class HttpRanges:
    """Reads ranges of the files of one server; each thread has a connection and a buffer of its own.

    Args:
        host: name or address of the server.
        port: of the server.
        tls: whether to speak HTTPS; the certificate is verified.
        authority: the host and port as the URL has them.
    """

    def __init__(self, host: str, port: int, tls: bool, authority: str) -> None:
        self._address = host, port
        self._tls = ssl.create_default_context() if tls else None
        self._authority = authority
        self._threads = threading.local()
        self._refusals = 0
        self._open: set[socket.socket] = set()
        weakref.finalize(self, _close, self._open)

    def read(self, url: str, size: int, start: int, end: int) -> memoryview | None:
        """Read the bytes from `start` to `end` of a file.

        Args:
            url: of the file, on the server.
            size: of the file in bytes; a server that says another one has another file.
            start: offset of the first byte.
            end: offset behind the last byte, above `start`.

        Returns:
            The bytes, until the next call in this thread; None where the server answers anything else, or nothing.
        """
        own = self._threads
        target = quote(urlsplit(url).path, safe="/%:@!$&'()*+,;=~")
        request = (
            f"GET {target} HTTP/1.1\r\nHost: {self._authority}\r\nRange: bytes={start}-{end - 1}\r\n"
            "Accept: */*\r\nAccept-Encoding: identity\r\nUser-Agent: animesion\r\n\r\n"
        )
        whole = (f"bytes {start}-{end - 1}/{size}", f"bytes {start}-{end - 1}/*")
        if self._refusals >= _MOST_REFUSALS:
            return None
        try:
            if getattr(own, "socket", None) is None:
                own.socket = self._connect()
                self._open.add(own.socket)
            if len(getattr(own, "buffer", b"")) < end - start:
                own.buffer = bytearray(end - start)
            content = memoryview(own.buffer)[: end - start]
            own.socket.sendall(request.encode("ascii"))
            stays = _receive(own.socket, content, whole)
        except (OSError, ValueError):  # also a connection that the server has closed since the last range
            stays = None
        self._refusals = self._refusals + 1 if stays is None else 0
        if not stays and getattr(own, "socket", None) is not None:
            self._open.discard(own.socket)
            own.socket.close()
            own.socket = None
        return content if stays is not None else None

    def _connect(self) -> socket.socket:
        plain = socket.create_connection(self._address, timeout=_SILENCE)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            return plain
        try:
            return self._tls.wrap_socket(plain, server_hostname=self._address[0])
        except BaseException:
            plain.close()
            raise


def http_ranges(system: Any, root: str) -> HttpRanges | None:
    """Return a reader of what is below an HTTP URL; None where fsspec has to read it.

    Args:
        system: the fsspec file system of the URL.
        root: the URL.
    """
    if type(system).__module__ != "fsspec.implementations.http" or system.storage_options:
        return None  # another protocol, or credentials, headers, a proxy
    try:
        parts = urlsplit(root)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    simple = root.isascii() and root.isprintable() and " " not in root
    if not host or not simple or "@" in parts.netloc or parts.query or parts.fragment:
        return None
    tls = parts.scheme == "https"
    return HttpRanges(host, port or (443 if tls else 80), tls, parts.netloc)


def _close(sockets: set[socket.socket]) -> None:
    for each in list(sockets):
        each.close()


def _receive(connection: socket.socket, content: memoryview, whole: tuple[str, ...]) -> bool | None:
    """Receive a range into `content`; return whether the connection stays open, None for any other answer."""
    deadline = time.monotonic() + _WHOLE
    start = b""
    while (behind := start.find(b"\r\n\r\n")) < 0:
        more = connection.recv(_MOST_HEAD)
        if not more or len(start) > _MOST_HEAD or time.monotonic() > deadline:
            return None
        start += more
    status, *lines = start[:behind].decode("latin-1").split("\r\n")
    fields = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or (name in fields and name in _ONCE):
            return None
        fields[name] = value.strip()
    if (
        not status.startswith(("HTTP/1.1 206", "HTTP/1.0 206"))
        or fields.get("content-length") != str(len(content))
        or fields.get("content-range") not in whole
        or "transfer-encoding" in fields
        or fields.get("content-encoding", "identity") != "identity"
    ):
        return None
    rest = start[behind + 4 :]
    if len(rest) > len(content):
        return None
    content[: len(rest)] = rest
    done = len(rest)
    while done < len(content):
        count = connection.recv_into(content[done:])
        if not count or time.monotonic() > deadline:
            return None
        done += count
    return status.startswith("HTTP/1.1") and fields.get("connection", "").lower() != "close"
