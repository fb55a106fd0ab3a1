"""The transport below `requests`: it connects by the rules of the routes, and ends every exchange at its deadline.

`requests` and urllib3 limit the wait for each piece of a response, so that a server that sends a byte at a time, or
interim responses, header lines, chunk extensions or trailers without end, would hold a request for ever. Here the
sockets themselves check the clock and count the bytes, whatever is read from them.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import create_connection

from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.clients import certificates


class Deadline:
    """The limits of one exchange, from the connection to the last byte of the body; `start` begins another."""

    def __init__(self, seconds: float, stall: float, most: int) -> None:
        """Keep the limits.

        Args:
            seconds: Longest exchange.
            stall: Longest wait for one piece.
            most: Most bytes received, as sent and with all headers.
        """
        self._seconds = seconds
        self._stall = stall
        self._most = most
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self._end = time.monotonic() + self._seconds
        self._received = 0

    @property
    def passed(self) -> bool:
        """Whether the exchange took too long or sent too many bytes."""
        return time.monotonic() >= self._end or self._received > self._most

    def wait(self) -> float:
        """Seconds to wait for the next piece.

        Raises:
            TimeoutError: The exchange has ended.
        """
        if self.passed:
            raise TimeoutError("the response took too long")
        return max(1e-3, min(self._end - time.monotonic(), self._stall))  # 0 would not wait at all

    def received(self, count: int) -> int:
        """Count received bytes and return them."""
        self._received += count
        return count


class Session(requests.Session):
    """A session that follows no redirect.

    `requests` reads the body of a redirect to prepare the next request, even if it is told not to follow any. That body
    has no limit of size or time.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: the caller reads the `Location` header."""


class RoutedAdapter(HTTPAdapter):
    """Connects by the rules of the routes; the URL, and so the Host header and the TLS name, does not change."""

    def __init__(self, routes: Routes, deadline: Deadline) -> None:
        self._routes = routes
        self._deadline = deadline
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Create the pools of connections, as `requests` does for every adapter."""
        context = ssl.create_default_context(cafile=certificates())
        context.sslsocket_class = _timed_class(ssl.SSLSocket, self._deadline)
        super().init_poolmanager(*args, ssl_context=context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pool_classes(self._routes, self._deadline)


def _timed_class(base: Any, deadline: Deadline) -> Any:
    """A class of sockets that keep the deadline; `http.client` reads with `recv_into` and nothing else."""

    class TimedSocket(base):  # type: ignore[misc]
        def recv_into(self, *args: Any, **kwargs: Any) -> int:
            self.settimeout(deadline.wait())
            return deadline.received(super().recv_into(*args, **kwargs))

        def send(self, *args: Any, **kwargs: Any) -> int:
            self.settimeout(deadline.wait())
            return int(super().send(*args, **kwargs))

        def sendall(self, *args: Any, **kwargs: Any) -> None:
            self.settimeout(deadline.wait())
            super().sendall(*args, **kwargs)

    return TimedSocket


def _pool_classes(routes: Routes, deadline: Deadline) -> dict[str, type[HTTPConnectionPool]]:
    timed = _timed_class(socket.socket, deadline)

    def connect(connection: HTTPConnection) -> socket.socket:
        try:
            targets = routes.resolve(connection.host, connection.port)
        except socket.gaierror as error:
            raise NameResolutionError(connection.host, connection, error) from error
        fault: OSError | None = None
        for target in targets:
            try:
                plain = create_connection(
                    target,
                    deadline.wait(),
                    source_address=connection.source_address,
                    socket_options=connection.socket_options,
                )
            except OSError as error:
                fault = error
            else:
                opened: socket.socket = timed(fileno=plain.detach())
                opened.settimeout(deadline.wait())  # that of the TLS handshake
                return opened
        if isinstance(fault, TimeoutError):
            raise ConnectTimeoutError(connection, "timed out") from fault
        raise NewConnectionError(connection, str(fault)) from fault

    class RoutedHTTPConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class RoutedHTTPSConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class RoutedHTTPPool(HTTPConnectionPool):
        ConnectionCls = RoutedHTTPConnection

    class RoutedHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = RoutedHTTPSConnection

    return {"http": RoutedHTTPPool, "https": RoutedHTTPSPool}
