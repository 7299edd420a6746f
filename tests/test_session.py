"""The session as a whole: settings, limits, liveness, and its use as a library."""

from __future__ import annotations

import pytest

from reflex.errors import SessionClosed, StreamsExhausted
from reflex.protocol.events import EventKind
from reflex.protocol.handshake import SessionSecrets
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.wire import (
    DEFAULT_MAX_STREAMS,
    KEEPALIVE_GRACE_S,
    KEEPALIVE_S,
    MAX_STREAM_ID,
    SETTING,
    Code,
    FrameType,
    Setting,
    Status,
    Suite,
)
from tests.sessions import (
    CLIENT_TIME_MS,
    SERVER_TIME_MS,
    START_S,
    TARGET,
    TO_TARGET,
    Pair,
    Peer,
    Seen,
    code,
    connected,
    frame,
    peer_of,
)


class TestLibrary:
    @pytest.mark.parametrize("suite", list(Suite))
    def test_a_request_and_its_answer_in_memory(self, pools: Pools, suite: Suite) -> None:
        secrets = SessionSecrets(suite, bytes(32), bytes([1]) * 32, bytes(32), bytes(32))
        client = Session.client(secrets, pools, time_ms=1)
        server = Session.server(secrets, pools, time_ms=2)
        stream = client.open(TARGET)
        client.send(stream, b"ping")
        client.finish(stream)
        for event in server.feed(client.data_to_send()):
            if event.kind is EventKind.OPEN:
                assert event.stream is not None
                assert event.address == TARGET
                server.accept(event.stream)
            elif event.kind is EventKind.DATA:
                assert event.stream is not None
                server.consumed(event.stream, server.send(event.stream, event.data))
            elif event.kind is EventKind.FIN:
                assert event.stream is not None
                server.finish(event.stream)
        answer = [
            (event.kind, bytes(event.data)) for event in client.feed(server.data_to_send()) if event.stream is not None
        ]
        assert answer == [(EventKind.OPENED, b""), (EventKind.DATA, b"ping"), (EventKind.FIN, b"")]
        assert not client.streams
        assert not server.streams
        client.consumed(stream, 4)
        client.close_buffers()
        server.close_buffers()

    def test_bytes_received_in_place_are_the_same_as_bytes_fed(self, pair: Pair) -> None:
        near, far = pair.open()
        pair.client.session.send(near, b"straight into place")
        data = pair.client.take_output()
        session = pair.server.session
        view = session.receive_buffer()
        view[: len(data)] = data
        session.received(len(data))
        for event in session.events():
            pair.server.keep(event)
        assert pair.server.got[far.id] == b"straight into place"

    def test_a_receive_buffer_that_stayed_empty_goes_back(self, pair: Pair, pools: Pools) -> None:
        session = pair.server.session
        before = pools.in_use
        session.receive_buffer()
        assert pools.in_use == before + 1
        session.received(0)
        assert pools.in_use == before

    def test_output_says_what_waits_and_is_taken_in_parts(self, pair: Pair) -> None:
        near, far = pair.open()
        session = pair.client.session
        assert session.output() is None
        session.send(near, bytes(1000))
        assert session.unsent_bytes == 1008
        assert not session.has_output
        session.seal()
        assert session.has_output
        while (view := session.output()) is not None:
            part = bytes(view[:100])
            session.sent(len(part))
            pair.server.feed(part)
        assert session.unsent_bytes == 0
        assert not session.has_output
        assert pair.server.got[far.id] == bytes(1000)

    def test_an_idle_session_holds_no_view_of_what_it_received(self, peer: Peer) -> None:
        """The view would keep the memory of a buffer that its pool has let go of."""
        peer.open(1)
        for frame_type in (FrameType.DATA, FrameType.DATA_FIN):
            for event in peer.session.feed(peer.seal(frame(frame_type, 1, b"x" * 100))):
                assert event.data == b"x" * 100
                peer.session.consumed(peer.side.streams[1], 100)
                if frame_type == FrameType.DATA_FIN:
                    break  # an application that ends the session stops drawing
            assert not peer.session._event.data

    def test_what_is_drawn_after_close_buffers_borrows_nothing(self, peer: Peer, pools: Pools) -> None:
        """An application may cut the session while it draws events; the rest of the record is not answered."""
        body = frame(FrameType.OPEN, 1, TO_TARGET) + frame(FrameType.PING, 0, bytes(8))
        for event in peer.session.feed(peer.seal(body)):
            assert event.kind is EventKind.OPEN
            peer.session.close_buffers()
        left = pools.in_use
        peer.session.close_buffers()
        assert left == 0


