"""The downloader's connections: an aiohttp session that connects only where the routes allow."""

from __future__ import annotations

from socket import AddressFamily

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

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
    connector = aiohttp.TCPConnector(
        ssl=tls_context(),
        resolver=_RoutedResolver(routes),
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
    """Resolves names by the rules of the routes; aiohttp connects only to the addresses returned."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._plain = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET
    ) -> list[ResolveResult]:
        target = self._routes.target(host, port)
        if target:
            found = await self._plain.resolve(*target, family=family)
            return [{**result, "hostname": host} for result in found]
        found = await self._plain.resolve(host, port, family=family)
        admitted = set(self._routes.admit((result["host"] for result in found), host, port))
        return [result for result in found if result["host"] in admitted]

    async def close(self) -> None:
        """Do nothing: the resolver holds no connections."""
