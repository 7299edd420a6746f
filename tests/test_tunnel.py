"""reflex.net.tunnel: one session over one socket, its back-pressure, its clock, and each of its ends."""

from __future__ import annotations

import asyncio
import logging
import secrets
import select
import time
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import pytest

from reflex.metrics import Counters
from reflex.net import tunnel as tunnel_module
from reflex.net.tunnel import READS_PER_TURN, SHARED_TURNS, SMALL_FRAMES_PER_TURN, TICK_MAX_S, Tunnel
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.wire import (
    CODE,
    GOAWAY,
    KEEPALIVE_GRACE_S,
    SETTING,
    STREAM_WINDOW,
    Code,
    FrameType,
    Network,
    Setting,
    Status,
)
from tests.ends import End, tcp_pair
from tests.loops import in_loop, turns, until
from tests.rig import Rig
from tests.sessions import CLIENT_TIME_MS, SECRETS, TARGET, TO_TARGET

SMALL_BUFFERS = 4_096


pytestmark = pytest.mark.usefixtures("each_loop")


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_module, "TICK_MIN_S", 0.001)
    monkeypatch.setattr(tunnel_module, "TICK_MAX_S", 0.002)


class Owner:
    """A stream's owner that keeps what it is told, and consumes at once unless told otherwise."""

    def __init__(self, rig: Rig, stream: Stream) -> None:
        self.rig = rig
        self.stream = stream
        self.last_tick = rig.tunnel.tick
        self.told: list[object] = []
        self.ended = False
        self.fd = -1
        self.waiting_bytes = 0
        self.got = bytearray()
        stream.owner = self

    def on_opened(self) -> None:
        self.told.append("opened")

    def on_refused(self, status: int) -> None:
        self.told.append(("refused", status))

    def on_data(self, data: memoryview) -> None:
        self.got += data
        self.rig.session.consumed(self.stream, len(data))

    def on_fin(self) -> None:
        self.told.append("fin")

    def on_reset(self, code: int) -> None:
        self.told.append(("reset", code))

    def on_writable(self) -> None:
        self.told.append("writable")

    def on_idle(self) -> None:
        self.told.append("idle")
        self.last_tick = self.rig.tunnel.tick

    def on_hang_up(self) -> None:
        self.told.append("hang-up")


class Sleeper:
    """Waits for a tunnel that is blocked."""

    def __init__(self) -> None:
        self.resumed = 0

    def resume(self) -> None:
        self.resumed += 1


async def accepted(rig: Rig) -> tuple[Owner, Stream]:
    """A stream that is open both ways: its owner at the tunnel, and the remote's view of it."""
    ours, theirs = await rig.accept()
    owner = Owner(rig, ours)
    rig.session.accept(ours)
    rig.tunnel.flush_soon()
    await rig.remote.see(EventKind.OPENED, theirs.id)
    return owner, theirs


# Events find their owners


@in_loop
async def test_a_servers_tunnel_tells_of_opens_data_and_fins(pools: Pools) -> None:
    async with Rig(pools) as rig:
        assert rig.times_ms == [2]
        owner, theirs = await accepted(rig)
        assert rig.addresses == [TARGET]
        assert rig.counters.streams_opened == 1
        assert repr(rig.tunnel) == "<Tunnel peer, 1 streams>"
        assert rig.tunnel.stream_count == 1
        rig.remote.session.send(theirs, b"hello")
        rig.remote.session.finish(theirs)
        await rig.remote.flush()
        await until(lambda: owner.told)
        assert owner.got == b"hello"
        assert owner.told == ["fin"]
        looks = rig.looks
        assert rig.session.send(owner.stream, b"bye") == 3
        rig.session.finish(owner.stream)
        rig.tunnel.flush_soon()
        rig.tunnel.stream_ended()
        assert rig.looks == looks + 1
        await rig.remote.see(EventKind.FIN, theirs.id)
        assert rig.remote.side.got[theirs.id] == b"bye"
        assert rig.tunnel.stream_count == 0