class TestSettings:
    def test_each_side_announces_its_limit_its_time_and_its_interval(self, pools: Pools) -> None:
        server = Peer(pools, of_server=True, max_streams=7)
        client = Peer(pools, of_server=False)
        for peer, limit, time_ms in ((server, 7, SERVER_TIME_MS), (client, 0, CLIENT_TIME_MS)):
            ((frame_type, stream_id, payload),) = peer.answers()
            assert (frame_type, stream_id) == (FrameType.SETTINGS, 0)
            assert list(SETTING.iter_unpack(payload)) == [
                (Setting.MAX_STREAMS, limit),
                (Setting.TIME_MS, time_ms),
                (Setting.KEEPALIVE_MS, KEEPALIVE_S * 1000),
            ]
            peer.end()

    def test_the_peers_settings_are_in_the_attributes(self, pools: Pools) -> None:
        pair = Pair(pools)
        assert pair.client.session.peer_time_ms == 0
        pair.pump()
        assert pair.client.seen == pair.server.seen == [Seen(EventKind.SETTINGS)]
        assert pair.client.session.peer_time_ms == SERVER_TIME_MS
        assert pair.server.session.peer_time_ms == CLIENT_TIME_MS
        pair.end()

    def test_unknown_settings_are_ignored(self, server: Peer) -> None:
        server.write(FrameType.SETTINGS, 0, SETTING.pack(0xBEEF, 1) + SETTING.pack(Setting.TIME_MS, 5))
        assert server.session.peer_time_ms == 5
        server.write(FrameType.SETTINGS, 0, SETTING.pack(4, 2**64 - 1))
        assert server.side.seen == [Seen(EventKind.SETTINGS)] * 2

    def test_without_settings_the_peer_allows_the_default_number_of_streams(self, server: Peer) -> None:
        for _ in range(DEFAULT_MAX_STREAMS):
            server.side.open()
        assert not server.session.has_room
        server.write(FrameType.SETTINGS, 0)
        assert not server.session.has_room
        server.write(FrameType.SETTINGS, 0, SETTING.pack(Setting.MAX_STREAMS, DEFAULT_MAX_STREAMS + 1))
        assert server.session.has_room


class TestLimits:
    def test_opening_stops_at_the_peers_limit(self, pools: Pools) -> None:
        with connected(pools, max_streams=2) as pair:
            first, _ = pair.client.open(), pair.client.open()
            assert not pair.client.session.has_room
            with pytest.raises(StreamsExhausted):
                pair.client.open()
            pair.client.session.reset(first, Code.CANCELLED)
            assert pair.client.session.has_room
            assert pair.client.open().id == 5

    def test_an_open_beyond_this_sides_limit_is_reset(self, pools: Pools) -> None:
        with peer_of(pools, of_server=True, max_streams=1) as peer:
            stream = peer.call(1)
            peer.write(FrameType.OPEN, 3, TO_TARGET)
            assert peer.answers() == [(FrameType.RESET, 3, code(Code.LIMIT))]
            assert list(peer.session.streams) == [1]
            peer.session.refuse(stream, Status.REFUSED)
            peer.write(FrameType.OPEN, 5, TO_TARGET)
            assert list(peer.session.streams) == [5]

    def test_an_id_is_never_used_twice_and_after_the_last_there_is_none(self, pair: Pair) -> None:
        session = pair.client.session
        session._highest_id = MAX_STREAM_ID - 4
        last_but_one = pair.client.open()
        assert last_but_one.id == MAX_STREAM_ID - 2
        last = pair.client.open()
        assert last.id == MAX_STREAM_ID
        session.reset(last, Code.CANCELLED)
        session.reset(last_but_one, Code.CANCELLED)
        assert not session.has_room
        with pytest.raises((StreamsExhausted, SessionClosed)):
            session.open(TARGET)
        pair.pump()
        assert not pair.server.session.streams

    def test_the_last_id_is_followed_by_goaway(self, server: Peer) -> None:
        server.session._highest_id = MAX_STREAM_ID - 2
        server.side.open()
        assert FrameType.GOAWAY in [frame_type for frame_type, _, _ in server.answers()]

    def test_a_server_opens_no_streams(self, pair: Pair) -> None:
        with pytest.raises(SessionClosed):
            pair.server.session.open(TARGET)


