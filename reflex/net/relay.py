"""One stream and its local socket: bytes from the socket into the tunnel's record, and back.

A relay holds no buffer while it is idle. Bytes from the tunnel are sent to the socket from where they
were decrypted; only what the socket does not take is copied, into the smallest buffer that fits, and
the peer gets credit for a byte when the socket has taken it. Bytes from the socket are received where
they will be sealed. The relay stops reading where the tunnel is blocked or a window is used up, and
is woken by the tunnel.

Ends: the socket's FIN becomes DATA_FIN and the other way round, each direction for itself; a reset on
either side becomes a reset on the other. A relay whose stream has ended in both directions still
delivers what had arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from typing import Final

from reflex.metrics import Counters
from reflex.net.backlog import Backlog
from reflex.net.options import set_fin_on_close, set_unpaced
from reflex.net.pressure import log_shed
from reflex.net.talk import SHARED_READ_BYTES, SHARED_READS
from reflex.net.tunnel import Tunnel
from reflex.pool import TieredPool
from reflex.protocol.streams import Stream
from reflex.protocol.wire import MAX_PAYLOAD_SIZE, Code

FIRST_READ_BYTES: Final = 4_096  # a fresh or idle stream: its first bytes are not held back for more
READ_GROWTH: Final = 4  # a read that filled its room: the next may be so much larger
MAX_READ_BYTES: Final = MAX_PAYLOAD_SIZE
SENDS_PER_TURN: Final = 8
BULK_BYTES: Final = 16_384  # a piece of this size is bulk data
NEVER: Final = sys.maxsize


class Relay:
    """One stream and its local socket.

    Args:
        tunnel: the stream's tunnel.
        stream: becomes this relay's (``stream.owner``).
        buffers: where what the socket does not take is kept.
        on_end: called once, when the relay has ended and its socket is closed.
        sock: connected and non-blocking, set to RST on close, since a process that is killed has no time to
            say so; None where :meth:`connected` will bring it.
    """

    __slots__ = (
        "_backlog",
        "_buffers",
        "_counters",
        "_fd",
        "_fin_is_due",
        "_is_reading",
        "_is_writing",
        "_local_done",
        "_loop",
        "_on_end",
        "_read_ended",
        "_read_size",
        "_sock",
        "_unpace_from",
        "_wants_to_read",
        "ended",
        "last_tick",
        "stream",
        "tunnel",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tunnel: Tunnel,
        stream: Stream,
        *,
        buffers: TieredPool,
        counters: Counters,
        on_end: Callable[[Relay], None],
        sock: socket.socket | None = None,
    ) -> None:
        self._loop = loop
        self.tunnel = tunnel
        self.stream = stream
        self._buffers = buffers
        self._counters = counters
        self._on_end = on_end
        self._sock = sock
        self._fd = -1 if sock is None else sock.fileno()
        self._read_size = FIRST_READ_BYTES
        self._is_reading = False  # registered with the loop
        self._is_writing = False
        self._wants_to_read = False  # reading may begin, and has not ended
        self._read_ended = False  # the socket's FIN was passed on to the peer
        self._local_done = False  # the peer's FIN was passed on to the socket
        self._fin_is_due = False  # it waits for the backlog
        self._backlog: Backlog | None = None  # None, and no memory, where nothing ever had to wait
        self._unpace_from = NEVER  # the size of a piece of bulk data, where pacing is of no use
        self.ended = False
        self.last_tick = tunnel.tick
        stream.owner = self

    def connected(self, sock: socket.socket) -> None:
        """The local socket is there, set to RST on close: deliver what has arrived, and start reading."""
        self._sock = sock
        self._fd = sock.fileno()
        self.last_tick = self.tunnel.tick
        if self._backlog is not None:
            self._send_backlog()
        elif self._fin_is_due:
            self._pass_fin()
        if not self.ended:
            self.start_reading()

    # From the socket into the tunnel.

    def start_reading(self) -> None:
        """From now on, read the socket."""
        self._wants_to_read = True
        self._read_again()

    def resume(self) -> None:
        """The tunnel takes bytes again."""
        self._read_again()

    def on_writable(self) -> None:
        """A window that was used up has opened."""
        self._read_again()

    def _read_again(self) -> None:
        if self._wants_to_read and not self._is_reading and not self.ended:
            self._is_reading = True
            self._loop.add_reader(self._fd, self._on_readable)

    def _pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        tunnel = self.tunnel
        if tunnel.is_blocked:
            self._pause()
            tunnel.wait(self)
            return
        session = tunnel.session
        read_size = wanted = self._read_size
        if tunnel.last_talker is not self:
            tunnel.heard(self)
        if wanted > SHARED_READ_BYTES and tunnel.shared_turns and tunnel.talk.shared_reads:
            tunnel.talk.shared_reads -= 1
            wanted = SHARED_READ_BYTES
        view = session.reserve(self.stream, wanted)
        if view is None:
            self._pause()  # until on_writable
            return
        try:
            size = self._sock.recv_into(view)  # type: ignore[union-attr]  # it is read only where it is there
        except (BlockingIOError, InterruptedError):
            tunnel.flush_soon()
            return
        except OSError:
            tunnel.flush_soon()
            self.on_local_error()
            return
        self.last_tick = tunnel.tick
        if not size:
            self._wants_to_read = False
            self._read_ended = True
            session.finish(self.stream)
            tunnel.flush_soon()
            if self.stream.is_closed:
                tunnel.stream_ended()
            self._end_if_done()
            if not self.ended:
                self._pause()
            return
        session.commit(self.stream, size)
        self._counters.bytes_into_tunnels += size
        if size == read_size:
            self._read_size = min(read_size * READ_GROWTH, MAX_READ_BYTES)
        elif read_size == FIRST_READ_BYTES:
            tunnel.talk.shared_reads = SHARED_READS
        elif size * READ_GROWTH < len(view):
            self._read_size = max(read_size // READ_GROWTH, FIRST_READ_BYTES)
        if session.sealed_records:
            tunnel.send()
        if not tunnel.flush_is_due:
            tunnel.flush_soon()

    # From the tunnel to the socket.

    def on_data(self, data: memoryview) -> None:
        """Deliver bytes; ``data`` is the session's and is not kept."""
        tunnel = self.tunnel
        self.last_tick = tunnel.tick
        size = len(data)
        if size >= self._unpace_from:
            self._unpace()
        self._counters.bytes_out_of_tunnels += size
        if self.ended:
            tunnel.session.consumed(self.stream, size)
            return
        sent = 0
        backlog = self._backlog
        if backlog is None and self._sock is not None:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                tunnel.session.consumed(self.stream, size)
                self._on_send_error()
                return
            if sent:
                tunnel.session.consumed(self.stream, sent)
            if sent == size:
                return
            self._write_again()
        if backlog is None:
            backlog = self._backlog = Backlog(self._buffers, tunnel.session.share, self)
        kept = backlog.keep(data[sent:] if sent else data)
        if sent + kept < size:
            tunnel.session.consumed(self.stream, size - sent - kept)
            self.on_memory_used_up()

    def _unpace(self) -> None:
        """The first large piece for a socket of this machine: from now on it is worth a system call."""
        self._unpace_from = NEVER
        if self._sock is not None:
            with contextlib.suppress(OSError):
                set_unpaced(self._sock)

    def _write_again(self) -> None:
        if not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._fd, self._send_backlog)

    def _send_backlog(self) -> None:
        """The socket takes bytes again: send what waits, oldest first."""
        tunnel = self.tunnel
        session = tunnel.session
        backlog = self._backlog
        session.now_s = self._loop.time()
        self.last_tick = tunnel.tick
        for _ in range(SENDS_PER_TURN):
            if backlog is None or not backlog.size_bytes:
                break
            waiting = backlog.first()
            try:
                size = self._sock.send(waiting)  # type: ignore[union-attr]  # nothing is sent before it is there
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._on_send_error()
                return
            backlog.taken(size)
            session.consumed(self.stream, size)
            if size < len(waiting):
                break
        if not tunnel.ended and session.unsent_bytes:
            tunnel.flush_soon()
        if backlog is not None and backlog.size_bytes:
            self._write_again()
            return
        self._backlog = None
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._fd)
        if self._fin_is_due:
            self._pass_fin()

    def on_fin(self) -> None:
        """The peer has sent its last."""
        self._fin_is_due = True
        if self._backlog is None and self._sock is not None:
            self._pass_fin()
        elif self.stream.is_closed and not self.tunnel.ended:
            self.tunnel.draining.add(self)

    def _pass_fin(self) -> None:
        self._local_done = True
        if self.stream.is_closed:
            self.end(reset=False)  # everything was read: closing sends the FIN, and costs one call less
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)  # type: ignore[union-attr]
        except OSError:
            self.on_local_error()
            return
        self._end_if_done()

    # Answers to OPEN, for a relay that opened its stream. What they mean is the subclass's.

    def on_opened(self) -> None:
        """The target is connected."""

    def on_refused(self, status: int) -> None:
        """There will be no stream."""
        del status
        self.end(reset=True)

    # The end.

    @property
    def waiting_bytes(self) -> int:
        """How much has arrived that the socket has not taken."""
        return 0 if self._backlog is None else self._backlog.size_bytes

    def on_reset(self, code: int) -> None:
        """The stream is gone in both directions, or its tunnel is."""
        del code
        self.end(reset=True)

    @property
    def fd(self) -> int:
        """The local socket's descriptor; -1 while there is none."""
        return -1 if self.ended else self._fd

    def on_hang_up(self) -> None:
        """The local connection is gone, and no event may have told: pass on what is left of it, and its end."""
        sock = self._sock
        if self.ended or sock is None:
            return
        if self._is_reading:
            self._on_readable()
            if self._is_reading:
                self._loop.call_soon(self.on_hang_up)
        elif self._read_ended:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.on_local_error()
        else:
            try:
                sock.recv(1, socket.MSG_PEEK)  # what has arrived, or FIN, is for later
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.on_local_error()

    def on_idle(self) -> None:
        """No byte has moved for the idle time-out."""
        self._reset_stream(Code.IDLE)

    def on_memory_used_up(self) -> None:
        """The process has no memory left for what waits here."""
        if not self.ended:
            self._counters.streams_shed += 1
            log_shed(self.tunnel.session.share.budget)
            self._reset_stream(Code.LIMIT)

    def on_local_error(self) -> None:
        """The local socket failed or was reset: so is the stream."""
        self._reset_stream(Code.TARGET_RESET)

    def _on_send_error(self) -> None:
        """The local socket takes nothing more; what came from it before goes first, as far as it may be read now."""
        if self._is_reading and not self.tunnel.is_blocked:
            self._read_last()
        self.on_local_error()

    def _read_last(self) -> None:
        session = self.tunnel.session
        while (view := session.reserve(self.stream, MAX_READ_BYTES)) is not None:
            try:
                size = self._sock.recv_into(view)  # type: ignore[union-attr]  # it is read
            except OSError:
                return
            if not size:
                return  # the socket's error was told by its send: this is no FIN
            session.commit(self.stream, size)
            self._counters.bytes_into_tunnels += size

    def _reset_stream(self, code: Code) -> None:
        if self.ended:
            return
        tunnel = self.tunnel
        if not self.stream.is_closed:
            tunnel.session.reset(self.stream, code)
            tunnel.flush_soon()
            self._counters.streams_reset += 1
            tunnel.stream_ended()
        self.end(reset=True)

    def _end_if_done(self) -> None:
        if self._local_done and self.stream.is_closed:
            self.end(reset=False)
        elif self.stream.is_closed and not self.tunnel.ended and not self.ended:
            self.tunnel.draining.add(self)

    def end(self, *, reset: bool) -> None:
        """Close the socket, with an RST where ``reset``; give every buffer back. Once; then nothing."""
        if self.ended:
            return
        self.ended = True
        tunnel = self.tunnel
        tunnel.draining.discard(self)
        tunnel.forget(self)
        if tunnel.last_talker is self:
            tunnel.last_talker = None
        if self._sock is not None:
            if self._is_reading:
                self._is_reading = False
                tunnel.drop_reader(self._fd)
            if self._is_writing:
                self._loop.remove_writer(self._fd)
            if not reset:
                set_fin_on_close(self._sock)
            self._sock.close()
        if self._backlog is not None:
            dropped = self._backlog.clear()
            self._backlog = None
            tunnel.session.consumed(self.stream, dropped)
            if not tunnel.ended and tunnel.session.unsent_bytes:
                tunnel.flush_soon()
        if self.stream.is_closed:
            self.stream.owner = None  # no cycle is left, so that nobody has to collect this
        self._on_end(self)
