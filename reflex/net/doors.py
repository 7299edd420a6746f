"""The client's local doors: SOCKS5, and plain port forwards.

A connection is first a *visitor*: for SOCKS5 it says where it wants to go. Then it asks for a tunnel,
opens a stream on it, and becomes that stream's relay.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from reflex.errors import SocksError, TunnelError
from reflex.metrics import Counters
from reflex.net.connector import Connector
from reflex.net.options import set_fin_on_close, set_reset_on_close
from reflex.net.pressure import Pressure
from reflex.net.relay import Relay
from reflex.net.tunnel import Tunnel
from reflex.pool import TieredPool
from reflex.protocol.address import Address
from reflex.protocol.socks5 import Socks5Parser, reply
from reflex.protocol.streams import Stream
from reflex.protocol.wire import STREAM_WINDOW, Code, Status

log = logging.getLogger(__name__)

CONVERSATION_READ_BYTES = 2_048
# The tunnel was cut, its server ends, or it allows fewer streams than were opened before its SETTINGS came;
# LIMIT after them speaks of the user or of the server's memory, and comes again on every tunnel.
RETRIED = (Code.CANCELLED, Code.SHUTTING_DOWN, Code.LIMIT)
ATTEMPTS = 3  # tunnels that a request may try, as long as none of its bytes can have been delivered


@dataclass(frozen=True, slots=True)
class Door:
    """What every visitor of one local listener shares.

    ``target`` is where a forward leads; None for SOCKS5, whose ``credentials`` may be set.
    ``pressure`` is the process's memory, None where nobody looks at it.
    ``on_end`` is called once for every visitor, when its socket is closed.
    """

    loop: asyncio.AbstractEventLoop
    connector: Connector
    buffers: TieredPool
    counters: Counters
    greeting_timeout_s: float
    target: Address | None
    credentials: tuple[bytes, bytes] | None
    on_end: Callable[[Visitor], None]
    pressure: Pressure | None = None


class Visitor:
    """One accepted local connection, from its first byte to its last."""

    __slots__ = ("_attempts", "_door", "_parser", "_relay", "_sock", "_target", "_timer", "_was_settled", "ended")

    def __init__(self, door: Door, sock: socket.socket) -> None:
        self._door = door
        self._sock = sock
        self._relay: DoorRelay | None = None
        self._attempts = 0
        self._was_settled = False  # the tunnel of the last attempt had its server's SETTINGS
        self._parser: Socks5Parser | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._target = door.target
        self.ended = False
        if self._target is not None:
            self._request_tunnel()
            return
        self._parser = Socks5Parser(door.credentials)
        self._timer = door.loop.call_later(door.greeting_timeout_s, self.end)
        door.loop.add_reader(sock, self._on_readable)

    @property
    def has_stream(self) -> bool:
        """Whether it has come as far as a stream."""
        return self._relay is not None

    def _on_readable(self) -> None:
        """The application speaks SOCKS5."""
        buffers = self._door.buffers
        parser = self._parser
        assert parser is not None  # noqa: S101  # it is dropped together with this callback
        buffer = buffers.acquire(CONVERSATION_READ_BYTES)
        size = 0
        try:
            size = self._sock.recv_into(buffer)
            if not size:
                self.end()
                return
            answer = parser.feed(buffer[:size])
            if answer:
                self._sock.send(answer)  # a few bytes on a fresh connection: it takes them whole
        except (BlockingIOError, InterruptedError):
            return
        except SocksError as error:
            log.info("local connection refused: %s", error)
            self._say(error.reply)
            self.end()
            return
        except OSError:
            self.end()
            return
        finally:
            buffers.release(buffer, size)
        if parser.request is not None:
            self._target = parser.request
            self._stop_greeting()
            self._request_tunnel()

    def _stop_greeting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._door.loop.remove_reader(self._sock)

    def _request_tunnel(self) -> None:
        pressure = self._door.pressure
        if pressure is not None and pressure.is_high():
            self._door.counters.connections_refused += 1
            self._refuse(Status.GENERAL_FAILURE)
            return
        self._attempts += 1
        self._door.connector.request(self)

    def on_tunnel(self, tunnel: Tunnel) -> None:
        """There is a tunnel: open the stream."""
        door = self._door
        stream = tunnel.session.open(self._target)
        tunnel.flush_soon()
        self._was_settled = tunnel.settled.is_set()
        door.counters.streams_opened += 1
        if door.target is None:
            set_reset_on_close(self._sock)  # a forward's is from the start
        self._relay = DoorRelay(door, self, tunnel, stream, self._sock)
        if tunnel.vigil is not None:
            tunnel.vigil.called()
        if self._parser is None:
            # A forward has nobody to tell how the OPEN went: its data may follow at once.
            self._relay.start_reading()

    def on_no_tunnel(self, error: TunnelError) -> None:
        """There is none: the connector has logged why."""
        log.debug("no tunnel for a local connection: %s", error)
        self._refuse(Status.GENERAL_FAILURE)

    # What the relay reports of its OPEN.

    @property
    def may_try_again(self) -> bool:
        """Whether it has tunnels left to try."""
        return self._attempts < ATTEMPTS

    def opened(self) -> None:
        """The target is connected; what the application sent ahead follows."""
        parser, relay = self._parser, self._relay
        if parser is not None and relay is not None:
            self._parser = None
            if not self._say(reply(Status.SUCCEEDED)):
                relay.on_local_error()
                return
            relay.start_reading(behind=parser.rest)

    def refused(self, status: int) -> None:
        """The server would not, or could not, connect the target."""
        log.debug("%s: refused with status %d", self._target, status)
        self._relay = None
        self._refuse(status)

    def lost(self, code: int, *, is_untouched: bool) -> None:
        """The stream was reset before the target was connected: try another tunnel where nothing was sent."""
        self._relay = None
        is_final = code not in RETRIED or (code == Code.LIMIT and self._was_settled)
        if is_untouched and self.may_try_again and not is_final:
            self._request_tunnel()
        else:
            self._refuse(Status.GENERAL_FAILURE)

    def closed(self) -> None:
        """The relay has ended and closed the socket."""
        self._finish()

    def _refuse(self, status: int) -> None:
        if self._parser is not None:
            set_fin_on_close(self._sock)
            self._say(reply(status))
        else:
            set_reset_on_close(self._sock)
        self.end()

    def _say(self, answer: bytes) -> bool:
        """Send an answer; False where nobody is there any more to take it, which is told only once."""
        if answer:
            try:
                self._sock.send(answer)
            except OSError:
                log.debug("a local connection was gone before it was answered")
                return False
        return True

    def end(self) -> None:
        """Close the connection. Once; then nothing."""
        if self.ended:
            return
        self._stop_greeting()
        self._door.connector.cancel(self)
        if self._relay is not None:
            self._relay.end(reset=True)
            return
        self._sock.close()
        self._finish()

    def _finish(self) -> None:
        if not self.ended:
            self.ended = True
            self._relay = None  # no cycle is left, so that nobody has to collect this
            self._door.on_end(self)


class DoorRelay(Relay):
    """The client's relay: until its OPEN is answered, how that went is the visitor's matter."""

    __slots__ = ("_ahead", "_is_opened", "_visitor")

    def __init__(self, door: Door, visitor: Visitor, tunnel: Tunnel, stream: Stream, sock: socket.socket) -> None:
        super().__init__(
            door.loop,
            tunnel,
            stream,
            buffers=door.buffers,
            counters=door.counters,
            on_end=self._on_relay_end,
            sock=sock,
        )
        self._visitor = visitor
        self._is_opened = False
        self._ahead = b""

    def start_reading(self, *, behind: bytes = b"") -> None:
        """From now on, read the socket, behind what was read of it together with the request."""
        self._ahead = behind
        super().start_reading()

    def _read_again(self) -> None:
        """Read on once all that came with the request is sent: other streams may have used up the session's window."""
        if self._ahead and not self.ended:
            sent = self.tunnel.session.send(self.stream, self._ahead)
            self._counters.bytes_into_tunnels += sent
            self._ahead = self._ahead[sent:]
            self.tunnel.flush_soon()
            if self._ahead:
                return  # until on_writable
        super()._read_again()

    def on_opened(self) -> None:
        """The target is connected."""
        self._is_opened = True
        self._visitor.opened()

    def on_refused(self, status: int) -> None:
        """There will be no stream: the socket goes back to the visitor."""
        self._let_go()
        self._visitor.refused(status)

    def on_reset(self, code: int) -> None:
        """Before the target was connected, the socket goes back to the visitor; later both are reset."""
        if self._is_opened or self.ended:
            super().on_reset(code)
            return
        is_untouched = self._is_untouched
        self._let_go()
        self._visitor.lost(code, is_untouched=is_untouched)

    @property
    def _is_untouched(self) -> bool:
        """Whether the target cannot have received anything: nothing was sent, nor credit given for what was."""
        stream = self.stream
        return stream.send_window.available == STREAM_WINDOW and not (stream.hurried_bytes or self._read_ended)

    def on_idle(self) -> None:
        """No byte for the idle time-out; where there is no answer to the OPEN yet, none is awaited any longer."""
        if self._is_opened or self.ended:
            super().on_idle()
            return
        self._counters.streams_reset += 1
        self._give_up(Code.IDLE)
        self._visitor.refused(Status.TIMED_OUT)

    def try_elsewhere(self) -> None:
        """The tunnel does not answer: ask for another, where nothing was sent and a try is left."""
        if self._is_opened or self.ended or not self._is_untouched or not self._visitor.may_try_again:
            return
        self._give_up(Code.CANCELLED)
        self._visitor.lost(Code.CANCELLED, is_untouched=True)

    def _give_up(self, code: Code) -> None:
        """Reset the stream, and keep the socket for the visitor."""
        tunnel = self.tunnel
        tunnel.session.reset(self.stream, code)
        tunnel.flush_soon()
        self._let_go()
        tunnel.stream_ended()

    def _let_go(self) -> None:
        """End without closing the socket."""
        self.ended = True
        self.tunnel.forget(self)
        self._pause()
        if self.tunnel.last_talker is self:
            self.tunnel.last_talker = None
        self.stream.owner = None

    @staticmethod
    def _on_relay_end(relay: Relay) -> None:
        assert isinstance(relay, DoorRelay)  # noqa: S101  # it is given to this class alone
        relay._visitor.closed()
