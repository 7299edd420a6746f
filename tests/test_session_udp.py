"""UDP streams of a session: datagrams both ways, and calls that do not fit a stream's network."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from reflex.errors import LocalError, StreamStateError
from reflex.protocol.events import EventKind
from reflex.protocol.wire import (
    DATAGRAM_BACKLOG,
    MAX_PAYLOAD_SIZE,
    STREAM_WINDOW,
    Code,
    FrameType,
    Network,
)
from tests.sessions import TARGET, TO_UDP, Pair, Peer, Seen


class TestUdp:
    def test_a_udp_stream_carries_datagrams_both_ways(self, pair: Pair) -> None:
        near = pair.client.session.open(None, Network.UDP)
        pair.pump()
        (opened,) = pair.server.take_seen()
        assert opened == Seen(EventKind.OPEN, near.id, address=None)
        far = pair.server.streams[near.id]
        assert far.network is Network.UDP
        pair.server.session.accept(far)
        pair.client.session.send_datagram(near, TARGET, b"query")
        pair.server.session.send_datagram(far, TARGET, b"")
        pair.pump()
        assert pair.server.take_seen() == [Seen(EventKind.DATAGRAM, near.id, b"query", address=TARGET)]
        assert pair.client.take_seen() == [
            Seen(EventKind.OPENED, near.id),
            Seen(EventKind.DATAGRAM, near.id, b"", address=TARGET),
        ]
        pair.client.session.reset(near, Code.NONE)
        pair.pump()
        assert far.is_closed

    def test_datagrams_beyond_the_backlog_are_dropped_until_it_is_read(self, peer: Peer) -> None:
        peer.write(FrameType.OPEN, 1, TO_UDP)
        stream = peer.side.streams[1]
        peer.session.accept(stream)
        peer.answers()
        peer.side.take_seen()
        peer.side.reads = False
        size = DATAGRAM_BACKLOG // 4
        for _ in range(6):
            peer.write(FrameType.DATAGRAM, 1, TARGET.encode() + bytes(size))
        peer.write(FrameType.DATAGRAM, 1, TARGET.encode() + b"x")
        assert len(peer.side.take_seen()) == 4
        assert stream.held_bytes == peer.budget.buffered == DATAGRAM_BACKLOG
        peer.session.consumed(stream, size)
        peer.write(FrameType.DATAGRAM, 1, TARGET.encode() + bytes(size))
        assert len(peer.side.take_seen()) == 1
        peer.side.consume(stream)
        assert peer.answers() == []  # datagrams are not counted in windows
        assert stream.receive_window.available == STREAM_WINDOW

    def test_the_largest_datagram_goes_and_a_larger_one_is_the_callers_mistake(self, pair: Pair) -> None:
        near = pair.client.session.open(None, Network.UDP)
        room = MAX_PAYLOAD_SIZE - len(TARGET.encode())
        with pytest.raises(LocalError, match="a datagram of"):
            pair.client.session.send_datagram(near, TARGET, bytes(room + 1))
        pair.client.session.send_datagram(near, TARGET, bytes(room))
        pair.pump()
        assert [len(each.data) for each in pair.server.take_seen()] == [0, room]

    def test_datagrams_are_refused_where_the_stream_has_ended(self, pair: Pair) -> None:
        near = pair.client.session.open(None, Network.UDP)
        pair.client.session.reset(near, Code.NONE)
        with pytest.raises(StreamStateError):
            pair.client.session.send_datagram(near, TARGET, b"late")

    def test_calls_that_do_not_fit_the_network_are_refused_here_and_not_by_the_peer(self, pair: Pair) -> None:
        """The peer would have to end the whole session for them."""
        tcp, _ = pair.open()
        udp = pair.client.session.open(None, Network.UDP)
        pair.pump()
        session = pair.client.session
        calls: list[Callable[[], object]] = [
            lambda: session.send(udp, b"no datagram"),
            lambda: session.finish(udp),
            lambda: session.send_datagram(tcp, TARGET, b"no byte stream"),
            lambda: session.open(None, Network.TCP),
            lambda: session.open(TARGET, Network.UDP),
        ]
        for call in calls:
            with pytest.raises(LocalError):
                call()
        assert pair.client.take_output() == b""
