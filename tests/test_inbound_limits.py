"""reflex.inbound: when there are too many, connections or waiting bytes, strangers give way and users go on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import Any

import pytest

from reflex.complaints import BURST_LINES, Complaints
from reflex.config import InboundLimits
from reflex.inbound import Inbound
from reflex.net.listener import open_listening
from reflex.protocol.events import EventKind
from reflex.protocol.wire import Code, FrameType, Status
from reflex.saved_replay import SavedReplaySet
from reflex.worker import SharedCount, SharedCounts, WorkerContext
from tests.ends import HOST, Origin, connect
from tests.keys import Keys
from tests.loops import in_loop, until
from tests.pair import Hog, Pair, drain_slowly, inbound_settings, limited, port_of, running_inbound, statistics
from tests.remote import raw_client

pytestmark = pytest.mark.usefixtures("each_loop")


@in_loop
async def test_above_max_connections_new_ones_are_closed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys.generate()
    settings = inbound_settings(keys, limits=InboundLimits(max_connections=2))
    async with running_inbound(settings) as (inbound, port):
        remotes = [await raw_client(port, keys) for _ in range(2)]
        inbound._complaints = Complaints(interval_s=3600)
        for _ in range(2):
            third = await connect(port)
            await third.expect_fin()
        assert inbound._counters.connections_refused == 2
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said == ["new connections are closed: users have all 2 (limits.max_connections)"]
        remotes.pop().leave()
        await until(lambda: len(inbound._tunnels) == 1)
        remotes.append(await raw_client(port, keys))
        assert inbound._counters.connections_displaced == 0
        for remote in remotes:
            remote.leave()


@in_loop
async def test_a_user_whose_tunnels_break_without_end_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        for _ in range(BURST_LINES + 3):
            (await raw_client(port, keys)).leave()
        await until(lambda: inbound._counters.tunnels_lost == BURST_LINES + 3)
    levels = [record.levelno for record in caplog.records if "streams are reset" in record.getMessage()]
    assert len(levels) == BURST_LINES + 3
    assert levels.count(logging.DEBUG) in (2, 3), "one more where the machine took over ten seconds"


@in_loop
async def test_at_max_connections_the_oldest_stranger_gives_way_whatever_it_has_said() -> None:
    keys = Keys.generate()
    with Origin() as web:
        settings = inbound_settings(keys, fallback=web.port, limits=InboundLimits(max_connections=3))
        async with running_inbound(settings) as (inbound, port):
            user = await raw_client(port, keys)
            browser = await connect(port)
            await browser.send(b"GET /")
            server = await web.accept()
            silent = await connect(port)
            await until(lambda: len(inbound._greetings) == 2)
            others = [await raw_client(port, keys)]
            await browser.expect_fin()
            assert await server.receive(5) == b"GET /"
            await server.expect_fin()
            assert silent.is_silent
            others.append(await raw_client(port, keys))
            await silent.expect_fin()
            assert (inbound._counters.connections_displaced, inbound._counters.connections_refused) == (2, 0)
            assert len(inbound._tunnels) == 3
            for remote in (user, *others):
                remote.leave()


@in_loop
async def test_a_user_with_too_many_tunnels_keeps_nobody_out() -> None:
    keys = Keys.generate()
    settings = limited(keys, max_tunnels=1)
    settings = dataclasses.replace(settings, limits=dataclasses.replace(settings.limits, max_connections=3))
    async with running_inbound(settings) as (inbound, port):
        allowed = await raw_client(port, keys)
        crowd = [await raw_client(port, keys) for _ in range(5)]  # which do not close: each is told and stays
        assert all(remote.session.close_received for remote in crowd)
        assert allowed.end.is_silent
        assert len(inbound._tunnels) <= 3
        assert (inbound._counters.connections_refused, inbound._counters.tunnels_lost) == (0, 0)
        assert inbound._counters.connections_displaced
        for remote in (allowed, *crowd):
            remote.leave()
        await until(lambda: not inbound._tunnels)
        assert not inbound._room.turned_away


@in_loop
async def test_a_flood_of_the_silent_does_not_lock_users_out() -> None:
    keys = Keys.generate()
    settings = inbound_settings(keys, limits=InboundLimits(max_connections=20))
    async with running_inbound(settings) as (inbound, port):
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(await connect(port))
            await until(lambda: inbound._counters.connections_accepted == 100)
            assert len(inbound._greetings) == 20
            remotes = [await raw_client(port, keys) for _ in range(20)]
            assert (len(inbound._greetings), len(inbound._tunnels)) == (0, 20)
        for remote in remotes:
            remote.leave()


@in_loop
async def test_a_connection_that_outlives_a_fatal_error_counts_and_gives_way_to_the_next() -> None:
    """Else a user could have any number of them, for half a minute each, or keep everybody out by them."""
    keys = Keys.generate()
    settings = inbound_settings(keys, limits=InboundLimits(max_connections=2))
    async with running_inbound(settings) as (inbound, port):
        remotes = [await raw_client(port, keys) for _ in range(2)]
        for remote in remotes:
            await remote.write(0x7F)  # an unknown type, which is fatal
        await until(lambda: not inbound._tunnels)
        assert inbound._room.own == 2
        third = await raw_client(port, keys)
        assert inbound._room.own == 2
        assert inbound._counters.connections_displaced == 1
        third.leave()
        for remote in remotes:
            remote.end.close()
            remote.session.close_buffers()
        await until(lambda: inbound._room.own == 0)


@in_loop
async def test_what_is_still_delivered_after_its_stream_has_ended_counts_as_one_of_its_tunnels_streams(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else the sockets to the targets of one tunnel would have no limit."""
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys, limits=InboundLimits(max_streams=3))) as (inbound, port):
        remote = await raw_client(port, keys)
        with Origin(receive_buffer_bytes=2_048) as origin:
            for _ in range(2):
                await drain_slowly(inbound, remote, origin)
            stream, seen = await remote.ask(origin.address)
            assert seen.kind is EventKind.OPENED
            inbound.report()
            gauges = statistics(caplog, "reflex.inbound")["gauges"]
            assert (gauges["streams"], gauges["relays"]) == (1, 3)
            _, seen = await remote.ask(origin.address)
            assert (seen.kind, seen.number) == (EventKind.RESET, Code.LIMIT)
            assert inbound._counters.streams_refused == 1
            remote.session.reset(stream, Code.CANCELLED)
            assert (await remote.ask(origin.address))[1].kind is EventKind.OPENED
        remote.leave()


