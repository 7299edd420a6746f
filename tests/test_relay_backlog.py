"""reflex.net.relay: what waits where a socket, a window or the tunnel takes no more, and what it may cost."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from reflex.complaints import Complaints
from reflex.net import pressure as pressure_module
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.wire import STREAM_WINDOW, Code, FrameType
from tests.ends import End
from tests.loops import in_loop, turns, until
from tests.rig import PATTERN, SMALL_BUFFERS, Relayed, Rig, arrived, relayed, send_into

pytestmark = pytest.mark.usefixtures("each_loop")


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


async def ended_with_a_window_waiting(rig: Rig) -> Relayed:
    """A stream that has ended both ways, while a window of bytes waits for its local socket."""
    joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
    rig.remote.session.send(joined.theirs, PATTERN[:STREAM_WINDOW])
    rig.remote.session.finish(joined.theirs)
    await rig.remote.flush()
    joined.local.finish()
    await rig.remote.see(EventKind.FIN, joined.theirs.id)
    await until(lambda: rig.tunnel.draining)
    return joined


@in_loop
async def test_a_stream_that_has_ended_still_delivers_what_had_arrived_then_fin(pools: Pools) -> None:
    async with Rig(pools) as rig:
        joined = await ended_with_a_window_waiting(rig)
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
        joined = await ended_with_a_window_waiting(rig)
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


@in_loop
async def test_where_memory_is_used_up_the_stream_that_keeps_most_is_reset_and_others_go_on(
    pools: Pools, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure_module, "_SHED", Complaints())
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
            assert sum("(limits.buffered_bytes) wait for slow readers" in line for line in caplog.messages) == 1
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
