"""A peer that wants this side to keep, to answer or to break: it gets nothing but ProtocolError."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflex.errors import FrameError, ProtocolError
from reflex.protocol.allowance import BURST_UNITS, UNITS_PER_S
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import MAX_UNSENT_BYTES
from reflex.protocol.wire import DEFAULT_MAX_STREAMS, SESSION_WINDOW, STREAM_WINDOW, Code, FrameType, Network, Status
from tests.sessions import (
    TARGET,
    TO_TARGET,
    Pair,
    Peer,
    Seen,
    code,
    connected,
    frame,
    goaway,
    increment,
    peer_of,
)

SEALING = 10_000  # bytes: what the tags and lengths of so many records may take at the most
LAST_STREAM = 7  # ids that random frames speak of: the live ones and a few that were never opened


def write_all(peer: Peer, records: list[bytes]) -> None:
    for body in records:
        peer.write_body(body)


def write_slowly(peer: Peer, *records: bytes) -> None:
    """Each record long after the one before: what frames cost was forgotten meanwhile."""
    for body in records:
        peer.session.now_s += BURST_UNITS / UNITS_PER_S
        peer.write_body(body)


class TestAnswers:
    def test_pongs_for_a_peer_that_never_reads_are_bounded(self, peer: Peer) -> None:
        body = frame(FrameType.PING, 0, bytes(8)) * 4000
        for _ in range(MAX_UNSENT_BYTES // len(body)):
            write_slowly(peer, body)
        with pytest.raises(ProtocolError, match="does not read"):
            write_slowly(peer, body)
        assert peer.session.unsent_bytes < MAX_UNSENT_BYTES + SEALING

    def test_resets_for_a_peer_that_never_reads_are_bounded(self, pools: Pools) -> None:
        refused = frame(FrameType.RESET, 1, code(Code.LIMIT))
        needed = MAX_UNSENT_BYTES // len(refused)
        opens = [frame(FrameType.OPEN, 2 * each + 1, TO_TARGET) for each in range(needed + 1000)]
        records = [b"".join(opens[start : start + 1000]) for start in range(0, len(opens), 1000)]
        with peer_of(pools, of_server=True, max_streams=0) as peer:
            with pytest.raises(ProtocolError, match="does not read"):
                write_slowly(peer, *records)
            assert peer.session.unsent_bytes < MAX_UNSENT_BYTES + SEALING

    def test_a_peer_that_reads_its_answers_may_go_on(self, peer: Peer) -> None:
        body = frame(FrameType.PING, 0, bytes(8)) * 4000
        for _ in range(2 * MAX_UNSENT_BYTES // len(body)):
            write_slowly(peer, body)
            assert len(peer.answers()) == 4000

    def test_data_that_this_side_has_not_sent_yet_is_not_the_peers_fault(self, pools: Pools) -> None:
        """All that the first windows allow may wait while the peer's SETTINGS arrive."""
        pair = Pair(pools)
        for _ in range(SESSION_WINDOW // STREAM_WINDOW):
            assert pair.client.session.send(pair.client.open(), bytes(STREAM_WINDOW)) == STREAM_WINDOW
        try:
            pair.client.feed(pair.server.take_output())
            assert pair.client.take_seen() == [Seen(EventKind.SETTINGS)]
            pair.pump()
            assert sum(map(len, pair.server.got.values())) == SESSION_WINDOW
        finally:
            pair.end()

    def test_streams_are_bounded_and_credit_for_those_beyond_is_given_back(self, peer: Peer) -> None:
        for stream_id in range(1, 2 * DEFAULT_MAX_STREAMS + 20, 2):
            peer.write(FrameType.OPEN, stream_id, TO_TARGET)
            peer.write(FrameType.DATA, stream_id, b"early")
        assert len(peer.session.streams) == DEFAULT_MAX_STREAMS
        resets = [each for each in peer.answers() if each[0] == FrameType.RESET]
        assert resets == [
            (FrameType.RESET, 2 * DEFAULT_MAX_STREAMS + each, code(Code.LIMIT)) for each in range(1, 20, 2)
        ]
        assert peer.session._receive_window.available + peer.session._receive_window.owed == SESSION_WINDOW


class TestFatal:
    def test_what_came_before_a_fatal_frame_was_given_out_and_nothing_behind_it(self, peer: Peer) -> None:
        peer.open(1)
        with pytest.raises(FrameError):
            peer.write_body(
                frame(FrameType.DATA, 1, b"before") + frame(FrameType.DATA, 1) + frame(FrameType.DATA, 1, b"behind")
            )
        assert peer.side.got == {1: b"before"}

    def test_an_altered_byte_is_fatal_wherever_it_stands(self, pools: Pools) -> None:
        with peer_of(pools, of_server=True) as peer:
            size = len(peer.seal(frame(FrameType.PING, 0, bytes(8))))
        for position in range(size):
            with peer_of(pools, of_server=True) as peer:
                record = bytearray(peer.seal(frame(FrameType.PING, 0, bytes(8))))
                record[position] ^= 1
                with pytest.raises(ProtocolError):
                    peer.side.feed(bytes(record))
                assert peer.answers() == []

    def test_a_record_that_comes_twice_is_fatal(self, peer: Peer) -> None:
        record = peer.seal(frame(FrameType.PAD))
        peer.side.feed(record)
        with pytest.raises(ProtocolError):
            peer.side.feed(record)

    def test_a_record_of_the_other_direction_is_fatal(self, pools: Pools) -> None:
        with connected(pools) as pair:
            pair.client.session.ping()
            with pytest.raises(ProtocolError):
                pair.client.feed(pair.client.take_output())


stream_ids = st.integers(0, LAST_STREAM) | st.integers(0, 2**32 - 1)
statuses = st.integers(0, 255).map(lambda number: bytes([number]))
numbers = st.integers(0, 2**32 - 1) | st.integers(0, 8)
plausible_frames = st.one_of(
    st.builds(frame, st.integers(0, 255), stream_ids, st.binary(max_size=40)),
    st.builds(frame, st.sampled_from([FrameType.DATA, FrameType.DATA_FIN]), stream_ids, st.binary(max_size=500)),
    st.builds(frame, st.sampled_from([FrameType.RESET, FrameType.CLOSE]), stream_ids, numbers.map(code)),
    st.builds(frame, st.just(FrameType.WINDOW), stream_ids, numbers.map(increment)),
    st.builds(frame, st.just(FrameType.OPENED), stream_ids, statuses),
    st.builds(
        frame, st.just(FrameType.OPEN), stream_ids, st.sampled_from([TO_TARGET, b"\x02"]) | st.binary(max_size=12)
    ),
    st.builds(frame, st.just(FrameType.DATAGRAM), stream_ids, st.binary(max_size=20).map(TARGET.encode().__add__)),
    st.builds(frame, st.sampled_from([FrameType.PING, FrameType.PONG]), st.just(0), st.binary(min_size=8, max_size=8)),
    st.builds(frame, st.just(FrameType.GOAWAY), st.just(0), st.builds(goaway, stream_ids, numbers)),
    st.builds(frame, st.just(FrameType.SETTINGS), st.just(0), st.binary(min_size=10, max_size=10)),
)
bodies = st.binary(min_size=1, max_size=200) | st.lists(plausible_frames, min_size=1, max_size=8).map(b"".join)


class TestRandomBodies:
    """Whatever a peer that holds the keys seals, the session says ProtocolError or takes it."""

    @settings(max_examples=300)
    @given(st.lists(bodies, max_size=6))
    def test_a_server_raises_nothing_else(self, records: list[bytes]) -> None:
        with peer_of(Pools(), of_server=True) as peer:
            peer.open(1)
            peer.call(3)
            peer.write(FrameType.OPEN, 5, bytes([Network.UDP]))
            self.play(peer, records)

    @settings(max_examples=300)
    @given(st.lists(bodies, max_size=6))
    def test_a_client_raises_nothing_else(self, records: list[bytes]) -> None:
        with peer_of(Pools(), of_server=False) as server:
            for _ in range(2):
                server.side.open()
            server.session.open(None, Network.UDP)
            server.write(FrameType.OPENED, 1, bytes([Status.SUCCEEDED]))
            self.play(server, records)

    @given(st.binary(max_size=400))
    def test_bytes_that_nobody_sealed_raise_nothing_else(self, data: bytes) -> None:
        with peer_of(Pools(), of_server=True) as peer:
            try:
                peer.side.feed(data)
            except ProtocolError:
                pass
            else:
                assert len(data) < 20
            assert peer.answers() == []

    def play(self, peer: Peer, records: list[bytes]) -> None:
        with suppress(ProtocolError):
            write_all(peer, records)
        assert peer.budget.buffered == sum(stream.held_bytes for stream in peer.side.streams.values())
