"""What a session holds for its application, and the credit that it gives its peer for more.

Credit of a stream is given back when the application has consumed the bytes; the stream's window grows
where it is the limit, and the session's along with it. Credit of the session is given back on arrival, so
that one stream whose reader is slow does not stop the others, for as long as the owner's share of the
process's budget lasts; from there on it, too, waits for the reader.

Functions of the session, which use its internals, as those of :mod:`reflex.protocol.incoming` do. For DATA,
the common case, :meth:`reflex.protocol.session.Session.events` does without a call what :func:`hold` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reflex.protocol.streams import Stream
from reflex.protocol.window import BULK_BYTES, BULK_PAUSE_S, GROWTH_FACTOR, MAX_STREAM_RECEIVE_WINDOW
from reflex.protocol.wire import INCREMENT, MAX_WINDOW, FrameType

if TYPE_CHECKING:
    from reflex.protocol.session import Session


def hold(session: Session, stream: Stream, size_bytes: int) -> None:
    """Count payload that the application now has to consume.

    Raises:
        FlowControlError: the stream's window does not have so much left.
    """
    stream.receive_window.receive(size_bytes)
    stream.held_bytes += size_bytes
    session._budget.buffered += size_bytes
    if _has_room_to_hold(session):
        give_session_credit(session, size_bytes)
    else:
        session._withheld += size_bytes


def _has_room_to_hold(session: Session) -> bool:
    """Whether its owner keeps no more than what the process has left."""
    budget = session._budget
    return session.share.kept + budget.buffered + budget.growth <= session.share.soft_limit


def give_session_credit(session: Session, size_bytes: int) -> None:
    """So many bytes of the session's window are free again: WINDOW is packed where enough of them are owed."""
    window = session._receive_window
    if window.release(size_bytes):
        session._encoder.write(FrameType.WINDOW, 0, INCREMENT.pack(window.update(session.now_s)))


def give_withheld_credit(session: Session) -> None:
    """Give the session's credit that waits for readers, where others have made room meanwhile."""
    if _has_room_to_hold(session):
        withheld, session._withheld = session._withheld, 0
        give_session_credit(session, withheld)


def give_stream_credit(session: Session, stream: Stream) -> None:
    """Pack the WINDOW that is due on a stream, whose window grows first where it is the limit."""
    window = stream.receive_window
    note_credit(session, stream, window.owed)
    liveness = session._liveness
    session_window = session._receive_window
    wanted = min(
        (GROWTH_FACTOR - 1) * window.size,
        MAX_STREAM_RECEIVE_WINDOW - window.size,
        MAX_WINDOW - session_window.size,  # so that credit which is due can always be told
    )
    if (
        wanted > 0
        and window.wants_growth(session.now_s, liveness.round_trip_s)
        and (growth := session.share.take_growth(wanted))
    ):
        window.grow(growth)
        stream.grown_bytes += growth
        # The session's window grows along, or it would be the limit instead.
        session_window.grow(growth)
        give_session_credit(session, 0)
    if liveness.measurement_is_due(session.now_s):
        session.ping()
    session._encoder.write(FrameType.WINDOW, stream.id, INCREMENT.pack(window.update(session.now_s)))


def note_credit(session: Session, stream: Stream, increment_bytes: int) -> None:
    """Credit is due or has come, so about as many bytes have gone: see whether the stream carries bulk data."""
    now_s = session.now_s
    if now_s - stream.hurried_s > BULK_PAUSE_S:
        stream.hurried_bytes = 0
    stream.hurried_s = now_s
    stream.hurried_bytes += increment_bytes
    if stream.hurried_bytes >= BULK_BYTES:
        session.bulk_s = now_s