# As one of several workers


@in_loop
async def test_a_worker_counts_its_connections_among_those_of_all_workers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    counts = SharedCounts(2)
    counts[2] = 1  # another worker has one
    sock = open_listening(HOST, 0)
    replay: Any = SavedReplaySet(None, clock=float)
    tunnels = SharedCounts(2)
    tunnels[2] = 1  # a tunnel
    shared = WorkerContext(1, [sock], replay, SharedCount(counts, 1), SharedCount(tunnels, 1))
    inbound = Inbound(inbound_settings(keys, limits=InboundLimits(max_connections=2)), shared=shared)
    (address,) = await inbound.start()
    remote = await raw_client(port_of(address), keys)
    assert (counts[1], tunnels[1]) == (1, 1)
    assert len(replay) == 1
    with await connect(port_of(address)) as end:
        await end.expect_fin()
    await remote.write(FrameType.CLOSE, 0, bytes(4))
    await until(lambda: counts[1] == 0)
    assert tunnels[1] == 0
    inbound.report()
    assert statistics(caplog, "reflex.inbound")["gauges"]["worker"] == 1
    inbound.abort()
    remote.leave()


@in_loop
async def test_when_memory_is_nearly_used_up_new_streams_are_reset_and_running_ones_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with Pair() as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            share = next(iter(pair.inbound._users.shares.values()))
            with Hog(share, 94):
                await pair.stream(origin)
            with Hog(share, 95):
                for _ in range(3):
                    assert await pair.status(origin.port) == Status.GENERAL_FAILURE
                assert origin.is_unvisited
                await near.send(b"running")
                assert await far.receive(7) == b"running"
                await far.send(b"still")
                assert await near.receive(5) == b"still"
            assert pair.inbound._counters.streams_refused == 3  # another tunnel would meet the same limit
            assert pair.tunnels == 1
            await pair.stream(origin)
    lines = [line for line in caplog.messages if "new streams are refused: " in line]
    assert len(lines) == 1
    assert caplog.messages.count("enough bytes were read by now: nothing is refused any more") == 1


def test_the_memory_for_waiting_bytes_is_what_the_settings_say() -> None:
    @in_loop
    async def test() -> None:
        async with running_inbound(
            inbound_settings(Keys.generate(), limits=InboundLimits(buffered_bytes=5_000_000))
        ) as (inbound, _):
            assert inbound._budget.buffered_limit == 5_000_000
            assert inbound._budget.growth_limit == 2_500_000

    test()


@in_loop
async def test_strangers_at_another_worker_keep_nobody_out_of_this_one() -> None:
    keys = Keys.generate()
    counts, tunnels = SharedCounts(2), SharedCounts(2)
    counts[2] = 2  # the other worker is full, of greetings
    replay: Any = SavedReplaySet(None, clock=float)
    shared = WorkerContext(1, [open_listening(HOST, 0)], replay, SharedCount(counts, 1), SharedCount(tunnels, 1))
    inbound = Inbound(inbound_settings(keys, limits=InboundLimits(max_connections=2)), shared=shared)
    (address,) = await inbound.start()
    with await connect(port_of(address)) as stranger:
        await until(lambda: len(inbound._greetings) == 1)
        remote = await raw_client(port_of(address), keys)  # in the stranger's place
        await stranger.expect_fin()
    second = await raw_client(port_of(address), keys)
    assert inbound._counters.connections_refused == 0
    with await connect(port_of(address)) as third:  # so many are tunnels now
        await third.expect_fin()
    assert inbound._counters.connections_refused == 1
    counts[2] = 0
    tunnels[1] = 0
    inbound.abort()
    remote.leave()
    second.leave()
