"""What each frame does to a session: the receiving half of :mod:`reflex.protocol.session`.

:func:`take` is handed every frame but DATA, which the session takes itself. One function for each type checks
what section 5 of docs/protocol.md says of it, charges the peer for what is of no use, and gives out the
events that follow. They belong to the session and use its internals; they stand in a file of their own so
that each file can be read in one go.

Raises, everywhere: FrameError or FlowControlError, or ProtocolError where the peer has nothing left to be
charged; all of them are fatal to the session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from reflex.errors import AddressError, FlowControlError, FrameError
from reflex.protocol import streams as st
from reflex.protocol.address import decode_address
from reflex.protocol.allowance import ABANDONED_COST, PLAIN_COST, RESET_COST, SESSION_COST, USEFUL_BYTES
from reflex.protocol.credit import give_session_credit, hold, note_credit
from reflex.protocol.events import Event, EventKind
from reflex.protocol.frames import Frame
from reflex.protocol.payloads import check_session_frame, check_size, read_open, read_settings
from reflex.protocol.streams import Stream
from reflex.protocol.wire import (
    CODE,
    DATAGRAM_BACKLOG,
    FIRST_IGNORED_TYPE,
    GOAWAY,
    INCREMENT,
    PING_SIZE,
    SETTING,
    Code,
    FrameType,
    Network,
    Setting,
    Status,
)

if TYPE_CHECKING:
    from reflex.protocol.session import Session


def take(session: Session, frame_type: int, stream_id: int, payload: memoryview) -> Iterator[Event]:
    """Take any frame but DATA; and any at all once the session is ending."""
    if session._is_ending and (session.close_received or frame_type != FrameType.CLOSE):
        return  # nothing is answered after CLOSE, and nothing said after it counts
    handler = HANDLERS.get(frame_type)
    if handler is not None:
        frame = session._frames.acquire()
        try:
            frame.type = frame_type
            frame.stream_id = stream_id
            frame.payload = payload
            yield from handler(session, frame)
        finally:
            session._frames.release(frame)
    elif frame_type < FIRST_IGNORED_TYPE:
        raise FrameError(f"a frame of unknown type {frame_type:#04x}")
    else:
        session._allowance.charge(PLAIN_COST, session.now_s)
    session._check_answers()


def take_late_data(session: Session, stream_id: int, size_bytes: int) -> None:
    """Take DATA for a stream that has ended: its bytes are nobody's."""
    _check_was_opened(session, stream_id)
    if size_bytes < USEFUL_BYTES:
        session._allowance.charge(PLAIN_COST, session.now_s)
    give_session_credit(session, size_bytes)


def on_pad(session: Session, frame: Frame) -> Iterator[Event]:
    check_session_frame(frame)
    session._allowance.charge(PLAIN_COST, session.now_s)
    return iter(())


def on_data_fin(session: Session, frame: Frame) -> Iterator[Event]:
    size = len(frame.payload)
    stream = stream_of(session, frame)
    session._receive_window.receive(size)
    if stream is None:
        session._allowance.charge(PLAIN_COST, session.now_s)
        give_session_credit(session, size)
        return
    if not stream.can(st.RECEIVE_FIN) or stream.network != Network.TCP:
        raise FrameError(f"DATA_FIN on {stream!r}")
    if size:
        hold(session, stream, size)
        event = session._event.set(EventKind.DATA, stream)
        event.data = frame.payload
        yield event
    if stream.can(st.RECEIVE_FIN):  # the application may have reset it while it had the data
        stream.move(st.RECEIVE_FIN)
        session._forget_if_closed(stream)
        yield session._event.set(EventKind.FIN, stream)


def on_reset(session: Session, frame: Frame) -> Iterator[Event]:
    check_size(frame, CODE.size)
    stream = stream_of(session, frame)
    if stream is None or not session._is_client:  # a client has asked for every stream itself
        is_abandoned = stream is not None and stream.state in st.UNANSWERED
        session._allowance.charge(ABANDONED_COST if is_abandoned else RESET_COST, session.now_s)
    if stream is not None:
        stream.move(st.RECEIVE_RESET)
        session._forget_if_closed(stream)
        yield session._event.set(EventKind.RESET, stream, CODE.unpack(frame.payload)[0])


def on_window(session: Session, frame: Frame) -> Iterator[Event]:
    check_size(frame, INCREMENT.size)
    increment = INCREMENT.unpack(frame.payload)[0]
    stream, window = None, session._send_window
    if frame.stream_id:
        stream = stream_of(session, frame)
        if stream is None:
            if increment < 1:
                raise FlowControlError("a window raised by 0")
            session._allowance.charge(PLAIN_COST, session.now_s)
            return
        window = stream.send_window
    # Credit for what was sent is free. More than that makes the window larger: no peer does so often.
    if increment < USEFUL_BYTES or window.available + increment > window.size:
        session._allowance.charge(PLAIN_COST, session.now_s)
    was_shut = window.available == 0
    window.add(increment)
    if stream is None:
        if was_shut:
            yield session._event.set(EventKind.WRITABLE)
        return
    note_credit(session, stream, increment)
    if was_shut and stream.may_send:
        yield session._event.set(EventKind.WRITABLE, stream)