class TestLiveness:
    def test_a_ping_is_answered_with_its_own_bytes(self, peer: Peer) -> None:
        peer.write(FrameType.PING, 0, b"8 opaque")
        assert peer.answers() == [(FrameType.PONG, 0, b"8 opaque")]
        assert peer.side.seen == []

    def test_round_trips_are_measured_and_averaged(self, pair: Pair) -> None:
        session = pair.client.session
        assert session.round_trip_s == 0.0
        session.ping()
        there = pair.client.take_output()
        pair.set_time(START_S + 0.4)
        pair.server.feed(there)
        pair.client.feed(pair.server.take_output())
        assert session.round_trip_s == pytest.approx(0.4)
        session.ping()
        there = pair.client.take_output()
        pair.set_time(START_S + 1.2)
        pair.server.feed(there)
        pair.client.feed(pair.server.take_output())
        assert session.round_trip_s == pytest.approx(0.4 + 0.25 * (0.8 - 0.4))

    def test_a_pong_for_no_ping_or_for_an_older_one_is_ignored(self, server: Peer) -> None:
        server.write(FrameType.PONG, 0, (1).to_bytes(8))
        server.session.ping()
        server.session.ping()
        (_, _, older), (_, _, newer) = server.answers()
        server.session.now_s += 1
        server.write(FrameType.PONG, 0, older)
        assert server.session.round_trip_s == 0.0
        server.write(FrameType.PONG, 0, newer)
        assert server.session.round_trip_s == 1.0
        server.session.now_s += 1
        server.write(FrameType.PONG, 0, newer)
        assert server.session.round_trip_s == 1.0

    def test_a_side_that_sent_nothing_for_its_interval_sends_ping(self, pools: Pools) -> None:
        with connected(pools, keepalive_s=20) as pair:
            session = pair.client.session
            session.now_s = START_S + 19.9
            assert not session.is_dead()
            assert session.unsent_bytes == 0
            session.now_s = START_S + 20
            assert not session.is_dead()
            assert session.unsent_bytes > 0

    def test_sealing_nothing_is_not_sending(self, pair: Pair) -> None:
        """An idle session whose application looks for output every second still owes a PING."""
        session = pair.client.session
        pings = 0
        for second in range(1, KEEPALIVE_S + 2):
            session.now_s = START_S + second
            assert not session.is_dead()
            pings += bool(pair.client.take_output())
        assert pings == 1

    def test_a_peer_that_is_silent_for_its_interval_and_the_grace_time_is_dead(self, pools: Pools) -> None:
        with connected(pools, keepalive_s=20) as pair:
            session = pair.client.session
            session.now_s = START_S + 20 + KEEPALIVE_GRACE_S
            assert not session.is_dead()
            session.now_s += 0.1
            assert session.is_dead()

    def test_any_byte_that_arrives_is_a_sign_of_life(self, pair: Pair) -> None:
        pair.set_time(START_S + 39)
        pair.server.session.ping()
        pair.client.feed(pair.server.take_output()[:1])
        pair.set_time(START_S + 39 + 40)
        assert not pair.client.session.is_dead()
        assert pair.server.session.is_dead()

    def test_two_idle_sides_keep_each_other_alive(self, pair: Pair) -> None:
        for second in range(1, 200):
            pair.set_time(START_S + second)
            for side in (pair.client, pair.server):
                assert not side.session.is_dead()
            if pair.client.session.unsent_bytes or pair.server.session.unsent_bytes:
                pair.pump()
        assert pair.client.seen == pair.server.seen == []
