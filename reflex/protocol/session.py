"""Many streams over one connection: bytes in, events out; calls in, bytes out.

Strategy. The session owns an encoder and a decoder and every rule of docs/protocol.md, section 5: what is
sent in :mod:`reflex.protocol.outgoing`, what each frame but DATA does in :mod:`reflex.protocol.incoming`,
flow control's credit in :mod:`reflex.protocol.credit`. Here is the walk through what was received. It
does no I/O: the application receives into :meth:`Session.receive_buffer`, draws :meth:`Session.events`,
makes calls, and sends :meth:`Session.output`. It knows no clock: the application sets ``now_s``.

What a peer may make this side keep is bounded: DATA by the windows, streams by the limit that SETTINGS
announced, answers (PONG, RESET, WINDOW) by MAX_UNSENT_BYTES, after which the session is over. So it is
after too many frames that are of no use to anybody (:mod:`reflex.protocol.allowance`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from reflex.errors import FrameError, ProtocolError
from reflex.protocol.allowance import Allowance
from reflex.protocol.credit import give_session_credit, give_stream_credit, give_withheld_credit
from reflex.protocol.events import NO_DATA, Event, EventKind
from reflex.protocol.frames import FrameDecoder, FrameEncoder
from reflex.protocol.handshake import SessionSecrets
from reflex.protocol.incoming import take, take_late_data
from reflex.protocol.keys import CipherState
from reflex.protocol.liveness import Liveness
from reflex.protocol.outgoing import SendingHalf
from reflex.protocol.pools import Pools
from reflex.protocol.share import Share
from reflex.protocol.streams import MAY_RECEIVE, Stream
from reflex.protocol.window import Budget
from reflex.protocol.wire import (
    DEFAULT_MAX_STREAMS,
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    KEEPALIVE_S,
    MAX_FRAME_SIZE,
    SETTING,
    FrameType,
    Setting,
)

# Answers that wait for a peer which does not read them; DATA is bounded by the windows.
MAX_UNSENT_BYTES: Final = 1_048_576
# DATA below this is counted, since a record holds thousands of such frames, each of which takes microseconds.
SMALL_DATA_BYTES: Final = 64
NO_LIMIT: Final = 1 << 30  # more small frames than one draw can bring

# Plain ints and bound names for what is asked for every frame.
_DATA: Final = int(FrameType.DATA)
_DATA_EVENT: Final = EventKind.DATA
_unpack_header = FRAME_HEADER.unpack_from


class Session(SendingHalf):
    """One session. Made by :meth:`client` or :meth:`server`; its SETTINGS are packed at once.

    Attributes:
        now_s: monotonic seconds; the application sets it before it draws events or reports
            consumed bytes.
        share: its owner's part of the process's budget.
        streams: the live streams by id.
        sealed_records: empty unless sealed bytes wait to be sent; for those who ask at every turn.
        bulk_s: when a stream was last seen to carry bulk data; minus infinity until then.
        peer_time_ms: the peer's clock when it sent its SETTINGS, ms since 1970; 0 until then.
        close_sent, close_received: whether the session has ended cleanly, by this side or by the peer.
    """

    __slots__ = (
        "_allowance",
        "_decoder",
        "_event",
        "_frames",
        "_left_off",
        "_liveness",
        "_max_streams",
        "_withheld",
        "bulk_s",
        "now_s",
        "peer_time_ms",
        "sealed_records",
    )

    def __init__(
        self,
        secrets: SessionSecrets,
        pools: Pools,
        *,
        is_client: bool,
        time_ms: int,
        now_s: float = 0.0,
        max_streams: int = DEFAULT_MAX_STREAMS,
        keepalive_s: float = KEEPALIVE_S,
        budget: Budget | None = None,
        share: Share | None = None,
    ) -> None:
        outgoing, incoming = secrets.root_client_to_server, secrets.root_server_to_client
        if not is_client:
            outgoing, incoming = incoming, outgoing
        encoder = FrameEncoder(CipherState(secrets.suite, outgoing), pools.buffers)
        super().__init__(encoder, share or Share(budget or Budget()), is_client=is_client)
        self.sealed_records: Sequence[object] = encoder.records
        self._decoder = FrameDecoder(CipherState(secrets.suite, incoming), pools.buffers, pools.frames)
        self._frames = pools.frames
        self._event = Event()
        self._max_streams = 0 if is_client else max_streams  # what the peer may have open
        self._withheld = 0  # received bytes whose session credit waits for the reader
        self.now_s = now_s
        self._liveness = Liveness(keepalive_s, now_s)
        self._allowance = Allowance(now_s)
        self._allowance.allow_streams(self._max_streams)
        self.peer_time_ms = 0
        self.bulk_s = -math.inf
        self._left_off: tuple[memoryview, int] | None = None  # where the last draw stopped: the body, the next frame
        encoder.write(
            FrameType.SETTINGS,
            0,
            SETTING.pack(Setting.MAX_STREAMS, self._max_streams)
            + SETTING.pack(Setting.TIME_MS, time_ms)
            + SETTING.pack(Setting.KEEPALIVE_MS, int(keepalive_s * 1000)),
        )

    @classmethod
    def client(
        cls,
        secrets: SessionSecrets,
        pools: Pools,
        *,
        time_ms: int,
        now_s: float = 0.0,
        keepalive_s: float = KEEPALIVE_S,
        budget: Budget | None = None,
        share: Share | None = None,
    ) -> Session:
        """The half that connects and opens streams.

        Args:
            secrets: what the handshake gave.
            pools: where every buffer is borrowed.
            time_ms: this machine's clock, ms since 1970, for SETTINGS.
            now_s: monotonic seconds.
            keepalive_s: after how long without sending a PING is due.
            budget: what all sessions of the process share; by default one of its own.
            share: the part of it that its owner's sessions have together; by default one of its own.
        """
        return cls(
            secrets,
            pools,
            is_client=True,
            time_ms=time_ms,
            now_s=now_s,
            keepalive_s=keepalive_s,
            budget=budget,
            share=share,
        )

    @classmethod
    def server(
        cls,
        secrets: SessionSecrets,
        pools: Pools,
        *,
        time_ms: int,
        now_s: float = 0.0,
        max_streams: int = DEFAULT_MAX_STREAMS,
        keepalive_s: float = KEEPALIVE_S,
        budget: Budget | None = None,
        share: Share | None = None,
    ) -> Session:
        """The half that accepts. ``max_streams``: how many the client may have open; the rest as for a client."""
        return cls(
            secrets,
            pools,
            is_client=False,
            time_ms=time_ms,
            now_s=now_s,
            max_streams=max_streams,
            keepalive_s=keepalive_s,
            budget=budget,
            share=share,
        )

    # Bytes in, events out.

    def receive_buffer(self) -> memoryview:
        """Where to receive the next bytes; see :meth:`FrameDecoder.receive_buffer`."""
        return self._decoder.receive_buffer()

    def received(self, size_bytes: int) -> None:
        """So many bytes were received into :meth:`receive_buffer` (0: none, the buffer goes back)."""
        self._decoder.received(size_bytes)

    def feed(self, data: bytes | memoryview) -> Iterator[Event]:
        """Take bytes of any length and give out their events: the convenient way, at the price of a copy."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._decoder.feed(rest) :]
            yield from self.events()

    def events(self, small_frames: int = NO_LIMIT) -> Iterator[Event]:
        """Give out what the received bytes say. To be drawn to the end.

        The event object, and its ``data``, are valid until the next one is drawn.

        Args:
            small_frames: how many DATA frames below SMALL_DATA_BYTES to give out at the most. Where there
                are more, :attr:`is_left_off` is true afterwards, and this is to be called again before
                anything else is received.

        Raises:
            ProtocolError: fatal (protocol section 5): call :meth:`close_buffers`, send nothing more.
        """
        self._liveness.received_s = self.now_s
        self._check_answers()  # those to DATA, too, which is not asked frame by frame
        decoder = self._decoder
        event = self._event
        live = self.streams
        session_window = self._receive_window
        budget = self._budget
        share = self.share
        try:
            body, end = self._left_off or (decoder.next_body(), 0)
            self._left_off = None
            while body is not None:
                size = len(body)
                while end < size:
                    if self._is_over:
                        return  # the body is not this session's any more
                    start = end + FRAME_HEADER_SIZE
                    if start > size:
                        raise FrameError(f"{size - end} bytes at the end of a body are no frame")
                    type_and_size, stream_id = _unpack_header(body, end)
                    payload_bytes = type_and_size & MAX_FRAME_SIZE
                    end = start + payload_bytes
                    if end > size:
                        raise FrameError(f"a frame passes the end of its body by {end - size} bytes")
                    if type_and_size >> 24 != _DATA or self._is_ending:
                        yield from take(self, type_and_size >> 24, stream_id, body[start:end])
                        continue
                    # DATA, the common case, without a call: windows first, then the stream.
                    if payload_bytes < SMALL_DATA_BYTES:
                        if not payload_bytes:
                            raise FrameError("an empty DATA frame")
                        if not small_frames:
                            self._left_off = body, start - FRAME_HEADER_SIZE
                            return
                        small_frames -= 1
                    if payload_bytes > session_window.available:
                        session_window.receive(payload_bytes)  # raises
                    session_window.available -= payload_bytes
                    stream = live.get(stream_id)
                    if stream is None:
                        take_late_data(self, stream_id, payload_bytes)
                        continue
                    if not MAY_RECEIVE[stream.state] or not stream.is_tcp:
                        raise FrameError(f"DATA on {stream!r}")
                    window = stream.receive_window
                    if payload_bytes > window.available:
                        window.receive(payload_bytes)  # raises
                    window.available -= payload_bytes
                    stream.held_bytes += payload_bytes
                    budget.buffered += payload_bytes
                    if share.kept + budget.buffered + budget.growth > share.soft_limit:
                        self._withheld += payload_bytes
                    else:
                        session_window.owed += payload_bytes
                        if session_window.owed >= session_window.due:
                            give_session_credit(self, 0)
                    event.kind = _DATA_EVENT
                    event.stream = stream
                    event.data = body[start:end]
                    yield event
                body, end = decoder.next_body(), 0
        finally:
            event.data = NO_DATA  # an idle session holds no buffer
            if self._left_off is None:
                decoder.settle()

    @property
    def is_left_off(self) -> bool:
        """Whether :meth:`events` stopped at its limit, with more to give out."""
        return self._left_off is not None

    def _check_answers(self) -> None:
        if self._encoder.control_bytes > MAX_UNSENT_BYTES:
            raise ProtocolError("the peer asks for answers and does not read them")

    # Flow control and keepalive.

    def consumed(self, stream: Stream, size_bytes: int) -> None:
        """The application is done with so many bytes of the stream: the peer may send as many more."""
        stream.held_bytes -= size_bytes
        self._budget.buffered -= size_bytes
        if self._is_ending:
            return
        if self._withheld:
            size = min(self._withheld, size_bytes)
            self._withheld -= size
            give_session_credit(self, size)
        if MAY_RECEIVE[stream.state] and stream.is_tcp:
            window = stream.receive_window
            window.owed += size_bytes
            if window.owed >= window.due:
                give_stream_credit(self, stream)

    def ping(self) -> None:
        """Send a PING; its PONG tells the round trip. Nothing after CLOSE."""
        if self._is_ending:
            return
        self._encoder.write(FrameType.PING, 0, self._liveness.next_ping(self.now_s))

    @property
    def round_trip_s(self) -> float:
        """The running mean of measured round trips; 0.0 until one was measured."""
        return self._liveness.round_trip_s

    @property
    def round_trip_is_measured(self) -> bool:
        """Whether a round trip was measured; a near peer's may be 0.0 by a clock of milliseconds."""
        return self._liveness.is_measured

    @property
    def heard_s(self) -> float:
        """When something last came from the peer, in the time of ``now_s``."""
        return self._liveness.received_s

    @property
    def awaits_pong(self) -> bool:
        """Whether the last PING is still unanswered."""
        return self._liveness.awaits_pong

    @property
    def silence_left_s(self) -> float:
        """How much longer, from ``now_s`` on, the peer may be silent before it is taken for dead."""
        return self._liveness.silence_left_s(self.now_s)

    def is_dead(self) -> bool:
        """To be asked every second or so, with ``now_s`` set: whether the peer is dead.

        Packs a PING where one is due; the application then sends :meth:`output`.
        """
        if self._liveness.is_dead(self.now_s):
            return True
        if self._liveness.ping_is_due(self.now_s):
            self.ping()
            self._liveness.sent_s = self.now_s  # as good as sent: where nothing can be sent, no further ones pile up
        if self._withheld and not self._is_ending:
            give_withheld_credit(self)
        return False

    # Bytes out.

    @property
    def unsent_bytes(self) -> int:
        """Bytes that are packed or sealed and not yet sent."""
        return self._encoder.unsent_bytes

    @property
    def has_output(self) -> bool:
        """Whether sealed bytes wait to be sent."""
        return self._encoder.has_output

    def seal(self) -> None:
        """Seal what is packed: to be called once a turn, before :meth:`output`."""
        if self._encoder.is_packing:
            self._liveness.sent_s = self.now_s
        self._encoder.seal()

    def output(self) -> memoryview | None:
        """The next sealed bytes to send; see :meth:`FrameEncoder.output`."""
        return self._encoder.output()

    def sent(self, size_bytes: int) -> None:
        """So many bytes of :meth:`output` were sent."""
        self._encoder.sent(size_bytes)

    def shrink(self) -> None:
        """The peer takes nothing for a while: see :meth:`FrameEncoder.shrink`."""
        self._encoder.shrink()

    def data_to_send(self) -> bytes:
        """Seal, and take everything that waits: the convenient way, at the price of a copy."""
        self.seal()
        parts = []
        while (part := self.output()) is not None:
            parts.append(bytes(part))
            self.sent(len(part))
        return b"".join(parts)

    def close_buffers(self) -> None:
        """Give every buffer and all growth back; every stream is closed.

        After this only :meth:`consumed` may be called, for what streams had received before.
        """
        self._left_off = None
        self._encoder.close()
        self._decoder.close()
        self._is_over = self._is_ending = True
        self._goaway_received = True
        self._drop_streams()
