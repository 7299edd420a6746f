"""Listening sockets: accepts in batches, pauses where descriptors have run out, loses nobody at the end.

The end of listening in order: who is connected is served, and who is not is refused. Closing a listening socket
alone would reset those who are connected, as far as they know, but not accepted yet. So it first takes no new
SYN (a dropped one is sent again a second later, and is then refused), lets the handshakes that are under way
come to their end, accepts what has come, and only then closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Final, Literal

from reflex.complaints import Complaints
from reflex.errors import StartError
from reflex.net.dial import OUT_OF_RESOURCES
from reflex.net.options import RESET_ON_CLOSE, is_loopback, set_options, set_unpaced

log = logging.getLogger(__name__)

BACKLOG: Final = 1_024
ACCEPTS_PER_TURN: Final = 64
PAUSE_S: Final = 0.25  # after accept() found no descriptor or memory left
# How long TCP handshakes that are under way may take to come to their end, once no new ones are taken.
HANDSHAKE_GRACE_S: Final = 0.25
LOOPBACK_GRACE_S: Final = 0.02
SETTLE_S: Final = 1.0  # for who is connected when listening ends: to say what it wants
SETTLE_STEP_S: Final = 0.02


class Listener:
    """One listening address.

    Args:
        sock: listens already, and is non-blocking; the listener's from now on.
        on_accept: called with each accepted socket, non-blocking, which is the callee's.
        on_pause: called whenever accepting pauses, for who counts that.
        accepts_per_turn: the most that are accepted before what else is ready gets its turn;
            None: ACCEPTS_PER_TURN.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_accept: Callable[[socket.socket], None],
        on_pause: Callable[[], None] | None = None,
        *,
        accepts_per_turn: int | None = None,
    ) -> None:
        self._loop = loop
        self._on_accept = on_accept
        self._accepts_per_turn = accepts_per_turn or ACCEPTS_PER_TURN
        self._on_pause = on_pause
        self._complaints = Complaints(loop.time)
        self._pause_timer: asyncio.TimerHandle | None = None
        self._sock = sock
        self._options: Callable[[socket.socket], None] | None = None
        loop.add_reader(sock, self._accept)

    @property
    def address(self) -> str:
        """What it listens on: ``host:port``, with brackets around IPv6."""
        return listening_address(self._sock)

    def _accept(self) -> None:
        for _ in range(self._accepts_per_turn):
            try:
                sock = self._accept_one()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in OUT_OF_RESOURCES:
                    raise
                if self._complaints.is_due():
                    log.warning("cannot accept on %s: %s; pausing", self.address, error.strerror)
                if self._on_pause is not None:
                    self._on_pause()
                self._loop.remove_reader(self._sock)
                self._pause_timer = self._loop.call_later(PAUSE_S, self._go_on)
                return
            self._on_accept(sock)

    def _accept_one(self) -> socket.socket:
        sock, _ = self._sock.accept()
        sock.setblocking(False)
        if self._options is not None:
            self._options(sock)
        return sock

    def set_options(self, *, nodelay: bool, keepalive_s: int, reset_on_close: bool = False) -> None:
        """Set options for every connection: on Linux, once and for all.

        Args:
            nodelay: see :func:`reflex.net.options.set_options`.
            keepalive_s: the same.
            reset_on_close: ``close()``, and the end of a process that is killed, send RST.
        """
        on_loopback = _is_loopback(self._sock)

        def set_all(sock: socket.socket) -> None:
            set_options(sock, nodelay=nodelay, keepalive_s=keepalive_s, on_loopback=on_loopback)
            if on_loopback:
                set_unpaced(sock)
            if reset_on_close:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

        if sys.platform.startswith("linux"):
            set_all(self._sock)  # who is accepted has them from its start (tcp(7))
        else:
            self._options = set_all

    def _go_on(self) -> None:
        self._pause_timer = None
        self._loop.add_reader(self._sock, self._accept)

    async def finish(self) -> None:
        """Accept those who are connected already, then close; see the module. ``close`` may come in between."""
        _refuse_new(self._sock)
        await asyncio.sleep(LOOPBACK_GRACE_S if _is_loopback(self._sock) else HANDSHAKE_GRACE_S)
        if self._sock.fileno() < 0:
            return
        with contextlib.suppress(BlockingIOError, OSError):  # there is nobody left, or no descriptor to take them
            while True:
                self._on_accept(self._accept_one())
        self.close()

    def close(self) -> None:
        """Accept nothing more. Any number of times."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()


async def finish_listening(
    listeners: Sequence[Listener], is_settled: Callable[[], bool], *, at_most_s: float = SETTLE_S
) -> None:
    """The end of listening in order, for all listeners of a daemon.

    Args:
        listeners: closed when this returns.
        is_settled: whether everybody who was accepted has said what it wants; asked again and again.
        at_most_s: how long that is waited for.
    """
    await asyncio.gather(*(listener.finish() for listener in listeners))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(at_most_s):
            while not is_settled():  # noqa: ASYNC110 - who settles has better to do than to tell
                await asyncio.sleep(SETTLE_STEP_S)


def listening_address(sock: socket.socket) -> str:
    """What a socket listens on: ``host:port``, with brackets around IPv6."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(sock: socket.socket) -> bool:
    return is_loopback(sock.getsockname()[0])


def open_shared(host: str, port: int, *, count: int) -> list[socket.socket]:
    """``count`` listening sockets on one address, among which the kernel spreads the connections (SO_REUSEPORT).

    Nobody else's sockets are among them: the first one wants the port for itself before it shares it.

    Raises:
        StartError: as for one socket; or this system cannot share a port.
    """
    sockets = [open_listening(host, port, share="after")]
    try:
        port = sockets[0].getsockname()[1]
        sockets += [open_listening(host, port, share="before") for _ in range(count - 1)]
    except StartError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def open_listening(host: str, port: int, *, share: Literal["never", "before", "after"] = "never") -> socket.socket:
    """A non-blocking listening socket. ``share``: whether others may listen as well, from before or after its bind.

    Raises:
        StartError: the address cannot be listened on; the text names it and says why.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"cannot listen on {where}: {error.strerror or error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "[::]" is IPv6 alone, whatever the system's default: what is listened on is what was written.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if share == "before":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        if share == "after":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise StartError(f"cannot listen on {where}: {error.strerror or error}") from error
    return sock


# A packet filter for TCP headers (classic BPF, socket(7)): drop what has SYN set, take all else.
# Each instruction: code, jump if true, jump if false, operand.
_DROP_SYN: Final = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte at 13, the flags
        (0x45, 0, 1, 0x02),  # is SYN set? then on, else over one
        (0x06, 0, 0, 0),  # take 0 bytes of it
        (0x06, 0, 0, 0xFFFF_FFFF),  # take all of it
    )
)
_INSTRUCTION_SIZE: Final = 2 + 1 + 1 + 4
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h; Python has no name for it


def _refuse_new(sock: socket.socket) -> None:
    """Take no new TCP handshakes, but finish those under way. Where the system cannot, nothing."""
    if not sys.platform.startswith("linux"):
        return
    program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    with contextlib.suppress(OSError):
        sock.setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_FILTER,
            struct.pack("@HP", len(_DROP_SYN) // _INSTRUCTION_SIZE, ctypes.addressof(program)),
        )
