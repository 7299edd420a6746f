"""Frames that are of no use are charged, each kind of them; what honest peers do is not, or comes nowhere near."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import pytest

from reflex.errors import ProtocolError
from reflex.protocol.allowance import (
    ABANDONED_COST,
    BURST_UNITS,
    PLAIN_COST,
    RESET_COST,
    SESSION_COST,
    UNITS_PER_S,
    USEFUL_BYTES,
)
from reflex.protocol.events import Event, EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import MAX_UNSENT_BYTES, SMALL_DATA_BYTES, Session
from reflex.protocol.streams import Stream
from reflex.protocol.wire import (
    FRAME_HEADER_SIZE,
    MAX_BODY_SIZE,
    MAX_PAYLOAD_SIZE,
    PING_SIZE,
    SESSION_WINDOW,
    SETTING,
    STREAM_WINDOW,
    Code,
    FrameType,
    Network,
    Setting,
    Status,
)
from tests.sessions import (
    START_S,
    TARGET,
    TO_TARGET,
    TO_UDP,
    Pair,
    Peer,
    code,
    connected,
    frame,
    goaway,
    increment,
    peer_of,
)

ENDED: Final = 1  # a stream that was there, and was reset
LIVE: Final = 3
FULL: Final = 1_000  # streams beyond the limit
UNKNOWN_TYPE: Final = 0x90
SETTINGS_OF_TEN: Final = SETTING.pack(77, 1) * 10

Frames = Callable[[], Iterator[bytes]]
Answer = Callable[[Session, Stream], None]


def same(frame_type: int, stream_id: int = 0, payload: bytes = b"") -> Frames:
    def endless() -> Iterator[bytes]:
        while True:
            yield frame(frame_type, stream_id, payload)

    return endless


def opens(payload: bytes = TO_TARGET, *, then_reset: bool = False) -> Frames:
    def endless() -> Iterator[bytes]:
        stream_id = LIVE
        while True:
            stream_id += 2
            yield frame(FrameType.OPEN, stream_id, payload)
            if then_reset:
                yield frame(FrameType.RESET, stream_id, code(Code.CANCELLED))

    return endless


# What a server is sent: the frames, and what one of them costs.
FLOODS: Final = {
    "PING": (same(FrameType.PING, 0, bytes(PING_SIZE)), PLAIN_COST),
    "PONG": (same(FrameType.PONG, 0, bytes(PING_SIZE)), PLAIN_COST),
    "an empty PAD": (same(FrameType.PAD), PLAIN_COST),
    "an unknown type": (same(UNKNOWN_TYPE, 9, b"x"), PLAIN_COST),
    "SETTINGS": (same(FrameType.SETTINGS), SESSION_COST),
    "SETTINGS of ten": (same(FrameType.SETTINGS, 0, SETTINGS_OF_TEN), SESSION_COST + 10),
    "GOAWAY": (same(FrameType.GOAWAY, 0, goaway(0, Code.NONE)), SESSION_COST),
    "WINDOW by 1, session": (same(FrameType.WINDOW, 0, increment(1)), PLAIN_COST),
    "WINDOW by 1, live": (same(FrameType.WINDOW, LIVE, increment(1)), PLAIN_COST),
    "WINDOW by more than was sent, session": (same(FrameType.WINDOW, 0, increment(USEFUL_BYTES)), PLAIN_COST),
    "WINDOW by more than was sent, live": (same(FrameType.WINDOW, LIVE, increment(USEFUL_BYTES)), PLAIN_COST),
    "WINDOW, ended": (same(FrameType.WINDOW, ENDED, increment(STREAM_WINDOW)), PLAIN_COST),
    "DATA, ended": (same(FrameType.DATA, ENDED, b"x"), PLAIN_COST),
    "DATA_FIN, ended": (same(FrameType.DATA_FIN, ENDED), PLAIN_COST),
    "RESET, ended": (same(FrameType.RESET, ENDED, code(Code.NONE)), RESET_COST),
    "OPENED, ended": (same(FrameType.OPENED, ENDED, bytes([Status.SUCCEEDED])), PLAIN_COST),
    "DATAGRAM, ended": (same(FrameType.DATAGRAM, ENDED, TARGET.encode()), PLAIN_COST),
    "OPEN of what there is not": (opens(b"\x09"), PLAIN_COST),
}


# What the application says to an OPEN before it draws the next event, and what the OPEN carries.
REFUSALS: Final[dict[str, tuple[Answer, bytes]]] = {
    "UDP, refused": (lambda session, stream: session.refuse(stream, Status.NOT_SUPPORTED), TO_UDP),
    "TCP, refused": (lambda session, stream: session.refuse(stream, Status.NOT_ALLOWED), TO_TARGET),
    "TCP, reset": (lambda session, stream: session.reset(stream, Code.LIMIT), TO_TARGET),
}


@pytest.fixture
def peer(pools: Pools) -> Iterator[Peer]:
    """A server's peer, which has one live stream and one that has ended."""
    with peer_of(pools, of_server=True, max_streams=FULL) as peer:
        peer.open(ENDED)
        peer.session.reset(peer.side.streams[ENDED], Code.CANCELLED)
        peer.open(LIVE)
        yield peer


