"""One session over one socket: reads, flushes, back-pressure.

The way of a turn:

1. The loop says that the tunnel's socket is readable: its bytes are received where the decoder wants
   them, and each event goes to the relay of its stream, which sends to its own socket at once.
2. The loop says that local sockets are readable: each relay receives straight into the record that is
   being packed. A record that is full is sealed and sent on the spot.
3. At the turn's end what was packed is sealed and sent, in one piece.
4. What the socket does not take stays in the encoder; until it is taken, the tunnel is *blocked*:
   relays that turn readable stop reading, and go on when it is not blocked any more. Answers that
   are packed meanwhile wait in one record, not in one each turn.

A tunnel ends once, in one of three ways: ``close`` (cleanly, CLOSE then FIN), ``cut`` (the connection
is gone: every relay is reset), or a fatal protocol error (the same, but the socket first swallows
what comes, for a random time, so that the peer learns nothing from the moment of the close).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from reflex.complaints import Throttle
from reflex.errors import ProtocolError
from reflex.loop import DirectLoop
from reflex.metrics import Counters
from reflex.net.dispatch import StreamOwner, dispatch
from reflex.net.farewell import Farewell
from reflex.net.silence import Silence
from reflex.net.talk import Talk
from reflex.net.upkeep import on_tick, ticks_for, watch
from reflex.protocol.events import Event, EventKind
from reflex.protocol.session import Session
from reflex.protocol.wire import FATAL_DISCARD_BYTES, FATAL_DISCARD_MAX_S, FATAL_DISCARD_MIN_S, Code

if TYPE_CHECKING:
    from reflex.net.vigil import Vigil

log = logging.getLogger(__name__)

_DATA: Final = EventKind.DATA  # asked for every event: no look-up in the enumeration

MAX_CHAT_BYTES: Final = 4_096  # a turn that moves less is part of a conversation; an answer is expected
BULK_TURN_BYTES: Final = 32_768  # so much between two pieces of a conversation, and it is none
# DATA frames of a few bytes that one tunnel may have delivered in a turn: one record may hold 14,000 of them.
SMALL_FRAMES_PER_TURN: Final = 500
SHARED_TURNS: Final = 32  # for so many turns after two streams were seen to talk
BULK_MEMORY_S: Final = 2.0  # longer than bulk data pauses
CLOSE_WAIT_S: Final = 2.0  # for the peer's FIN after ours


def _do_nothing() -> None:
    """Where the loop cannot be told."""


class Resumable(Protocol):
    """What waits for a tunnel that is blocked."""

    def resume(self) -> None: ...


class Tunnel:
    """One session and its socket.

    Args:
        sock: connected and non-blocking; the tunnel's from now on.
        session: the same; its buffers are given back when the tunnel ends.
        on_open: called with each OPEN event, which it answers or hands to a relay (server).
        on_settings: called with the peer's time, in ms since 1970, when its first SETTINGS arrive.
        on_stream_end: called whenever streams may have ended, so that an owner can count.
        on_end: called once, when the tunnel has ended and its socket takes no more streams.
        on_broken: called when a fatal protocol error ends the session, before its streams are reset.
        on_discard: called with 1 when the socket outlives a fatal error, to discard what comes (``silence``), and
            with -1 when it is closed.
        idle_timeout_s: a stream without a byte in either direction for so long is reset.
        label: who is at the other end, for the log.
        talk: shared by all tunnels of the process; None for one of its own.
        throttle: of the lines that the peer can cause; None where each is logged.
    """

    __slots__ = (
        "__weakref__",
        "_at_turn_end",
        "_close_timer",
        "_counters",
        "_expect_soon",
        "_fd",
        "_idle_ticks",
        "_label",
        "_loop",
        "_moved_bytes",
        "_on_broken",
        "_on_discard",
        "_on_end",
        "_on_open",
        "_on_settings",
        "_on_stream_end",
        "_sock",
        "_throttle",
        "_tick_s",
        "_tick_timer",
        "_waiting",
        "close_code",
        "draining",
        "drop_reader",
        "ended",
        "flush_is_due",
        "idle_since_s",
        "is_blocked",
        "is_near",
        "is_suspect",
        "last_talker",
        "session",
        "settled",
        "shared_turns",
        "silence",
        "talk",
        "tick",
        "turn",
        "vigil",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        session: Session,
        *,
        counters: Counters,
        idle_timeout_s: float,
        label: str,
        on_end: Callable[[Tunnel], None],
        on_open: Callable[[Tunnel, Event], None] | None = None,
        on_settings: Callable[[int], None] | None = None,
        on_stream_end: Callable[[Tunnel], None] | None = None,
        on_broken: Callable[[], None] | None = None,
        on_discard: Callable[[Tunnel, int], None] | None = None,
        talk: Talk | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        self._loop = loop
        self._at_turn_end = loop.at_turn_end if isinstance(loop, DirectLoop) else loop.call_soon
        self._expect_soon = loop.expect_soon if isinstance(loop, DirectLoop) else _do_nothing
        # For a socket that is closed next: stops reading it.
        self.drop_reader = loop.forget_reader if isinstance(loop, DirectLoop) else loop.remove_reader
        self._sock = sock
        self._fd = sock.fileno()
        self.session = session
        self.talk = talk or Talk()
        self._counters = counters
        self._label = label
        self._throttle = throttle
        self._on_end = on_end
        self._on_open = on_open
        self._on_settings = on_settings
        self._on_stream_end = on_stream_end
        self.flush_is_due = False
        self._on_broken = on_broken
        self._on_discard = on_discard
        self.is_blocked = False
        self.is_near = False  # the peer answers at once, by the last tick
        self.is_suspect = False  # it does not answer: the vigil's to say
        self.vigil: Vigil | None = None  # for a client's tunnel, set by who made it
        self._waiting: dict[Resumable, None] = {}  # in their order
        self.draining: set[StreamOwner] = set()  # relays whose stream has ended, with bytes left to deliver
        self.last_talker: object = None
        self.shared_turns = 0
        self._moved_bytes = 0  # in the whole process, when it was last seen whether a conversation is all that there is
        self.ended = False
        self.close_code: int | None = None  # of the peer's CLOSE, once it has come
        self.settled = asyncio.Event()  # the peer's SETTINGS have come, or nothing will
        self.idle_since_s = loop.time()
        self.silence: Silence | None = None  # after a fatal error, what reads the socket to its end
        self._close_timer: asyncio.TimerHandle | Farewell | None = None
        self.tick = 0
        self.turn = 0  # how often it was read
        self._tick_s, self._idle_ticks = ticks_for(idle_timeout_s)
        self._tick_timer = loop.call_later(self._tick_s, on_tick, self)
        counters.tunnels_opened += 1
        session.ping()  # the round trip is known before the first window is used up
        loop.add_reader(self._fd, self._on_readable)
        self.flush_soon()

    def __repr__(self) -> str:
        return f"<Tunnel {self._label}, {len(self.session.streams)} streams>"

    @property
    def stream_count(self) -> int:
        """How many streams are live."""
        return len(self.session.streams)

    @property
    def is_closed_cleanly(self) -> bool:
        """Whether either side has said CLOSE."""
        return self.close_code is not None or self.session.close_sent

    @property
    def is_bulk(self) -> bool:
        """Whether a stream on it has carried bulk data just now: another's small requests would queue behind it."""
        return self._loop.time() - self.session.bulk_s < BULK_MEMORY_S

    @property
    def has_room(self) -> bool:
        """Whether a stream can be opened on it."""
        return not self.ended and self.session.has_room

    # From the tunnel.

    def feed(self, data: memoryview) -> None:
        """Take bytes that were received together with the handshake."""
        self.session.now_s = self._loop.time()
        try:
            for event in self.session.feed(data):
                dispatch(self, event)
                if self.ended:
                    break
        except ProtocolError as error:
            self._fail(error)
        except Exception:
            self._cut_by_mistake()
        self._after_events()

    def _on_readable(self) -> None:
        try:
            self._read()
        except Exception:
            self._cut_by_mistake()

    def _cut_by_mistake(self) -> None:
        """A mistake of ours: the peer and every relay see a lost connection, and nobody waits for ever."""
        log.exception("%s: internal error", self._label)
        self.cut("internal error")

    def _read(self) -> None:
        self.turn += 1
        session = self.session
        session.now_s = self._loop.time()
        try:
            size = self._sock.recv_into(session.receive_buffer())
        except (BlockingIOError, InterruptedError):
            session.received(0)
            return
        except OSError as error:
            session.received(0)
            self.cut(f"connection lost: {error.strerror or error}")
            return
        session.received(size)
        if not size:
            self._on_eof()
            return
        self._deliver()
        if session.is_left_off:
            self._loop.remove_reader(self._fd)
            self._loop.call_soon(self._go_on)
        if not (self.ended or self.flush_is_due) and session.unsent_bytes:
            self.flush_soon()
        if self.is_near and size < MAX_CHAT_BYTES and not self.shared_turns and self._is_chat():
            self._expect_soon()

    def _is_chat(self) -> bool:
        """Whether little has moved since this was last asked: credit for bulk data is small, too, and no talk."""
        counters = self._counters
        moved_bytes = counters.bytes_into_tunnels + counters.bytes_out_of_tunnels
        moved_bytes, self._moved_bytes = moved_bytes - self._moved_bytes, moved_bytes
        return moved_bytes < BULK_TURN_BYTES

    def _deliver(self) -> None:
        """Give out the events of what was received."""
        session = self.session
        try:
            for event in session.events(SMALL_FRAMES_PER_TURN):
                if event.kind is _DATA:
                    event.stream.owner.on_data(event.data)  # type: ignore[union-attr]  # DATA has a stream
                else:
                    dispatch(self, event)
                if self.ended:
                    break  # its buffers are gone
        except ProtocolError as error:
            self._fail(error)

    def _go_on(self) -> None:
        """In the next turn: what was left off; then the socket again."""
        if self.ended:
            return
        self.turn += 1
        self.session.now_s = self._loop.time()
        try:
            self._deliver()
        except Exception:
            self._cut_by_mistake()
            return
        if self.session.is_left_off:
            self._loop.call_soon(self._go_on)
        elif not self.ended:
            self._loop.add_reader(self._fd, self._on_readable)
        self._after_events()

    def _after_events(self) -> None:
        if not self.ended and self.session.unsent_bytes:
            self.flush_soon()

    def _on_eof(self) -> None:
        if self.session.close_received or self.session.close_sent:
            self._finish_end()
        else:
            self.cut("connection ended without CLOSE")

    # Into the tunnel.

    def heard(self, talker: object) -> None:
        """Another relay than the last one has something to say: several talk."""
        self.last_talker = talker
        self.shared_turns = SHARED_TURNS

    def wait(self, relay: Resumable) -> None:
        """The tunnel is blocked: ``relay.resume`` is called when it is not any more."""
        self._waiting[relay] = None

    def forget(self, relay: Resumable) -> None:
        """It waits no longer: a peer that takes nothing must not make this side keep relays that have ended."""
        self._waiting.pop(relay, None)

    def flush_soon(self) -> None:
        """Seal and send at the end of this turn; to be called after whatever packed something."""
        if not self.flush_is_due:
            self.flush_is_due = True
            self._at_turn_end(self._flush)

    def _flush(self) -> None:
        self.flush_is_due = False
        if self.ended:
            return
        if self.shared_turns:
            self.shared_turns -= 1
        if not self.is_blocked:
            session = self.session
            if self.is_near and not self.shared_turns and session.unsent_bytes < MAX_CHAT_BYTES and self._is_chat():
                self._expect_soon()
            session.seal()
            self.send()

    def send(self) -> None:
        """Send what is sealed; what the socket does not take blocks the tunnel."""
        session = self.session
        sock = self._sock
        while (view := session.output()) is not None:
            try:
                size = sock.send(view)
            except (BlockingIOError, InterruptedError):
                size = 0
            except OSError as error:
                self.cut(f"connection lost: {error.strerror or error}")
                return
            if size:
                session.sent(size)
            if size < len(view):
                if not self.is_blocked:
                    self.is_blocked = True
                    session.shrink()
                    self._loop.add_writer(self._fd, self.send)
                return
        if self.is_blocked:
            self.is_blocked = False
            self._loop.remove_writer(self._fd)
            if session.unsent_bytes:
                self.flush_soon()  # what was packed meanwhile
            waiting, self._waiting = self._waiting, {}
            for relay in waiting:
                relay.resume()
        if session.close_sent and not session.unsent_bytes:
            self._shut_down()

    # The end.

    def stream_ended(self) -> None:
        """A stream may have ended: whoever counts them looks again."""
        if not self.session.streams:
            self.idle_since_s = self._loop.time()
        if self._on_stream_end is not None:
            self._on_stream_end(self)

    def go_away(self, code: Code) -> None:
        """Tell the peer that no new streams are taken; those that are open go on."""
        if not self.ended:
            self.session.go_away(code)
            self.flush_soon()

    def close(self, code: Code) -> None:
        """End cleanly: streams that are left are reset, then CLOSE, then FIN; the peer's FIN is awaited shortly."""
        if self.ended or self.session.close_sent:
            return
        for stream in list(self.session.streams.values()):
            if stream.owner is not None:
                stream.owner.on_reset(code)
            self.session.reset(stream, code)
        self.session.close(code)
        # What was sent before gets the time that an idle stream gets; the peer's FIN after it, little.
        self._close_timer = self._loop.call_later(self._tick_s * self._idle_ticks, self._finish_end)
        self.flush_soon()

    def _shut_down(self) -> None:
        if self._close_timer is not None:
            self._close_timer.cancel()
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._finish_end()
            return
        idle_s = self._tick_s * self._idle_ticks
        self._close_timer = Farewell(
            self._loop, self._sock, wait_s=CLOSE_WAIT_S, idle_s=idle_s, on_end=self._finish_end
        )

    def say(self, level: int, kind: str, text: str) -> None:
        """A line that the peer can cause as often as it likes."""
        throttle = self._throttle
        log.log(level if throttle is None else throttle.level(kind, level), "%s: %s", self._label, text)

    def cut(self, reason: str) -> None:
        """The connection is gone, or is to go: every relay is reset at once."""
        if self.ended:
            return
        if not self.session.close_sent:
            self._counters.tunnels_lost += 1
            self.say(logging.INFO, "lost", f"{reason}; {self.stream_count} streams are reset")
        self._finish_end()

    def _finish_end(self) -> None:
        if self._leave():
            self._sock.close()

    def _leave(self) -> bool:
        """What every end does once; the socket is left to the caller."""
        if self.ended:
            return False
        self.ended = True
        self.settled.set()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._tick_timer.cancel()
        if self._close_timer is not None:
            self._close_timer.cancel()
        owners = [stream.owner for stream in self.session.streams.values() if stream.owner is not None]
        self.session.close_buffers()
        for owner in owners:
            owner.on_reset(Code.CANCELLED)
        self._waiting.clear()
        # Relays that only deliver what had arrived go on, but not for longer than an idle stream may.
        for relay in self.draining:
            watch(self, relay)
        self.draining.clear()
        self.last_talker = None
        self._on_end(self)
        return True

    def _fail(self, error: ProtocolError) -> None:
        """Fatal error: send nothing, swallow what comes for a random time or length, close."""
        self.say(logging.WARNING, "error", f"protocol error, {self.stream_count} streams are reset: {error}")
        self._counters.protocol_errors += 1
        if self._on_broken is not None and not self.ended:
            self._on_broken()
        if not self._leave():
            return
        limit_bytes = secrets.randbelow(FATAL_DISCARD_BYTES + 1)
        span_ms = (FATAL_DISCARD_MAX_S - FATAL_DISCARD_MIN_S) * 1000
        wait_s = FATAL_DISCARD_MIN_S + secrets.randbelow(span_ms + 1) / 1000
        on_discard = self._on_discard
        on_end = partial(on_discard, self, -1) if on_discard is not None else None
        self.silence = Silence(self._loop, self._sock, wait_s=wait_s, limit_bytes=limit_bytes, on_end=on_end)
        if on_discard is not None:
            on_discard(self, 1)
