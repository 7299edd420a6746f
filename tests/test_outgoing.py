"""reflex.protocol.outgoing: streams of a session, opened, answered, half-closed, reset, and what arrives late."""

from __future__ import annotations

import pytest

from reflex.errors import StreamStateError, WindowExceeded
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.streams import Stream
from reflex.protocol.wire import (
    MAX_PAYLOAD_SIZE,
    SESSION_WINDOW,
    Code,
    FrameType,
    Status,
)
from tests.sessions import TARGET, TO_TARGET, Pair, Peer, Seen, code, increment


class TestOpening:
    def test_open_carries_the_address_and_is_answered(self, pair: Pair) -> None:
        near = pair.client.open()
        pair.pump()
        assert pair.server.take_seen() == [Seen(EventKind.OPEN, near.id, address=TARGET)]
        pair.server.session.accept(pair.server.streams[near.id])
        pair.pump()
        assert pair.client.take_seen() == [Seen(EventKind.OPENED, near.id)]
        assert near.may_send

    def test_ids_are_odd_and_rise_from_1(self, pair: Pair) -> None:
        assert [pair.client.open().id for _ in range(4)] == [1, 3, 5, 7]

    @pytest.mark.parametrize("status", [status for status in Status if status])
    def test_a_refusal_is_told_with_its_status_and_ends_the_stream(self, pair: Pair, status: Status) -> None:
        near = pair.client.open()
        pair.pump()
        far = pair.server.streams[near.id]
        pair.server.session.refuse(far, status)
        pair.pump()
        assert pair.client.take_seen() == [Seen(EventKind.REFUSED, near.id, number=status)]
        assert near.is_closed
        assert far.is_closed
        assert not pair.client.session.streams
        assert not pair.server.session.streams

    def test_data_and_its_end_may_come_before_the_answer(self, pair: Pair) -> None:
        near = pair.client.open()
        pair.client.session.send(near, b"early")
        pair.client.session.finish(near)
        pair.pump()
        assert pair.server.got[near.id] == b"early"
        assert [each.kind for each in pair.server.take_seen()] == [EventKind.OPEN, EventKind.FIN]
        far = pair.server.streams[near.id]
        pair.server.session.accept(far)
        pair.server.session.send(far, b"answer")
        pair.server.session.finish(far)
        pair.pump()
        assert pair.client.got[near.id] == b"answer"
        assert near.is_closed
        assert far.is_closed

    @pytest.mark.parametrize("finished", [False, True])
    def test_what_is_under_way_to_a_refused_stream_is_discarded(self, pair: Pair, finished: bool) -> None:  # noqa: FBT001
        near = pair.client.open()
        pair.client.session.send(near, b"early")
        pair.pump()
        pair.client.session.send(near, b"under way")
        if finished:
            pair.client.session.finish(near)
        pair.server.session.refuse(pair.server.streams[near.id], Status.REFUSED)
        pair.pump()
        assert pair.server.got[near.id] == b"early"
        assert near.is_closed
        assert pair.client.seen == [Seen(EventKind.REFUSED, near.id, number=Status.REFUSED)]

    def test_a_refusal_may_follow_the_clients_end(self, pair: Pair) -> None:
        near = pair.client.open()
        pair.client.session.finish(near)
        pair.pump()
        pair.server.session.refuse(pair.server.streams[near.id], Status.TIMED_OUT)
        pair.pump()
        assert near.is_closed

    def test_an_answer_is_given_once(self, pair: Pair) -> None:
        _, far = pair.open()
        for call in (pair.server.session.accept, lambda stream: pair.server.session.refuse(stream, Status.REFUSED)):
            with pytest.raises(StreamStateError):
                call(far)
        with pytest.raises(StreamStateError):
            pair.client.session.accept(pair.client.open())

    def test_a_server_sends_nothing_before_its_answer(self, peer: Peer) -> None:
        stream = peer.call(1)
        with pytest.raises(StreamStateError):
            peer.session.send(stream, b"too early")
        with pytest.raises(StreamStateError):
            peer.session.finish(stream)
        assert peer.answers() == []


