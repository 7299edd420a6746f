"""reflex.outbound: draining lets connections end, and then everything ends; aborting ends it at once."""

from __future__ import annotations

import asyncio
import logging

import pytest

from reflex.config import OutboundLimits
from reflex.protocol.wire import Status
from tests.ends import REPLY_SIZE, Origin, connect, silent_port, socks_head
from tests.keys import Keys
from tests.loops import DEADLINE_S, in_loop, until
from tests.pair import Pair, outbound_settings, running_outbound, server_settings, statistics

pytestmark = pytest.mark.usefixtures("each_loop")


@in_loop
async def test_draining_lets_running_connections_end_and_reports(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Pair() as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            task = asyncio.create_task(pair.outbound.drain())
            await until(lambda: pair.outbound._is_draining)
            with pytest.raises(ConnectionRefusedError):
                await pair.connect()
            await near.send(b"the last")
            near.finish()
            assert await far.receive_all() == b"the last"
            await far.send(b"word")
            far.finish()
            assert await near.receive_all() == b"word"
            async with asyncio.timeout(DEADLINE_S):
                await task
            await until(lambda: pair.tunnels == 0)
            assert pair.inbound._counters.tunnels_lost == 0
    found = statistics(caplog, "reflex.outbound")
    assert found["gauges"].pop("tasks") >= 1  # the one that drains
    assert found["gauges"] == {
        "connections": 0,
        "tunnels": 0,
        "idle_tunnels": 0,
        "streams": 0,
        "buffered_bytes": 0,
        "buffered_bytes_high_water": 0,
    }
    assert found["counters"]["bytes_into_tunnels"] == 8
    assert found["counters"]["bytes_out_of_tunnels"] == 4
    assert found["pools"]["2048"]["in_use"] == 0


@in_loop
async def test_what_is_left_after_the_drain_time_is_reset(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Pair(outbound_limits=OutboundLimits(drain_s=0.05)) as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            with await pair.connect() as silent:
                await until(lambda: len(pair.outbound._visitors) == 2)
                async with asyncio.timeout(DEADLINE_S):
                    await pair.outbound.drain()
                await silent.expect_fin()
            await near.expect_reset()
            await far.expect_reset()
    assert "1 connections were still open after 0.05 s: reset" in caplog.text


@in_loop
async def test_draining_ends_what_only_waits_for_a_tunnel() -> None:
    with silent_port() as port:
        limits = OutboundLimits(drain_s=0.05)
        async with running_outbound(outbound_settings([server_settings(Keys.generate(), port)], limits=limits)) as (
            outbound,
            door,
        ):
            end = await connect(door)
            await end.send(socks_head(80))
            await until(lambda: outbound._connector._waiting)
            async with asyncio.timeout(DEADLINE_S):
                await outbound.drain()
            assert not outbound._connector._waiting
            answer = await end.receive(2 + REPLY_SIZE)
            assert answer[3] == Status.GENERAL_FAILURE
            await end.expect_fin()
            end.close()


@in_loop
async def test_aborting_resets_everything_at_once() -> None:
    async with Pair() as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            pair.outbound.abort()
            pair.outbound.abort()
            await near.expect_reset()
            await far.expect_reset()
