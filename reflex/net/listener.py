"""Listening sockets: accepts in batches, pauses where descriptors have run out."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Final

from reflex.errors import StartError

log = logging.getLogger(__name__)

BACKLOG: Final = 1_024
ACCEPTS_PER_TURN: Final = 64
PAUSE_S: Final = 0.25  # after accept() found no descriptor or memory left
_OUT_OF_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class Listener:
    """One listening address.

    Args:
        host: a name or address.
        port: 0 for any free one.
        on_accept: called with each accepted socket, non-blocking, which is the callee's.

    Raises:
        StartError: the address cannot be listened on; the text names it and says why.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        host: str,
        port: int,
        on_accept: Callable[[socket.socket], None],
    ) -> None:
        self._loop = loop
        self._on_accept = on_accept
        self._pause_timer: asyncio.TimerHandle | None = None
        self._sock = _listen(host, port)
        loop.add_reader(self._sock, self._accept)

    @property
    def address(self) -> str:
        """What it listens on: ``host:port``, with brackets around IPv6."""
        host, port = self._sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                log.warning("cannot accept on %s: %s; pausing", self.address, error.strerror)
                self._loop.remove_reader(self._sock)
                self._pause_timer = self._loop.call_later(PAUSE_S, self._go_on)
                return
            sock.setblocking(False)
            self._on_accept(sock)

    def _go_on(self) -> None:
        self._pause_timer = None
        self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Accept nothing more."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()


def _listen(host: str, port: int) -> socket.socket:
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
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise StartError(f"cannot listen on {where}: {error.strerror or error}") from error
    return sock
