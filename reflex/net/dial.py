"""From a target's address to a connected, non-blocking socket.

Two ways lead there:

- :func:`dial`, a coroutine, for names and for whoever may wait: resolve once, judge every address,
  connect exactly those that were allowed, by Happy Eyeballs (RFC 8305), within one time limit.
- :func:`begin_connect` and :func:`finish_connect`, plain calls for IP addresses, for a caller that
  works with readiness callbacks and needs no task: between the two the socket becomes writable.

Whatever fails is a ``DialError`` whose status tells the truth, as far as the machine knows it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, cast

import aiohappyeyeballs

from reflex.errors import DialError
from reflex.net.options import RESET_ON_CLOSE, is_loopback, set_options, set_unpaced
from reflex.net.resolver import AddrInfo, checked, failure
from reflex.net.targets import NameVerdict, TargetPolicy
from reflex.protocol.address import Address
from reflex.protocol.wire import AddressType, Status

# Resolves a name to the addresses for a TCP connection; raises DialError.
LookUp = Callable[[str, int], Awaitable[list[AddrInfo]]]

HAPPY_EYEBALLS_DELAY_S: Final = 0.25  # RFC 8305, section 5, "Connection Attempt Delay"

_STATUS_OF_ERRNO: Final = {
    errno.ECONNREFUSED: Status.REFUSED,
    errno.ETIMEDOUT: Status.TIMED_OUT,
    errno.EHOSTUNREACH: Status.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Status.HOST_UNREACHABLE,
    errno.ENETUNREACH: Status.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Status.NETWORK_UNREACHABLE,
    errno.EACCES: Status.NOT_ALLOWED,  # broadcast addresses, and rules of the machine's own firewall
    errno.EPERM: Status.NOT_ALLOWED,
    errno.EAFNOSUPPORT: Status.ADDRESS_TYPE_NOT_SUPPORTED,  # a machine without IPv6
}

# What this machine has run out of; nobody else's fault, and over as soon as something is closed here.
OUT_OF_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# Where several addresses failed in different ways, the one that says most of the target speaks for all:
# a refusal came from the target itself, while an unreachable network may only be a missing route for IPv6.
_MOST_TELLING_FIRST: Final = (
    Status.REFUSED,
    Status.TIMED_OUT,
    Status.HOST_UNREACHABLE,
    Status.NOT_ALLOWED,
    Status.NETWORK_UNREACHABLE,
    Status.ADDRESS_TYPE_NOT_SUPPORTED,
    Status.GENERAL_FAILURE,
)

_NONBLOCK: Final = getattr(socket, "SOCK_NONBLOCK", 0)  # saves a call where the system has it

_FAMILIES: Final = {AddressType.IPV4: socket.AF_INET, AddressType.IPV6: socket.AF_INET6}


async def resolve(host: str, port: int, *, family: int = 0) -> list[AddrInfo]:
    """Resolve a name as the event loop does it: for the start, when nobody else waits for its few threads.

    Args:
        host: a name, or the text of an IP address.
        port: put into every result.
        family: AF_INET or AF_INET6 for one kind only, 0 for both.

    Returns:
        At least one result.

    Raises:
        DialError: as :meth:`Resolver.resolve`.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, ValueError) as error:
        raise failure(host, error) from error
    return checked(host, found)


async def dial(
    address: Address,
    *,
    timeout_s: float,
    nodelay: bool = True,
    keepalive_s: int = 0,
    policy: TargetPolicy | None = None,
    look_up: LookUp = resolve,
) -> socket.socket:
    """Connect to a target.

    Args:
        address: a name is resolved, once; an IP address is not.
        timeout_s: for all of it, resolving included.
        nodelay: see :func:`set_options`.
        keepalive_s: see :func:`set_options`.
        policy: who may be dialled; None for everybody. Every address is judged, and only those that
            pass are connected to.
        look_up: resolves the name.

    Returns:
        A connected, non-blocking socket, which is the caller's to close.

    Raises:
        DialError: with the status that fits. No socket is left open, nor when the task is cancelled.
    """
    try:
        async with asyncio.timeout(timeout_s):
            infos = await _allowed_infos(address, policy, look_up)
            sock = await _connect_first(address, infos)
    except TimeoutError as error:
        raise DialError(Status.TIMED_OUT, f"{address}: no connection within {timeout_s:g} s") from error
    try:
        on_loopback = is_loopback(sock.getpeername()[0])
        set_options(sock, nodelay=nodelay, keepalive_s=keepalive_s, on_loopback=on_loopback)
        if on_loopback:
            set_unpaced(sock)
    except OSError as error:
        sock.close()
        raise DialError(status_of(error), f"{address}: {_reason(error)}") from error
    return sock


