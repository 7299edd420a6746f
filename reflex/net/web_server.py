"""Which IP address the fallback's web server has: a name is looked up once, at the start.

Of several addresses the first that accepts a connection is taken: web servers often listen on one kind alone, and
``localhost`` is both. An address at which this server listens itself is never one: each stranger handed there would
come in again as the next one, until nothing else fits in.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Sequence
from typing import Final

from reflex.errors import DialError, StartError
from reflex.net.own_addresses import is_own
from reflex.net.resolver import checked, failure
from reflex.protocol.address import Address
from reflex.protocol.wire import AddressType

log = logging.getLogger(__name__)

TRY_S: Final = 1.0  # for one address, while nobody is served yet
MAX_TRIED: Final = 4

_LOOPBACK: Final = {4: ipaddress.ip_address("127.0.0.1"), 6: ipaddress.ip_address("::1")}


async def web_server_address(host: str, port: int, listening: Sequence[socket.socket]) -> Address:
    """:func:`find_web_server`, without holding up the event loop by a look-up."""
    if Address.of(host, port).kind is not AddressType.NAME:
        return find_web_server(host, port, listening)
    return await asyncio.get_running_loop().run_in_executor(None, find_web_server, host, port, listening)


def find_web_server(host: str, port: int, listening: Sequence[socket.socket]) -> Address:
    """The web server's IP address. Blocks: for the look-up of a name, and MAX_TRIED times TRY_S at most.

    Args:
        host: a name, or the text of an IP address.
        listening: this server's own sockets.

    Raises:
        StartError: the name has no address, none that can be one, or none but this server's own.
    """
    try:
        found = checked(host, socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP))
    except DialError as error:
        raise StartError(f"fallback: {error}") from error
    except (OSError, ValueError) as error:
        raise StartError(f"fallback: {failure(host, error)}") from error
    every = [Address.of(str(info[4][0]), port) for info in found]
    try:
        others = [address for address in every if not _is_listened_on(address, listening)]
    except OSError as error:
        raise StartError(f"fallback: {host}: {error.strerror or error}") from error
    if not others:
        raise StartError(f"fallback: {every[0]} is this server itself")
    if len(others) == 1:
        return others[0]
    for address in others[:MAX_TRIED]:
        if _accepts(address):
            return address
    log.warning("fallback: the web server at %s:%d does not answer now; %s is taken for it", host, port, others[0])
    return others[0]


def _accepts(address: Address) -> bool:
    try:
        socket.create_connection((address.host, address.port), TRY_S).close()
    except OSError:
        return False
    return True


def _is_listened_on(address: Address, listening: Sequence[socket.socket]) -> bool:
    """Whether who connects to the address reaches one of the sockets."""
    ip = ipaddress.ip_address(address.host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_unspecified:
        ip = _LOOPBACK[ip.version]  # where connecting to it leads
    for sock in listening:
        host, port = sock.getsockname()[:2]
        own = ipaddress.ip_address(host.partition("%")[0])
        if port != address.port or own.version != ip.version:
            continue
        if own == ip or (own.is_unspecified and (ip.is_loopback or is_own(str(ip)))):
            return True
    return False
