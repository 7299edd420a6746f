"""reflex.protocol.events: one object, used again for every event."""

from __future__ import annotations

from reflex.protocol import streams
from reflex.protocol.address import Address
from reflex.protocol.events import NO_DATA, Event, EventKind
from reflex.protocol.streams import Stream
from reflex.protocol.wire import AddressType, Code, Network


def test_a_new_event_speaks_of_nothing() -> None:
    event = Event()
    assert (event.kind, event.stream, event.number, event.address) == (EventKind.DATA, None, 0, None)
    assert event.data is NO_DATA
    assert bytes(NO_DATA) == b""


def test_set_makes_it_another_event_and_forgets_the_one_before() -> None:
    event = Event()
    stream = Stream(1, streams.OPEN, Network.TCP)
    event.data = memoryview(b"payload")
    event.address = Address(AddressType.IPV4, "192.0.2.7", 80)
    assert event.set(EventKind.RESET, stream, Code.CANCELLED) is event
    assert (event.kind, event.stream, event.number) == (EventKind.RESET, stream, Code.CANCELLED)
    assert event.data is NO_DATA
    assert event.address is None
    event.set(EventKind.SETTINGS)
    assert (event.kind, event.stream, event.number) == (EventKind.SETTINGS, None, 0)


def test_kinds_are_dense_so_that_a_table_can_be_indexed_by_them() -> None:
    assert sorted(EventKind) == list(range(len(EventKind)))
