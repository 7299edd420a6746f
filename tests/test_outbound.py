"""reflex.outbound: the client's half, driven in process against the server's half and servers of the test's own."""

from __future__ import annotations

import gc
import logging
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from reflex.complaints import Complaints
from reflex.config import HostPort, InboundLimits, ListenSettings, OutboundLimits, Secret, TargetRule, TargetSettings
from reflex.errors import StartError
from reflex.net.doors import Visitor
from reflex.net.listener import open_listening
from reflex.outbound import Outbound, cipher_suite
from reflex.protocol.socks5 import METHOD_NONE, METHOD_PASSWORD, METHOD_REFUSED, VERSION
from reflex.protocol.wire import Status, Suite
from reflex.worker import SharedCount, SharedCounts, WorkerContext
from tests.conftest import require_ipv6
from tests.ends import HOST, NO_SUCH_NAME, REPLY_SIZE, End, Origin, connect, refusing_port, silent_port, socks_head
from tests.keys import Keys
from tests.loops import in_loop, turns, until
from tests.pair import EPHEMERAL, Hog, Pair, forward_to, outbound_settings, port_of, server_settings, statistics

pytestmark = pytest.mark.usefixtures("each_loop")


# Doors


@in_loop
async def test_socks_statuses_tell_the_truth() -> None:
    targets = TargetSettings(
        allow=(TargetRule.parse("127.0.0.1:*"), TargetRule.parse("localhost:*"), TargetRule.parse("*.invalid:*"))
    )
    async with Pair(targets=targets, inbound_limits=InboundLimits(dial_timeout_s=1.0)) as pair:
        with refusing_port() as refusing, silent_port() as silent:
            assert await pair.status(refusing) == Status.REFUSED
            assert await pair.status(refusing, "localhost") == Status.REFUSED
            assert await pair.status(80, "10.0.0.1") == Status.NOT_ALLOWED
            assert await pair.status(80, NO_SUCH_NAME) == Status.HOST_UNREACHABLE
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
async def test_above_max_connections_new_ones_are_closed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async with Pair(outbound_limits=OutboundLimits(max_connections=1)) as pair:
        pair.outbound._complaints = Complaints(interval_s=3600)
        with await pair.connect():
            await until(lambda: pair.outbound._visitors)
            for _ in range(2):
                with await pair.connect() as second:
                    await second.expect_fin()
        assert pair.outbound._counters.connections_refused == 2
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said == ["local connections are closed: there are 1 already (limits.max_connections)"]
        await until(lambda: not pair.outbound._visitors)
        with Origin() as origin:
            await pair.stream(origin)


@in_loop
async def test_it_says_where_it_listens_and_lets_go_when_it_cannot() -> None:
    require_ipv6()
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
