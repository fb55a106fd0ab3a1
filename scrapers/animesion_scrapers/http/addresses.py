"""Checks of the addresses that a client connects to, and overrides by host (as curl's `--connect-to`).

URLs are untrusted: without a check, a crawler inside a company or a cloud could be made to fetch from internal hosts.
Addresses are checked after name resolution, where the connection is made, so that neither a redirect nor a name server
can bypass the check. Proxies are not supported: both clients connect directly.
"""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from animesion_scrapers.errors import ScraperError, UnsafeAddressError

#: Networks of IPv6 addresses whose last 32 bits are an IPv4 address: NAT64, and the deprecated "IPv4-compatible".
_EMBEDDING = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE)
_HOST = r"[^\s:/@?#\[\]]{1,253}|\[[0-9a-fA-F:.]+\]"
_PRIVATE = re.compile(rf"(?P<host>{_HOST}):(?P<port>[0-9]{{1,5}})(?::(?P<to>{_HOST}):(?P<to_port>[0-9]{{1,5}}))?")


@dataclass(frozen=True, slots=True)
class Routes:
    """The rules by which a client connects.

    Attributes:
        connect_to: Address and port to connect to instead, by host name; URL, `Host` header and TLS name do not change.
            These hosts may have any address.
        allow_private: Which other hosts may be on loopback, private or link-local addresses: all, none, or those named
            as `host:port`. As in curl's `--connect-to`, `host:port:address:port` connects there instead.
    """

    connect_to: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    allow_private: bool | Sequence[str] = False
    _named: Mapping[tuple[str, int], tuple[str, int] | None] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Convert host names to lower case, as in URLs, and read the named hosts.

        Raises:
            ScraperError: An entry is malformed.
        """
        object.__setattr__(self, "connect_to", {host.lower(): target for host, target in self.connect_to.items()})
        for host in self.connect_to:
            if _literal(host):
                raise ScraperError(f"connect_to accepts host names, not addresses such as {host}.")
        if not isinstance(self.allow_private, bool):
            object.__setattr__(self, "_named", dict(map(parse_private, self.allow_private)))

    def target(self, host: str, port: int) -> tuple[str, int] | None:
        """The address and port to connect to instead of `host` and `port`, if any."""
        return self.connect_to.get(host.lower()) or self._named.get((_canonical(host), port))

    def check(self, scheme: str, host: str | None, port: int | None = None) -> None:
        """Check a URL's scheme and host before name resolution.

        Args:
            scheme: Scheme of the URL.
            host: Host of the URL, without brackets.
            port: Port of the URL; None for that of the scheme.

        Raises:
            UnsafeAddressError: Not http or https, no host, a literal address that is not public, or one in a form that
                clients read differently, such as `127.1`, `0x7f000001`, `127.0.0.1.` or `[fe80::1%eth0]`.
        """
        if scheme not in ("http", "https"):
            raise UnsafeAddressError(f"only http and https are fetched, not {scheme[:20] or 'a URL without a scheme'}")
        if not host:
            raise UnsafeAddressError("the URL names no host")
        if _literal(host):
            self.admit([host], host, port or (443 if scheme == "https" else 80))
        elif _looks_numeric(host):
            raise UnsafeAddressError("the host is neither a name nor an address in its usual form")

    def is_allowed(self, address: str, port: int) -> bool:
        """Whether a client may connect to a numeric address and port, whatever host it stands for."""
        return self.allow_private is True or is_public(address) or (_canonical(address), port) in self._named

    def admit(self, addresses: Iterable[str], host: str, port: int) -> list[str]:
        """Filter the addresses of a host and port.

        Raises:
            UnsafeAddressError: None of them may be connected to.
        """
        private = self.allow_private is True or (_canonical(host), port) in self._named
        admitted = [address for address in addresses if private or is_public(address)]
        if not admitted:
            raise UnsafeAddressError("the host is not on the public internet")
        return admitted

    def resolve(self, host: str, port: int) -> list[tuple[str, int]]:
        """Resolve `host` to the addresses and ports to try, in order.

        Raises:
            UnsafeAddressError: None of its addresses may be connected to.
            OSError: The name cannot be resolved.
        """
        target = self.target(host, port)
        name, connect_port = target or (host, port)
        try:
            found = socket.getaddrinfo(name, connect_port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
        addresses = [str(entry[4][0]) for entry in found]
        return [(address, connect_port) for address in (addresses if target else self.admit(addresses, host, port))]


def parse_private(entry: str) -> tuple[tuple[str, int], tuple[str, int] | None]:
    """Parse an entry of `allow_private`.

    Args:
        entry: `host:port`, or `host:port:address:port`; IPv6 addresses are in brackets.

    Returns:
        Host and port as in URLs, and the address and port to connect to instead, if any.

    Raises:
        ScraperError: The entry is malformed.
    """
    match = _PRIVATE.fullmatch(entry)
    ports = [int(port) for port in (match["port"], match["to_port"]) if port] if match else []
    if not match or not all(0 < port < 65536 for port in ports):
        raise ScraperError(
            f"allow_private accepts host:port, such as booru.lan:8080 or [::1]:8080, not {entry[:100]!r}."
        )
    host = _canonical(match["host"].strip("[]"))
    if not _literal(host) and _looks_numeric(host):
        raise ScraperError(f"allow_private accepts addresses in their usual form, such as 127.0.0.1, not {host}.")
    if len(ports) == 1:
        return (host, ports[0]), None
    if _literal(host):
        raise ScraperError(f"allow_private connects host names to another address, not addresses such as {host}.")
    return (host, ports[0]), (match["to"].strip("[]"), ports[1])


def is_public(address: str) -> bool:
    """Whether a numeric address is on the public internet; IPv4 addresses embedded in IPv6 are unwrapped first."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        embedded = any(ip in network for network in _EMBEDDING)
        inner = ip.ipv4_mapped or ip.sixtofour or (IPv4Address(int(ip) & 0xFFFFFFFF) if embedded else None)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


@functools.lru_cache(maxsize=4096)
def _literal(host: str) -> bool:
    """Whether a host is an address in its usual form: four decimal numbers, or IPv6 without a zone."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def _looks_numeric(host: str) -> bool:
    """Whether a host could be read as an address; no public domain ends in a number.

    Source: https://url.spec.whatwg.org/#ends-in-a-number-checker, which browsers follow. Other clients pass such a host
    to the system, which reads `127.1`, `0177.0.0.1`, `2130706433` and `0` as addresses.
    """
    return ":" in host or "%" in host or _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]) is not None


def _canonical(host: str) -> str:
    """A host as it is compared: names in lower case and ASCII, addresses in their shortest form."""
    try:
        return str(ip_address(host))
    except ValueError:
        pass
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            return host.lower()
    return host.lower().removesuffix(".")
