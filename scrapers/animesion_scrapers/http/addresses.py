"""Checks of the addresses that a client connects to, and overrides by host (as curl's `--connect-to`).

URLs are untrusted: without a check, a crawler inside a company or a cloud could be made to fetch from internal hosts.
Addresses are checked after name resolution, where the connection is made, so that neither a redirect nor a name server
can bypass the check. Proxies are not supported: both clients connect directly.
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
        connect_to: Address and port to connect to instead, by host name; URL, `Host` header and TLS name do not change.
            These hosts may have any address.
        allow_private: Whether other hosts may be on loopback, private or link-local addresses.
    """

    connect_to: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    allow_private: bool = False

    def __post_init__(self) -> None:
        """Convert host names to lower case, as in URLs."""
        object.__setattr__(self, "connect_to", {host.lower(): target for host, target in self.connect_to.items()})
        for host in self.connect_to:
            if _literal(host):
                raise ScraperError(f"connect_to accepts host names, not addresses such as {host}.")

    def target(self, host: str) -> tuple[str, int] | None:
        """The address and port to connect to instead of `host`, if any."""
        return self.connect_to.get(host.lower())

    def check(self, scheme: str, host: str | None) -> None:
        """Check a URL's scheme and host before name resolution.

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
        """Filter resolved addresses.

        Raises:
            UnsafeAddressError: None of them may be connected to.
        """
        admitted = [address for address in addresses if self.allow_private or is_public(address)]
        if not admitted:
            raise UnsafeAddressError("the host is not on the public internet")
        return admitted

    def resolve(self, host: str, port: int) -> list[tuple[str, int]]:
        """Resolve `host` to the addresses and ports to try, in order.

        Raises:
            UnsafeAddressError: None of its addresses may be connected to.
            OSError: The name cannot be resolved.
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
    """Whether a numeric address is on the public internet; IPv4 addresses embedded in IPv6 are unwrapped first."""
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