class TestData:
    def test_bytes_go_both_ways_in_any_pieces(self, pair: Pair) -> None:
        near, far = pair.open()
        up, down = bytes(range(256)) * 100, bytes(reversed(range(256))) * 90
        assert pair.client.session.send(near, up) == len(up)
        assert pair.server.session.send(far, memoryview(down)) == len(down)
        pair.pump([1, 19, 1, 100, 4096])
        assert pair.server.got[near.id] == up
        assert pair.client.got[near.id] == down

    def test_nothing_sent_writes_nothing(self, pair: Pair) -> None:
        near, _ = pair.open()
        assert pair.client.session.send(near, b"") == 0
        assert pair.client.take_output() == b""

    def test_committing_nothing_writes_nothing(self, pair: Pair) -> None:
        """An empty DATA frame is fatal at the peer."""
        near, _ = pair.open()
        assert pair.client.session.reserve(near, 100) is not None
        pair.client.session.commit(near, 0)
        assert pair.client.take_output() == b""

    def test_bytes_received_straight_into_place(self, pair: Pair) -> None:
        near, far = pair.open()
        view = pair.client.session.reserve(near, MAX_PAYLOAD_SIZE)
        assert view is not None
        assert len(view) == MAX_PAYLOAD_SIZE
        view[:5] = b"there"
        pair.client.session.commit(near, 5)
        pair.pump()
        assert pair.server.got[far.id] == b"there"

    def test_more_than_was_reserved_is_refused_and_not_written(self, pair: Pair) -> None:
        near, _ = pair.open()
        near.send_window.available = 10
        view = pair.client.session.reserve(near, 100)
        assert view is not None
        assert len(view) == 10
        with pytest.raises(WindowExceeded):
            pair.client.session.commit(near, 11)
        assert pair.client.take_output() == b""
        assert near.send_window.available == 10

    def test_a_call_on_an_ended_stream_leaves_no_plaintext_in_a_buffer(self, pair: Pair, pools: Pools) -> None:
        near, _ = pair.open()
        pair.client.session.finish(near)
        pair.pump()
        with pytest.raises(StreamStateError):
            pair.client.session.send(near, b"secret" * 100)
        pair.pump()
        buffers = [pools.buffers.acquire(size) for size in (2_048, 32_768, 131_072) for _ in range(4)]
        found = any(b"secret" in bytes(buffer) for buffer in buffers)
        for buffer in buffers:
            pools.buffers.release(buffer)
        assert not found


class TestHalfClose:
    def test_the_client_ends_first_and_the_server_goes_on(self, pair: Pair) -> None:
        near, far = pair.open()
        pair.client.session.finish(near)
        pair.pump()
        assert pair.server.take_seen() == [Seen(EventKind.FIN, far.id)]
        assert not near.may_send
        with pytest.raises(StreamStateError):
            pair.client.session.send(near, b"more")
        pair.server.session.send(far, b"answer")
        pair.pump()
        assert pair.client.got[near.id] == b"answer"
        pair.server.session.finish(far)
        pair.pump()
        assert pair.client.take_seen() == [Seen(EventKind.FIN, near.id)]
        assert near.is_closed
        assert far.is_closed

    def test_the_server_ends_first_and_the_client_goes_on(self, pair: Pair) -> None:
        near, far = pair.open()
        pair.server.session.finish(far)
        pair.pump()
        assert pair.client.take_seen() == [Seen(EventKind.FIN, near.id)]
        pair.client.session.send(near, b"more")
        pair.client.session.finish(near)
        pair.pump()
        assert pair.server.got[far.id] == b"more"
        assert pair.server.take_seen() == [Seen(EventKind.FIN, far.id)]
        assert near.is_closed
        assert far.is_closed

    def test_both_end_at_once(self, pair: Pair) -> None:
        near, far = pair.open()
        pair.client.session.finish(near)
        pair.server.session.finish(far)
        assert not near.is_closed
        pair.pump()
        assert pair.client.take_seen() == pair.server.take_seen() == [Seen(EventKind.FIN, near.id)]
        assert near.is_closed
        assert far.is_closed

    def test_the_end_may_carry_the_last_bytes(self, peer: Peer) -> None:
        stream = peer.open(1)
        peer.write(FrameType.DATA_FIN, 1, b"last")
        assert peer.side.got[1] == b"last"
        assert peer.side.seen == [Seen(EventKind.FIN, 1)]
        peer.session.finish(stream)
        assert stream.is_closed

    def test_a_stream_that_the_application_resets_at_its_last_bytes_gets_no_fin(self, peer: Peer) -> None:
        stream = peer.open(1)
        body = bytes.fromhex("02000004 00000001") + b"last"
        kinds = []
        for event in peer.session.feed(peer.seal(body)):
            kinds.append(event.kind)
            peer.session.consumed(stream, len(event.data))
            peer.session.reset(stream, Code.TARGET_RESET)
        assert kinds == [EventKind.DATA]
        assert peer.answers() == [(FrameType.RESET, 1, code(Code.TARGET_RESET))]

    def test_an_end_is_sent_once(self, pair: Pair) -> None:
        near, _ = pair.open()
        pair.client.session.finish(near)
        with pytest.raises(StreamStateError):
            pair.client.session.finish(near)


