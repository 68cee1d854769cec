"""Fetch images from the few hosts that the operator allows, and from nowhere else.

An address is read by one strict pattern, and nothing reads it again: scheme, host, port and path come from its groups.
The name is resolved once. The connection goes to an address of that answer, so a name that changes its mind between
check and use (DNS rebinding) changes nothing, and TLS still proves that the host has that name. Addresses that are not
public are refused. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
import h11

from .errors import ApiError, invalid
from .settings import FETCH_S, FETCHES

_PORTS = {"http": 80, "https": 443}
# No user, no percent signs or brackets in the host, no backslash, space or fragment anywhere.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[\x21\x22\x24-\x5b\x5d-\x7e]*)?",
    re.IGNORECASE,
)
_MOST_URL = 2048
_HEAD_BYTES = 16 << 10
_PIECE = 64 << 10
_MOST_ADDRESSES = 3
_EMBEDDED = ipaddress.ip_network("64:ff9b::/96")  # NAT64: the last four bytes are an address of IPv4

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Connect = Callable[[str, int, "ssl.SSLContext | None", str], Awaitable[Streams]]


@dataclass(frozen=True)
class Target:
    """An address, cut into its parts."""

    scheme: str
    host: str
    port: int
    path: str


def parse_url(url: str) -> Target | None:
    """Return the parts of an address, or None for whatever is not written in the plainest way."""
    found = _URL.fullmatch(url) if len(url) <= _MOST_URL else None
    if found is None:
        return None
    scheme = found["scheme"].lower()
    port = int(found["port"] or _PORTS[scheme])
    return Target(scheme, found["host"].lower(), port, found["path"] or "/") if 0 < port < 65536 else None


def is_public(address: str) -> bool:
    """Whether an address belongs to the public network, also the one that an IPv6 address holds inside."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _EMBEDDED:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        inside = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if any(not is_public(str(each)) for each in inside if each is not None):
            return False
    special = found.is_multicast or found.is_reserved or found.is_unspecified or found.is_loopback
    return found.is_global and not special and not found.is_private and not found.is_link_local


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def _connect(address: str, port: int, context: ssl.SSLContext | None, host: str) -> Streams:
    name = host if context is not None else None
    return await asyncio.open_connection(address, port, ssl=context, server_hostname=name, limit=_PIECE)


class Fetcher:
    """Fetches images.

    Args:
        hosts: names that are allowed, exactly, at the usual port of the scheme; or "name:port".
        most_bytes: of an image.
        resolve, connect: for tests.
    """

    def __init__(
        self, hosts: Sequence[str], most_bytes: int, resolve: Resolve = _resolve, connect: Connect = _connect
    ) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._most_bytes = most_bytes
        self._resolve = resolve
        self._connect = connect
        self._slots = anyio.Semaphore(FETCHES)
        self._context: ssl.SSLContext | None = None

    def check(self, url: str, param: str) -> Target:
        """Return the parts of an address that may be fetched.

        Raises:
            ApiError: 400.
        """
        if not self._hosts:
            raise invalid(
                param, "addresses are not fetched by this server; send the image as data:image/...;base64,..."
            )
        target = parse_url(url)
        if target is None:
            raise invalid(param, f"{param} is no plain address http(s)://host/path; write it so, or send the image")
        usual = target.port == _PORTS[target.scheme]
        if f"{target.host}:{target.port}" not in self._hosts and not (usual and target.host in self._hosts):
            raise invalid(param, f"{param} is on a host that this server does not fetch from; send the image itself")
        return target

    async def fetch(self, url: str, param: str) -> bytes:
        """Return the content of an address.

        Raises:
            ApiError: 400, the address is not allowed or has no image within the limits.
        """
        target = self.check(url, param)
        try:
            async with self._slots:
                with anyio.fail_after(FETCH_S):
                    return await self._get(target, param)
        except TimeoutError:
            raise _failed(target, param, f"it took more than {FETCH_S:g} s") from None
        except (OSError, ssl.SSLError, h11.ProtocolError, UnicodeError, asyncio.LimitOverrunError):
            raise _failed(target, param, "the connection failed") from None

    async def _get(self, target: Target, param: str) -> bytes:
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(map(is_public, addresses)):
            raise _failed(target, param, "its name is not that of a public address")
        reader, writer = await self._open(target, addresses[:_MOST_ADDRESSES])
        try:
            return await self._exchange(target, param, reader, writer)
        finally:
            writer.transport.abort()

    async def _open(self, target: Target, addresses: Sequence[str]) -> Streams:
        context = None
        if target.scheme == "https":
            context = self._context = self._context or ssl.create_default_context()
        for address in addresses[:-1]:
            try:
                return await self._connect(address, target.port, context, target.host)
            except OSError:
                continue
        return await self._connect(addresses[-1], target.port, context, target.host)

    async def _exchange(
        self, target: Target, param: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
        host = target.host if target.port == _PORTS[target.scheme] else f"{target.host}:{target.port}"
        headers = [("Host", host), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
        request = connection.send(h11.Request(method="GET", target=target.path, headers=headers))
        writer.write((request or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        content = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_PIECE))
            elif isinstance(event, h11.Response):
                self._check_head(target, param, event)
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > self._most_bytes:
                    raise self._too_large(target, param)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise _failed(target, param, "the connection failed")

    def _check_head(self, target: Target, param: str, response: h11.Response) -> None:
        if 300 <= response.status_code < 400:
            raise _failed(target, param, "it redirects, which is not followed")
        if response.status_code != 200:
            raise _failed(target, param, f"its status is {response.status_code}")
        for name, value in response.headers:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise _failed(target, param, "it is compressed, though asked not to be")
            if name == b"content-length" and int(value) > self._most_bytes:
                raise self._too_large(target, param)

    def _too_large(self, target: Target, param: str) -> ApiError:
        return _failed(target, param, f"it has more than {self._most_bytes} bytes, this server's limit")


def _failed(target: Target, param: str, reason: str) -> ApiError:
    return invalid(param, f"the image at {target.host} cannot be used: {reason}; send the image itself")
