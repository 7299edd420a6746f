"""reflex.net.relay: one stream and its local socket, each way, each end, and what waits in between."""

from __future__ import annotations

import asyncio
from functools import partial
from unittest.mock import patch

import pytest

from reflex.net.options import set_reset_on_close
from reflex.net.relay import FIRST_READ_BYTES, MAX_READ_BYTES, Relay
from reflex.net.tunnel import SHARED_READ_BYTES
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.wire import STREAM_WINDOW, Code, FrameType
from tests.pair import End, in_loop, tcp_pair, turns, until
from tests.rig import Rig
from tests.sessions import TARGET

pytestmark = pytest.mark.usefixtures("each_loop")

SMALL_BUFFERS = 4_096
PATTERN = bytes(range(251)) * 5000  # 1.2 MB; no power of two divides its period


class Relayed:
    """A stream that a relay joins with a local socket.

    Attributes:
        local: the other end of the local socket, the test's.
        theirs: the remote's view of the stream.
        ends: how often the relay said that it has ended.
    """

    def __init__(self, rig: Rig, stream: Stream, theirs: Stream, *, buffer_bytes: int = 0) -> None:
        near, far = tcp_pair(buffer_bytes=buffer_bytes)
        set_reset_on_close(far)
        self.local = End(near)
        self.theirs = theirs
        self.ends: list[Relay] = []
        self.relay = Relay(
            rig.loop,
            rig.tunnel,
            stream,
            buffers=rig.pools.buffers,
            counters=rig.counters,
            on_end=self.ends.append,
            sock=far,
        )

    async def ended(self) -> None:
        await until(lambda: self.ends)
        assert self.ends == [self.relay]
        assert self.relay.ended


async def relayed(rig: Rig, *, buffer_bytes: int = 0) -> Relayed:
    """A stream that the remote has opened, joined with a local socket."""
    ours, theirs = await rig.accept()
    joined = Relayed(rig, ours, theirs, buffer_bytes=buffer_bytes)
    rig.session.accept(ours)
    rig.tunnel.flush_soon()
    joined.relay.start_reading()
    await rig.remote.see(EventKind.OPENED, theirs.id)
    return joined


def arrived(rig: Rig, size: int) -> bool:
    """Whether so many bytes have come out of the tunnel."""
    return rig.counters.bytes_out_of_tunnels == size


async def send_into(rig: Rig, theirs: Stream, data: bytes) -> None:
    """Send all of it on the stream, as the windows allow."""
    rest = memoryview(data)
    while True:
        rest = rest[rig.remote.session.send(theirs, rest) :]
        await rig.remote.flush()
        if not rest:
            return
        await rig.remote.read()


# Bytes, and FIN


