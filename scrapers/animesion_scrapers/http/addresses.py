"""Which addresses may be connected to, and where a host name leads instead (as curl's `--connect-to` does).

URLs come from strangers. Without a check, a crawler run inside a company or a cloud would fetch from its neighbours for
anyone who can write a URL. The check looks at addresses after name resolution, right where the connection is made, so
neither a redirect nor a name server can slip past it. Proxies are left out: both clients connect directly.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from animesion_scrapers.errors import ScraperError, UnsafeAddressError

_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Routes:
    """The rules by which a client connects.

    Attributes:
        connect_to: By host name, the address and port to connect to in its stead; URL, `Host` header and TLS name stay.
            These hosts are trusted wherever they lead.
        allow_private: Whether other hosts may be on loopback, private or link-local addresses.
    """

    connect_to: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    allow_private: bool = False

    def __post_init__(self) -> None:
        """Spell the host names as URLs do."""
        object.__setattr__(self, "connect_to", {host.lower(): target for host, target in self.connect_to.items()})
        for host in self.connect_to:
            if _literal(host):
                raise ScraperError(f"connect_to takes host names, not addresses such as {host}.")

    def target(self, host: str) -> tuple[str, int] | None:
        """The address and port to connect to instead of `host`, if it has one."""
        return self.connect_to.get(host.lower())

    def check(self, scheme: str, host: str | None) -> None:
        """Refuse what can be refused before any name is resolved.

        Raises:
            UnsafeAddressError: Not http or https, no host, or a literal address that is not public.
        """
        if scheme not in ("http", "https"):
            raise UnsafeAddressError(f"only http and https are fetched, not {scheme[:20] or 'a URL without a scheme'}")
        if not host:
            raise UnsafeAddressError("the URL names no host")
        if _literal(host):
            self.admit([host])

    def admit(self, addresses: Iterable[str]) -> list[str]:
        """Those of the resolved addresses that may be connected to.

        Raises:
            UnsafeAddressError: None of them may.
        """
        admitted = [address for address in addresses if self.allow_private or is_public(address)]
        if not admitted:
            raise UnsafeAddressError("the host is not on the public internet")
        return admitted

    def resolve(self, host: str, port: int) -> list[tuple[str, int]]:
        """Look `host` up and return the addresses and ports to try, in order.

        Raises:
            UnsafeAddressError: None of its addresses may be connected to.
            OSError: The name is not known.
        """
        target = self.target(host)
        name, port = target or (host, port)
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
        addresses = [str(entry[4][0]) for entry in found]
        return [(address, port) for address in (addresses if target else self.admit(addresses))]


def is_public(address: str) -> bool:
    """Whether a numeric address is an ordinary one on the internet, also when wrapped in an IPv6 form."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


@functools.lru_cache(maxsize=4096)
def _literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
