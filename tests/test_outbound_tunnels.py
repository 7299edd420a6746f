"""reflex.outbound: which tunnel a request gets, how long one is kept, and what becomes of a request that has none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from reflex import outbound as outbound_module
from reflex.config import InboundLimits, ListenSettings, OutboundLimits, PoolSettings
from reflex.net import server as server_module
from reflex.net import upkeep
from reflex.protocol.window import BULK_BYTES
from reflex.protocol.wire import Code, Status
from tests.ends import HOST, REPLY_SIZE, Origin, connect, refusing_port, silent_port, socks_head, socks_request
from tests.keys import Keys
from tests.loops import in_loop, until
from tests.pair import (
    EPHEMERAL,
    Pair,
    forward_to,
    inbound_settings,
    outbound_settings,
    running_inbound,
    running_outbound,
    server_settings,
)

pytestmark = pytest.mark.usefixtures("each_loop")


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(server_module, "MAX_DELAY_S", 0.004)


# Tunnels: shared, kept, never more than needed


@in_loop
async def test_concurrent_requests_dial_one_tunnel_only() -> None:
    async with Pair() as pair:
        with Origin() as origin:
            ends = await asyncio.gather(*(pair.socks(origin.port) for _ in range(60)))
            assert pair.inbound._counters.connections_accepted == 1
            assert pair.tunnels == 1
            for end in ends:
                end.close()


@in_loop
async def test_a_burst_beyond_what_is_allowed_before_the_servers_settings_dials_one_tunnel_only() -> None:
    # 100 streams may be opened before SETTINGS has come, which then allows more.
    async with Pair(pool=PoolSettings(max_streams=256)) as pair:
        with Origin(backlog=512) as origin:
            ends = await asyncio.gather(*(pair.socks(origin.port) for _ in range(200)))
            assert pair.inbound._counters.connections_accepted == 1
            for end in ends:
                end.close()


@in_loop
async def test_streams_above_max_streams_get_another_tunnel_and_above_max_tunnels_none() -> None:
    async with Pair(pool=PoolSettings(max_streams=2, max_tunnels=2, max_idle=1)) as pair:
        with Origin() as origin, refusing_port() as port:
            ends = await asyncio.gather(*(pair.socks(origin.port) for _ in range(4)))
            assert pair.tunnels == 2
            assert await pair.status(port) == Status.GENERAL_FAILURE
            assert pair.inbound._counters.connections_accepted == 2
            for end in ends:
                end.reset()
            await until(lambda: pair.outbound._tunnels.idle_count() == 2)
            assert await pair.status(port) == Status.REFUSED  # there is room again


@in_loop
async def test_a_request_beside_bulk_data_does_not_queue_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound_module, "EXPIRY_INTERVAL_S", 0.01)
    async with Pair() as pair:
        with Origin() as origin:
            app = await pair.socks(origin.port)
            far = await origin.accept()
            piece = bytes(65_536)
            sent = 0
            while pair.tunnels < 2:  # down, the way that most bulk data goes
                await far.send(piece)
                assert await app.receive(len(piece)) == piece
                sent += len(piece)
            assert sent >= BULK_BYTES
            second = await pair.socks(origin.port)
            streams = [tunnel.stream_count for tunnel in pair.outbound._tunnels]
            assert streams == [1, 1]
            for end in (app, second):
                end.close()


@in_loop
async def test_a_server_that_allows_fewer_streams_than_the_client_would_open_serves_all_of_them() -> None:
    async with Pair(inbound_limits=InboundLimits(max_streams=10)) as pair:
        with Origin() as origin:
            ends = await asyncio.gather(*(pair.socks(origin.port) for _ in range(25)))
            assert len(ends) == 25
            for end in ends:
                end.close()


@in_loop
async def test_idle_tunnels_are_counted_kept_and_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound_module, "EXPIRY_INTERVAL_S", 0.01)
    async with Pair(pool=PoolSettings(max_streams=1, max_idle=1, idle_timeout_s=3600)) as pair:
        with Origin() as origin:
            ends = await asyncio.gather(*(pair.socks(origin.port) for _ in range(3)))
            assert pair.tunnels == 3
            assert pair.outbound._tunnels.idle_count() == 0
            for end in ends:
                end.reset()
            kept = pair.outbound._tunnels
            await until(lambda: pair.tunnels == kept.idle_count() == len(kept) == 1)
            again = await pair.socks(origin.port)
            assert pair.inbound._counters.connections_accepted == 3
            again.reset()
            pair.outbound._tunnels._idle_timeout_s = 0.01
            await until(lambda: pair.tunnels == 0)
            await until(lambda: len(pair.outbound._tunnels) == 0)
            assert pair.inbound._counters.tunnels_lost == pair.outbound._counters.tunnels_lost == 0


@in_loop
async def test_a_request_that_comes_while_the_only_tunnel_is_being_closed_gets_a_new_one() -> None:
    async with Pair(pool=PoolSettings(max_tunnels=1)) as pair:
        with Origin() as origin:
            first, _ = await pair.stream(origin)
            first.reset()
            await until(lambda: pair.outbound._tunnels.idle_count() == 1)
            for tunnel in pair.outbound._tunnels:
                tunnel.close(Code.IDLE)
            await pair.stream(origin)
            assert pair.inbound._counters.connections_accepted == 2


@in_loop
async def test_streams_that_are_idle_are_reset_by_the_client_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "TICK_MIN_S", 0.005)
    async with Pair(outbound_limits=OutboundLimits(idle_timeout_s=0.05)) as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            await near.expect_reset()
            await far.expect_reset()


@in_loop
async def test_a_goaway_leaves_streams_running_and_sends_new_ones_elsewhere() -> None:
    async with Pair() as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            (tunnel,) = pair.inbound._tunnels
            tunnel.go_away(Code.SHUTTING_DOWN)
            await until(lambda: not any(each.has_room for each in pair.outbound._tunnels))
            other, _ = await pair.stream(origin)
            assert pair.tunnels == 2
            await near.send(b"still here")
            assert await far.receive(10) == b"still here"
            near.finish()
            far.finish()
            await near.expect_fin()
            await until(lambda: pair.tunnels == 1)  # with its last stream it was closed
            other.close()


# What goes wrong


@in_loop
async def test_a_tunnel_cut_resets_every_local_socket_at_once_and_new_requests_work() -> None:
    async with Pair() as pair:
        with Origin() as origin:
            streams = [await pair.stream(origin) for _ in range(5)]
            (tunnel,) = pair.inbound._tunnels
            tunnel.cut("the test says so")
            for near, far in streams:
                await near.expect_reset()
                await far.expect_reset()
            assert pair.outbound._counters.tunnels_lost == 1
            await pair.stream(origin)


@in_loop
async def test_an_untouched_request_is_tried_again_on_a_fresh_tunnel() -> None:
    async with Pair() as pair:
        with Origin() as origin:
            (await pair.socks(origin.port)).reset()
            await until(lambda: pair.outbound._tunnels.idle_count() == 1)
            (stale,) = pair.outbound._tunnels
            # The server is gone, and the client does not know yet.
            asyncio.get_running_loop().remove_reader(stale._fd)
            for tunnel in list(pair.inbound._tunnels):
                tunnel.cut("the test says so")
            with await pair.connect() as near:
                await near.send(socks_head(origin.port))
                await until(lambda: stale.ended or stale.stream_count)
                if not stale.ended:
                    stale._on_readable()
                assert (await near.receive(2 + REPLY_SIZE))[3] == Status.SUCCEEDED
            assert pair.inbound._counters.connections_accepted == 2


@contextlib.asynccontextmanager
async def cutting_pair(cuts: int, door: ListenSettings | None = None) -> AsyncIterator[Pair]:
    """A pair whose server cuts so many tunnels as soon as a stream is opened on them."""
    left = cuts

    async with Pair(listen=[door or ListenSettings(address=EPHEMERAL)]) as pair:
        real = pair.inbound._on_open

        def on_open(tunnel: Any, event: Any, **more: Any) -> None:
            nonlocal left
            if left:
                left -= 1
                tunnel.cut("before OPENED")
            else:
                real(tunnel, event, **more)

        pair.inbound._on_open = on_open  # type: ignore[method-assign]
        yield pair


@in_loop
async def test_a_request_is_tried_three_times_then_refused() -> None:
    async with cutting_pair(2) as pair:
        with Origin() as origin:
            await pair.stream(origin)
            assert pair.inbound._counters.connections_accepted == 3
    async with cutting_pair(3) as pair:
        with Origin() as origin:
            assert await pair.status(origin.port) == Status.GENERAL_FAILURE
            assert pair.inbound._counters.connections_accepted == 3


@in_loop
async def test_a_forward_that_has_sent_something_is_not_tried_again() -> None:
    with silent_port() as silent:
        async with Pair(listen=[forward_to(silent)]) as pair:
            with await pair.connect() as near:
                await near.send(b"delivered, perhaps")
                await until(lambda: pair.inbound._counters.bytes_out_of_tunnels)
                (tunnel,) = pair.inbound._tunnels
                tunnel.cut("before OPENED")
                await near.expect_reset()
            assert pair.inbound._counters.connections_accepted == 1


@pytest.mark.usefixtures("quick_retries")
@in_loop
async def test_where_the_dial_fails_those_who_wait_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with refusing_port() as port:
        async with running_outbound(outbound_settings([server_settings(Keys.generate(), port)])) as (outbound, door):

            async def status() -> int:
                with await connect(door) as end:
                    return await socks_request(end, 80)

            statuses = await asyncio.gather(*(status() for _ in range(10)))
            assert set(statuses) == {Status.GENERAL_FAILURE}
            assert not outbound._connector._waiting
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{HOST}:{port}: cannot connect to the server: " in lines[0]
    assert "Connection refused" in lines[0]


@pytest.mark.usefixtures("quick_retries")
@in_loop
async def test_where_the_first_server_is_down_the_second_one_serves() -> None:
    keys = Keys.generate()
    with refusing_port() as down:
        async with running_inbound(inbound_settings(keys)) as (_, port):
            servers = [server_settings(keys, down), server_settings(keys, port)]
            async with running_outbound(outbound_settings(servers)) as (outbound, door):
                with Origin() as origin, await connect(door) as end:
                    assert await socks_request(end, origin.port) == Status.SUCCEEDED
                assert outbound._tunnels.count(outbound._connector._servers[1]) == 1


@pytest.mark.usefixtures("quick_retries")
@in_loop
async def test_a_wrong_user_key_and_a_wrong_server_key_are_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    keys, others = Keys.generate(), Keys.generate()
    limits = OutboundLimits(handshake_timeout_s=0.2, connect_timeout_s=0.2)
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        for wrong in (
            Keys(keys.private_key, keys.public_key, keys.user_id, others.user_key),
            Keys(keys.private_key, others.public_key, keys.user_id, keys.user_key),
        ):
            settings = outbound_settings([server_settings(wrong, port)], limits=limits)
            async with running_outbound(settings) as (_, door):
                with await connect(door) as end:
                    assert await socks_request(end, 80) == Status.GENERAL_FAILURE
        assert inbound._counters.handshakes_completed == 0
        assert inbound._counters.handshakes_failed == 2
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    wrong_keys = "the server's public key, the user id or the user key is wrong, or this machine's clock is off"
    assert sum("the server did not answer the hello within 0.2 s" in line and wrong_keys in line for line in lines) == 2
