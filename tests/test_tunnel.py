"""reflex.net.tunnel: one session over one socket, what is read and sent, and its back-pressure."""

from __future__ import annotations

import asyncio
import select
from itertools import pairwise
from unittest.mock import patch

import pytest

from reflex.metrics import Counters
from reflex.net.tunnel import BULK_MEMORY_S, BULK_TURN_BYTES, SHARED_TURNS, SMALL_FRAMES_PER_TURN, Tunnel
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.wire import (
    CODE,
    STREAM_WINDOW,
    Code,
    FrameType,
)
from tests.ends import End, tcp_pair
from tests.loops import in_loop, turns, until
from tests.rig import SMALL_BUFFERS, Owner, Rig, accepted
from tests.sessions import CLIENT_TIME_MS, SECRETS, TARGET, TO_TARGET

pytestmark = pytest.mark.usefixtures("each_loop")


class Sleeper:
    """Waits for a tunnel that is blocked."""

    def __init__(self) -> None:
        self.resumed = 0

    def resume(self) -> None:
        self.resumed += 1


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
    assert rig.tunnel.silence is not None
    rig.tunnel.silence.end()
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


@in_loop
async def test_nor_is_one_in_what_was_left_off_or_in_what_came_with_the_handshake(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        for _ in range(3 * SMALL_FRAMES_PER_TURN):
            rig.remote.session.send(theirs, b"x")
        rig.loop.remove_reader(rig.tunnel._fd)
        await rig.remote.flush()
        await until(lambda: select.select([rig.tunnel._fd], [], [], 0)[0])
        rig.tunnel._on_readable()
        assert rig.session.is_left_off
        with patch.object(Session, "events", side_effect=LookupError("a mistake")):
            await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]
    async with Rig(pools) as rig:
        with patch.object(Session, "feed", side_effect=LookupError("a mistake")):
            rig.tunnel.feed(memoryview(b"x"))
        assert rig.tunnel.ended


# Into the tunnel, and its back-pressure


@in_loop
async def test_several_talk_until_one_alone_has_talked_for_a_while(pools: Pools) -> None:
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
async def test_a_tunnel_is_read_once_a_turn(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert len(reads) == 1
        rig.tunnel._on_readable()
        assert len(reads) == 2
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
        await rig.tunnel.settled.wait()
        for _ in range(3):  # something may be there the first time
            rig.tunnel._on_readable()
        assert pools.in_use == 0
        assert not rig.tunnel.ended


@in_loop
async def test_an_answer_is_expected_in_a_conversation_with_one_who_is_near_and_in_nothing_else(
    pools: Pools,
) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        tunnel, remote = rig.tunnel, rig.remote
        expected = 0

        def expect_soon() -> None:
            nonlocal expected
            expected += 1

        tunnel._expect_soon = expect_soon

        async def receive(size: int) -> int:
            """How often an answer is expected when so much arrives."""
            before, had = expected, len(owner.got)
            remote.session.send(theirs, bytes(size))
            await remote.flush()
            await until(lambda: len(owner.got) == had + size)
            await turns()
            return expected - before

        async def send(size: int) -> int:
            """The same when so much is sent."""
            before = expected
            rig.session.send(owner.stream, bytes(size))
            tunnel.flush_soon()
            await turns()
            return expected - before

        tunnel.is_near = False
        assert await receive(100) == await send(100) == 0
        tunnel.is_near = True
        assert await receive(100) == 1
        assert await send(100) == 1
        assert await receive(20_000) == 0
        assert await send(20_000) == 0
        rig.counters.bytes_into_tunnels += BULK_TURN_BYTES
        assert await receive(100) == 0
        rig.counters.bytes_out_of_tunnels += BULK_TURN_BYTES
        assert await send(100) == 0
        assert await receive(100) == await send(100) == 1
        tunnel.heard(owner)
        assert await receive(100) == await send(100) == 0


@in_loop
async def test_a_tunnel_is_one_of_bulk_data_for_a_while_after_its_session_has_seen_some(pools: Pools) -> None:
    async with Rig(pools) as rig:
        assert not rig.tunnel.is_bulk
        rig.session.bulk_s = rig.loop.time()
        assert rig.tunnel.is_bulk
        rig.session.bulk_s -= BULK_MEMORY_S
        assert not rig.tunnel.is_bulk
