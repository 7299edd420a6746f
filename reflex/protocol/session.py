"""Many streams over one connection: bytes in, events out; calls in, bytes out.

Strategy. The session owns an encoder and a decoder and every rule of docs/protocol.md, section 5. It
does no I/O: the application receives into :meth:`Session.receive_buffer`, draws :meth:`Session.events`,
makes calls, and sends :meth:`Session.output`. It knows no clock: the application sets ``now_s``.

What a peer may make this side keep is bounded: DATA by the windows, streams by the limit that SETTINGS
announced, answers (PONG, RESET, WINDOW) by MAX_UNSENT_BYTES, after which the session is over. So it is
after too many frames that are of no use to anybody (:mod:`reflex.protocol.allowance`).

Credit of a stream is given back when the application has consumed the bytes. Credit of the session is
given back on arrival, so that one stream whose reader is slow does not stop the others, for as long as
the owner's share of the process's budget lasts; from there on it, too, waits for the reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from reflex.errors import (
    FrameError,
    LocalError,
    ProtocolError,
    SessionClosed,
    StreamsExhausted,
    StreamStateError,
    WindowExceeded,
)
from reflex.protocol import streams as st
from reflex.protocol.address import Address
from reflex.protocol.allowance import PLAIN_COST, USEFUL_BYTES, Allowance
from reflex.protocol.events import Event, EventKind
from reflex.protocol.frames import FrameDecoder, FrameEncoder
from reflex.protocol.handshake import SessionSecrets
from reflex.protocol.incoming import HANDLERS
from reflex.protocol.keys import CipherState
from reflex.protocol.liveness import Liveness
from reflex.protocol.pools import Pools
from reflex.protocol.share import Share
from reflex.protocol.streams import MAY_RECEIVE, MAY_SEND, Stream
from reflex.protocol.window import GROWTH_FACTOR, MAX_STREAM_RECEIVE_WINDOW, Budget, ReceiveWindow, SendWindow
from reflex.protocol.wire import (
    CODE,
    DEFAULT_MAX_STREAMS,
    FIRST_IGNORED_TYPE,
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    GOAWAY,
    INCREMENT,
    KEEPALIVE_S,
    MAX_FRAME_SIZE,
    MAX_STREAM_ID,
    SESSION_WINDOW,
    SETTING,
    Code,
    FrameType,
    Network,
    Setting,
    Status,
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


class Session:
    """One session. Made by :meth:`client` or :meth:`server`; its SETTINGS are packed at once.

    Attributes:
        now_s: monotonic seconds; the application sets it before it draws events or reports
            consumed bytes.
        share: its owner's part of the process's budget.
        streams: the live streams by id.
        sealed_records: empty unless sealed bytes wait to be sent; for those who ask at every turn.
        peer_time_ms: the peer's clock when it sent its SETTINGS, ms since 1970; 0 until then.
        close_sent, close_received: whether the session has ended cleanly, by this side or by the peer.
    """

    __slots__ = (
        "_allowance",
        "_budget",
        "_decoder",
        "_encoder",
        "_event",
        "_frames",
        "_goaway_received",
        "_goaway_sent",
        "_highest_id",
        "_is_client",
        "_is_ending",
        "_is_over",
        "_left_off",
        "_liveness",
        "_max_streams",
        "_peer_max_streams",
        "_receive_window",
        "_send_window",
        "_withheld",
        "close_received",
        "close_sent",
        "now_s",
        "peer_time_ms",
        "sealed_records",
        "share",
        "streams",
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
        self._encoder = FrameEncoder(CipherState(secrets.suite, outgoing), pools.buffers)
        self.sealed_records: Sequence[object] = self._encoder.records
        self._decoder = FrameDecoder(CipherState(secrets.suite, incoming), pools.buffers, pools.frames)
        self._frames = pools.frames
        self._event = Event()
        self._is_client = is_client
        self.share = share or Share(budget or Budget())
        self._budget = self.share.budget
        self.streams: dict[int, Stream] = {}
        self._highest_id = -1  # of the client's streams: the last one opened
        self._max_streams = 0 if is_client else max_streams  # what the peer may have open
        self._peer_max_streams = DEFAULT_MAX_STREAMS
        self._send_window = SendWindow(SESSION_WINDOW)
        self._receive_window = ReceiveWindow(SESSION_WINDOW)
        self._withheld = 0  # received bytes whose session credit waits for the reader
        self.now_s = now_s
        self._liveness = Liveness(keepalive_s, now_s)
        self._allowance = Allowance(now_s)
        self.peer_time_ms = 0
        self._goaway_sent = False
        self._goaway_received = False
        self._left_off: tuple[memoryview, int] | None = None  # where the last draw stopped: the body, the next frame
        self._is_over = False  # close_buffers was called
        self._is_ending = False  # it was, or CLOSE was sent or received
        self.close_sent = False
        self.close_received = False
        self._encoder.write(
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
                        yield from self._take(type_and_size >> 24, stream_id, body[start:end])
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
                        self._take_late_data(stream_id, payload_bytes)
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
                            self._give_session_credit(0)
                    event.kind = _DATA_EVENT
                    event.stream = stream
                    event.data = body[start:end]
                    yield event
                body, end = decoder.next_body(), 0
        finally:
            if self._left_off is None:
                decoder.settle()

    @property
    def is_left_off(self) -> bool:
        """Whether :meth:`events` stopped at its limit, with more to give out."""
        return self._left_off is not None

    def _take_late_data(self, stream_id: int, size_bytes: int) -> None:
        """DATA for a stream that has ended: its bytes are nobody's."""
        self._check_was_opened(stream_id)
        if size_bytes < USEFUL_BYTES:
            self._allowance.charge(PLAIN_COST, self.now_s)
        self._give_session_credit(size_bytes)

    def _take(self, frame_type: int, stream_id: int, payload: memoryview) -> Iterator[Event]:
        """Any frame but DATA; and any at all once the session is ending."""
        if self._is_ending and (self.close_received or frame_type != FrameType.CLOSE):
            return  # nothing is answered after CLOSE, and nothing said after it counts
        handler = HANDLERS.get(frame_type)
        if handler is not None:
            frame = self._frames.acquire()
            try:
                frame.type = frame_type
                frame.stream_id = stream_id
                frame.payload = payload
                yield from handler(self, frame)
            finally:
                self._frames.release(frame)
        elif frame_type < FIRST_IGNORED_TYPE:
            raise FrameError(f"a frame of unknown type {frame_type:#04x}")
        else:
            self._allowance.charge(PLAIN_COST, self.now_s)
        self._check_answers()

    def _check_answers(self) -> None:
        if self._encoder.control_bytes > MAX_UNSENT_BYTES:
            raise ProtocolError("the peer asks for answers and does not read them")

    def _hold(self, stream: Stream, size_bytes: int) -> None:
        """Count payload that the application now has to consume."""
        stream.receive_window.receive(size_bytes)
        stream.held_bytes += size_bytes
        self._budget.buffered += size_bytes
        if self._has_room_to_hold():
            self._give_session_credit(size_bytes)
        else:
            self._withheld += size_bytes

    def _has_room_to_hold(self) -> bool:
        """Whether its owner keeps no more than what the process has left; :meth:`events` asks it without a call."""
        budget = self._budget
        return self.share.kept + budget.buffered + budget.growth <= self.share.soft_limit

    def _check_was_opened(self, stream_id: int) -> None:
        # Ids of the client are odd and rising; version 1's server opens none.
        if stream_id % 2 == 0 or stream_id > self._highest_id:
            raise FrameError(f"a frame for stream {stream_id}, which was never opened")

    def _give_session_credit(self, size_bytes: int) -> None:
        window = self._receive_window
        if window.release(size_bytes):
            self._encoder.write(FrameType.WINDOW, 0, INCREMENT.pack(window.update(self.now_s)))

    # Calls of the application.

    @property
    def has_room(self) -> bool:
        """Whether :meth:`open` would be allowed."""
        return (
            not (self._goaway_received or self._goaway_sent or self.close_sent or self.close_received)
            and len(self.streams) < self._peer_max_streams
            and self._highest_id + 2 <= MAX_STREAM_ID
        )

    def open(self, address: Address | None, network: Network = Network.TCP) -> Stream:
        """Open a stream; DATA may follow at once.

        Args:
            address: the target; None for UDP.
            network: TCP or UDP.

        Raises:
            SessionClosed: the session takes no new streams.
            StreamsExhausted: the peer's limit is reached, or the ids have run out.
            LocalError: TCP without an address, or UDP with one.
        """
        if (address is None) != (network == Network.UDP):
            raise LocalError("a TCP stream is opened with an address, a UDP stream without")
        if not self._is_client or self._goaway_received or self._goaway_sent or self.close_sent or self.close_received:
            raise SessionClosed("this session opens no new streams")
        if not self.has_room:
            raise StreamsExhausted(f"{len(self.streams)} streams are open, the peer allows {self._peer_max_streams}")
        self._highest_id += 2
        stream = self.streams[self._highest_id] = Stream(self._highest_id, st.CALLING, network)
        target = b"" if address is None else address.encode()
        self._encoder.write(FrameType.OPEN, stream.id, bytes([network]) + target)
        if self._highest_id + 2 > MAX_STREAM_ID:
            self.go_away(Code.NONE)  # the ids have run out
        return stream

    def accept(self, stream: Stream) -> None:
        """Answer OPEN: the target is connected."""
        stream.move(st.SEND_OPENED)
        self._encoder.write(FrameType.OPENED, stream.id, bytes([Status.SUCCEEDED]))

    def refuse(self, stream: Stream, status: Status) -> None:
        """Answer OPEN: there will be no stream, for this reason."""
        stream.move(st.SEND_REFUSAL)
        self._encoder.write(FrameType.OPENED, stream.id, bytes([status]))
        self._forget_if_closed(stream)

    def reserve(self, stream: Stream, wanted_bytes: int) -> memoryview | None:
        """Room to receive DATA into, straight into its place; then :meth:`commit` what was filled.

        Args:
            stream: one that may send.
            wanted_bytes: how much at the most, 1 to MAX_PAYLOAD_SIZE.

        Returns:
            The view, valid until the next call of any other method; shorter where a window or the
            record ends. None where a window is used up: a WRITABLE event follows.

        Raises:
            StreamStateError: the stream has ended sending, or carries datagrams.
        """
        if not MAY_SEND[stream.state] or not stream.is_tcp:
            raise StreamStateError(stream.id, repr(stream), "send DATA")
        available = min(stream.send_window.available, self._send_window.available)
        if available < wanted_bytes:
            if available <= 0:
                return None
            wanted_bytes = available
        return self._encoder.reserve(wanted_bytes)

    def commit(self, stream: Stream, size_bytes: int) -> None:
        """The first ``size_bytes`` of the reserved view are DATA of the stream; for 0 nothing is written.

        Raises:
            WindowExceeded: more than was reserved; nothing is written.
        """
        if not size_bytes:
            return
        window = stream.send_window
        session_window = self._send_window
        if size_bytes > window.available or size_bytes > session_window.available:
            raise WindowExceeded(size_bytes, min(window.available, session_window.available))
        window.available -= size_bytes
        session_window.available -= size_bytes
        self._encoder.commit(_DATA, stream.id, size_bytes)

    def send(self, stream: Stream, data: bytes | memoryview) -> int:
        """Send as much of ``data`` as the windows allow, copying it; return how many bytes that was."""
        rest = memoryview(data)
        while rest and (room := self.reserve(stream, min(len(rest), 65_536))) is not None:
            size = min(len(room), len(rest))
            room[:size] = rest[:size]
            self.commit(stream, size)
            rest = rest[size:]
        return len(data) - len(rest)

    def finish(self, stream: Stream) -> None:
        """This side has sent its last on the stream.

        Raises:
            StreamStateError: it had, or the stream carries datagrams, which ends by a reset.
        """
        if not stream.is_tcp:
            raise StreamStateError(stream.id, repr(stream), "send DATA_FIN")
        stream.move(st.SEND_FIN)
        self._encoder.write(FrameType.DATA_FIN, stream.id)
        self._forget_if_closed(stream)

    def send_datagram(self, stream: Stream, address: Address, data: bytes) -> None:
        """Send one datagram on a UDP stream.

        Raises:
            StreamStateError: the stream has ended, or is no UDP stream.
        """
        if stream.is_tcp:
            raise StreamStateError(stream.id, repr(stream), "send a DATAGRAM")
        stream.move(st.SEND_DATA)
        self._encoder.write(FrameType.DATAGRAM, stream.id, address.encode() + data)

    def reset(self, stream: Stream, code: Code) -> None:
        """End the stream in both directions; nothing where it has ended."""
        if not stream.is_closed:
            stream.move(st.SEND_RESET)
            self._encoder.write(FrameType.RESET, stream.id, CODE.pack(code))
            self._forget_if_closed(stream)

    def consumed(self, stream: Stream, size_bytes: int) -> None:
        """The application is done with so many bytes of the stream: the peer may send as many more."""
        stream.held_bytes -= size_bytes
        self._budget.buffered -= size_bytes
        if self._is_ending:
            return
        if self._withheld:
            size = min(self._withheld, size_bytes)
            self._withheld -= size
            self._give_session_credit(size)
        if MAY_RECEIVE[stream.state] and stream.is_tcp:
            window = stream.receive_window
            window.owed += size_bytes
            if window.owed >= window.due:
                self._update_stream_window(stream)

    def _update_stream_window(self, stream: Stream) -> None:
        window = stream.receive_window
        liveness = self._liveness
        budget = self._budget
        growth = min((GROWTH_FACTOR - 1) * window.size, MAX_STREAM_RECEIVE_WINDOW - window.size, budget.growth_left)
        if growth > 0 and window.wants_growth(self.now_s, liveness.round_trip_s) and budget.take_growth(growth):
            window.grow(growth)
            stream.grown_bytes += growth
            # The session's window grows along, or it would be the limit instead.
            self._receive_window.grow(growth)
            self._give_session_credit(0)
        if liveness.measurement_is_due(self.now_s):
            self.ping()
        self._encoder.write(FrameType.WINDOW, stream.id, INCREMENT.pack(window.update(self.now_s)))

    def _forget_if_closed(self, stream: Stream) -> None:
        if stream.is_closed:
            del self.streams[stream.id]
            if stream.grown_bytes:
                self._budget.give_growth(stream.grown_bytes)
                self._receive_window.grow(-stream.grown_bytes)
                stream.grown_bytes = 0

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

    def go_away(self, code: Code) -> None:
        """Take no new streams; those that are open go on."""
        if not self._goaway_sent and not self._is_ending:
            self._goaway_sent = True
            last_id = 0 if self._is_client else max(self._highest_id, 0)
            self._encoder.write(FrameType.GOAWAY, 0, GOAWAY.pack(last_id, code))

    def close(self, code: Code) -> None:
        """End the session cleanly: nothing is sent after this. Streams that are open are lost."""
        if not self._is_over and not self.close_sent:
            self._encoder.write(FrameType.CLOSE, 0, CODE.pack(code))
            self.close_sent = self._is_ending = True
            self._drop_streams()

    def _drop_streams(self) -> None:
        """Every stream that is left is closed, and its growth given back."""
        for stream in self.streams.values():
            self._budget.give_growth(stream.grown_bytes)
            stream.grown_bytes = 0
            stream.state = st.CLOSED
        self.streams.clear()

    def is_dead(self) -> bool:
        """To be asked every second or so, with ``now_s`` set: whether the peer is dead.

        Packs a PING where one is due; the application then sends :meth:`output`.
        """
        if self._liveness.is_dead(self.now_s):
            return True
        if self._liveness.ping_is_due(self.now_s):
            self.ping()
            self._liveness.sent_s = self.now_s  # as good as sent: where nothing can be sent, no further ones pile up
        if self._withheld and not self._is_ending and self._has_room_to_hold():
            withheld, self._withheld = self._withheld, 0
            self._give_session_credit(withheld)  # others have made room
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