@in_loop
async def test_bytes_go_both_ways(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        await joined.local.send(b"question")
        assert await rig.remote.receive(joined.theirs, 8) == b"question"
        await send_into(rig, joined.theirs, b"answer")
        assert await joined.local.receive(6) == b"answer"
        assert rig.counters.bytes_into_tunnels == 8
        assert rig.counters.bytes_out_of_tunnels == 6
        assert pools.in_use == 0
        joined.local.close()


@in_loop
async def test_a_megabyte_each_way_at_once_arrives_whole(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)

        async def send() -> None:
            await joined.local.send(PATTERN)
            joined.local.finish()

        async def both_of_the_remote() -> bytes:
            await send_into(rig, joined.theirs, PATTERN)
            rig.remote.session.finish(joined.theirs)
            await rig.remote.flush()
            await rig.remote.see(EventKind.FIN, joined.theirs.id)
            return bytes(rig.remote.side.got[joined.theirs.id])

        _, there, back = await asyncio.gather(send(), both_of_the_remote(), joined.local.receive_all())
        assert there == PATTERN
        assert back == PATTERN
        await joined.ended()
        joined.local.close()


@in_loop
async def test_reads_grow_with_what_is_there_and_shrink_again(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        relay = joined.relay
        rig.tunnel.shared_turns = 0
        rig.tunnel.last_talker = relay
        assert relay._read_size == FIRST_READ_BYTES
        await joined.local.send(bytes(100_000))
        await rig.remote.receive(joined.theirs, 100_000)
        assert relay._read_size > FIRST_READ_BYTES
        for _ in range(10):
            await joined.local.send(b"x")
            await rig.remote.receive(joined.theirs, 1)
        assert relay._read_size == FIRST_READ_BYTES
        joined.local.close()


@in_loop
async def test_reads_stay_small_while_another_stream_talks(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined, other = await relayed(rig), await relayed(rig)
        asked: list[int] = []
        reserve = Session.reserve

        def watched(session: Session, stream: Stream, wanted_bytes: int) -> memoryview | None:
            if stream is joined.relay.stream:
                asked.append(wanted_bytes)
            return reserve(session, stream, wanted_bytes)

        joined.relay._read_size = MAX_READ_BYTES
        with patch.object(Session, "reserve", watched):
            await other.local.send(b"x")
            await rig.remote.receive(other.theirs, 1)
            await joined.local.send(b"y")
            await rig.remote.receive(joined.theirs, 1)
        assert asked == [SHARED_READ_BYTES]
        joined.local.close()
        other.local.close()


@in_loop
async def test_fin_goes_through_each_way_for_itself_remote_first(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        await send_into(rig, joined.theirs, b"last")
        rig.remote.session.finish(joined.theirs)
        await rig.remote.flush()
        assert await joined.local.receive_all() == b"last"
        await joined.local.send(b"still here")
        assert await rig.remote.receive(joined.theirs, 10) == b"still here"
        looks = rig.looks
        joined.local.finish()
        await rig.remote.see(EventKind.FIN, joined.theirs.id)
        await joined.ended()
        assert rig.looks == looks + 1
        assert rig.counters.streams_reset == 0
        joined.local.close()


@in_loop
async def test_fin_goes_through_each_way_for_itself_local_first(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        await joined.local.send(b"last")
        joined.local.finish()
        await rig.remote.see(EventKind.FIN, joined.theirs.id)
        assert rig.remote.side.got[joined.theirs.id] == b"last"
        await send_into(rig, joined.theirs, b"still here")
        assert await joined.local.receive(10) == b"still here"
        rig.remote.session.finish(joined.theirs)
        await rig.remote.flush()
        await joined.local.expect_fin()
        await joined.ended()
        assert rig.counters.streams_reset == 0
        joined.local.close()


@in_loop
async def test_many_that_talk_in_one_turn_fill_more_than_one_record(pools: Pools) -> None:
    async with Rig(pools) as rig:
        everyone = [await relayed(rig) for _ in range(12)]
        for joined in everyone:  # all of them are readable before the loop turns
            assert joined.local.sock.send(bytes(60_000)) == 60_000
        got = rig.remote.side.got
        await rig.remote.read_until(lambda: all(len(got.get(each.theirs.id, b"")) == 60_000 for each in everyone))
        for joined in everyone:
            joined.local.close()


# RST


@in_loop
async def test_an_rst_of_the_local_socket_resets_the_stream(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        joined.local.reset()
        assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.TARGET_RESET
        await joined.ended()
        assert rig.counters.streams_reset == 1


@in_loop
async def test_an_rst_that_is_noticed_by_sending_resets_the_stream(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        joined.relay._pause()  # or reading would notice it first
        joined.local.reset()
        await send_into(rig, joined.theirs, b"x")
        assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.TARGET_RESET
        await joined.ended()


@in_loop
async def test_a_reset_of_the_stream_resets_the_local_socket_in_spite_of_what_waits(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        await send_into(rig, joined.theirs, bytes(STREAM_WINDOW))
        await until(lambda: rig.counters.bytes_out_of_tunnels == STREAM_WINDOW)
        rig.remote.session.reset(joined.theirs, Code.CANCELLED)
        await rig.remote.flush()
        await joined.local.expect_reset()
        await joined.ended()


@in_loop
async def test_a_cut_tunnel_resets_every_local_socket_at_once(pools: Pools) -> None:
    async with Rig(pools) as rig:
        everyone = [await relayed(rig) for _ in range(5)]
        await joined_bytes(rig, everyone[0])
        rig.remote.end.finish()  # without CLOSE
        for joined in everyone:
            await joined.local.expect_reset()
            await joined.ended()


async def joined_bytes(rig: Rig, joined: Relayed) -> None:
    """Let something wait for the local socket."""
    await send_into(rig, joined.theirs, b"x" * 1000)
    await until(lambda: rig.counters.bytes_out_of_tunnels >= 1000)


@in_loop
async def test_a_refusal_ends_a_relay_with_a_reset(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        near, far = tcp_pair()
        set_reset_on_close(far)
        ends: list[Relay] = []
        stream = rig.session.open(TARGET)
        relay = Relay(
            rig.loop,
            rig.tunnel,
            stream,
            buffers=pools.buffers,
            counters=rig.counters,
            on_end=ends.append,
            sock=far,
        )
        relay.on_opened()
        relay.on_refused(1)
        relay.on_refused(1)
        assert ends == [relay]
        await End(near).expect_reset()
        near.close()


# What waits


@in_loop
async def test_a_slow_local_socket_holds_no_more_than_its_window_and_gets_every_byte(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        rest = memoryview(PATTERN)
        session = rig.remote.session
        sent = 0
        # Until the window is used up for good: no credit comes for what nobody reads.
        while sent < STREAM_WINDOW + joined.theirs.send_window.available:
            size = session.send(joined.theirs, rest[sent:])
            if not size:
                break
            sent += size
            await rig.remote.flush()
            await until(partial(arrived, rig, sent))
            await turns()
            while not rig.remote.end.is_silent:
                await rig.remote.read()
        stream = joined.relay.stream
        assert 0 < stream.held_bytes <= STREAM_WINDOW
        assert rig.budget.buffered == stream.held_bytes
        assert sent < STREAM_WINDOW * 2

        async def send_the_rest() -> None:
            await send_into(rig, joined.theirs, bytes(rest[sent:]))
            session.finish(joined.theirs)
            await rig.remote.flush()

        _, received = await asyncio.gather(send_the_rest(), joined.local.receive_all())
        assert received == PATTERN
        assert stream.held_bytes == 0
        joined.local.close()


@in_loop
async def test_a_stream_that_waits_does_not_hold_up_the_others(pools: Pools) -> None:
    async with Rig(pools) as rig:
        slow = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        quick = await relayed(rig)
        await send_into(rig, slow.theirs, bytes(STREAM_WINDOW))
        await send_into(rig, quick.theirs, b"quick")
        assert await quick.local.receive(5) == b"quick"
        slow.local.close()
        quick.local.close()


@in_loop
async def test_a_used_up_window_stops_reading_until_it_opens(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        rig.remote.side.reads = False
        task = asyncio.create_task(joined.local.send(PATTERN[: STREAM_WINDOW + 50_000]))
        got = rig.remote.side.got
        await rig.remote.read_until(lambda: len(got.get(joined.theirs.id, b"")) == STREAM_WINDOW)
        await until(lambda: not joined.relay._is_reading)
        rig.remote.side.reads = True
        rig.remote.side.consume()
        await rig.remote.flush()
        received = await rig.remote.receive(joined.theirs, STREAM_WINDOW + 50_000)
        assert received == PATTERN[: STREAM_WINDOW + 50_000]
        await task
        joined.local.close()


@in_loop
async def test_a_blocked_tunnel_stops_reading_local_sockets_and_every_byte_arrives(pools: Pools) -> None:
    async with Rig(pools, buffer_bytes=SMALL_BUFFERS) as rig:
        first, second = await relayed(rig), await relayed(rig)
        tasks = [asyncio.create_task(each.local.send(PATTERN)) for each in (first, second)]
        await until(lambda: rig.tunnel.is_blocked and not (first.relay._is_reading or second.relay._is_reading))
        read = rig.counters.bytes_into_tunnels
        assert rig.session.unsent_bytes < 2 * STREAM_WINDOW
        await turns(20)
        assert rig.counters.bytes_into_tunnels == read
        got = rig.remote.side.got
        await rig.remote.read_until(
            lambda: all(len(got.get(each.theirs.id, b"")) == len(PATTERN) for each in (first, second))
        )
        assert got[first.theirs.id] == got[second.theirs.id] == PATTERN
        await asyncio.gather(*tasks)
        first.local.close()
        second.local.close()


@in_loop
async def test_a_relay_that_has_ended_is_not_resumed(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        rig.tunnel.wait(joined.relay)
        joined.relay.end(reset=True)
        joined.relay.end(reset=True)
        rig.tunnel.is_blocked = True
        rig.tunnel.send()
        assert not joined.relay._is_reading
        # What comes for it is consumed, and does nothing else.
        await send_into(rig, joined.theirs, b"late")
        await until(lambda: rig.counters.bytes_out_of_tunnels == 4)
        assert rig.budget.buffered == 0
        joined.relay.on_idle()
        assert rig.counters.streams_reset == 0
        joined.local.close()


@in_loop
async def test_a_stream_that_has_ended_still_delivers_what_had_arrived_then_fin(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        rig.remote.session.send(joined.theirs, PATTERN[:STREAM_WINDOW])
        rig.remote.session.finish(joined.theirs)
        await rig.remote.flush()
        joined.local.finish()
        await rig.remote.see(EventKind.FIN, joined.theirs.id)
        await until(lambda: rig.tunnel.draining)
        assert not rig.session.streams
        assert await joined.local.receive_all() == PATTERN[:STREAM_WINDOW]
        await joined.ended()
        assert not rig.tunnel.draining
        joined.local.close()


@in_loop
async def test_a_stream_whose_local_end_came_first_delivers_what_had_arrived_then_fin(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        joined.local.finish()
        await rig.remote.see(EventKind.FIN, joined.theirs.id)
        rig.remote.session.send(joined.theirs, PATTERN[:STREAM_WINDOW])
        rig.remote.session.finish(joined.theirs)
        await rig.remote.flush()
        await until(lambda: rig.tunnel.draining)
        assert await joined.local.receive_all() == PATTERN[:STREAM_WINDOW]
        await joined.ended()
        joined.local.close()


@in_loop
async def test_it_delivers_even_after_its_tunnel_has_ended(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        rig.remote.session.send(joined.theirs, PATTERN[:STREAM_WINDOW])
        rig.remote.session.finish(joined.theirs)
        await rig.remote.flush()
        joined.local.finish()
        await rig.remote.see(EventKind.FIN, joined.theirs.id)
        await until(lambda: rig.tunnel.draining)
        await rig.remote.write(FrameType.CLOSE, 0, bytes(4))
        await until(lambda: rig.tunnel.ended)
        assert await joined.local.receive_all() == PATTERN[:STREAM_WINDOW]
        await joined.ended()
        assert rig.budget.buffered == 0
        joined.local.close()


@in_loop
async def test_a_local_socket_that_is_reset_while_bytes_wait_for_it_resets_the_stream(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        joined.relay._wants_to_read = False
        joined.relay._pause()  # only sending is to notice it
        await send_into(rig, joined.theirs, bytes(STREAM_WINDOW))
        await until(lambda: joined.relay._is_writing)
        joined.local.reset()
        assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.TARGET_RESET
        await joined.ended()


@in_loop
async def test_a_local_socket_that_cannot_take_fin_resets_the_stream(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        joined.relay._pause()
        joined.local.reset()
        rig.remote.session.finish(joined.theirs)
        await rig.remote.flush()
        assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.TARGET_RESET
        await joined.ended()


@in_loop
async def test_a_readiness_that_was_none_changes_nothing(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        joined.relay._on_readable()
        await turns()
        assert pools.in_use == 0
        joined.relay._send_backlog()
        assert not joined.ends
        await send_into(rig, joined.theirs, b"x")
        assert await joined.local.receive(1) == b"x"
        joined.local.close()


@in_loop
async def test_a_local_socket_that_is_full_again_at_once_keeps_what_waits(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        await send_into(rig, joined.theirs, PATTERN[:STREAM_WINDOW])
        await until(lambda: rig.counters.bytes_out_of_tunnels == STREAM_WINDOW)
        stream = joined.relay.stream
        held = -1
        while stream.held_bytes != held:
            held = stream.held_bytes
            joined.relay._send_backlog()  # at last it takes nothing
        assert held > 0
        assert await joined.local.receive(STREAM_WINDOW) == PATTERN[:STREAM_WINDOW]
        joined.local.close()


@in_loop
async def test_a_local_socket_that_is_full_before_anything_waits_gets_every_byte(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        assert joined.relay._sock is not None
        filled = 0
        while size := End(joined.relay._sock).fill():
            filled += size
            await turns()
        await send_into(rig, joined.theirs, b"behind it")
        await until(lambda: joined.relay._is_writing)
        assert await joined.local.receive(filled + 9) == bytes(filled) + b"behind it"
        joined.local.close()


# Time


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_stream_without_a_byte_for_the_idle_time_out_is_reset(pools: Pools) -> None:
    async with Rig(pools, idle_timeout_s=0.02) as rig:
        joined = await relayed(rig)
        assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.IDLE
        await joined.local.expect_reset()
        await joined.ended()


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_stream_that_only_delivers_is_reset_as_well_when_nothing_moves(pools: Pools) -> None:
    async with Rig(pools, idle_timeout_s=0.2) as rig:
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        rig.remote.session.send(joined.theirs, bytes(STREAM_WINDOW))
        rig.remote.session.finish(joined.theirs)
        await rig.remote.flush()
        joined.local.finish()
        await rig.remote.see(EventKind.FIN, joined.theirs.id)
        await joined.ended()
        await joined.local.expect_reset()
        assert rig.counters.streams_reset == 0  # the stream itself had ended well


@in_loop
async def test_where_memory_is_used_up_the_stream_that_keeps_most_is_reset_and_others_go_on(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.budget.buffered_limit = 96 * 1024
        large, small = [await relayed(rig, buffer_bytes=SMALL_BUFFERS) for _ in range(2)]
        reading = await relayed(rig)
        with large.local, small.local, reading.local:
            await send_into(rig, large.theirs, PATTERN[: 64 * 1024])
            await until(lambda: rig.budget.kept)
            await send_into(rig, small.theirs, PATTERN[: 48 * 1024])
            await large.ended()
            assert rig.budget.kept <= rig.budget.buffered_limit
            assert rig.counters.streams_shed == rig.counters.streams_reset == 1
            assert (await rig.remote.see(EventKind.RESET, large.theirs.id)).number == Code.LIMIT
            await large.local.expect_reset()
            # The one that is left gets every byte, and so does one that keeps nothing.
            assert await small.local.receive(48 * 1024) == PATTERN[: 48 * 1024]
            await send_into(rig, reading.theirs, b"reading")
            assert await reading.local.receive(7) == b"reading"
        await until(lambda: not rig.budget.kept)


@in_loop
async def test_a_stream_that_alone_wants_more_than_there_is_is_reset(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.budget.buffered_limit = 16 * 1024
        joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
        with joined.local:
            await send_into(rig, joined.theirs, PATTERN[: 128 * 1024])
            await joined.ended()
            assert rig.budget.kept == rig.budget.buffered == 0
            assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.LIMIT
            await joined.local.expect_reset()


@in_loop
async def test_one_whose_stream_has_ended_gives_way_as_well(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.budget.buffered_limit = 96 * 1024
        ended, open_ = [await relayed(rig, buffer_bytes=SMALL_BUFFERS) for _ in range(2)]
        with ended.local, open_.local:
            rig.remote.session.send(ended.theirs, PATTERN[: 64 * 1024])
            rig.remote.session.finish(ended.theirs)
            await rig.remote.flush()
            ended.local.finish()
            await rig.remote.see(EventKind.FIN, ended.theirs.id)
            await until(lambda: rig.tunnel.draining)
            await send_into(rig, open_.theirs, PATTERN[: 48 * 1024])
            await ended.ended()
            await ended.local.expect_reset()
            assert not rig.tunnel.draining
            assert (rig.counters.streams_shed, rig.counters.streams_reset) == (1, 0)
            assert await open_.local.receive(48 * 1024) == PATTERN[: 48 * 1024]


# A local connection that is gone, and no event tells of it.


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_reset_behind_bytes_is_passed_on_behind_them_where_the_loop_has_given_the_socket_up(
    pools: Pools,
) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        rig.loop.remove_reader(joined.relay._fd)  # as uvloop does by itself after an error
        await joined.local.send(PATTERN[:100_000])
        joined.local.reset()
        assert await rig.remote.receive(joined.theirs, 100_000) == PATTERN[:100_000]
        assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.TARGET_RESET
        await joined.ended()


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_reset_before_reading_has_begun_or_after_fin_resets_the_stream(pools: Pools) -> None:
    async with Rig(pools) as rig:
        ours, theirs = await rig.accept()
        unread = Relayed(rig, ours, theirs)
        finished = await relayed(rig)
        finished.local.finish()
        await rig.remote.see(EventKind.FIN, finished.theirs.id)
        tick = rig.tunnel.tick
        await until(lambda: rig.tunnel.tick > tick + 2)
        assert not unread.relay.ended
        assert not finished.relay.ended
        for joined in (unread, finished):
            joined.local.reset()
            await rig.remote.see(EventKind.RESET, joined.theirs.id)
            await joined.ended()
            joined.relay.on_hang_up()


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_bytes_that_no_window_allows_yet_are_not_lost_by_a_reset_behind_them(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        size = STREAM_WINDOW + 1_000
        rig.remote.side.reads = False
        await joined.local.send(PATTERN[:size])
        await rig.remote.read_until(lambda: len(rig.remote.side.got.get(joined.theirs.id, b"")) == STREAM_WINDOW)
        joined.local.reset()
        tick = rig.tunnel.tick
        await until(lambda: rig.tunnel.tick > tick + 2)
        assert not joined.relay.ended
        rig.remote.side.consume(joined.theirs)
        rig.remote.side.reads = True
        await rig.remote.flush()
        assert await rig.remote.receive(joined.theirs, size) == PATTERN[:size]
        await rig.remote.see(EventKind.RESET, joined.theirs.id)
        await joined.ended()


@in_loop
async def test_a_hang_up_that_is_a_clean_end_is_left_to_be_read(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await relayed(rig)
        joined.relay._pause()
        joined.relay.on_hang_up()  # nothing has come at all
        await joined.local.send(b"last")
        joined.local.finish()
        await turns()
        joined.relay.on_hang_up()
        assert not joined.relay.ended
        joined.relay.resume()
        assert await rig.remote.receive(joined.theirs, 4) == b"last"
        await rig.remote.see(EventKind.FIN, joined.theirs.id)
        joined.relay.on_hang_up()
        assert not joined.relay.ended
        joined.local.close()
        assert joined.relay.fd >= 0
