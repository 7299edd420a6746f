"""reflex.inbound: the server's half, driven in process through both halves and by clients of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from reflex import inbound as inbound_module
from reflex.config import HostPort, InboundLimits, TargetRule, TargetSettings, TcpSettings
from reflex.errors import StartError
from reflex.inbound import Inbound
from reflex.net import listener as listener_module
from reflex.net import tunnel as tunnel_module
from reflex.net import upkeep
from reflex.net.doors import ATTEMPTS
from reflex.net.listener import open_listening
from reflex.protocol.address import Address
from reflex.protocol.events import EventKind
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import STREAM_WINDOW, Code, FrameType, Network, Status
from reflex.worker import SharedCount, SharedCounts, WorkerContext
from tests.pair import (
    DEADLINE_S,
    HOST,
    LOOPS,
    Hog,
    Keys,
    LoopFactory,
    Origin,
    Pair,
    Remote,
    connect,
    in_loop,
    inbound_settings,
    loops_from,
    port_of,
    raw_client,
    refusing_port,
    running_inbound,
    silent_port,
    statistics,
    turns,
    until,
)

NO_DRAIN = InboundLimits(drain_s=0.05)


@pytest.fixture(autouse=True, params=LOOPS)
def _each_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    factory: LoopFactory = request.param
    with loops_from(factory):
        yield


def arrived(inbound: Inbound, size: int) -> bool:
    """Whether so many bytes have come out of tunnels."""
    return inbound._counters.bytes_out_of_tunnels == size


async def leave(remote: Remote) -> None:
    remote.end.close()
    remote.session.close_buffers()


async def opened(remote: Remote, address: Address | None) -> tuple[Any, Any]:
    """Open a stream by hand: it, and how that went."""
    stream = remote.session.open(address, Network.TCP if address else Network.UDP)
    await remote.flush()
    found: list[Any] = []

    def is_answered() -> bool:
        found.extend(each for each in remote.side.take_seen() if each.stream_id == stream.id)
        return bool(found)

    await remote.read_until(is_answered)
    return stream, found[0]


# Through both halves


@in_loop
async def test_bytes_fin_and_rst_go_through_both_halves() -> None:
    async with Pair() as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            await near.send(b"question")
            near.finish()
            assert await far.receive_all() == b"question"
            await far.send(b"answer")
            far.finish()
            assert await near.receive_all() == b"answer"
            near.close()
            near, far = await pair.stream(origin)
            far.finish()
            await near.expect_fin()
            await near.send(b"half open")
            assert await far.receive(9) == b"half open"
            near.finish()
            await far.expect_fin()
            near, far = await pair.stream(origin)
            far.reset()
            await near.expect_reset()
            near, far = await pair.stream(origin)
            near.reset()
            await far.expect_reset()
            assert pair.tunnels == 1


@in_loop
async def test_megabytes_go_through_both_halves_both_ways_at_once() -> None:
    there, back = secrets.token_bytes(3 << 20), secrets.token_bytes(3 << 20)
    async with Pair() as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)

            async def send_all(end: Any, data: bytes) -> None:
                await end.send(data)
                end.finish()

            results = await asyncio.gather(
                send_all(near, there), send_all(far, back), far.receive_all(), near.receive_all()
            )
            assert results[2] == there
            assert results[3] == back
            near.close()


@in_loop
async def test_a_protocol_error_cuts_the_tunnel_without_a_word_and_its_targets_are_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MIN_S", 0)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MAX_S", 0)
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        with Origin() as origin:
            remote = await raw_client(port, keys)
            await opened(remote, origin.address)
            target = await origin.accept()
            await remote.write(0x0D)
            await target.expect_reset()
            await remote.end.expect_fin()
            assert inbound._counters.protocol_errors == 1
            await leave(remote)


# Listening and the first bytes


@in_loop
async def test_it_says_where_it_listens_and_lets_go_when_it_cannot() -> None:
    keys = Keys.generate()
    two = [HostPort(HOST, 0), HostPort("::1", 0)]
    inbound = Inbound(inbound_settings(keys, listen=two))
    addresses = await inbound.start()
    assert [address.rpartition(":")[0] for address in addresses] == [HOST, "[::1]"]
    busy = HostPort(HOST, port_of(addresses[0]))
    other = Inbound(inbound_settings(keys, listen=[HostPort(HOST, 0), busy]))
    with pytest.raises(StartError, match="already in use"):
        await other.start()
    assert other._listeners == []
    inbound.abort()


@in_loop
async def test_a_fallback_that_is_a_name_is_resolved_at_the_start() -> None:
    settings = inbound_settings(Keys.generate())
    with Origin() as web:
        named = HostPort("localhost", web.port)
        object.__setattr__(settings, "fallback", named)
        async with running_inbound(settings) as (inbound, _):
            assert inbound._door is not None
            assert inbound._door.fallback is not None
            assert inbound._door.fallback.host in (HOST, "::1")

        object.__setattr__(settings, "fallback", HostPort("no-such-host.invalid", 80))
        with pytest.raises(StartError, match=r"fallback: cannot resolve no-such-host\.invalid"):
            await Inbound(settings).start()


@in_loop
async def test_a_browser_reaches_the_fallback_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Origin() as web:
        async with running_inbound(inbound_settings(Keys.generate(), fallback=web.port)) as (inbound, port):
            browser = await connect(port)
            await browser.send(b"GET / HTTP/1.1\r\n\r\n")
            server = await web.accept()
            assert await server.receive(18) == b"GET / HTTP/1.1\r\n\r\n"
            await server.send(b"HTTP/1.1 200 OK\r\n\r\n")
            server.finish()
            assert await browser.receive_all() == b"HTTP/1.1 200 OK\r\n\r\n"
            inbound.report()
            found = statistics(caplog, "reflex.inbound")
            assert found["counters"]["fallbacks"] == 1
            assert found["gauges"]["greetings"] == 1
            browser.finish()
            await server.expect_fin()
            await until(lambda: not inbound._greetings)
            browser.close()


@in_loop
async def test_a_bad_hello_gets_silence_and_no_target_is_dialled() -> None:
    async with running_inbound(inbound_settings(Keys.generate())) as (inbound, port):
        stranger = await connect(port)
        await stranger.send(Keys.generate().hello(0))
        await until(lambda: inbound._counters.handshakes_failed)
        await turns()
        assert stranger.is_silent
        stranger.close()
        await until(lambda: not inbound._greetings)


@in_loop
async def test_a_user_who_makes_hellos_without_end_is_refused_and_others_go_on() -> None:
    greedy, other = Keys.generate(), Keys.generate()
    # One server, two users.
    other = Keys(greedy.private_key, greedy.public_key, other.user_id, other.user_key)
    settings = inbound_settings(greedy)
    settings = dataclasses.replace(settings, users=(*settings.users, *inbound_settings(other).users))
    async with contextlib.AsyncExitStack() as stack:
        inbound, port = await stack.enter_async_context(running_inbound(settings))
        assert inbound._door is not None
        small = ReplaySet(0, capacity=64 * 3)
        inbound._door = dataclasses.replace(inbound._door, replay=small)
        remotes = [await raw_client(port, greedy) for _ in range(3)]
        for _ in range(10):
            stranger = await connect(port)
            await stranger.send(greedy.hello(int(time.time())))
        await until(lambda: inbound._counters.handshakes_failed == 10)
        assert len(small) == 3
        remotes += [await raw_client(port, other) for _ in range(3)]
        assert len(small) == 6
        for remote in remotes:
            await leave(remote)


@in_loop
async def test_records_behind_the_hello_are_served() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        end = await connect(port)
        _, hello = keys.handshake(int(time.time()))
        await end.send(hello + bytes(50))  # no record: fatal, but only for the session
        assert len(await end.receive(40)) == 40
        await until(lambda: inbound._counters.protocol_errors)
        assert inbound._counters.handshakes_completed == 1
        end.close()


@in_loop
async def test_above_max_connections_new_ones_are_closed_at_once() -> None:
    keys = Keys.generate()
    settings = inbound_settings(keys, limits=InboundLimits(max_connections=2))
    async with running_inbound(settings) as (inbound, port):
        remotes = [await raw_client(port, keys) for _ in range(2)]
        third = await connect(port)
        await third.expect_fin()
        assert inbound._counters.connections_refused == 1
        await leave(remotes.pop())
        await until(lambda: len(inbound._tunnels) == 1)
        remotes.append(await raw_client(port, keys))
        assert inbound._counters.connections_displaced == 0
        for remote in remotes:
            await leave(remote)


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
                await leave(remote)


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
            await leave(remote)


@in_loop
async def test_a_connection_that_outlives_a_fatal_error_counts_until_it_is_closed() -> None:
    """Else a user could have any number of them, for half a minute each."""
    keys = Keys.generate()
    settings = inbound_settings(keys, limits=InboundLimits(max_connections=2))
    async with running_inbound(settings) as (inbound, port):
        remotes = [await raw_client(port, keys) for _ in range(2)]
        for remote in remotes:
            await remote.write(0x7F)  # an unknown type, which is fatal
        await until(lambda: not inbound._tunnels)
        assert inbound._own_connections() == 2
        with await connect(port) as third:
            await third.expect_fin()
        for remote in remotes:
            remote.end.close()
            remote.session.close_buffers()
        await until(lambda: inbound._own_connections() == 0)
        await leave(await raw_client(port, keys))


@in_loop
async def test_who_left_before_it_was_looked_at_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_inbound(inbound_settings(Keys.generate())) as (inbound, port):

        def gone(*_: object, **__: object) -> None:
            raise OSError("it is gone")

        monkeypatch.setattr(inbound_module, "set_unpaced", gone)
        with await connect(port) as end:
            await end.expect_fin()
        assert not inbound._greetings


@in_loop
async def test_who_left_before_its_hello_was_answered_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):

        def gone(*_: object) -> int:
            raise ConnectionResetError

        monkeypatch.setattr(socket.socket, "sendmsg", gone)
        with await connect(port) as end:
            await end.send(keys.hello(int(time.time())))
            await end.expect_fin()
        assert inbound._counters.handshakes_completed == 0
        assert not inbound._tunnels


@in_loop
async def test_the_tcp_options_of_the_settings_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (inbound_module, listener_module):
        monkeypatch.setattr(module, "is_loopback", lambda _: False)  # as for a client from elsewhere
    keys = Keys.generate()
    settings = inbound_settings(keys, tcp=TcpSettings(nodelay=True, keepalive_s=17))
    async with running_inbound(settings) as (inbound, port):
        remote = await raw_client(port, keys)
        (tunnel,) = inbound._tunnels
        assert tunnel._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 17
        await leave(remote)


# Streams


@in_loop
async def test_how_a_target_could_not_be_reached_is_told_by_status() -> None:
    keys = Keys.generate()
    targets = TargetSettings(
        allow=(TargetRule.parse("127.0.0.1:*"), TargetRule.parse("localhost:*"), TargetRule.parse("*.invalid:*"))
    )
    settings = inbound_settings(keys, targets=targets, limits=InboundLimits(dial_timeout_s=0.2))
    async with running_inbound(settings) as (inbound, port):
        remote = await raw_client(port, keys)
        with refusing_port() as refusing, silent_port() as silent:
            for address, status in (
                (Address.of(HOST, refusing), Status.REFUSED),
                (Address.of("localhost", refusing), Status.REFUSED),
                (Address.of(HOST, silent), Status.TIMED_OUT),
                (Address.of("10.0.0.1", 80), Status.NOT_ALLOWED),
                (Address.of("no-such-host.invalid", 80), Status.HOST_UNREACHABLE),
                (None, Status.NOT_SUPPORTED),
            ):
                _, seen = await opened(remote, address)
                assert (seen.kind, seen.number) == (EventKind.REFUSED, status), address
        assert inbound._counters.streams_refused == 6
        assert not remote.session.streams
        await leave(remote)


@in_loop
async def test_more_streams_than_allowed_are_reset() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys, limits=InboundLimits(max_streams=1))) as (_, port):
        with Origin() as origin:
            remote = await raw_client(port, keys)
            await opened(remote, origin.address)
            remote.session._peer_max_streams = 2  # it does not keep to what it was told
            _, seen = await opened(remote, origin.address)
            assert (seen.kind, seen.number) == (EventKind.RESET, Code.LIMIT)
            await leave(remote)


@in_loop
async def test_a_stream_without_a_byte_is_reset_after_the_idle_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "TICK_MIN_S", 0.005)
    async with Pair(inbound_limits=InboundLimits(idle_timeout_s=0.05)) as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            await near.expect_reset()
            await far.expect_reset()


# The end


@in_loop
async def test_draining_lets_streams_end_takes_no_new_ones_and_reports(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        with Origin() as origin:
            idle = await raw_client(port, keys)
            remote = await raw_client(port, keys)
            stream, seen = await opened(remote, origin.address)
            assert seen.kind is EventKind.OPENED
            target = await origin.accept()
            task = asyncio.create_task(inbound.drain())
            assert (await remote.see(EventKind.GOAWAY)).number == Code.SHUTTING_DOWN
            await idle.read_until(lambda: idle.session.close_received)
            await idle.end.expect_fin()
            idle.end.close()
            idle.session.close_buffers()
            with pytest.raises(ConnectionRefusedError):
                await connect(port)
            remote.session._goaway_received = False  # it does not keep to what it was told
            _, refusal = await opened(remote, origin.address)
            assert (refusal.kind, refusal.number) == (EventKind.RESET, Code.SHUTTING_DOWN)
            await target.send(b"the last")
            target.finish()
            assert await remote.receive(stream, 8) == b"the last"
            assert not task.done()
            remote.session.finish(stream)
            await remote.flush()
            await target.expect_fin()
            await remote.read_until(lambda: remote.session.close_received)
            remote.end.finish()
            async with asyncio.timeout(DEADLINE_S):
                await task
            await leave(remote)
    found = statistics(caplog, "reflex.inbound")
    assert found["gauges"]["tunnels"] == found["gauges"]["streams"] == found["gauges"]["buffered_bytes"] == 0
    assert found["counters"]["handshakes_completed"] == 2
    assert found["pools"]["client_hello"]["in_use"] == 0


@in_loop
async def test_what_is_left_after_the_drain_time_is_reset(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    with Origin() as web, Origin() as origin:
        async with running_inbound(inbound_settings(keys, fallback=web.port, limits=NO_DRAIN)) as (inbound, port):
            remote = await raw_client(port, keys)
            await opened(remote, origin.address)
            target = await origin.accept()
            browser = await connect(port)
            await browser.send(b"GET /")
            server = await web.accept()
            await server.receive(5)
            task = asyncio.create_task(inbound.drain())
            await target.expect_reset()
            await browser.expect_reset()
            await server.expect_reset()
            assert (await remote.see(EventKind.RESET, 1)).number == Code.SHUTTING_DOWN
            remote.end.close()
            async with asyncio.timeout(DEADLINE_S):
                await task
            remote.session.close_buffers()
    assert "1 tunnels still had streams after 0.05 s: reset" in caplog.text


@in_loop
async def test_draining_waits_for_what_a_slow_target_has_not_taken_yet() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        with Origin(receive_buffer_bytes=4096) as origin:
            remote = await raw_client(port, keys)
            stream, _ = await opened(remote, origin.address)
            target = await origin.accept()
            sent = 0
            # More than the kernel keeps for a socket: the rest waits in the server.
            while not (inbound._budget.buffered and stream.send_window.available == 0):
                sent += remote.session.send(stream, bytes(STREAM_WINDOW))
                await remote.flush()
                await until(partial(arrived, inbound, sent))
                await turns()
                while not remote.end.is_silent:
                    await remote.read()
            remote.session.finish(stream)
            await remote.flush()
            target.finish()
            await remote.see(EventKind.FIN, stream.id)
            task = asyncio.create_task(inbound.drain())
            await remote.read_until(lambda: remote.session.close_received)
            remote.end.close()
            await until(lambda: not inbound._tunnels)
            await turns()
            assert not task.done(), f"the end came with {inbound._budget.buffered} bytes undelivered"
            assert await target.receive_all() == bytes(sent)
            async with asyncio.timeout(DEADLINE_S):
                await task
            remote.session.close_buffers()


@in_loop
async def test_draining_does_not_wait_for_those_who_have_said_nothing() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys, limits=NO_DRAIN)) as (inbound, port):
        with await connect(port) as silent, await connect(port) as bad:
            await bad.send(bytes(76))
            await until(lambda: len(inbound._greetings) == 2)
            async with asyncio.timeout(DEADLINE_S):
                await inbound.drain()
            await silent.expect_fin()
            await bad.expect_fin()


@in_loop
async def test_aborting_resets_everything_at_once() -> None:
    keys = Keys.generate()
    with Origin() as web, Origin() as origin:
        async with running_inbound(inbound_settings(keys, fallback=web.port)) as (inbound, port):
            remote = await raw_client(port, keys)
            await opened(remote, origin.address)
            target = await origin.accept()
            browser = await connect(port)
            await browser.send(b"GET /")
            await web.accept()
            await until(lambda: inbound._counters.fallbacks)
            inbound.abort()
            inbound.abort()
            await target.expect_reset()
            await browser.expect_reset()
            with contextlib.suppress(ConnectionResetError):
                assert await remote.end.receive_all() is not None
            await leave(remote)


# As one of several workers


@in_loop
async def test_a_worker_counts_its_connections_among_those_of_all_workers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    counts = SharedCounts(2)
    counts[2] = 1  # another worker has one
    sock = open_listening(HOST, 0)
    replay: Any = ReplaySet(0)
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
    await leave(remote)


@in_loop
async def test_when_memory_is_nearly_used_up_new_streams_are_reset_and_running_ones_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with Pair() as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            share = next(iter(pair.inbound._shares.values()))
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
            assert pair.inbound._counters.streams_refused == 3 * ATTEMPTS
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
    replay: Any = ReplaySet(0)
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
    await leave(remote)
    await leave(second)
