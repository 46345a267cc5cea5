"""The one way out to an address that a person gave: it leads to nothing that only this machine can reach.

A name is looked up once. Every address that it has must be one of the public internet, or be trusted by
`OUTBOUND_ALLOW`, and the connection goes to exactly these addresses: a name that changes in between (DNS
rebinding) changes nothing. Redirects are not followed, since they would be another address.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from app import __version__
from app.errors import InvalidRequest

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host name."""

TIMEOUT_S = 10.0
MOST_ANSWER_BYTES = 65536
LONGEST_URL = 2048

PUBLIC_IPV6 = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
NOT_PUBLIC: tuple[Network, ...] = (
    IPv4Network("168.63.129.16/32"),  # Azure's host, with the metadata of its machines
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
    IPv6Network("3fff::/20"),  # documentation, newer than Python's table
)
"""What Python takes for addresses of the internet."""

# Ports and paths are the server's business; what is before them must be spelled in the one plain way.
_PLAIN_URL = re.compile(r"https?://(?:[^\s/?#@\\%\[\]:]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:[/?#][^\s\\]*)?")
_NUMBER = re.compile(r"\d+|0[xX][0-9a-fA-F]*")


class OutboundFailed(Exception):
    """Nobody answered; the text says why, without the address."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the first `MOST_ANSWER_BYTES` of it, as they came."""

    status: int
    body: bytes


class Outbound:
    """Sends requests to addresses that people gave. `allow` are hosts and networks that the admin trusts
    though they are not public."""

    def __init__(
        self, allow: Sequence[str] = (), *, lookup: Lookup | None = None, timeout: float = TIMEOUT_S
    ) -> None:
        self._networks, self._hosts = _sorted_out(allow)
        self._lookup = lookup or _look_up
        self._timeout = timeout

    async def post(self, url: str, body: bytes, content_type: str = "application/json") -> Answer:
        """Posts a body, within `timeout` seconds altogether. Raises `InvalidRequest` for an address that
        is none or leads to where it must not, `OutboundFailed` when nobody answers."""
        try:
            async with asyncio.timeout(self._timeout):
                target = plain_url(url)
                addresses = await self._addresses(target)
                return await self._post(target, addresses, body, content_type)
        except TimeoutError:
            raise OutboundFailed("it took too long") from None
        except (aiohttp.ClientError, OSError) as error:
            raise OutboundFailed(type(error).__name__) from None

    async def _addresses(self, url: URL) -> list[Address]:
        """Where to connect to. Raises `InvalidRequest` when one of them must not be reached."""
        host = url.raw_host or ""
        literal = _literal(host)
        try:
            found = [literal] if literal else [ip_address(a) for a in await self._lookup(host, url.port or 0)]
        except socket.gaierror:
            raise OutboundFailed("there is no such host") from None
        if not found:
            raise OutboundFailed("there is no such host")
        if host.rstrip(".") not in self._hosts and not all(map(self._may_reach, found)):
            raise InvalidRequest("url: it leads into a private network; an admin can allow it")
        return found

    def _may_reach(self, address: Address) -> bool:
        plain = _embedded(address) or address
        return is_public(address) or any(plain in network for network in self._networks)

    async def _post(self, url: URL, addresses: list[Address], body: bytes, content_type: str) -> Answer:
        connector = aiohttp.TCPConnector(
            resolver=_Resolved(addresses),
            use_dns_cache=False,
            force_close=True,
            socket_factory=_only(addresses),
        )
        headers = {"Content-Type": content_type, "User-Agent": f"prompt-portal/{__version__}"}
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a small answer may be a large one, packed
                trust_env=False,
            ) as session,
            session.post(url, data=body, headers=headers, allow_redirects=False) as response,
        ):
            return Answer(response.status, await _beginning(response))


def plain_url(url: str) -> URL:
    """The URL, when it is spelled so that all readers read the same. Raises `InvalidRequest`."""
    if len(url) > LONGEST_URL or not _PLAIN_URL.fullmatch(url):
        raise InvalidRequest("url: give a plain one, such as https://example.org/hook")
    try:
        parsed = URL(url).with_fragment(None)
    except ValueError:
        raise InvalidRequest("url: give a plain one, such as https://example.org/hook") from None
    host = parsed.raw_host or ""
    last = host.rstrip(".").rsplit(".", 1)[-1]
    # 2130706433, 0x7f.1 and 127.1 are addresses to some resolvers and names to others.
    if not host or (_literal(host) is None and (not last or _NUMBER.fullmatch(last))) or not parsed.port:
        raise InvalidRequest("url: give a plain one, such as https://example.org/hook")
    return parsed


def is_public(address: Address) -> bool:
    """Whether everybody on the internet reaches the same by this address; one that wraps an IPv4 address
    is as public as that."""
    inner = _embedded(address)
    if inner is not None:
        return is_public(inner)
    if isinstance(address, IPv6Address) and address not in PUBLIC_IPV6:
        return False
    special = address.is_multicast or any(address in network for network in NOT_PUBLIC)
    return address.is_global and not special


def _embedded(address: Address) -> IPv4Address | None:
    """The IPv4 address that a translator would make of it: mapped, 6to4, NAT64."""
    if isinstance(address, IPv4Address):
        return None
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _sorted_out(allow: Sequence[str]) -> tuple[list[Network], set[str]]:
    networks, hosts = [], set()
    for entry in allow:
        try:
            networks.append(ip_network(entry, strict=False))
        except ValueError:
            hosts.add(entry.lower().rstrip("."))
    return networks, hosts


async def _look_up(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _only(addresses: Sequence[Address]) -> Callable[[Any], socket.socket]:
    """Makes sockets to these addresses and no others, whatever was done to the name before."""

    def make(info: Any) -> socket.socket:
        family, kind, protocol, _name, where = info
        if ip_address(where[0]) not in addresses:
            raise OSError("this address was not checked")
        return socket.socket(family, kind, protocol)

    return make


class _Resolved(AbstractResolver):
    """Knows the addresses of the one host already."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - both are told
    ) -> list[ResolveResult]:
        """The addresses, for aiohttp."""
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """The first bytes of an answer; the rest is not waited for."""
    body = b""
    while len(body) < MOST_ANSWER_BYTES:
        piece = await response.content.read(MOST_ANSWER_BYTES - len(body))
        if not piece:
            break
        body += piece
    response.close()
    return body
