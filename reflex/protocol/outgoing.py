"""What the application asks of a session's streams: the sending half of :mod:`reflex.protocol.session`.

Streams are opened, answered, sent on, finished and reset; then the session itself goes away and closes. Each
call checks the stream's state and the windows, and packs one frame.
"""

from __future__ import annotations

from typing import Final

from reflex.errors import LocalError, SessionClosed, StreamsExhausted, StreamStateError, WindowExceeded
from reflex.protocol import streams as st
from reflex.protocol.address import Address
from reflex.protocol.frames import FrameEncoder
from reflex.protocol.share import Share
from reflex.protocol.streams import MAY_SEND, Stream
from reflex.protocol.window import ReceiveWindow, SendWindow
from reflex.protocol.wire import (
    CODE,
    DEFAULT_MAX_STREAMS,
    GOAWAY,
    MAX_PAYLOAD_SIZE,
    MAX_STREAM_ID,
    SESSION_WINDOW,
    Code,
    FrameType,
    Network,
    Status,
)

_DATA: Final = int(FrameType.DATA)  # a plain int for what is asked for every frame


class SendingHalf:
    """What a session is to those who send on it. Made as a part of :class:`reflex.protocol.session.Session` only.

    Args:
        encoder: packs what is sent; the session's.
        share: where streams that end give their growth back.
        is_client: whether this side opens streams.
    """

    __slots__ = (
        "_budget",
        "_encoder",
        "_goaway_received",
        "_goaway_sent",
        "_highest_id",
        "_is_client",
        "_is_ending",
        "_is_over",
        "_peer_max_streams",
        "_receive_window",
        "_send_window",
        "close_received",
        "close_sent",
        "share",
        "streams",
    )

    def __init__(self, encoder: FrameEncoder, share: Share, *, is_client: bool) -> None:
        self._encoder = encoder
        self.share = share
        self._budget = share.budget
        self._is_client = is_client
        self.streams: dict[int, Stream] = {}
        self._highest_id = -1  # of the client's streams: the last one opened
        self._peer_max_streams = DEFAULT_MAX_STREAMS
        self._send_window = SendWindow(SESSION_WINDOW)
        self._receive_window = ReceiveWindow(SESSION_WINDOW)  # it has grown by what its streams have
        self._goaway_sent = False
        self._goaway_received = False
        self._is_over = False  # close_buffers was called
        self._is_ending = False  # it was, or CLOSE was sent or received
        self.close_sent = False
        self.close_received = False

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
            LocalError: address and data are more than a frame holds, MAX_PAYLOAD_SIZE.
        """
        if stream.is_tcp:
            raise StreamStateError(stream.id, repr(stream), "send a DATAGRAM")
        payload = address.encode() + data
        if len(payload) > MAX_PAYLOAD_SIZE:
            raise LocalError(f"a datagram of {len(payload)} bytes with its address; at most {MAX_PAYLOAD_SIZE} fit")
        stream.move(st.SEND_DATA)
        self._encoder.write(FrameType.DATAGRAM, stream.id, payload)

    def reset(self, stream: Stream, code: Code) -> None:
        """End the stream in both directions; nothing where it has ended."""
        if not stream.is_closed:
            stream.move(st.SEND_RESET)
            self._encoder.write(FrameType.RESET, stream.id, CODE.pack(code))
            self._forget_if_closed(stream)

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

    def _forget_if_closed(self, stream: Stream) -> None:
        if stream.is_closed:
            del self.streams[stream.id]
            if stream.grown_bytes:
                self.share.give_growth(stream.grown_bytes)
                self._receive_window.grow(-stream.grown_bytes)
                stream.grown_bytes = 0

    def _drop_streams(self) -> None:
        """Every stream that is left is closed, and its growth given back."""
        for stream in self.streams.values():
            self.share.give_growth(stream.grown_bytes)
            stream.grown_bytes = 0
            stream.state = st.CLOSED
        self.streams.clear()
