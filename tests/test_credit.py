"""reflex.protocol.credit, and flow control of a session as a whole: credit, growth, and that nothing ever stalls."""

from __future__ import annotations

import math

import pytest

from reflex.errors import FlowControlError
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.streams import Stream
from reflex.protocol.window import BULK_BYTES, BULK_PAUSE_S, MAX_STREAM_RECEIVE_WINDOW, Budget
from reflex.protocol.wire import MAX_WINDOW, SESSION_WINDOW, STREAM_WINDOW, Code, FrameType
from tests.sessions import START_S, Pair, Peer, RawFrame, Seen, connected, increment, peer_of

PIECE = 65_536


def windows(frames: list[RawFrame], stream_id: int) -> int:
    """How much credit these frames give a stream, or the session (0)."""
    return sum(
        int.from_bytes(payload) for kind, where, payload in frames if (kind, where) == (FrameType.WINDOW, stream_id)
    )


def measure(pair: Pair, round_trip_s: float) -> None:
    """Let the server measure a round trip."""
    pair.server.session.ping()
    back = pair.server.take_output()
    pair.set_time(pair.server.session.now_s + round_trip_s)
    pair.client.feed(back)
    pair.server.feed(pair.client.take_output())


class TestSending:
    def test_a_stream_sends_up_to_its_window_and_goes_on_when_it_opens(self, pair: Pair) -> None:
        near, far = pair.open()
        pair.server.reads = False
        assert pair.client.session.send(near, bytes(STREAM_WINDOW + 10)) == STREAM_WINDOW
        assert pair.client.session.reserve(near, 1) is None
        pair.pump()
        assert pair.client.seen == []
        pair.server.consume(far)
        pair.pump()
        assert pair.client.take_seen() == [Seen(EventKind.WRITABLE, near.id)]
        assert pair.client.session.send(near, bytes(10)) == 10

    def test_all_streams_together_send_up_to_the_sessions_window(self, pools: Pools) -> None:
        with connected(pools, server_budget=Budget(buffered_limit=0)) as pair:
            streams = [pair.open()[0] for _ in range(5)]
            pair.server.reads = False
            sent = [pair.client.session.send(stream, bytes(STREAM_WINDOW)) for stream in streams]
            assert sent == [STREAM_WINDOW] * 4 + [0]
            assert pair.client.session.reserve(streams[4], 1) is None
            pair.pump()
            assert pair.client.seen == []
            pair.server.consume()
            pair.pump()
            seen = pair.client.take_seen()
            assert Seen(EventKind.WRITABLE) in seen
            assert sorted(each.stream_id for each in seen) == [0, 1, 3, 5, 7]

    def test_writable_is_told_exactly_when_a_window_had_been_used_up(self, pools: Pools) -> None:
        with peer_of(pools, of_server=False) as server:
            stream = server.side.open()
            server.write(FrameType.OPENED, 1, b"\0")
            server.side.take_seen()
            server.write(FrameType.WINDOW, 0, increment(1))
            server.write(FrameType.WINDOW, 1, increment(1))
            assert server.side.seen == []
            server.session.send(stream, bytes(STREAM_WINDOW))
            server.write(FrameType.WINDOW, 1, increment(1))
            assert server.side.seen == []
            server.session.send(stream, bytes(2))
            server.write(FrameType.WINDOW, 1, increment(1))
            server.write(FrameType.WINDOW, 1, increment(1))
            assert server.side.seen == [Seen(EventKind.WRITABLE, 1)]

    def test_a_stream_that_has_ended_sending_is_not_told(self, pools: Pools) -> None:
        with peer_of(pools, of_server=False) as server:
            stream = server.side.open()
            server.session.send(stream, bytes(STREAM_WINDOW))
            server.session.finish(stream)
            server.write(FrameType.WINDOW, 1, increment(1))
            assert server.side.seen == []

    def test_a_reserved_view_ends_where_the_smaller_window_ends(self, pair: Pair) -> None:
        near, _ = pair.open()
        session = pair.client.session
        session._send_window.available = 7
        view = session.reserve(near, 100)
        assert view is not None
        assert len(view) == 7
        near.send_window.available = 3
        view = session.reserve(near, 100)
        assert view is not None
        assert len(view) == 3
        session._send_window.available = SESSION_WINDOW
        near.send_window.available = STREAM_WINDOW


