"""reflex.inbound: the server's half, driven in process through both halves and by clients of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import socket
import time
from typing import Any

import pytest

from reflex import inbound as inbound_module
from reflex.config import HostPort, InboundLimits, TargetRule, TargetSettings, TcpSettings
from reflex.errors import StartError
from reflex.inbound import Inbound
from reflex.net import listener as listener_module
from reflex.net import tunnel as tunnel_module
from reflex.net import upkeep
from reflex.net.target import DIALS_PER_TURN
from reflex.protocol.address import Address
from reflex.protocol.events import EventKind
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import Code, Status
from tests.conftest import require_ipv6
from tests.ends import HOST, NO_SUCH_NAME, Origin, connect, refusing_port, silent_port
from tests.keys import Keys
from tests.loops import in_loop, turns, until
from tests.pair import Pair, inbound_settings, port_of, running_inbound, statistics
from tests.processes import kept_port
from tests.remote import raw_client

pytestmark = pytest.mark.usefixtures("each_loop")


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
            await remote.ask(origin.address)
            target = await origin.accept()
            await remote.write(0x0D)
            await target.expect_reset()
            await remote.end.expect_fin()
            assert inbound._counters.protocol_errors == 1
            remote.leave()


# Listening and the first bytes


@in_loop
async def test_it_says_where_it_listens_and_lets_go_when_it_cannot() -> None:
    require_ipv6()
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

        object.__setattr__(settings, "fallback", HostPort(NO_SUCH_NAME, 80))
        with pytest.raises(StartError, match=f"fallback: cannot resolve {NO_SUCH_NAME}"):
            await Inbound(settings).start()


@in_loop
async def test_a_fallback_that_is_the_server_itself_prevents_the_start_and_nothing_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[socket.socket] = []

    def open_listening(host: str, port: int) -> socket.socket:
        opened.append(listener_module.open_listening(host, port))
        return opened[-1]

    monkeypatch.setattr(inbound_module, "open_listening", open_listening)
    with kept_port("0.0.0.0") as port:
        everywhere = [HostPort(HOST, 0), HostPort("0.0.0.0", port)]
        inbound = Inbound(inbound_settings(Keys.generate(), listen=everywhere, fallback=port))
        with pytest.raises(StartError, match=rf"^fallback: 127\.0\.0\.1:{port} is this server itself$"):
            await inbound.start()
    assert [sock.fileno() for sock in opened] == [-1, -1]
    assert inbound._listeners == []


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
            remote.leave()


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
        remote.leave()


# Streams


@in_loop
async def test_how_a_target_could_not_be_reached_is_told_by_status() -> None:
    keys = Keys.generate()
    targets = TargetSettings(
        allow=(TargetRule.parse("127.0.0.1:*"), TargetRule.parse("localhost:*"), TargetRule.parse("*.invalid:*"))
    )
    settings = inbound_settings(keys, targets=targets, limits=InboundLimits(dial_timeout_s=1.0))
    async with running_inbound(settings) as (inbound, port):
        remote = await raw_client(port, keys)
        with refusing_port() as refusing, silent_port() as silent:
            for address, status in (
                (Address.of(HOST, refusing), Status.REFUSED),
                (Address.of("localhost", refusing), Status.REFUSED),
                (Address.of(HOST, silent), Status.TIMED_OUT),
                (Address.of("10.0.0.1", 80), Status.NOT_ALLOWED),
                (Address.of(NO_SUCH_NAME, 80), Status.HOST_UNREACHABLE),
                (None, Status.NOT_SUPPORTED),
            ):
                _, seen = await remote.ask(address)
                assert (seen.kind, seen.number) == (EventKind.REFUSED, status), address
        assert inbound._counters.streams_refused == 6
        assert not remote.session.streams
        remote.leave()


@in_loop
async def test_more_streams_than_allowed_are_reset() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys, limits=InboundLimits(max_streams=1))) as (_, port):
        with Origin() as origin:
            remote = await raw_client(port, keys)
            await remote.ask(origin.address)
            remote.session._peer_max_streams = 2  # it does not keep to what it was told
            _, seen = await remote.ask(origin.address)
            assert (seen.kind, seen.number) == (EventKind.RESET, Code.LIMIT)
            remote.leave()


@in_loop
async def test_the_tunnels_of_a_user_dial_one_after_the_other() -> None:
    """Else a user with a hundred tunnels has a hundred times as many dials in a turn."""
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        remotes = [await raw_client(port, keys) for _ in range(2)]
        assert len({id(queue) for queue in inbound._tunnels.values()}) == 1
        with Origin() as origin:
            for remote in remotes:
                for _ in range(DIALS_PER_TURN):
                    remote.session.open(origin.address)
                await remote.flush()
            await until(lambda: sum(relay.fd >= 0 for relay in inbound._relays) == 2 * DIALS_PER_TURN)
        for remote in remotes:
            remote.leave()
        await until(lambda: not inbound._dial_queues)


@in_loop
async def test_a_stream_without_a_byte_is_reset_after_the_idle_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "TICK_MIN_S", 0.005)
    async with Pair(inbound_limits=InboundLimits(idle_timeout_s=0.05)) as pair:
        with Origin() as origin:
            near, far = await pair.stream(origin)
            await near.expect_reset()
            await far.expect_reset()