def bring(pair: Pair, state: str) -> tuple[Stream, Stream]:
    """A stream in a state, seen from the client and from the server."""
    client, server = pair.client.session, pair.server.session
    near = pair.client.open()
    pair.pump()
    far = pair.server.streams[near.id]
    if "accepted" in state:
        server.accept(far)
        pair.pump()
    if "client done" in state:
        client.finish(near)
    if "server done" in state:
        server.finish(far)
    pair.pump()
    pair.client.take_seen()
    pair.server.take_seen()
    return near, far


STATES = ["called", "called, client done", "accepted", "accepted, client done", "accepted, server done"]


class TestReset:
    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("resets", ["client", "server"])
    def test_either_side_resets_from_every_state(self, pair: Pair, state: str, resets: str) -> None:
        near, far = bring(pair, state)
        if resets == "client":
            pair.client.session.reset(near, Code.CANCELLED)
            other = pair.server
        else:
            pair.server.session.reset(far, Code.CANCELLED)
            other = pair.client
        pair.pump()
        assert other.take_seen() == [Seen(EventKind.RESET, near.id, number=Code.CANCELLED)]
        assert near.is_closed
        assert far.is_closed
        assert not pair.client.session.streams
        assert not pair.server.session.streams

    @pytest.mark.parametrize("state", STATES)
    def test_both_may_reset_at_once(self, pair: Pair, state: str) -> None:
        near, far = bring(pair, state)
        pair.client.session.reset(near, Code.CANCELLED)
        pair.server.session.reset(far, Code.TARGET_RESET)
        pair.pump()
        assert pair.client.seen == pair.server.seen == []

    def test_a_stream_that_has_ended_is_not_reset(self, pair: Pair) -> None:
        near, _ = pair.open()
        pair.client.session.reset(near, Code.CANCELLED)
        pair.pump()
        pair.client.session.reset(near, Code.CANCELLED)
        assert pair.client.take_output() == b""

    def test_late_frames_of_an_ended_stream_are_discarded(self, peer: Peer) -> None:
        stream = peer.open(1)
        peer.session.reset(stream, Code.CANCELLED)
        peer.answers()
        for frame_type, payload in (
            (FrameType.DATA, b"late"),
            (FrameType.DATA_FIN, b"late"),
            (FrameType.DATA_FIN, b""),
            (FrameType.RESET, code(Code.NONE)),
            (FrameType.WINDOW, increment(1)),
            (FrameType.DATAGRAM, TARGET.encode() + b"late"),
            (FrameType.OPENED, bytes([Status.SUCCEEDED])),
        ):
            peer.write(frame_type, 1, payload)
        assert peer.answers() == []
        assert peer.side.seen == []
        assert peer.side.got == {}

    @pytest.mark.parametrize("late", [FrameType.DATA, FrameType.DATA_FIN])
    def test_the_credit_of_late_bytes_is_given_back_to_the_session(self, peer: Peer, late: FrameType) -> None:
        stream = peer.open(1)
        peer.session.reset(stream, Code.CANCELLED)
        peer.answers()
        given_back = 0
        for _ in range(3 * SESSION_WINDOW // 65_536):
            peer.write(late, 1, bytes(65_536))
            for frame_type, stream_id, payload in peer.answers():
                assert (frame_type, stream_id) == (FrameType.WINDOW, 0)
                given_back += int.from_bytes(payload)
        assert given_back == 3 * SESSION_WINDOW


def test_a_refused_open_counts_as_opened(peer: Peer) -> None:
    """Its late frames are discarded, not fatal: an OPEN of a network that this side does not have."""
    peer.write(FrameType.OPEN, 1, b"\x09")
    peer.write(FrameType.DATA, 1, b"early")
    peer.write(FrameType.DATA_FIN, 1)
    assert peer.answers() == [(FrameType.OPENED, 1, bytes([Status.NOT_SUPPORTED]))]
    peer.write(FrameType.OPEN, 3, TO_TARGET)
    assert [each.stream_id for each in peer.side.seen] == [3]


def test_a_clients_reset_may_cross_the_answer(server: Peer) -> None:
    stream = server.side.open()
    server.session.reset(stream, Code.CANCELLED)
    server.write(FrameType.OPENED, stream.id, bytes([Status.SUCCEEDED]))
    server.write(FrameType.DATA, stream.id, b"late")
    assert server.side.seen == []
    assert server.side.got == {}
