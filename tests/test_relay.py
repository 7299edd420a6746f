"""reflex.net.relay: one stream and its local socket, each way, and each end."""

from __future__ import annotations

import asyncio
from unittest.mock import patch

import pytest

from reflex.net.options import set_reset_on_close
from reflex.net.relay import FIRST_READ_BYTES, MAX_READ_BYTES, Relay
from reflex.net.talk import SHARED_READ_BYTES
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.wire import STREAM_WINDOW, Code
from tests.ends import End, tcp_pair
from tests.loops import in_loop, turns, until
from tests.rig import PATTERN, SMALL_BUFFERS, Relayed, Rig, relayed, send_into
from tests.sessions import TARGET

pytestmark = pytest.mark.usefixtures("each_loop")


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


@pytest.mark.parametrize("has_backlog", [False, True])
def test_an_answer_that_came_before_a_reset_goes_first_though_a_send_finds_it(
    pools: Pools,
    has_backlog: bool,  # noqa: FBT001
) -> None:
    """A web server that refuses a large upload: its answer, then RST, since it has not read all."""

    @in_loop
    async def goes_first() -> None:
        async with Rig(pools) as rig:
            joined = await relayed(rig, buffer_bytes=SMALL_BUFFERS)
            if has_backlog:
                await send_into(rig, joined.theirs, bytes(STREAM_WINDOW))
                await until(lambda: joined.relay.waiting_bytes)
            answer = bytes(range(250)) * 8
            assert joined.local.sock.send(answer) == len(answer)
            rig.loop.remove_reader(joined.relay.fd)  # the send is to find it first
            joined.local.reset()
            if not has_backlog:
                await send_into(rig, joined.theirs, b"x")
            assert await rig.remote.receive(joined.theirs, len(answer)) == answer
            assert (await rig.remote.see(EventKind.RESET, joined.theirs.id)).number == Code.TARGET_RESET
            await joined.ended()

    goes_first()


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