def on_open(session: Session, frame: Frame) -> Iterator[Event]:
    stream_id = frame.stream_id
    if session._is_client or stream_id % 2 == 0 or stream_id <= session._highest_id:
        raise FrameError(f"OPEN of stream {stream_id}: an id that the peer may not use, or has used")
    network, address, status = read_open(frame)
    session._highest_id = stream_id
    if session._goaway_sent:
        session._allowance.charge(RESET_COST, session.now_s)
        session._encoder.write(FrameType.RESET, stream_id, CODE.pack(Code.SHUTTING_DOWN))
    elif len(session.streams) >= session._max_streams:
        session._allowance.charge(RESET_COST, session.now_s)
        session._encoder.write(FrameType.RESET, stream_id, CODE.pack(Code.LIMIT))
    elif status or network is None:
        session._allowance.charge(PLAIN_COST, session.now_s)
        session._encoder.write(FrameType.OPENED, stream_id, bytes([status]))
    else:
        stream = session.streams[stream_id] = Stream(stream_id, st.CALLED, network)
        event = session._event.set(EventKind.OPEN, stream)
        event.address = address
        yield event
        if stream.is_closed and not session._is_ending:  # the application refused it on the spot
            session._allowance.charge(RESET_COST, session.now_s)


def on_opened(session: Session, frame: Frame) -> Iterator[Event]:
    check_size(frame, 1)
    stream = stream_of(session, frame)
    if stream is None:
        session._allowance.charge(PLAIN_COST, session.now_s)
        return
    status = frame.payload[0]
    event = st.RECEIVE_OPENED if status == Status.SUCCEEDED else st.RECEIVE_REFUSAL
    if not stream.can(event):
        raise FrameError(f"OPENED on {stream!r}")
    stream.move(event)
    session._forget_if_closed(stream)
    yield session._event.set(EventKind.REFUSED if stream.is_closed else EventKind.OPENED, stream, status)


def on_datagram(session: Session, frame: Frame) -> Iterator[Event]:
    stream = stream_of(session, frame)
    try:
        address, end = decode_address(frame.payload)
    except AddressError:
        raise FrameError("a DATAGRAM whose address is none") from None
    if stream is None:
        session._allowance.charge(PLAIN_COST, session.now_s)
        return
    if stream.network == Network.TCP or not st.MAY_RECEIVE[stream.state]:
        raise FrameError(f"DATAGRAM on {stream!r}")
    data = frame.payload[end:]
    if stream.held_bytes + len(data) > DATAGRAM_BACKLOG:
        return
    stream.held_bytes += len(data)
    session._budget.buffered += len(data)
    event = session._event.set(EventKind.DATAGRAM, stream)
    event.data = data
    event.address = address
    yield event


def on_ping(session: Session, frame: Frame) -> Iterator[Event]:
    check_session_frame(frame)
    check_size(frame, PING_SIZE)
    session._allowance.charge(PLAIN_COST, session.now_s)
    session._encoder.write(FrameType.PONG, 0, frame.payload)
    return iter(())


def on_pong(session: Session, frame: Frame) -> Iterator[Event]:
    check_session_frame(frame)
    check_size(frame, PING_SIZE)
    session._allowance.charge(PLAIN_COST, session.now_s)
    session._liveness.pong(frame.payload, session.now_s)
    return iter(())


def on_settings(session: Session, frame: Frame) -> Iterator[Event]:
    check_session_frame(frame)
    session._allowance.charge(SESSION_COST + len(frame.payload) // SETTING.size, session.now_s)
    for setting, value in read_settings(frame):
        if setting == Setting.MAX_STREAMS:
            session._peer_max_streams = value
        elif setting == Setting.TIME_MS:
            session.peer_time_ms = value
        elif setting == Setting.KEEPALIVE_MS:
            session._liveness.set_peer_interval(value)
    yield session._event.set(EventKind.SETTINGS)


def on_goaway(session: Session, frame: Frame) -> Iterator[Event]:
    check_session_frame(frame)
    check_size(frame, GOAWAY.size)
    session._allowance.charge(SESSION_COST, session.now_s)
    last_id, code = GOAWAY.unpack(frame.payload)
    if not session._goaway_received:
        session._goaway_received = True
        yield session._event.set(EventKind.GOAWAY, None, code)
    if session._is_client:
        for stream in [stream for stream_id, stream in session.streams.items() if stream_id > last_id]:
            if not stream.is_closed:
                stream.move(st.RECEIVE_RESET)
                session._forget_if_closed(stream)
                yield session._event.set(EventKind.RESET, stream, code)


def on_close(session: Session, frame: Frame) -> Iterator[Event]:
    check_session_frame(frame)
    check_size(frame, CODE.size)
    session.close_received = session._is_ending = True
    yield session._event.set(EventKind.CLOSED, None, CODE.unpack(frame.payload)[0])


def stream_of(session: Session, frame: Frame) -> Stream | None:
    """The frame's stream; None where it has ended.

    A number below the highest one that was opened counts as that of a stream that has ended, also where the
    client skipped it: no number is remembered.

    Raises:
        FrameError: there never was one.
    """
    stream = session.streams.get(frame.stream_id)
    if stream is None:
        _check_was_opened(session, frame.stream_id)
    return stream


def _check_was_opened(session: Session, stream_id: int) -> None:
    # Ids of the client are odd and rising; version 1's server opens none.
    if stream_id % 2 == 0 or stream_id > session._highest_id:
        raise FrameError(f"a frame for stream {stream_id}, which was never opened")


HANDLERS: Final[dict[int, Callable[[Session, Frame], Iterator[Event]]]] = {
    FrameType.PAD: on_pad,
    FrameType.DATA_FIN: on_data_fin,
    FrameType.RESET: on_reset,
    FrameType.WINDOW: on_window,
    FrameType.OPEN: on_open,
    FrameType.OPENED: on_opened,
    FrameType.DATAGRAM: on_datagram,
    FrameType.PING: on_ping,
    FrameType.PONG: on_pong,
    FrameType.SETTINGS: on_settings,
    FrameType.GOAWAY: on_goaway,
    FrameType.CLOSE: on_close,
}
