"""reflex.outbound: the client's half, driven in process against the server's half and servers of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from reflex import outbound as outbound_module
from reflex.config import (
    HostPort,
    InboundLimits,
    ListenSettings,
    OutboundLimits,
    PoolSettings,
    Secret,
    TargetRule,
    TargetSettings,
)
from reflex.errors import StartError
from reflex.net import server as server_module
from reflex.net import upkeep
from reflex.net.doors import Visitor
from reflex.net.listener import open_listening
from reflex.outbound import Outbound, cipher_suite
from reflex.protocol.socks5 import METHOD_NONE, METHOD_PASSWORD, METHOD_REFUSED, VERSION
from reflex.protocol.wire import Code, Status, Suite
from reflex.worker import SharedCount, SharedCounts, WorkerContext
from tests.pair import (
    DEADLINE_S,
    HOST,
    LOOPS,
    REPLY_SIZE,
    End,
    Hog,
    Keys,
    LoopFactory,
    Origin,
    Pair,
    connect,
    in_loop,
    inbound_settings,
    loops_from,
    outbound_settings,
    port_of,
    refusing_port,
    running_inbound,
    running_outbound,
    server_settings,
    silent_port,
    socks_head,
    socks_request,
    statistics,
    turns,
    until,
)

EPHEMERAL = HostPort(HOST, 0)


@pytest.fixture(autouse=True, params=LOOPS)
def _each_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    factory: LoopFactory = request.param
    with loops_from(factory):
        yield


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(server_module, "MAX_DELAY_S", 0.004)


def forward_to(port: int) -> ListenSettings:
    return ListenSettings(address=EPHEMERAL, protocol="forward", target=HostPort(HOST, port))


# Doors


@in_loop
async def test_socks_statuses_tell_the_truth() -> None:
    targets = TargetSettings(
        allow=(TargetRule.parse("127.0.0.1:*"), TargetRule.parse("localhost:*"), TargetRule.parse("*.invalid:*"))
    )
    async with Pair(targets=targets, inbound_limits=InboundLimits(dial_timeout_s=0.2)) as pair:
        with refusing_port() as refusing, silent_port() as silent:
            assert await pair.status(refusing) == Status.REFUSED
            assert await pair.status(refusing, "localhost") == Status.REFUSED
            assert await pair.status(80, "10.0.0.1") == Status.NOT_ALLOWED
            assert await pair.status(80, "no-such-host.invalid") == Status.HOST_UNREACHABLE
            assert await pair.status(silent) == Status.TIMED_OUT
        assert pair.outbound._counters.streams_refused == 5


@in_loop
async def test_a_name_is_resolved_by_the_server() -> None:
    async with Pair() as pair:
        with Origin() as origin, await pair.socks(origin.port, "localhost") as near:
            far = await origin.accept()
            await near.send(b"x")
            assert await far.receive(1) == b"x"


@in_loop
async def test_what_an_application_sends_ahead_follows_its_request() -> None:
    async with Pair() as pair:
        with Origin() as origin, await pair.connect() as near:
            await near.send(socks_head(origin.port) + b"ahead")
            near.finish()
            far = await origin.accept()
            assert await far.receive_all() == b"ahead"
            reply = await near.receive(2 + REPLY_SIZE)
            assert reply[3] == Status.SUCCEEDED
            await far.send(b"answer")
            far.finish()
            assert await near.receive_all() == b"answer"


@in_loop
async def test_an_application_may_ask_byte_by_byte() -> None:
    async with Pair() as pair:
        with Origin() as origin, await pair.connect() as near:
            for byte in socks_head(origin.port):
                await near.send(bytes([byte]))
                await turns()
            assert (await near.receive(2 + REPLY_SIZE))[3] == Status.SUCCEEDED


@in_loop
async def test_user_and_password_are_asked_for_where_they_are_set() -> None:
    door = ListenSettings(address=EPHEMERAL, username="u", password=Secret(b"pass"))
    async with Pair(listen=[door]) as pair:
        with Origin() as origin:
            with await pair.connect() as end:
                await end.send(bytes([VERSION, 1, METHOD_PASSWORD]))
                assert await end.receive(2) == bytes([VERSION, METHOD_PASSWORD])
                await end.send(b"\x01\x01u\x04pass")
                assert await end.receive(2) == b"\x01\x00"
                await end.send(socks_head(origin.port)[3:])
                assert (await end.receive(REPLY_SIZE))[1] == Status.SUCCEEDED
            with await pair.connect() as end:
                await end.send(bytes([VERSION, 1, METHOD_PASSWORD]) + b"\x01\x01u\x04PASS")
                assert await end.receive_all() == bytes([VERSION, METHOD_PASSWORD]) + b"\x01\x01"
            with await pair.connect() as end:
                await end.send(bytes([VERSION, 1, METHOD_NONE]))
                assert await end.receive_all() == bytes([VERSION, METHOD_REFUSED])


@in_loop
async def test_what_does_not_speak_socks_is_told_and_what_leaves_is_let_go() -> None:
    async with Pair() as pair:
        with await pair.connect() as end:
            await end.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await end.receive_all()).startswith(b"HTTP/1.1 400 ")
        with await pair.connect() as end:
            await end.send(b"\x00")
            await end.expect_fin()
        with await pair.connect() as end:
            end.finish()
            await end.expect_fin()
        (await pair.connect()).reset()
        await until(lambda: not pair.outbound._visitors)


@in_loop
async def test_who_says_nothing_is_closed_after_the_handshake_time_out() -> None:
    async with Pair(outbound_limits=OutboundLimits(handshake_timeout_s=0.05)) as pair:
        with await pair.connect() as end:
            await end.expect_fin()


@in_loop
async def test_a_forward_leads_to_its_target_and_resets_where_it_cannot() -> None:
    with Origin() as origin, refusing_port() as refusing:
        async with Pair(listen=[forward_to(origin.port), forward_to(refusing)]) as pair:
            with await pair.connect(0) as near:
                await near.send(b"at once")
                far = await origin.accept()
                assert await far.receive(7) == b"at once"
                far.finish()
                await near.expect_fin()
            with await pair.connect(1) as near:
                await near.expect_reset()


@in_loop
async def test_above_max_connections_new_ones_are_closed_at_once() -> None:
    async with Pair(outbound_limits=OutboundLimits(max_connections=1)) as pair:
        with await pair.connect():
            await until(lambda: pair.outbound._visitors)
            with await pair.connect() as second:
                await second.expect_fin()
        assert pair.outbound._counters.connections_refused == 1
        await until(lambda: not pair.outbound._visitors)
        with Origin() as origin:
            await pair.stream(origin)


@in_loop
async def test_it_says_where_it_listens_and_lets_go_when_it_cannot() -> None:
    servers = [server_settings(Keys.generate(), 1)]
    doors = [ListenSettings(address=EPHEMERAL), ListenSettings(address=HostPort("::1", 0))]
    outbound = Outbound(outbound_settings(servers, listen=doors))
    addresses = await outbound.start()
    assert [address.rpartition(":")[0] for address in addresses] == [HOST, "[::1]"]
    busy = ListenSettings(address=HostPort(HOST, port_of(addresses[0])))
    other = Outbound(outbound_settings(servers, listen=[ListenSettings(address=EPHEMERAL), busy]))
    with pytest.raises(StartError, match="already in use"):
        await other.start()
    assert other._listeners == []
    outbound.abort()


@in_loop
async def test_a_server_key_that_is_none_is_named() -> None:
    bad = server_settings(Keys.generate(), 1)
    object.__setattr__(bad, "public_key", bytes(32))
    with pytest.raises(StartError, match=r"servers\[1\]: "):
        Outbound(outbound_settings([server_settings(Keys.generate(), 1), bad]))


# Ciphers


@pytest.mark.parametrize("cipher", ["aes-256-gcm", "chacha20-poly1305"])
def test_both_ciphers_carry_data(cipher: str) -> None:
    @in_loop
    async def carries() -> None:
        async with Pair(cipher=cipher) as pair:
            with Origin() as origin:
                near, far = await pair.stream(origin)
                await near.send(bytes(100_000))
                assert await far.receive(100_000) == bytes(100_000)

    carries()


@pytest.mark.parametrize(
    ("flags", "suite"),
    [
        ("flags : fpu aes sse2", Suite.AES_256_GCM),
        ("flags : fpu sse2", Suite.CHACHA20_POLY1305),
        ("Features : fp aes pmull", Suite.AES_256_GCM),
        ("Features : fp aes", Suite.CHACHA20_POLY1305),
        (None, Suite.AES_256_GCM),
    ],
)
def test_auto_is_aes_where_the_processor_has_it(
    flags: str | None, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(*_: object, **__: object) -> str:
        if flags is None:
            raise FileNotFoundError
        return flags

    monkeypatch.setattr(Path, "read_text", read_text)
    assert cipher_suite("auto") is suite
    assert cipher_suite("aes-256-gcm") is Suite.AES_256_GCM
    assert cipher_suite("chacha20-poly1305") is Suite.CHACHA20_POLY1305


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


# The end, and figures


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


@in_loop
async def test_a_worker_counts_its_connections_among_those_of_all_workers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    counts = SharedCounts(2)
    counts[2] = 1  # another worker has one
    replay: Any = None
    shared = WorkerContext(
        1, [open_listening(HOST, 0)], replay, SharedCount(counts, 1), SharedCount(SharedCounts(2), 1)
    )
    settings = outbound_settings([server_settings(Keys.generate(), 1)], limits=OutboundLimits(max_connections=2))
    outbound = Outbound(settings, shared=shared)
    (address,) = await outbound.start()
    with await connect(port_of(address)):
        await until(lambda: counts[1] == 1)
        with await connect(port_of(address)) as second:
            await second.expect_fin()
    await until(lambda: counts[1] == 0)
    outbound.report()
    assert statistics(caplog, "reflex.outbound")["gauges"]["worker"] == 1
    outbound.abort()


# The clock


def shifted_time(monkeypatch: pytest.MonkeyPatch, shift_s: int) -> None:
    """Put the client's clock off by so much; the server's stays."""

    class Shifted:
        gmtime = staticmethod(time.gmtime)
        strftime = staticmethod(time.strftime)

        @staticmethod
        def time() -> float:
            return time.time() + shift_s

    monkeypatch.setattr(server_module, "time", Shifted)


async def answer_dates(web: Origin) -> None:
    """A web server that knows what time it is, and nothing else."""
    while True:
        end = await web.accept()
        asked = await end.receive_some()
        if asked.startswith(b"HEAD"):
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
            await end.send(b"HTTP/1.1 200 OK\r\nDate: " + date + b"\r\nConnection: close\r\n\r\n")
        else:
            await end.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        end.finish()


@pytest.mark.parametrize("shift_s", [3600, -3600, 23 * 3600])
def test_a_clock_that_is_off_is_made_up_for_by_the_fallbacks_date(
    shift_s: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shifted_time(monkeypatch, shift_s)

    @in_loop
    async def is_made_up_for() -> None:
        with Origin() as web, Origin() as origin:
            task = asyncio.create_task(answer_dates(web))
            async with Pair(fallback=web.port) as pair:
                await pair.stream(origin)
                (tunnel,) = pair.outbound._tunnels
                tunnel.cut("the test says so")
                await pair.stream(origin)  # from now on without asking
                assert pair.inbound._counters.handshakes_failed == 1
            task.cancel()

    is_made_up_for()
    side = "ahead of" if shift_s > 0 else "behind"
    told = re.search(rf"this machine's clock is (\d+) s {side} the server's \(by its web server's Date\)", caplog.text)
    assert told is not None
    assert int(told[1]) == pytest.approx(abs(shift_s), abs=2)


def test_a_clock_that_is_off_by_days_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shifted_time(monkeypatch, 3 * 24 * 3600)

    @in_loop
    async def is_told() -> None:
        with Origin() as web:
            task = asyncio.create_task(answer_dates(web))
            async with Pair(fallback=web.port) as pair:
                assert await pair.status(80) == Status.GENERAL_FAILURE
            task.cancel()

    is_told()
    assert "this machine's clock is off by +259" in caplog.text
    assert "too much to make up for: set it right" in caplog.text


def test_without_a_fallback_a_clock_that_is_off_is_named_as_one_of_the_reasons(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shifted_time(monkeypatch, 3600)

    @in_loop
    async def is_named() -> None:
        async with Pair(outbound_limits=OutboundLimits(handshake_timeout_s=0.1, connect_timeout_s=0.1)) as pair:
            assert await pair.status(80) == Status.GENERAL_FAILURE

    is_named()
    assert "or this machine's clock is off by more than 120 s (it says " in caplog.text
    assert "the client's clock is off by +3600 s; at most 120 s are allowed" in caplog.text  # the server's line


def test_right_clocks_leave_the_keys_as_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    @in_loop
    async def leaves_the_keys() -> None:
        keys, others = Keys.generate(), Keys.generate()
        wrong = Keys(keys.private_key, keys.public_key, keys.user_id, others.user_key)
        with Origin() as web:
            task = asyncio.create_task(answer_dates(web))
            async with (
                running_inbound(inbound_settings(keys, fallback=web.port)) as (_, port),
                running_outbound(outbound_settings([server_settings(wrong, port)])) as (_, door),
            ):
                with await connect(door) as end:
                    assert await socks_request(end, 80) == Status.GENERAL_FAILURE
            task.cancel()

    leaves_the_keys()
    assert "the clocks agree within 120 s, so the server's public key, the user id or the user key is wrong" in (
        caplog.text
    )


@in_loop
async def test_bytes_an_application_sends_while_its_target_is_dialled_wait_and_arrive() -> None:
    with Origin() as origin:
        async with Pair(listen=[forward_to(origin.port)]) as pair:
            near: End = await pair.connect()
            await near.send(bytes(range(256)) * 400)
            near.finish()
            far = await origin.accept()
            assert await far.receive_all() == bytes(range(256)) * 400
            far.finish()
            await near.expect_fin()
            near.close()


@in_loop
async def test_when_memory_is_nearly_used_up_local_connections_are_refused_and_running_ones_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with Origin() as origin:
        listen = [ListenSettings(address=EPHEMERAL), forward_to(origin.port)]
        async with Pair(listen=listen, outbound_limits=OutboundLimits(buffered_bytes=5_000_000)) as pair:
            assert pair.outbound._budget.buffered_limit == 5_000_000
            near, far = await pair.stream(origin)
            with Hog(pair.outbound._share, 95):
                for _ in range(3):
                    assert await pair.status(origin.port) == Status.GENERAL_FAILURE
                with pytest.raises(ConnectionResetError):
                    await (await pair.connect(1)).receive_all()
                assert pair.outbound._counters.connections_refused == 4
                assert origin.is_unvisited
                await near.send(b"running")
                assert await far.receive(7) == b"running"
            await pair.stream(origin)
    lines = [line for line in caplog.messages if "local connections are refused: " in line]
    assert len(lines) == 1
    assert caplog.messages.count("enough bytes were read by now: nothing is refused any more") == 1


@in_loop
async def test_streams_are_reset_by_the_kernel_should_the_process_be_killed() -> None:
    """Their sockets are set so from the start: a process that is killed has no time for it."""

    def on_close(visitor: Visitor) -> tuple[int, ...]:
        return struct.unpack("ii", visitor._sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))

    with Origin() as origin:
        async with Pair(listen=[ListenSettings(address=EPHEMERAL), forward_to(origin.port)]) as pair:
            with await pair.connect(1) as near:
                await until(lambda: any(visitor.has_stream for visitor in pair.outbound._visitors))
                assert [on_close(visitor) for visitor in pair.outbound._visitors] == [(1, 0)]
                near.reset()
            await until(lambda: not pair.outbound._visitors)
            end = await pair.socks(origin.port)
            assert [on_close(visitor) for visitor in pair.outbound._visitors] == [(1, 0)]
            end.reset()


@in_loop
async def test_a_connection_that_has_ended_leaves_nothing_to_the_collector() -> None:
    """What is freed by its reference counts is free at once; a collection would look at every live connection."""
    with Origin() as origin:
        async with Pair(listen=[forward_to(origin.port)]) as pair:

            async def once() -> None:
                with await pair.connect() as near:
                    await near.send(b"there")
                    far = await origin.accept()
                    assert await far.receive(5) == b"there"
                    far.finish()
                    await near.expect_fin()
                    near.finish()
                    await far.expect_fin()
                await until(lambda: not pair.outbound._visitors and not pair.inbound._relays)

            await once()
            gc.collect()
            gc.disable()
            try:
                gc.set_debug(gc.DEBUG_SAVEALL)
                await once()
                gc.collect()
                left = {type(each).__name__ for each in gc.garbage}
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
    assert not left & {"Stream", "TargetRelay", "DoorRelay", "Visitor", "socket"}
