"""How a session ends: GOAWAY, CLOSE, and what neither side says or hears after them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from reflex.errors import LocalError, SessionClosed
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.wire import (
    KEEPALIVE_S,
    Code,
    FrameType,
    Status,
)
from tests.sessions import (
    TARGET,
    TO_TARGET,
    TO_UDP,
    Pair,
    Peer,
    Seen,
    code,
    frame,
    goaway,
)


class TestGoAway:
    def test_streams_above_the_last_id_are_reset_and_the_others_go_on(self, server: Peer) -> None:
        first, second, third = (server.side.open() for _ in range(3))
        server.write(FrameType.GOAWAY, 0, goaway(1, Code.SHUTTING_DOWN))
        assert server.side.take_seen() == [
            Seen(EventKind.GOAWAY, number=Code.SHUTTING_DOWN),
            Seen(EventKind.RESET, second.id, number=Code.SHUTTING_DOWN),
            Seen(EventKind.RESET, third.id, number=Code.SHUTTING_DOWN),
        ]
        assert list(server.session.streams.values()) == [first]
        assert second.is_closed
        assert third.is_closed
        server.write(FrameType.OPENED, 1, bytes([Status.SUCCEEDED]))
        server.write(FrameType.DATA, 1, b"goes on")
        server.write(FrameType.DATA, 3, b"late")
        assert server.side.got == {1: b"goes on"}

    def test_a_stream_that_the_application_resets_meanwhile_is_not_reset_again(self, server: Peer) -> None:
        _, second = server.side.open(), server.side.open()
        told = []
        for event in server.session.feed(server.seal(frame(FrameType.GOAWAY, 0, goaway(0, Code.NONE)))):
            told.append((event.kind, event.stream and event.stream.id))
            if event.kind is EventKind.RESET:
                server.session.reset(second, Code.CANCELLED)
        assert told == [(EventKind.GOAWAY, None), (EventKind.RESET, 1)]

    def test_after_goaway_nothing_is_opened_in_either_role(self, pair: Pair) -> None:
        pair.server.session.go_away(Code.SHUTTING_DOWN)
        pair.pump()
        assert not pair.client.session.has_room
        with pytest.raises(SessionClosed):
            pair.client.open()

    def test_an_open_that_crosses_goaway_is_reset_and_a_stream_before_it_lives(self, pair: Pair) -> None:
        near, far = pair.open()
        late = pair.client.open()
        pair.server.session.go_away(Code.SHUTTING_DOWN)
        there, back = pair.client.take_output(), pair.server.take_output()
        pair.server.feed(there)
        pair.client.feed(back)
        pair.pump()
        assert late.is_closed
        assert not pair.server.seen
        pair.client.session.send(near, b"still here")
        pair.pump()
        assert pair.server.got[far.id] == b"still here"

    def test_an_open_after_goaway_gets_reset(self, peer: Peer) -> None:
        peer.open(1)
        peer.session.go_away(Code.SHUTTING_DOWN)
        peer.write(FrameType.OPEN, 3, TO_TARGET)
        peer.write(FrameType.DATA, 3, b"under way")
        assert peer.answers() == [
            (FrameType.GOAWAY, 0, goaway(1, Code.SHUTTING_DOWN)),
            (FrameType.RESET, 3, code(Code.SHUTTING_DOWN)),
        ]
        assert peer.side.seen == []

    def test_goaway_is_sent_once_and_names_no_stream_where_none_was_taken(self, peer: Peer) -> None:
        peer.session.go_away(Code.IDLE)
        peer.session.go_away(Code.SHUTTING_DOWN)
        assert peer.answers() == [(FrameType.GOAWAY, 0, goaway(0, Code.IDLE))]

    def test_a_client_that_goes_away_opens_nothing_more_and_its_streams_go_on(self, pair: Pair) -> None:
        near, far = pair.open()
        pair.client.session.go_away(Code.NONE)
        pair.pump()
        assert pair.server.take_seen() == [Seen(EventKind.GOAWAY)]
        assert not pair.client.session.has_room
        with pytest.raises(SessionClosed):
            pair.client.open()
        pair.server.session.send(far, b"goes on")
        pair.pump()
        assert pair.client.got[near.id] == b"goes on"


class TestClose:
    def test_close_is_told_with_its_code_and_sent_once(self, pair: Pair) -> None:
        pair.client.session.close(Code.IDLE)
        pair.client.session.close(Code.INTERNAL)
        assert pair.client.session.close_sent
        pair.pump()
        assert pair.server.take_seen() == [Seen(EventKind.CLOSED, number=Code.IDLE)]
        assert pair.server.session.close_received
        assert not pair.client.session.close_received

    def test_both_may_close_at_once(self, pair: Pair) -> None:
        pair.client.session.close(Code.NONE)
        pair.server.session.close(Code.SHUTTING_DOWN)
        pair.pump()
        assert pair.client.seen == [Seen(EventKind.CLOSED, number=Code.SHUTTING_DOWN)]
        assert pair.server.seen == [Seen(EventKind.CLOSED)]

    @pytest.mark.parametrize("who", ["client", "server"])
    def test_after_close_of_either_side_nothing_is_opened(self, pair: Pair, who: str) -> None:
        (pair.client if who == "client" else pair.server).session.close(Code.NONE)
        pair.pump()
        assert not pair.client.session.has_room
        with pytest.raises(SessionClosed):
            pair.client.open()

    def test_nothing_that_arrives_after_the_peers_close_counts(self, peer: Peer) -> None:
        peer.open(1)
        peer.write(FrameType.CLOSE, 0, code(Code.NONE))
        peer.side.take_seen()
        for frame_type, stream_id, payload in (
            (FrameType.DATA, 1, b"late"),
            (FrameType.PING, 0, bytes(8)),
            (FrameType.OPEN, 3, TO_TARGET),
            (FrameType.CLOSE, 0, code(Code.NONE)),
            (0x7F, 0, b"unknown"),
        ):
            peer.write(frame_type, stream_id, payload)
        assert peer.answers() == []
        assert peer.side.seen == []
        assert peer.side.got == {}

    def test_nothing_is_answered_after_this_sides_close(self, peer: Peer) -> None:
        stream = peer.open(1)
        peer.side.reads = False
        peer.write(FrameType.DATA, 1, bytes(100_000))
        peer.write(FrameType.DATA, 1, bytes(100_000))
        peer.session.close(Code.SHUTTING_DOWN)
        assert peer.answers() == [(FrameType.CLOSE, 0, code(Code.SHUTTING_DOWN))]
        peer.side.consume(stream)
        peer.write(FrameType.PING, 0, bytes(8))
        peer.write(FrameType.OPEN, 3, TO_TARGET)
        peer.write(FrameType.DATA, 1, bytes(50_000))
        peer.session.now_s += KEEPALIVE_S
        assert not peer.session.is_dead()
        assert peer.answers() == []
        peer.write(FrameType.CLOSE, 0, code(Code.NONE))
        assert peer.side.seen == [Seen(EventKind.CLOSED)]
        assert peer.answers() == []

    def test_no_call_writes_anything_after_this_sides_close(self, peer: Peer) -> None:
        asked, opened, half = peer.call(1), peer.open(3), peer.open(5)
        peer.write(FrameType.DATA_FIN, 5)
        peer.write(FrameType.OPEN, 7, TO_UDP)
        udp = peer.side.streams[7]
        session = peer.session
        session.accept(udp)
        session.close(Code.SHUTTING_DOWN)
        assert peer.answers()[-1] == (FrameType.CLOSE, 0, code(Code.SHUTTING_DOWN))
        calls: list[Callable[[], object]] = [
            lambda: session.accept(asked),
            lambda: session.refuse(asked, Status.REFUSED),
            lambda: session.send(opened, b"late"),
            lambda: session.finish(half),
            lambda: session.send_datagram(udp, TARGET, b"late"),
            lambda: session.reset(opened, Code.CANCELLED),
            session.ping,
            lambda: session.go_away(Code.SHUTTING_DOWN),
        ]
        for call in calls:
            with suppress(LocalError):
                call()
        assert peer.answers() == []

    def test_close_buffers_ends_every_stream_and_opens_none_again(self, pair: Pair, pools: Pools) -> None:
        near, far = pair.open()
        waiting = pair.client.open()
        pair.client.session.send(near, b"lost")
        pair.client.session.seal()
        pair.client.session.send(near, b"lost too")
        pair.server.feed(b"half a record")
        for side in (pair.client, pair.server):
            side.session.close_buffers()
            assert not side.session.streams
            assert not side.session.has_room
        assert near.is_closed
        assert far.is_closed
        assert waiting.is_closed
        assert pools.in_use == 0
        pair.client.session.close_buffers()