@in_loop
async def test_a_clients_tunnel_tells_how_its_opens_went(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        owners = []
        for _ in range(3):
            owners.append(Owner(rig, rig.session.open(TARGET)))
        rig.tunnel.flush_soon()
        remote = rig.remote
        await remote.read_until(lambda: len(remote.side.streams) == 3)
        yes, no, gone = remote.side.streams.values()
        remote.session.accept(yes)
        remote.session.refuse(no, Status.REFUSED)
        remote.session.reset(gone, Code.LIMIT)
        await remote.flush()
        await until(lambda: all(owner.told for owner in owners))
        assert [owner.told for owner in owners] == [["opened"], [("refused", Status.REFUSED)], [("reset", Code.LIMIT)]]
        assert rig.counters.streams_refused == 1
        assert rig.counters.streams_reset == 1
        assert rig.looks == 2


@in_loop
async def test_data_together_with_fin_is_told_as_data_and_fin(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        await rig.remote.write(FrameType.DATA_FIN, theirs.id, b"last")
        await until(lambda: owner.told)
        assert owner.got == b"last"
        assert owner.told == ["fin"]


@in_loop
async def test_a_window_that_opens_again_wakes_its_stream_or_all_of_them(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.side.reads = False
        first, theirs = await accepted(rig)
        second, _ = await accepted(rig)
        assert rig.session.send(first.stream, bytes(STREAM_WINDOW + 1)) == STREAM_WINDOW
        rig.session.seal()
        rig.tunnel.flush_soon()
        remote = rig.remote
        await remote.read_until(lambda: len(remote.side.got.get(theirs.id, b"")) == STREAM_WINDOW)
        remote.side.consume()
        await remote.flush()
        await until(lambda: first.told)
        assert (first.told, second.told) == (["writable"], [])
        rig.session._send_window.available = 0  # as if others had used it up
        _, unowned = await rig.accept()
        assert unowned.owner is None
        await remote.write(FrameType.WINDOW, 0, (1000).to_bytes(4))
        await until(lambda: second.told)
        assert (first.told, second.told) == (["writable"] * 2, ["writable"])


@in_loop
async def test_datagrams_are_dropped_and_a_stream_without_owner_may_be_reset(pools: Pools) -> None:
    async with Rig(pools) as rig:
        remote = rig.remote
        stream = remote.session.open(None, Network.UDP)
        await remote.flush()
        await until(lambda: rig.opened)
        rig.session.accept(rig.opened[0])
        rig.tunnel.flush_soon()
        await remote.see(EventKind.OPENED, stream.id)
        remote.session.send_datagram(stream, TARGET, b"dropped")
        remote.session.reset(stream, Code.NONE)
        await remote.flush()
        await until(lambda: not rig.session.streams)
        assert rig.budget.buffered == 0


@in_loop
async def test_a_goaway_is_logged_and_the_streams_behind_it_are_reset(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools, is_client=True) as rig:
        owner = Owner(rig, rig.session.open(TARGET))
        assert rig.tunnel.has_room
        await rig.remote.write(FrameType.GOAWAY, 0, GOAWAY.pack(0, Code.SHUTTING_DOWN))
        await until(lambda: owner.told)
        assert owner.told == [("reset", Code.SHUTTING_DOWN)]
        assert not rig.tunnel.has_room
    assert "the peer takes no new streams (shutting down)" in caplog.text


@in_loop
async def test_further_goaways_are_not_logged(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools, is_client=True) as rig:
        for _ in range(3):
            await rig.remote.write(FrameType.GOAWAY, 0, GOAWAY.pack(0, 77))
        await rig.remote.write(FrameType.CLOSE, 0, CODE.pack(Code.NONE))
        await until(lambda: rig.tunnel.ended)
    assert caplog.text.count("the peer takes no new streams") == caplog.text.count("(code 77)") == 1


@in_loop
async def test_it_says_goaway_unless_it_has_ended(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.tunnel.go_away(Code.SHUTTING_DOWN)
        assert (await rig.remote.see(EventKind.GOAWAY)).number == Code.SHUTTING_DOWN
        rig.tunnel.cut("over")
        rig.tunnel.go_away(Code.SHUTTING_DOWN)
        assert rig.session.unsent_bytes == 0


@in_loop
async def test_a_tunnel_may_do_without_an_owner_who_counts_streams_or_answers_opens(pools: Pools) -> None:
    near, far = tcp_pair()
    ended: list[Tunnel] = []
    loop = asyncio.get_running_loop()
    other = Session.client(SECRETS, Pools(), time_ms=0)
    other.open(TARGET)
    session = Session.server(SECRETS, pools, time_ms=1, now_s=loop.time())
    with End(near) as end:
        tunnel = Tunnel(
            loop,
            far,
            session,
            counters=Counters(),
            idle_timeout_s=10,
            label="x",
            on_end=ended.append,
        )
        await end.send(other.data_to_send())
        await until(lambda: session.streams)
        tunnel.stream_ended()
        other.close(Code.NONE)
        await end.send(other.data_to_send())
        await until(lambda: ended)
    other.close_buffers()


# What came together with the handshake


def client_bytes(*, frames: list[tuple[int, int, bytes]]) -> bytes:
    """What a client of SECRETS sends first: its SETTINGS and these frames, in one record."""
    session = Session.client(SECRETS, Pools(), time_ms=CLIENT_TIME_MS)
    for frame_type, stream_id, payload in frames:
        session._encoder.write(frame_type, stream_id, payload)
    return session.data_to_send()


@in_loop
async def test_bytes_that_came_with_the_hello_are_fed_to_it(pools: Pools) -> None:
    rig = Rig(pools)
    rig.tunnel.feed(memoryview(client_bytes(frames=[(FrameType.OPEN, 1, TO_TARGET), (FrameType.PING, 0, bytes(8))])))
    assert rig.times_ms == [CLIENT_TIME_MS]
    assert rig.addresses == [TARGET]
    Owner(rig, rig.opened[0])
    rig.tunnel.cut("over")
    rig.remote.end.close()
    rig.remote.session.close_buffers()
    assert rig.ends == 1


@in_loop
async def test_data_among_those_bytes_finds_its_owner(pools: Pools) -> None:
    rig = Rig(pools)
    side = rig.remote.side
    theirs = side.open()
    rig.tunnel.feed(memoryview(side.take_output()))
    owner = Owner(rig, rig.opened[0])
    side.session.send(theirs, b"early")
    rig.tunnel.feed(memoryview(side.take_output()))
    assert owner.got == b"early"
    rig.tunnel.cut("over")
    rig.remote.end.close()
    rig.remote.session.close_buffers()


@in_loop
async def test_a_close_among_those_bytes_is_a_clean_end(pools: Pools) -> None:
    rig = Rig(pools)
    rig.tunnel.feed(memoryview(client_bytes(frames=[(FrameType.CLOSE, 0, CODE.pack(0))])))
    assert rig.tunnel.ended
    assert rig.counters.tunnels_lost == rig.counters.protocol_errors == 0
    rig.remote.end.close()
    rig.remote.session.close_buffers()


@in_loop
async def test_a_protocol_error_among_those_bytes_is_fatal(pools: Pools) -> None:
    rig = Rig(pools)
    rig.tunnel.feed(memoryview(client_bytes(frames=[(0x0D, 0, b"")])))
    assert rig.tunnel.ended
    assert rig.counters.protocol_errors == 1
    rig.tunnel._end_discarding()
    rig.remote.end.close()
    rig.remote.session.close_buffers()


@in_loop
async def test_a_mistake_of_ours_is_a_lost_connection_and_not_a_hang(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        with patch.object(Session, "events", side_effect=LookupError("a mistake")):
            rig.remote.session.send(theirs, b"x")
            await rig.remote.flush()
            await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]
        assert rig.counters.tunnels_lost == 1
    assert "internal error" in caplog.text
    assert "a mistake" in caplog.text


# Into the tunnel, and its back-pressure


@in_loop
async def test_records_are_small_while_several_talk_and_large_again_afterwards(pools: Pools) -> None:
    async with Rig(pools) as rig:
        tunnel = rig.tunnel
        one, other = object(), object()
        tunnel.heard(one)
        for _ in range(SHARED_TURNS):
            assert tunnel.shared_turns
            tunnel._flush()
        assert not tunnel.shared_turns, "one alone talks"
        tunnel.heard(other)
        assert tunnel.shared_turns
        assert tunnel.last_talker is other


@in_loop
async def test_what_the_socket_does_not_take_blocks_the_tunnel_until_it_is_taken(pools: Pools) -> None:
    async with Rig(pools, buffer_bytes=SMALL_BUFFERS) as rig:
        owner, theirs = await accepted(rig)
        sleeper = Sleeper()
        data = bytes(range(256)) * (STREAM_WINDOW // 256)
        assert rig.session.send(owner.stream, data) == len(data)
        rig.tunnel.flush_soon()
        await until(lambda: rig.tunnel.is_blocked)
        rig.tunnel.wait(sleeper)
        rig.session.ping()
        rig.tunnel.flush_soon()  # packed, and sent behind the rest
        await turns()
        rig.tunnel.send()  # takes nothing, and changes nothing
        assert rig.tunnel.is_blocked
        assert sleeper.resumed == 0
        assert await rig.remote.receive(theirs, len(data)) == data
        await until(lambda: not rig.tunnel.is_blocked)
        assert sleeper.resumed == 1
        assert rig.session.unsent_bytes == 0


@in_loop
async def test_answers_that_cannot_be_sent_wait_in_one_record_and_not_in_one_each(pools: Pools) -> None:
    """Each record has a buffer of its own, of 2 KiB at least; a PONG has 16 bytes."""
    async with Rig(pools, buffer_bytes=SMALL_BUFFERS) as rig:
        owner, theirs = await accepted(rig)
        data = bytes(STREAM_WINDOW)
        assert rig.session.send(owner.stream, data) == len(data)
        rig.tunnel.flush_soon()
        await until(lambda: rig.tunnel.is_blocked)
        lent, packed = pools.buffers.in_use, rig.session.unsent_bytes
        for _ in range(200):
            rig.session.ping()
            rig.tunnel.flush_soon()
            await turns(2)
        assert rig.session.unsent_bytes <= packed + 200 * 16  # the kernel may have found some more room
        assert rig.tunnel.is_blocked
        assert pools.buffers.in_use <= lent + 1
        assert await rig.remote.receive(theirs, len(data)) == data
        await until(lambda: not rig.tunnel.is_blocked and not rig.session.unsent_bytes)


@in_loop
async def test_who_has_ended_does_not_wait_for_a_tunnel_that_stays_blocked(pools: Pools) -> None:
    async with Rig(pools) as rig:
        sleepers = [Sleeper() for _ in range(3)]
        for each in sleepers:
            rig.tunnel.wait(each)
        rig.tunnel.forget(sleepers[1])
        rig.tunnel.forget(Sleeper())
        assert list(rig.tunnel._waiting) == [sleepers[0], sleepers[2]]


@in_loop
async def test_it_closes_cleanly_once_a_blocked_socket_takes_its_last_record(pools: Pools) -> None:
    async with Rig(pools, buffer_bytes=SMALL_BUFFERS) as rig:
        owner, theirs = await accepted(rig)
        data = bytes(STREAM_WINDOW)
        rig.session.send(owner.stream, data)
        rig.tunnel.flush_soon()
        await until(lambda: rig.tunnel.is_blocked)
        rig.tunnel.close(Code.SHUTTING_DOWN)
        assert await rig.remote.receive(theirs, len(data)) == data
        assert (await rig.remote.see(EventKind.CLOSED)).number == Code.SHUTTING_DOWN


@in_loop
async def test_only_the_first_settings_tell_the_time(pools: Pools) -> None:
    """Each telling may be a line in the log."""
    async with Rig(pools) as rig:
        told = SETTING.pack(Setting.TIME_MS, 77)
        for _ in range(3):
            await rig.remote.write(FrameType.SETTINGS, 0, told)
        await until(lambda: rig.session.peer_time_ms == 77)
        assert rig.times_ms == [2]


@in_loop
async def test_a_record_full_of_small_frames_is_delivered_in_several_turns(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        count = 5 * SMALL_FRAMES_PER_TURN
        sizes: list[int] = []

        def look() -> None:
            if len(owner.got) < count:
                sizes.append(len(owner.got))
                rig.loop.call_soon(look)

        look()
        for _ in range(count):
            assert rig.remote.session.send(theirs, b"x") == 1
        rig.remote.session.ping()
        await rig.remote.flush()
        await until(lambda: len(owner.got) == count)
        steps = [later - sooner for sooner, later in pairwise(sizes)]
        assert max(steps) <= SMALL_FRAMES_PER_TURN
        # The socket is read again afterwards.
        rig.remote.session.send(theirs, b"and more")
        await rig.remote.flush()
        await until(lambda: owner.got.endswith(b"and more"))


@in_loop
async def test_a_tunnel_that_ends_in_the_midst_of_small_frames_delivers_nothing_more(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        for _ in range(3 * SMALL_FRAMES_PER_TURN):
            rig.remote.session.send(theirs, b"x")
        rig.loop.remove_reader(rig.tunnel._fd)
        await rig.remote.flush()
        await until(lambda: select.select([rig.tunnel._fd], [], [], 0)[0])
        rig.tunnel._on_readable()
        assert rig.session.is_left_off
        rig.tunnel.cut("enough")
        size = len(owner.got)
        await turns()
        assert len(owner.got) == size
        assert pools.in_use == 0


@in_loop
async def test_an_error_behind_small_frames_is_fatal_in_its_turn(pools: Pools) -> None:
    async with Rig(pools) as rig:
        _, theirs = await accepted(rig)
        for _ in range(3 * SMALL_FRAMES_PER_TURN):
            rig.remote.session.send(theirs, b"x")
        rig.remote.session._encoder.write(0x7F, 0)
        await rig.remote.flush()
        await until(lambda: rig.counters.protocol_errors)
        assert pools.in_use == 0


@in_loop
async def test_one_read_a_turn_where_a_turn_lasts_long(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        reads = []
        take = rig.session.receive_buffer

        def small() -> memoryview:
            reads.append(1)
            return take()[:100]

        monkeypatch.setattr(Session, "receive_buffer", lambda _: small())
        rig.loop.remove_reader(rig.tunnel._fd)
        assert rig.remote.session.send(theirs, bytes(10_000)) == 10_000
        await rig.remote.flush()
        await until(lambda: select.select([rig.tunnel._fd], [], [], 0)[0])
        rig.tunnel._on_readable()
        assert len(reads) == READS_PER_TURN
        monkeypatch.setattr(tunnel_module, "LONG_TURN_S", -1.0)
        rig.tunnel._on_readable()
        assert len(reads) == READS_PER_TURN + 1
        rig.loop.add_reader(rig.tunnel._fd, rig.tunnel._on_readable)
        await until(lambda: len(owner.got) == 10_000)


@in_loop
async def test_a_long_read_leaves_the_others_their_turn(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        remote = rig.remote
        sent = 0
        for _ in range(20):
            data = bytes(100_000)
            rest = memoryview(data)
            while rest:
                size = remote.session.send(theirs, rest)
                rest = rest[size:]
                await remote.flush()
                if not size:
                    await remote.read()
            sent += len(data)
        await until(lambda: len(owner.got) == sent)


@in_loop
async def test_a_readiness_that_was_none_changes_nothing(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.tunnel._on_readable()
        assert pools.in_use == 0
        assert not rig.tunnel.ended


# Time


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_who_has_sent_nothing_for_its_interval_sends_a_ping(pools: Pools) -> None:
    async with Rig(pools, keepalive_s=0.02) as rig:
        for _ in range(2):
            assert await rig.remote.end.receive_some()
        assert not rig.tunnel.ended


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_ping_is_answered(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.session.now_s = time.monotonic()
        rig.remote.session.ping()
        await rig.remote.flush()
        rig.remote.session.now_s += 0.5
        await rig.remote.read_until(lambda: rig.remote.session.round_trip_s)


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_peer_that_gives_no_sign_of_life_is_cut_off(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        await turns()
        rig.session._liveness.received_s -= 41  # its interval is 30 s, and 10 s more
        await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]
        assert rig.counters.tunnels_lost == 1
        await rig.remote.end.receive_all()
    assert "no sign of life from the peer; 1 streams are reset" in caplog.text


@in_loop
async def test_a_dead_peer_is_found_when_its_time_is_over_and_not_a_tick_later(pools: Pools) -> None:
    async with Rig(pools) as rig:
        assert rig.tunnel._tick_s == TICK_MAX_S
        rig.session._liveness.received_s = rig.loop.time() - KEEPALIVE_GRACE_S
        rig.session._liveness._peer_interval_s = 0.05
        rig.tunnel._tick_timer.cancel()
        rig.tunnel._on_tick()
        assert rig.tunnel._tick_timer.when() - rig.loop.time() < TICK_MAX_S / 2
        await until(lambda: rig.tunnel.ended)


@in_loop
async def test_a_reset_behind_bytes_is_seen_although_the_loop_tells_of_it_once(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        await accepted(rig)
        rig.loop.remove_reader(rig.tunnel._fd)  # as uvloop does by itself after an error
        rig.remote.session.ping()
        await rig.remote.flush()
        rig.remote.end.reset()
        await until(lambda: rig.tunnel.ended)
        assert "connection lost: Connection reset by peer; 1 streams are reset" in caplog.text


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_owners_whose_connection_is_gone_are_told(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        other, _ = await accepted(rig)
        near, far = tcp_pair()
        with far, End(near) as end:
            owner.fd = far.fileno()
            tick = rig.tunnel.tick
            await until(lambda: rig.tunnel.tick > tick + 2)
            assert owner.told == []
            end.reset()
            await until(lambda: owner.told)
            assert set(owner.told) == {"hang-up"}
            owner.fd = -1
        assert other.told == []


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_owners_that_move_nothing_are_told_that_they_are_idle(pools: Pools) -> None:
    async with Rig(pools, idle_timeout_s=0.01) as rig:
        owner, _ = await accepted(rig)
        ours, _ = await rig.accept()  # one without an owner is not
        late = Owner(rig, Stream(99, 0, Network.TCP))
        rig.tunnel.draining.add(late)
        begun = rig.tunnel.tick
        await until(lambda: owner.told and late.told)
        assert rig.tunnel.tick - begun >= 2
        assert owner.told[0] == late.told[0] == "idle"
        assert ours.owner is None
        rig.tunnel.draining.clear()


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_tunnel_that_has_ended_ticks_no_more(pools: Pools) -> None:
    async with Rig(pools) as rig:
        await until(lambda: rig.tunnel.tick)
        rig.tunnel.cut("over")
        tick = rig.tunnel.tick
        rig.tunnel._on_tick()
        assert rig.tunnel.tick == tick


# The ends


@in_loop
async def test_a_peers_close_is_a_clean_end(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        rig.remote.session.close(Code.IDLE)
        await rig.remote.flush()
        await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]  # a stream that was open is lost all the same
        assert rig.counters.tunnels_lost == 0
        await rig.remote.end.expect_fin()


@in_loop
async def test_closing_resets_streams_says_close_then_fin_and_waits_for_the_peers(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        await rig.accept()
        rig.tunnel.close(Code.SHUTTING_DOWN)
        rig.tunnel.close(Code.NONE)
        assert owner.told == [("reset", Code.SHUTTING_DOWN)]
        await rig.remote.read_until(lambda: rig.remote.session.close_received)
        seen = rig.remote.side.take_seen()
        assert [each.kind for each in seen] == [EventKind.RESET, EventKind.RESET, EventKind.CLOSED]
        assert seen[0].stream_id == theirs.id
        assert {each.number for each in seen} == {Code.SHUTTING_DOWN}
        await rig.remote.end.expect_fin()
        assert not rig.tunnel.ended
        assert not rig.tunnel.has_room
        rig.remote.end.finish()
        await until(lambda: rig.tunnel.ended)
        assert rig.counters.tunnels_lost == 0
        rig.tunnel.close(Code.NONE)


@in_loop
async def test_a_peer_that_closes_as_well_or_resets_behind_a_close_ends_it_cleanly(pools: Pools) -> None:
    for answer in ("close", "reset"):
        async with Rig(pools) as rig:
            rig.tunnel.close(Code.NONE)
            await rig.remote.read_until(partial(getattr, rig.remote.session, "close_received"))
            if answer == "close":
                await rig.remote.write(FrameType.CLOSE, 0, CODE.pack(0))
            else:
                rig.remote.end.reset()
            await until(partial(getattr, rig.tunnel, "ended"))
            assert rig.counters.tunnels_lost == 0


def test_a_peer_that_does_not_answer_a_close_is_left_after_a_while(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "CLOSE_WAIT_S", 0.01)

    @in_loop
    async def is_left() -> None:
        async with Rig(pools) as rig:
            rig.tunnel.close(Code.NONE)
            await until(lambda: rig.tunnel.ended)
            await rig.remote.read_to_end()
            assert rig.remote.session.close_received

    is_left()


def test_what_was_sent_before_a_close_arrives_however_slowly_the_peer_reads(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "CLOSE_WAIT_S", 0.0)  # it is for the time behind CLOSE, not before it

    @in_loop
    async def arrives() -> None:
        async with Rig(pools, buffer_bytes=SMALL_BUFFERS) as rig:
            owner, theirs = await accepted(rig)
            rig.session.send(owner.stream, bytes(STREAM_WINDOW))
            rig.session.finish(owner.stream)
            await rig.remote.write(FrameType.DATA_FIN, theirs.id)
            await until(lambda: not rig.session.streams)
            rig.tunnel.close(Code.NONE)
            await turns(10)
            await rig.remote.read_to_end()
            assert len(rig.remote.side.got.get(theirs.id, b"")) == STREAM_WINDOW
            assert rig.remote.session.close_received

    arrives()


@in_loop
async def test_an_end_without_close_is_a_cut_that_resets_every_stream(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        owners = [(await accepted(rig))[0] for _ in range(3)]
        rig.remote.end.finish()
        await until(lambda: rig.tunnel.ended)
        assert [owner.told for owner in owners] == [[("reset", Code.CANCELLED)]] * 3
        assert rig.counters.tunnels_lost == 1
        rig.tunnel.cut("again")
        rig.tunnel.flush_soon()
        await turns()
        assert rig.ends == 1
    assert "peer: connection ended without CLOSE; 3 streams are reset" in caplog.text


@in_loop
async def test_a_reset_connection_is_a_cut(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        rig.remote.end.reset()
        await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]
    assert "connection lost: Connection reset by peer" in caplog.text


@in_loop
async def test_a_reset_that_is_noticed_by_sending_is_a_cut(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.end.reset()
        rig.session.ping()
        rig.tunnel._flush()
        assert rig.tunnel.ended
        assert rig.counters.tunnels_lost == 1


@in_loop
async def test_where_not_even_fin_can_be_sent_it_has_ended(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.end.reset()
        rig.session.close(Code.NONE)
        rig.tunnel._shut_down()
        assert rig.tunnel.ended


@in_loop
async def test_an_event_that_cuts_the_tunnel_is_the_last_one(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        other, others = await accepted(rig)

        def cut(_: memoryview) -> None:
            rig.session.consumed(owner.stream, 5)
            rig.tunnel.cut("enough")

        owner.on_data = cut  # type: ignore[assignment,method-assign]
        rig.remote.session.send(theirs, b"hello")
        rig.remote.session.send(others, b"never seen")
        await rig.remote.flush()
        await until(lambda: rig.tunnel.ended)
        assert other.got == b""


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_relays_that_only_deliver_go_on_behind_the_end_for_as_long_as_something_moves(pools: Pools) -> None:
    async with Rig(pools, idle_timeout_s=0.01) as rig:
        stuck, done = (Owner(rig, Stream(number, 0, Network.TCP)) for number in (97, 99))
        for each in (stuck, done):
            each.last_tick = 1 << 60
            each.waiting_bytes = 100
            rig.tunnel.draining.add(each)
        rig.tunnel.cut("over")
        assert stuck.told == []
        stuck.waiting_bytes = 50  # something moved, and then no more
        done.ended = True
        await until(lambda: stuck.told)
        assert stuck.told == ["idle"]
        assert done.told == []


# A peer that does what it must not


def never_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a failed tunnel discard for an hour and a gibibyte."""
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MIN_S", 3600)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MAX_S", 3600)
    monkeypatch.setattr(secrets, "randbelow", lambda limit: limit - 1)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_BYTES", 1 << 30)


def test_a_protocol_error_resets_the_streams_and_is_met_by_silence(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never_enough(monkeypatch)

    @in_loop
    async def is_silent() -> None:
        async with Rig(pools) as rig:
            owner, _ = await accepted(rig)
            rig.session.ping()  # packed, and never sent
            await rig.remote.write(0x0D)
            await until(lambda: rig.tunnel.ended)
            assert owner.told == [("reset", Code.CANCELLED)]
            assert rig.counters.protocol_errors == 1
            assert rig.counters.tunnels_lost == 0
            assert pools.in_use == 0
            for _ in range(3):
                await rig.remote.end.send(bytes(100_000))
                await turns()
            rig.tunnel._discard()
            assert rig.remote.end.is_silent
            rig.remote.end.finish()
            await rig.remote.end.expect_fin()

    is_silent()
    assert "protocol error, 1 streams are reset: a frame of unknown type 0x0d" in caplog.text


def test_altered_bytes_are_met_by_the_same_silence(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    never_enough(monkeypatch)

    @in_loop
    async def is_silent() -> None:
        async with Rig(pools) as rig:
            await rig.remote.end.send(bytes(100))
            await until(lambda: rig.tunnel.ended)
            assert rig.remote.end.is_silent
            rig.remote.end.reset()
            await until(lambda: rig.tunnel._sock.fileno() < 0)

    is_silent()


def test_the_silence_ends_after_its_bytes(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    never_enough(monkeypatch)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_BYTES", 1000)

    @in_loop
    async def ends() -> None:
        async with Rig(pools) as rig:
            await rig.remote.end.send(bytes(100))
            await until(lambda: rig.tunnel.ended)
            await rig.remote.end.send(bytes(1000))
            await turns()
            assert rig.remote.end.is_silent
            await rig.remote.end.send(b"x")
            await rig.remote.end.expect_fin()

    ends()


def test_the_silence_ends_after_its_time(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MIN_S", 0)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MAX_S", 0)

    @in_loop
    async def ends() -> None:
        async with Rig(pools) as rig:
            await rig.remote.end.send(bytes(100))
            await rig.remote.end.expect_fin()

    ends()


def test_a_protocol_error_behind_a_close_ends_it_as_well(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    never_enough(monkeypatch)

    @in_loop
    async def ends() -> None:
        async with Rig(pools) as rig:
            rig.tunnel.close(Code.NONE)
            await rig.remote.end.send(bytes(100))
            await until(lambda: rig.tunnel.ended)

    ends()
