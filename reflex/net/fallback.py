"""What is not Reflex, handed to the web server (docs/protocol.md, section 6): every byte, FIN and RST, both ways.

How long a connection may be silent is the web server's to say: any limit here that its own do not hide would
tell the two apart. There is one thing that it cannot say, which is that it has left for good: closed or half
closed, its end is one FIN. Whoever then neither sends nor leaves would be kept for ever, while the web server's
own machine forgets it silently after a minute (Linux: tcp_fin_timeout). So it is forgotten here as well, a
while later and as silently: the FIN was sent long ago, and what comes late is answered by RST, as there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Final

from reflex.complaints import Complaints
from reflex.errors import DialError
from reflex.loop import drop_reader
from reflex.net.backlog import Backlog
from reflex.net.dial import begin_connect, finish_connect, is_connected
from reflex.net.hangup import Lookout
from reflex.net.options import set_reset_on_close
from reflex.pool import TieredPool
from reflex.protocol.address import Address

log = logging.getLogger(__name__)

READ_BYTES: Final = 32_768
HALF_CLOSED_S: Final = 120.0  # of silence after the web server's FIN; twice what Linux gives those it does not serve
IDLE_S: Final = 2.0  # without a byte: who is waited for at the end of the daemon no longer; seen half a time later


async def end_idle(fallbacks: Callable[[], Iterable[Fallback]], ended: asyncio.Event) -> None:
    """For the end of a daemon: until ``ended`` is set, end those that nobody serves, and that are silent for IDLE_S.

    A browser keeps its connections for minutes, without a use for them.

    Args:
        fallbacks: those that there still are; asked again and again.
        ended: set by whoever hears of their ends.
    """
    loop = asyncio.get_running_loop()
    seen: dict[Fallback, tuple[int, float]] = {}  # bytes, and since when no more
    while not ended.is_set():
        before, seen, now_s = seen, {}, loop.time()
        for fallback in list(fallbacks()):
            moved_bytes, since_s = before.get(fallback, (-1, now_s))
            if moved_bytes != fallback.moved_bytes:
                since_s = now_s
            if not fallback.is_served and now_s - since_s >= IDLE_S:
                fallback.end(reset=False)
            else:
                seen[fallback] = fallback.moved_bytes, since_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S / 2):
                await ended.wait()


class _Side:
    """One of the two sockets: what is read from it goes to the other one."""

    __slots__ = ("backlog", "fd", "is_reading", "is_writing", "read_ended", "sock", "write_ended")

    def __init__(self, sock: socket.socket, buffers: TieredPool) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.backlog = Backlog(buffers)  # waits to be written to this socket
        self.is_reading = False
        self.is_writing = False
        self.read_ended = False
        self.write_ended = False  # to be shut down once the backlog is empty, or shut down


class Fallback:
    """A connection and the web server's, joined for as long as either side likes.

    Args:
        client: the connection; this object's from now on, with the reader that it may have.
        address: the web server's, an IP address.
        first: bytes already read from the client; copied.
        read_ended: whether the client's FIN was read already.
        complaints: about a web server that cannot be reached; whoever asks the same one shares them.
        lookout: looks at both sockets once they are joined; shared as well.
        on_end: called once, when both sockets are closed.

    Attributes:
        moved_bytes: read from both sides and written to them so far; who compares it sees whether anything moves.
    """

    __slots__ = (
        "_address",
        "_buffers",
        "_client",
        "_complaints",
        "_is_asked",
        "_lookout",
        "_loop",
        "_on_end",
        "_server",
        "_timer",
        "ended",
        "moved_bytes",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        client: socket.socket,
        address: Address,
        first: memoryview,
        *,
        buffers: TieredPool,
        complaints: Complaints,
        lookout: Lookout,
        on_end: Callable[[Fallback], None],
        read_ended: bool = False,
    ) -> None:
        self._loop = loop
        self._buffers = buffers
        self._address = address
        self._complaints = complaints
        self._lookout = lookout
        self._on_end = on_end
        self._client = _Side(client, buffers)
        self._client.read_ended = read_ended
        self._server: _Side | None = None
        self._timer: asyncio.TimerHandle | None = None  # runs once the client has the web server's FIN
        self.ended = False
        self.moved_bytes = 0
        self._is_asked = bool(first)  # the last bytes were the client's
        try:
            server = begin_connect(address)
        except DialError as error:
            self._cannot_connect(str(error))
            return
        self._server = _Side(server, buffers)
        if first:
            self._server.backlog.keep(first)
        try:
            # On the same machine it is: what the caller does next is then nothing that the client waits for.
            connected = is_connected(server, address)
        except DialError as error:
            self._cannot_connect(str(error))
            return
        if connected:
            self._begin(self._server)
        else:
            loop.remove_reader(self._client.fd)
            loop.add_writer(self._server.fd, self._on_connect)

    def _on_connect(self) -> None:
        server = self._server
        assert server is not None  # noqa: S101  # it is the one that became writable
        self._loop.remove_writer(server.fd)
        try:
            finish_connect(server.sock)
        except DialError as error:
            self._cannot_connect(f"{self._address}: {error}")
            return
        self._begin(server)

    def _cannot_connect(self, reason: str) -> None:
        if self._complaints.is_due():
            log.warning("fallback %s", reason)
        self.end(reset=True)  # refused, or connected and reset already: either is an RST, as where there is no machine

    def _begin(self, server: _Side) -> None:
        if self._client.read_ended:
            self._loop.remove_reader(self._client.fd)
        self._write(server)
        if self._client.read_ended:
            self._end_writing(server)
        else:
            self._read_on(self._client)
        if not self.ended:
            self._read_on(server)
            self._lookout.add(self)

    @property
    def descriptors(self) -> tuple[int, int]:
        """Of the client's socket and the web server's."""
        assert self._server is not None  # noqa: S101  # they are asked for only from then on
        return self._client.fd, self._server.fd

    def on_hang_up(self, fd: int) -> None:
        """A side that was reset unseen ends both, once what came before was read."""
        server = self._server
        self._read_rest(server if server is not None and fd == server.fd else self._client)

    def _read_rest(self, side: _Side) -> None:
        if self.ended:
            return
        if side.is_reading:
            self._on_readable(side)
            self._loop.call_soon(self._read_rest, side)
        elif side.read_ended:
            if side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.end(reset=True)
        else:
            try:
                side.sock.recv(1, socket.MSG_PEEK)  # what has arrived, or FIN, is for later
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.end(reset=True)

    def _other(self, side: _Side) -> _Side:
        other = self._server if side is self._client else self._client
        assert other is not None  # noqa: S101  # nothing moves before both are there
        return other

    def _read_on(self, side: _Side) -> None:
        if not (side.is_reading or side.read_ended or self.ended):
            side.is_reading = True
            self._loop.add_reader(side.fd, self._on_readable, side)

    def _on_readable(self, side: _Side) -> None:
        other = self._other(side)
        if other.backlog.size_bytes:
            side.is_reading = False  # until it has drained
            self._loop.remove_reader(side.fd)
            return
        buffer = self._buffers.acquire(READ_BYTES)
        size = 0
        try:
            size = side.sock.recv_into(buffer)
            if size:
                other.backlog.keep(buffer[:size])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.end(reset=True)
            return
        finally:
            self._buffers.release(buffer, size)
        if size:
            self.moved_bytes += size
            self._is_asked = side is self._client
            if self._timer is not None:
                self._await_client()
            self._write(other)
        else:
            side.read_ended = True
            side.is_reading = False
            self._loop.remove_reader(side.fd)
            self._end_writing(other)

    def _write(self, side: _Side) -> None:
        """Send what waits for this side."""
        while side.backlog.size_bytes:
            waiting = side.backlog.first()
            try:
                size = side.sock.send(waiting)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.end(reset=True)
                return
            side.backlog.taken(size)
            self.moved_bytes += size
        if side.backlog.size_bytes:
            if not side.is_writing:
                side.is_writing = True
                self._loop.add_writer(side.fd, self._write, side)
            return
        if side.is_writing:
            side.is_writing = False
            self._loop.remove_writer(side.fd)
        if side.write_ended:
            self._shut_down(side)
        else:
            self._read_on(self._other(side))

    def _end_writing(self, side: _Side) -> None:
        side.write_ended = True
        if not side.backlog.size_bytes and not self.ended:
            self._shut_down(side)

    def _shut_down(self, side: _Side) -> None:
        try:
            side.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.end(reset=True)
            return
        if side.read_ended and self._other(side).write_ended and not self._other(side).backlog.size_bytes:
            self.end(reset=False)
        elif side is self._client:
            self._await_client()

    def _await_client(self) -> None:
        """The web server has nothing more to say: from now on the client may be silent for so long."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(HALF_CLOSED_S, self._forget)

    def _forget(self) -> None:
        self.end(reset=False)

    @property
    def is_served(self) -> bool:
        """Whether the client spoke last, and so waits for an answer, or has not taken all of one."""
        return self._is_asked or bool(self._client.backlog.size_bytes)

    def end(self, *, reset: bool) -> None:
        """Close both sockets, with RST where ``reset``. Once; then nothing."""
        if self.ended:
            return
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._lookout.remove(self)
        for side in (self._client, self._server):
            if side is None:
                continue
            if side.is_reading:
                drop_reader(self._loop, side.fd)
            else:
                self._loop.remove_reader(side.fd)
            self._loop.remove_writer(side.fd)
            if reset:
                set_reset_on_close(side.sock)
            side.sock.close()
            side.backlog.clear()
        self._on_end(self)