def flood(peer: Peer, frames: Iterator[bytes], count: int) -> None:
    """So many of the frames, in as few records as hold them; the answers are read."""
    body = bytearray()
    for _, each in zip(range(count), frames, strict=False):
        if len(body) + len(each) > MAX_BODY_SIZE:
            peer.write_body(bytes(body))
            peer.answers()
            body.clear()
        body += each
    peer.write_body(bytes(body))
    peer.answers()


@pytest.mark.parametrize("name", FLOODS)
def test_each_kind_may_be_sent_in_a_burst_and_then_no_faster_than_it_is_forgotten(name: str, peer: Peer) -> None:
    make, cost = FLOODS[name]
    frames = make()
    flood(peer, frames, BURST_UNITS // cost)
    peer.session.now_s += 1.0
    flood(peer, frames, UNITS_PER_S // cost)
    with pytest.raises(ProtocolError, match="without use"):
        flood(peer, frames, 2)


def test_a_stream_that_is_opened_and_reset_before_it_was_answered_costs_what_it_takes(peer: Peer) -> None:
    frames = opens(then_reset=True)()
    flood(peer, frames, 2 * (BURST_UNITS // ABANDONED_COST))
    assert len(peer.session.streams) == 1
    with pytest.raises(ProtocolError, match="without use"):
        flood(peer, frames, 2)


@pytest.mark.parametrize("name", REFUSALS)
def test_an_open_that_the_application_refuses_at_once_costs_as_much_as_one_beyond_the_limit(
    name: str, peer: Peer
) -> None:
    answer, payload = REFUSALS[name]
    keep = peer.side.keep

    def refuse(event: Event) -> None:
        keep(event)
        if event.kind is EventKind.OPEN:
            assert event.stream is not None
            answer(peer.session, event.stream)

    peer.side.keep = refuse  # type: ignore[method-assign]  # this application is of few words
    frames = opens(payload)()
    flood(peer, frames, BURST_UNITS // RESET_COST)
    peer.session.now_s += 1.0
    flood(peer, frames, UNITS_PER_S // RESET_COST)
    assert len(peer.session.streams) == 1
    with pytest.raises(ProtocolError, match="without use"):
        flood(peer, frames, 1)


def test_an_open_at_which_the_application_ends_the_session_costs_nothing(peer: Peer) -> None:
    left = peer.session._allowance._left
    for event in peer.session.feed(peer.seal(frame(FrameType.OPEN, LIVE + 2, TO_TARGET))):
        assert event.kind is EventKind.OPEN
        peer.session.close(Code.SHUTTING_DOWN)
    assert peer.session._allowance._left == left


@pytest.mark.parametrize("is_ending", [False, True])
def test_streams_beyond_the_limit_and_after_goaway_are_reset_and_charged(peer: Peer, *, is_ending: bool) -> None:
    frames = opens()()
    if is_ending:
        peer.session.go_away(Code.SHUTTING_DOWN)
    else:
        flood(peer, frames, FULL - 1)
    peer.side.take_seen()
    flood(peer, frames, BURST_UNITS // RESET_COST)
    assert peer.side.take_seen() == []
    with pytest.raises(ProtocolError, match="without use"):
        flood(peer, frames, 1)


def test_a_hostile_server_is_charged_as_well(pools: Pools) -> None:
    with peer_of(pools, of_server=False) as server:
        stream = server.session.open(TARGET)
        server.session.reset(stream, Code.CANCELLED)
        frames = same(FrameType.OPENED, stream.id, bytes([Status.SUCCEEDED]))()
        flood(server, frames, BURST_UNITS)
        with pytest.raises(ProtocolError, match="without use"):
            flood(server, frames, 1)


def test_only_the_first_goaway_is_an_event(peer: Peer) -> None:
    flood(peer, same(FrameType.GOAWAY, 0, goaway(0, Code.NONE))(), 50)
    assert [each.kind for each in peer.side.take_seen() if each.kind is EventKind.GOAWAY] == [EventKind.GOAWAY]


class TestFree:
    """What an honest peer may do as much as it likes: nothing of it is charged."""

    def left(self, peer: Peer) -> float:
        return peer.session._allowance._left

    def test_data(self, peer: Peer) -> None:
        for _ in range(2_000):
            peer.write(FrameType.DATA, LIVE, b"x")
        assert self.left(peer) == BURST_UNITS

    def test_credit_for_what_was_sent_however_late_it_comes(self, peer: Peer) -> None:
        stream = peer.side.streams[LIVE]
        for _ in range(20):
            assert peer.session.send(stream, bytes(STREAM_WINDOW)) == STREAM_WINDOW
            peer.answers()
            for _ in range(STREAM_WINDOW // USEFUL_BYTES):
                peer.write(FrameType.WINDOW, LIVE, increment(USEFUL_BYTES))
                peer.write(FrameType.WINDOW, 0, increment(USEFUL_BYTES))
        assert self.left(peer) == BURST_UNITS

    def test_credit_of_a_window_that_has_grown_after_each_growth_was_paid_for_once(self, peer: Peer) -> None:
        stream = peer.side.streams[LIVE]
        peer.write(FrameType.WINDOW, LIVE, increment(STREAM_WINDOW))
        peer.write(FrameType.WINDOW, 0, increment(STREAM_WINDOW))
        assert self.left(peer) == BURST_UNITS - 2 * PLAIN_COST
        for _ in range(20):
            assert peer.session.send(stream, bytes(2 * STREAM_WINDOW)) == 2 * STREAM_WINDOW
            peer.answers()
            for _ in range(2):
                peer.write(FrameType.WINDOW, LIVE, increment(STREAM_WINDOW))
                peer.write(FrameType.WINDOW, 0, increment(STREAM_WINDOW))
        assert self.left(peer) == BURST_UNITS - 2 * PLAIN_COST

    def test_late_data_worth_a_frame(self, peer: Peer) -> None:
        for _ in range(SESSION_WINDOW // USEFUL_BYTES):
            peer.write(FrameType.DATA, ENDED, bytes(USEFUL_BYTES))
            peer.answers()
        assert self.left(peer) == BURST_UNITS

    def test_streams_that_come_and_go(self, peer: Peer) -> None:
        for stream_id in range(LIVE + 2, LIVE + 4_000, 2):
            stream = peer.open(stream_id)
            peer.write(FrameType.DATA_FIN, stream_id, b"request")
            peer.session.finish(stream)
        assert self.left(peer) == BURST_UNITS

    def test_datagrams_of_a_live_stream(self, peer: Peer) -> None:
        peer.write(FrameType.OPEN, LIVE + 2, bytes([Network.UDP]))
        for _ in range(2_000):
            peer.write(FrameType.DATAGRAM, LIVE + 2, TARGET.encode() + b"x")
        assert self.left(peer) == BURST_UNITS

    @pytest.mark.parametrize(("is_answered", "part"), [(True, 1 / 10), (False, 1 / 2)])
    def test_every_stream_of_a_full_session_reset_at_once_is_a_part_of_the_burst(
        self, peer: Peer, *, is_answered: bool, part: float
    ) -> None:
        flood(peer, opens()(), FULL - 1)
        if is_answered:
            for stream_id in range(LIVE + 2, LIVE + 2 * FULL, 2):
                peer.session.accept(peer.side.streams[stream_id])
        assert len(peer.session.streams) == FULL
        for stream_id in range(LIVE + 2, LIVE + 2 * FULL, 2):
            peer.write(FrameType.RESET, stream_id, code(Code.SHUTTING_DOWN))
        assert BURST_UNITS - self.left(peer) <= BURST_UNITS * part


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_session_with_as_many_streams_as_there_may_be_survives_the_end_of_all_of_them_at_once(
    pools: Pools,
    is_answered: bool,  # noqa: FBT001
) -> None:
    """Whichever half ends them, and though all its answers come late."""
    count = 5_000
    with connected(pools, max_streams=count) as pair:
        for ending, other in ((pair.client, pair.server), (pair.server, pair.client)):
            streams = [pair.client.open() for _ in range(count)]
            pair.pump()
            if is_answered:
                for each in streams:
                    pair.server.session.accept(pair.server.streams[each.id])
                pair.pump()
                for each in streams:
                    other.session.send(other.streams[each.id], b"x")
            for each in streams:
                ending.session.reset(ending.streams[each.id], Code.SHUTTING_DOWN)
            pair.pump()
            assert not pair.client.session.streams
            assert not pair.server.session.streams
            pair.client.streams.clear()
            pair.server.streams.clear()
            pair.set_time(pair.client.session.now_s + 20)


@pytest.mark.parametrize("of_server", [True, False])
def test_what_a_peer_says_of_streams_gives_it_nothing(
    pools: Pools,
    of_server: bool,  # noqa: FBT001
) -> None:
    with peer_of(pools, of_server=of_server) as peer:
        for count in (10_000, 1, 2**60):
            peer.write(FrameType.SETTINGS, 0, SETTING.pack(Setting.MAX_STREAMS, count))
        assert peer.session._allowance.burst_units == BURST_UNITS


def test_a_pair_that_moves_much_and_in_small_pieces_is_charged_next_to_nothing(pools: Pools) -> None:
    with connected(pools) as pair:
        near, far = pair.open()
        left = pair.server.session._allowance._left
        for turn in range(300):
            pair.client.session.send(near, bytes(STREAM_WINDOW // 2))
            pair.server.session.send(far, b"x" * (turn % 50 + 1))
            pair.set_time(START_S + turn / 1e6)
            pair.pump()
        assert sum(map(len, pair.server.got.values())) == 300 * (STREAM_WINDOW // 2)
        assert left - pair.server.session._allowance._left < 10
        assert BURST_UNITS - pair.client.session._allowance._left < SESSION_COST + 20  # SETTINGS, at the start


class TestAnswersToData:
    """Credit is an answer, too: a peer that sends DATA and never reads makes this side keep it."""

    def test_credit_for_a_peer_that_never_reads_is_bounded(self, pools: Pools) -> None:
        with peer_of(pools, of_server=True) as peer:
            peer.open(1)
            peer.session._encoder.control_bytes = MAX_UNSENT_BYTES - 100  # 6 GB would be needed to get there
            piece = frame(FrameType.DATA, 1, bytes(STREAM_WINDOW // 4))
            with pytest.raises(ProtocolError, match="does not read"):
                endless_data(peer, piece)
            assert peer.session.unsent_bytes < 1_000

    def test_the_largest_pads_are_not_kept(self, peer: Peer) -> None:
        body = frame(FrameType.PAD, 0, bytes(MAX_PAYLOAD_SIZE))
        assert len(body) == FRAME_HEADER_SIZE + MAX_PAYLOAD_SIZE == MAX_BODY_SIZE
        for _ in range(100):
            peer.write_body(body)
            assert peer.session.unsent_bytes == 0
            assert peer.budget.buffered == 0


class TestSmallData:
    """A record may hold thousands of DATA frames of a byte; a draw with a limit stops in the midst of it."""

    BODY: Final = b"".join(
        frame(FrameType.DATA, LIVE, bytes([each])) + frame(FrameType.DATA, LIVE, bytes(SMALL_DATA_BYTES))
        for each in range(100)
    )

    def draw(self, peer: Peer, limit: int) -> int:
        """How many events of DATA there are in one draw."""
        count = 0
        for event in peer.session.events(limit):
            peer.side.keep(event)
            count += event.kind is EventKind.DATA
        return count

    def feed(self, peer: Peer, body: bytes) -> None:
        record = peer.seal(body)
        peer.session.receive_buffer()[: len(record)] = record
        peer.session.received(len(record))

    def test_a_draw_stops_at_its_limit_and_the_next_one_goes_on(self, peer: Peer) -> None:
        self.feed(peer, self.BODY)
        assert self.draw(peer, 30) == 60
        assert peer.session.is_left_off
        assert self.draw(peer, 0) == 0
        assert self.draw(peer, 69) == 2 * 69
        assert peer.session.is_left_off
        assert self.draw(peer, 30) == 2
        assert not peer.session.is_left_off
        small = b"".join(bytes([each]) + bytes(SMALL_DATA_BYTES) for each in range(100))
        assert peer.side.got == {LIVE: small}
        assert self.draw(peer, 30) == 0

    def test_without_a_limit_it_is_drawn_to_the_end(self, peer: Peer) -> None:
        self.feed(peer, self.BODY)
        assert sum(event.kind is EventKind.DATA for event in peer.session.events()) == 200
        assert not peer.session.is_left_off
        peer.session.consumed(peer.side.streams[LIVE], 100 * (1 + SMALL_DATA_BYTES))

    def test_what_was_left_off_is_given_back_at_the_end(self, peer: Peer, pools: Pools) -> None:
        self.feed(peer, self.BODY)
        self.draw(peer, 30)
        assert pools.in_use > 0
        peer.session.close_buffers()
        assert pools.in_use == 0
        assert not peer.session.is_left_off
        assert self.draw(peer, 30) == 0

    def test_an_error_behind_the_limit_comes_with_its_draw(self, peer: Peer) -> None:
        self.feed(peer, self.BODY + frame(FrameType.DATA, LIVE))
        assert self.draw(peer, 99) == 198
        with pytest.raises(ProtocolError, match="empty"):
            self.draw(peer, 99)

    def test_a_stream_that_is_reset_in_between_gets_nothing_more(self, peer: Peer) -> None:
        self.feed(peer, self.BODY)
        assert self.draw(peer, 30) == 60
        peer.session.reset(peer.side.streams[LIVE], Code.CANCELLED)
        assert self.draw(peer, 1000) == 0
        assert not peer.session.is_left_off
        window = peer.session._receive_window
        assert window.available + window.owed == SESSION_WINDOW


def endless_data(peer: Peer, piece: bytes) -> None:
    while True:
        peer.write_body(piece)


def test_no_pings_pile_up_where_nothing_can_be_sent(pools: Pools) -> None:
    pair = Pair(pools, keepalive_s=5)
    try:
        pair.pump()
        session = pair.client.session
        for _ in range(28):
            session.now_s += 0.5
            assert not session.is_dead()
        assert session.unsent_bytes == 2 * (FRAME_HEADER_SIZE + PING_SIZE)  # 14 s, and nobody sealed
    finally:
        pair.end()
