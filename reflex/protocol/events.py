"""What a session tells its application."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from reflex.protocol.address import Address
from reflex.protocol.streams import Stream


class EventKind(IntEnum):
    """What happened; the comment says which fields of the event speak of it."""

    DATA = 0  # stream, data: payload; consumed() is owed for it
    FIN = 1  # stream: the peer has sent its last; nothing more comes
    OPEN = 2  # stream, address (None for UDP): to be answered by accept() or refuse()
    OPENED = 3  # stream: the target is connected
    REFUSED = 4  # stream, number: a Status; the stream is gone
    RESET = 5  # stream, number: a Code; the stream is gone
    WRITABLE = 6  # stream, or None for all: a window that was used up has opened
    DATAGRAM = 7  # stream, address, data: consumed() is owed for it
    SETTINGS = 8  # the peer's settings are in the session's attributes
    GOAWAY = 9  # number: a Code; no new streams
    CLOSED = 10  # number: a Code; a clean end, the peer sends nothing more


NO_DATA: Final = memoryview(b"")


class Event:
    """One event. Its session uses the same object again: it is valid until the next one is drawn.

    Attributes:
        kind: what happened.
        stream: the stream it speaks of; None for the session.
        data: a view of the session's buffer, valid as long as the event.
        number: a status or code.
        address: a target.
    """

    __slots__ = ("address", "data", "kind", "number", "stream")

    def __init__(self) -> None:
        self.kind = EventKind.DATA
        self.stream: Stream | None = None
        self.data: memoryview = NO_DATA
        self.number = 0
        self.address: Address | None = None

    def set(self, kind: EventKind, stream: Stream | None = None, number: int = 0) -> Event:
        """Make it another event, without data and address; return itself."""
        self.kind = kind
        self.stream = stream
        self.number = number
        self.data = NO_DATA
        self.address = None
        return self