class TestBulk:
    """A stream that moves a MiB without a pause is seen, whichever side sends."""

    @staticmethod
    def move(pair: Pair, near: Stream, size_bytes: int, every_s: float) -> None:
        """From the client to the server, which consumes at once; a round trip for each half a window."""
        step = STREAM_WINDOW // 2
        for _ in range(size_bytes // step):
            pair.set_time(pair.client.session.now_s + every_s)
            assert pair.client.session.send(near, bytes(step)) == step
            pair.pump()

    def test_both_halves_see_it(self, pair: Pair) -> None:
        near, _ = pair.open()
        self.move(pair, near, BULK_BYTES - STREAM_WINDOW // 2, BULK_PAUSE_S)
        assert pair.client.session.bulk_s == pair.server.session.bulk_s == -math.inf
        self.move(pair, near, STREAM_WINDOW // 2, BULK_PAUSE_S)
        assert pair.client.session.bulk_s == pair.server.session.bulk_s == pair.client.session.now_s

    def test_what_pauses_is_none(self, pair: Pair) -> None:
        near, _ = pair.open()
        self.move(pair, near, 4 * BULK_BYTES, 2 * BULK_PAUSE_S)
        assert pair.client.session.bulk_s == pair.server.session.bulk_s == -math.inf

    def test_many_that_move_a_little_are_none(self, pair: Pair) -> None:
        for _ in range(BULK_BYTES // STREAM_WINDOW * 4):
            near, _ = pair.open()
            self.move(pair, near, STREAM_WINDOW, 0.0)
        assert pair.client.session.bulk_s == pair.server.session.bulk_s == -math.inf


class TestReceiving:
    def test_a_streams_credit_comes_back_when_its_bytes_are_consumed(self, peer: Peer) -> None:
        stream = peer.open(1)
        peer.side.reads = False
        peer.write(FrameType.DATA, 1, bytes(PIECE))
        peer.write(FrameType.DATA, 1, bytes(PIECE))
        assert windows(peer.answers(), 1) == 0
        peer.session.consumed(stream, STREAM_WINDOW // 2 - 1)
        assert windows(peer.answers(), 1) == 0
        peer.session.consumed(stream, 1)
        assert windows(peer.answers(), 1) == STREAM_WINDOW // 2

    def test_no_credit_is_given_to_a_stream_whose_peer_has_ended(self, peer: Peer) -> None:
        stream = peer.open(1)
        peer.side.reads = False
        peer.write(FrameType.DATA, 1, bytes(PIECE))
        peer.write(FrameType.DATA_FIN, 1, bytes(PIECE))
        peer.side.consume(stream)
        assert peer.answers() == []

    def test_the_sessions_credit_comes_back_on_arrival(self, peer: Peer) -> None:
        peer.side.reads = False
        for stream_id in (1, 3):
            peer.open(stream_id)
            for _ in range(4):
                peer.write(FrameType.DATA, stream_id, bytes(PIECE))
        assert peer.answers() == [(FrameType.WINDOW, 0, increment(SESSION_WINDOW // 2))]

    @pytest.mark.parametrize("ended", [False, True])
    def test_beyond_the_budget_the_sessions_credit_waits_for_the_reader(self, pools: Pools, ended: bool) -> None:  # noqa: FBT001
        budget = Budget(buffered_limit=PIECE)
        with peer_of(pools, of_server=True, budget=budget) as peer:
            peer.side.reads = False
            streams = [peer.open(stream_id) for stream_id in (1, 3, 5, 7)]
            for stream in streams:
                for _ in range(4):
                    peer.write(FrameType.DATA, stream.id, bytes(PIECE))
            assert budget.buffered == SESSION_WINDOW
            assert peer.session._receive_window.available == 0
            assert windows(peer.answers(), 0) == 0
            for stream in streams:
                if ended:
                    peer.session.reset(stream, Code.CANCELLED)
                peer.side.consume(stream)
            window = peer.session._receive_window
            assert windows(peer.answers(), 0) == window.available >= SESSION_WINDOW // 2
            assert window.available + window.owed == SESSION_WINDOW
            assert budget.buffered == peer.session._withheld == 0

    def test_an_owner_gets_credit_while_it_keeps_no_more_than_what_is_left(self, pools: Pools) -> None:
        budget = Budget(buffered_limit=4 * SESSION_WINDOW, growth_limit=SESSION_WINDOW)
        with peer_of(pools, of_server=True, budget=budget) as peer:
            share = peer.session.share
            peer.side.reads = False
            stream = peer.open(1)
            for kept, grown, is_given in ((1, 0, True), (2, 0, False), (1, 1, True), (1.9, 1, False)):
                share.kept, budget.growth = int(kept * SESSION_WINDOW), grown * SESSION_WINDOW
                budget.buffered = share.kept
                peer.write(FrameType.DATA, 1, bytes(1000))
                assert (peer.session._withheld == 0) is is_given
                budget.buffered = stream.held_bytes
                peer.side.consume(stream)
            share.kept = budget.growth = 0

    @pytest.mark.parametrize("is_closed", [False, True])
    def test_credit_that_waits_comes_back_when_others_have_made_room(self, pools: Pools, is_closed: bool) -> None:  # noqa: FBT001
        budget = Budget(buffered_limit=SESSION_WINDOW)
        with peer_of(pools, of_server=True, budget=budget) as peer:
            peer.side.reads = False
            streams = [peer.open(stream_id) for stream_id in (1, 3, 5)]
            others, budget.buffered = SESSION_WINDOW, SESSION_WINDOW
            for stream in streams:
                for _ in range(4):
                    peer.write(FrameType.DATA, stream.id, bytes(PIECE))
            withheld = 3 * STREAM_WINDOW
            assert peer.session._withheld == withheld
            assert not peer.session.is_dead()
            assert peer.session._withheld == withheld
            budget.buffered -= others
            if is_closed:
                peer.session.close(Code.NONE)
            assert not peer.session.is_dead()
            assert peer.session._withheld == (withheld if is_closed else 0)
            assert windows(peer.answers(), 0) == (0 if is_closed else withheld)
            for stream in streams:
                peer.side.consume(stream)

    def test_the_last_bytes_of_a_stream_count_for_the_budget_too(self, pools: Pools) -> None:
        budget = Budget(buffered_limit=0)
        with peer_of(pools, of_server=True, budget=budget) as peer:
            peer.side.reads = False
            stream = peer.open(1)
            peer.write(FrameType.DATA_FIN, 1, bytes(1000))
            assert budget.buffered == 1000
            assert peer.session._withheld == 1000
            peer.side.consume(stream)
            assert peer.session._withheld == 0

    def test_a_slow_stream_does_not_stop_another_one(self, pair: Pair) -> None:
        slow, slow_far = pair.open()
        fast, fast_far = pair.open()
        pair.server.reads = False
        total = 4 * SESSION_WINDOW
        sent = pair.client.session.send(slow, bytes(total))
        done = 0
        while done < total:
            step = pair.client.session.send(fast, bytes(total - done))
            assert step > 0
            done += step
            pair.pump()
            pair.server.consume(fast_far)
            pair.pump()
        assert sent == slow_far.held_bytes == STREAM_WINDOW
        assert len(pair.server.got[fast.id]) == total
        pair.server.consume()

    def test_what_is_consumed_after_the_end_still_leaves_the_budget(self, pair: Pair) -> None:
        near, far = pair.open()
        pair.server.reads = False
        pair.client.session.send(near, bytes(1000))
        pair.pump()
        pair.server.session.close_buffers()
        assert pair.server.budget.buffered == 1000
        pair.server.session.consumed(far, 1000)
        assert pair.server.budget.buffered == 0


class TestOverrun:
    @pytest.mark.parametrize("frame_type", [FrameType.DATA, FrameType.DATA_FIN])
    def test_a_stream_window_that_is_overrun_is_fatal(self, peer: Peer, frame_type: FrameType) -> None:
        peer.side.reads = False
        peer.open(1)
        for _ in range(STREAM_WINDOW // PIECE):
            peer.write(FrameType.DATA, 1, bytes(PIECE))
        with pytest.raises(FlowControlError):
            peer.write(frame_type, 1, b"x")

    @pytest.mark.parametrize("frame_type", [FrameType.DATA, FrameType.DATA_FIN])
    def test_a_session_window_that_is_overrun_is_fatal(self, pools: Pools, frame_type: FrameType) -> None:
        with peer_of(pools, of_server=True, budget=Budget(buffered_limit=0)) as peer:
            peer.side.reads = False
            for stream_id in (1, 3, 5, 7):
                peer.open(stream_id)
                for _ in range(STREAM_WINDOW // PIECE):
                    peer.write(FrameType.DATA, stream_id, bytes(PIECE))
            peer.open(9)
            with pytest.raises(FlowControlError):
                peer.write(frame_type, 9, b"x")

    @pytest.mark.parametrize("stream_id", [0, 1])
    @pytest.mark.parametrize("size", [0, MAX_WINDOW, MAX_WINDOW + 1, 2**32 - 1])
    def test_a_window_raised_by_0_or_above_the_maximum_is_fatal(self, peer: Peer, stream_id: int, size: int) -> None:
        peer.open(1)
        with pytest.raises(FlowControlError):
            peer.write(FrameType.WINDOW, stream_id, increment(size))

    def test_a_window_may_be_raised_to_the_maximum(self, peer: Peer) -> None:
        stream = peer.open(1)
        peer.write(FrameType.WINDOW, 0, increment(MAX_WINDOW - SESSION_WINDOW))
        peer.write(FrameType.WINDOW, 1, increment(MAX_WINDOW - STREAM_WINDOW))
        assert stream.send_window.available == MAX_WINDOW
        with pytest.raises(FlowControlError):
            peer.write(FrameType.WINDOW, 1, increment(1))

    def test_a_window_raised_by_0_is_fatal_for_an_ended_stream_too(self, peer: Peer) -> None:
        stream = peer.open(1)
        peer.session.reset(stream, Code.CANCELLED)
        with pytest.raises(FlowControlError):
            peer.write(FrameType.WINDOW, 1, increment(0))


def move(pair: Pair, near: Stream, total: int) -> None:
    """Move so many bytes to a reader that takes everything at once."""
    rest = total
    while rest:
        sent = pair.client.session.send(near, bytes(min(rest, 1 << 20)))
        assert sent > 0
        rest -= sent
        pair.pump()


class TestGrowth:
    def test_windows_grow_with_round_trips_up_to_their_maximum_and_shrink_with_their_streams(self, pair: Pair) -> None:
        near, far = pair.open()
        measure(pair, 0.1)
        move(pair, near, STREAM_WINDOW)  # the first half window tells when the next one begins
        move(pair, near, 48 * 1024 * 1024)
        window = far.receive_window
        assert window.size == MAX_STREAM_RECEIVE_WINDOW
        assert pair.server.budget.growth == MAX_STREAM_RECEIVE_WINDOW - STREAM_WINDOW
        session_window = pair.server.session._receive_window
        assert session_window.size == SESSION_WINDOW + MAX_STREAM_RECEIVE_WINDOW - STREAM_WINDOW
        assert near.send_window.available == window.available
        pair.client.session.finish(near)
        pair.server.session.finish(far)
        pair.pump()
        assert pair.server.budget.growth == 0
        assert session_window.size == SESSION_WINDOW
        other, _ = pair.open()
        move(pair, other, 40 * 1024 * 1024)  # credit given for the ended stream is used up, and it still flows
        assert pair.server.session._send_window.available == SESSION_WINDOW

    def test_windows_do_not_grow_where_the_reader_is_slower_than_round_trips(self, pair: Pair) -> None:
        near, far = pair.open()
        measure(pair, 0.1)
        for step in range(20):
            pair.set_time(START_S + 1 + step)
            move(pair, near, STREAM_WINDOW // 2)
        assert far.receive_window.size == STREAM_WINDOW
        assert pair.server.budget.growth == 0

    def test_windows_do_not_grow_before_a_round_trip_is_known_and_it_is_asked_for(self, pair: Pair) -> None:
        near, far = pair.open()
        assert pair.client.session.send(near, bytes(STREAM_WINDOW)) == STREAM_WINDOW
        pair.server.feed(pair.client.take_output())
        assert far.receive_window.size == STREAM_WINDOW
        back = pair.server.take_output()
        pair.set_time(START_S + 0.2)
        pair.client.feed(back)
        pair.pump()
        assert pair.server.session.round_trip_s == pytest.approx(0.2)

    def test_all_windows_of_a_process_grow_within_its_budget(self, pools: Pools) -> None:
        budget = Budget(growth_limit=STREAM_WINDOW)
        with connected(pools, server_budget=budget) as pair:
            measure(pair, 0.1)
            (first, first_far), (second, second_far) = pair.open(), pair.open()
            for near in (first, second):
                move(pair, near, 4 * SESSION_WINDOW)
            assert budget.growth == STREAM_WINDOW
            assert first_far.receive_window.size == 2 * STREAM_WINDOW
            assert second_far.receive_window.size == STREAM_WINDOW
            pair.client.session.reset(first, Code.CANCELLED)
            pair.pump()
            assert budget.growth == 0
            move(pair, second, 4 * SESSION_WINDOW)
            assert second_far.receive_window.size == 2 * STREAM_WINDOW

    def test_the_sessions_window_grows_no_further_than_a_window_may(self, pools: Pools) -> None:
        """Beyond that, credit could not be told of: the peer would be sent WINDOW by 0, which is fatal."""
        with connected(pools, server_budget=Budget(buffered_limit=1 << 40)) as pair:
            measure(pair, 0.1)
            near, far = pair.open()
            pair.server.session._receive_window.grow(MAX_WINDOW - SESSION_WINDOW - 10)  # as 128 streams would
            move(pair, near, 8 * SESSION_WINDOW)
            assert far.grown_bytes == 10
            assert pair.server.session._receive_window.size == MAX_WINDOW
            window = pair.client.session._send_window
            assert window.available == pair.server.session._receive_window.available > MAX_WINDOW - SESSION_WINDOW

    def test_who_has_grown_much_leaves_growth_to_the_next(self, pools: Pools) -> None:
        limit = 8 * STREAM_WINDOW
        budget = Budget(growth_limit=limit)
        with connected(pools, server_budget=budget) as greedy:
            measure(greedy, 0.1)
            streams = [greedy.open()[0] for _ in range(4)]
            for near in streams:
                move(greedy, near, 4 * SESSION_WINDOW)
            assert 0 < greedy.server.session.share.growth == budget.growth < limit
            with connected(pools, server_budget=budget) as other:
                measure(other, 0.1)
                near, far = other.open()
                move(other, near, 4 * SESSION_WINDOW)
                assert far.grown_bytes == other.server.session.share.growth > 0
                for each in streams:
                    greedy.client.session.reset(each, Code.CANCELLED)
                greedy.pump()
                assert budget.growth == far.grown_bytes
                assert greedy.server.session.share.growth == 0

    def test_growth_is_given_back_when_the_session_is_closed(self, pair: Pair) -> None:
        near, _ = pair.open()
        measure(pair, 0.1)
        move(pair, near, 4 * SESSION_WINDOW)
        assert pair.server.budget.growth > 0
        pair.server.session.close_buffers()
        assert pair.server.budget.growth == 0

    def test_ended_streams_do_not_take_the_sessions_credit_with_them(self, pair: Pair) -> None:
        """Growth that is taken back again and again leaves the session what it began with."""
        measure(pair, 0.1)
        for _ in range(6):
            near, far = pair.open()
            move(pair, near, 4 * SESSION_WINDOW)
            assert far.grown_bytes > 0
            pair.client.session.reset(near, Code.CANCELLED)
            pair.pump()
        window = pair.server.session._receive_window
        assert window.size == SESSION_WINDOW
        assert window.available + window.owed == SESSION_WINDOW
        assert pair.client.session._send_window.available == window.available


class TestNoStall:
    @pytest.mark.parametrize("buffered_limit", [0, 100_000, 10**9])
    @pytest.mark.parametrize("step", [1, 4097, PIECE])
    def test_a_reader_that_consumes_in_any_steps_gets_everything(
        self, pools: Pools, step: int, buffered_limit: int
    ) -> None:
        with connected(pools, server_budget=Budget(buffered_limit=buffered_limit)) as pair:
            near, far = pair.open()
            pair.server.reads = False
            total = 2 * STREAM_WINDOW if step == 1 else 3 * SESSION_WINDOW
            done = 0
            while done < total:
                sent = pair.client.session.send(near, bytes(total - done))
                assert sent > 0
                done += sent
                pair.pump()
                while far.held_bytes:
                    pair.server.session.consumed(far, min(step, far.held_bytes))
                pair.pump()
            assert len(pair.server.got[near.id]) == total

    def test_many_streams_at_once_get_everything_with_growth_and_a_small_budget(self, pools: Pools) -> None:
        with connected(pools, server_budget=Budget(growth_limit=3_000_000, buffered_limit=200_000)) as pair:
            measure(pair, 0.05)
            pair.server.reads = False
            rest = {pair.open()[0]: 2_000_000 for _ in range(8)}
            while rest:
                moved = 0
                for near in list(rest):
                    sent = pair.client.session.send(near, bytes(min(rest[near], 300_000)))
                    moved += sent
                    rest[near] -= sent
                    if not rest[near]:
                        del rest[near]
                        pair.client.session.finish(near)
                assert moved > 0
                pair.pump()
                pair.server.consume()
                pair.pump()
            assert all(len(got) == 2_000_000 for got in pair.server.got.values())
