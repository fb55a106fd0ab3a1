"""The downloader's connections: an aiohttp session that connects only where the routes allow."""

from __future__ import annotations

import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from animesion_scrapers.errors import UnsafeAddressError
from animesion_scrapers.http.addresses import Routes
from animesion_scrapers.http.clients import tls_context


def open_session(user_agent: str, routes: Routes, *, connections: int, stall: float) -> aiohttp.ClientSession:
    """Open a session without cookies, proxies or decompression; must run on the event loop.

    Args:
        user_agent: Value of the User-Agent header.
        routes: Which addresses may be connected to.
        connections: Most connections at once.
        stall: Seconds without progress after which a connection or a read fails.
    """
    resolver = _RoutedResolver(routes)
    connector = aiohttp.TCPConnector(
        ssl=tls_context(),
        resolver=resolver,
        socket_factory=resolver.open_socket,
        ttl_dns_cache=60,
        limit=connections,
    )
    return aiohttp.ClientSession(
        connector=connector,
        # Images hardly compress, and the length of an uncompressed body can be checked against its header.
        headers={"User-Agent": user_agent, "Accept-Encoding": "identity"},
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall),
        trust_env=False,
    )


class _RoutedResolver(AbstractResolver):
    """Resolves names by the rules of the routes; aiohttp connects only to the addresses returned.

    A host that aiohttp takes for an address is not resolved, so the address is checked once more at the socket.
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._plain = aiohttp.ThreadedResolver()
        self._returned: set[tuple[str, int]] = set()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        target = self._routes.target(host, port)
        if target:
            found = await self._plain.resolve(*target, family=family)
            found = [{**result, "hostname": host} for result in found]
        else:
            found = await self._plain.resolve(host, port, family=family)
            admitted = set(self._routes.admit((result["host"] for result in found), host, port))
            found = [result for result in found if result["host"] in admitted]
        # Public addresses need no entry, so that the set stays as small as the routes.
        self._returned |= {
            address for result in found if not self._routes.is_allowed(*(address := (result["host"], result["port"])))
        }
        return found

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """Open the socket for an address, as returned by `getaddrinfo`.

        Raises:
            UnsafeAddressError: Neither the routes nor the resolver allow the address.
        """
        family, kind, protocol, _, address = info
        if tuple(address[:2]) not in self._returned and not self._routes.is_allowed(*address[:2]):
            raise UnsafeAddressError("the host is not on the public internet")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Do nothing: the resolver holds no connections."""