def begin_connect(
    address: Address,
    *,
    nodelay: bool = True,
    keepalive_s: int = 0,
    policy: TargetPolicy | None = None,
    reset_on_close: bool = False,
) -> socket.socket:
    """Start to connect to an IP address, without waiting.

    Args:
        address: an IPv4 or IPv6 address.
        nodelay: see :func:`set_options`.
        keepalive_s: see :func:`set_options`.
        policy: who may be dialled; None for everybody.
        reset_on_close: let ``close()``, and the end of a process that is killed, send RST from the start.

    Returns:
        A non-blocking socket whose connection is under way or done, which is the caller's to close.
        Once it is writable, :func:`finish_connect` says which. The time limit is the caller's.

    Raises:
        DialError: not allowed, or failed at once. No socket is left open.
        ValueError: the address is a name.
    """
    family = _FAMILIES.get(address.kind)
    if family is None:
        raise ValueError("a name must be resolved first")
    if policy is not None and not _allows(policy, (address.host, address.port), NameVerdict.ON_ADDRESSES):
        raise _not_allowed(address)
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | _NONBLOCK, socket.IPPROTO_TCP)
    except OSError as error:
        raise DialError(status_of(error), f"{address}: {_reason(error)}") from error
    try:
        if not _NONBLOCK:
            sock.setblocking(False)
        set_options(sock, nodelay=nodelay, keepalive_s=keepalive_s, on_loopback=is_loopback(address.host))
        if reset_on_close:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        code = sock.connect_ex((address.host, address.port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except OSError as error:
        sock.close()
        raise DialError(status_of(error), f"{address}: {_reason(error)}") from error
    return sock


def is_connected(sock: socket.socket, address: Address) -> bool:
    """Ask, right after :func:`begin_connect`, whether the connection is there already.

    On the same machine it is, and asking costs less than waiting for the loop to say so.

    Raises:
        DialError: it failed; the socket stays the caller's to close.
    """
    code = sock.connect_ex((address.host, address.port))
    if code in (0, errno.EISCONN):
        return True
    if code in (errno.EALREADY, errno.EINPROGRESS):
        return False
    error = OSError(code, os.strerror(code))
    raise DialError(status_of(error), f"{address}: {_reason(error)}")


def finish_connect(sock: socket.socket) -> None:
    """Say how the connection went that :func:`begin_connect` started; called once ``sock`` is writable.

    Raises:
        DialError: it failed; the socket stays the caller's to close.
    """
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code != 0:
        error = OSError(code, os.strerror(code))
        raise DialError(status_of(error), _reason(error))


def status_of(error: BaseException) -> Status:
    """Give the status that tells the truth about an error of resolving or connecting."""
    if isinstance(error, DialError):
        return Status(error.status)
    if isinstance(error, socket.gaierror):
        return Status.HOST_UNREACHABLE
    if isinstance(error, TimeoutError):  # also asyncio's, which has no errno
        return Status.TIMED_OUT
    if isinstance(error, OSError) and error.errno is not None:
        return _STATUS_OF_ERRNO.get(error.errno, Status.GENERAL_FAILURE)
    return Status.GENERAL_FAILURE


def is_own_fault(error: DialError) -> bool:
    """Whether dialling failed because this machine has run out of something."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in OUT_OF_RESOURCES


async def _allowed_infos(address: Address, policy: TargetPolicy | None, look_up: LookUp) -> list[AddrInfo]:
    """Give the addresses of a target that may be dialled, at least one. Raises DialError."""
    if address.kind is not AddressType.NAME:
        if policy is not None and not _allows(policy, (address.host, address.port), NameVerdict.ON_ADDRESSES):
            raise _not_allowed(address)
        sockaddr = (address.host, address.port)
        return [(_FAMILIES[address.kind], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", sockaddr)]
    if policy is None:
        return await look_up(address.host, address.port)
    verdict = policy.allows_name(address.host, address.port)
    if verdict is NameVerdict.DENIED:
        raise _not_allowed(address)
    infos = await look_up(address.host, address.port)
    allowed = [info for info in infos if _allows(policy, info[4], verdict)]
    if not allowed:
        raise _not_allowed(address)
    return allowed


def _allows(policy: TargetPolicy, sockaddr: tuple[Any, ...], verdict: NameVerdict) -> bool:
    """Judge one address: ``(ip, port)``, or ``(ip, port, flow, scope)`` with IPv6. Raises DialError: it cannot be."""
    host, port, *flow_and_scope = sockaddr
    try:
        return not any(flow_and_scope) and policy.allows_address(host, port, verdict=verdict)
    except OSError as error:  # no descriptor to ask with
        raise DialError(status_of(error), f"{host}: {_reason(error)}") from error


async def _connect_first(address: Address, infos: list[AddrInfo]) -> socket.socket:
    """Connect to whichever of the addresses answers first. Raises DialError."""
    recorder = _ConnectRecorder(asyncio.get_running_loop())
    try:
        return await aiohappyeyeballs.start_connection(
            infos,
            happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S,
            interleave=1,
            loop=cast(asyncio.AbstractEventLoop, recorder),
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: uvloop's, for a socket already in use
        status = _most_telling([*recorder.errors, error])
        raise DialError(status, f"{address}: {_reason(error)}") from error


class _ConnectRecorder:
    """The running loop, as far as connecting needs it, with a memory of what went wrong.

    The library joins the errors of several addresses into one text without an errno; the status
    needs each of them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.errors: list[OSError] = []

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        try:
            await self._loop.sock_connect(sock, address)
        except OSError as error:
            self.errors.append(error)
            raise


def _most_telling(errors: Iterable[BaseException]) -> Status:
    return min(map(status_of, errors), key=_MOST_TELLING_FIRST.index)


def _not_allowed(address: Address) -> DialError:
    return DialError(Status.NOT_ALLOWED, f"{address}: not allowed as a target")


def _reason(error: BaseException) -> str:
    """Give the system's text for an error, without the number and the call that asyncio puts around it."""
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)
