"""reflex.net.fallback: a connection and the web server's, joined byte for byte, with FIN and RST."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from reflex.complaints import Complaints
from reflex.errors import DialError
from reflex.net import fallback as fallback_module
from reflex.net.fallback import READ_BYTES, Fallback, end_idle
from reflex.net.hangup import LOOK_S, Lookout
from reflex.pool import TieredPool
from reflex.protocol.address import Address
from reflex.protocol.wire import Status
from tests.ends import HOST, End, Origin, refusing_port, tcp_pair
from tests.loops import DEADLINE_S, in_loop, until

pytestmark = pytest.mark.usefixtures("each_loop")

SMALL_BUFFERS = 4_096  # the kernel doubles it and rounds it up; far below what is sent


class Joined:
    """A client's end, and a fallback that has it."""

    def __init__(
        self,
        address: Address,
        first: bytes = b"",
        *,
        read_ended: bool = False,
        buffer_bytes: int = 0,
        look_s: float = LOOK_S,
    ) -> None:
        self.buffers = TieredPool()
        self.ends: list[Fallback] = []
        near, far = tcp_pair(buffer_bytes=buffer_bytes)
        self.client = End(near)
        self.fallback = Fallback(
            asyncio.get_running_loop(),
            far,
            address,
            memoryview(first),
            buffers=self.buffers,
            complaints=Complaints(),
            lookout=Lookout(asyncio.get_running_loop(), look_s),
            on_end=self.ends.append,
            read_ended=read_ended,
        )

    async def ended(self) -> None:
        await until(lambda: self.ends)
        assert len(self.ends) == 1
        assert self.fallback.ended
        assert self.buffers.in_use == 0


@contextlib.contextmanager
def joined(
    address: Address,
    first: bytes = b"",
    *,
    read_ended: bool = False,
    buffer_bytes: int = 0,
    look_s: float = LOOK_S,
) -> Iterator[Joined]:
    join = Joined(address, first, read_ended=read_ended, buffer_bytes=buffer_bytes, look_s=look_s)
    try:
        yield join
    finally:
        join.fallback.end(reset=True)
        join.client.close()
    assert join.buffers.in_use == 0
    assert len(join.ends) == 1


@in_loop
async def test_what_was_read_already_comes_first_and_bytes_go_both_ways() -> None:
    with Origin() as web, joined(web.address, b"GET / ") as join:
        server = await web.accept()
        assert await server.receive(6) == b"GET / "
        await join.client.send(b"HTTP/1.1\r\n\r\n")
        assert await server.receive(12) == b"HTTP/1.1\r\n\r\n"
        await server.send(b"HTTP/1.1 200 OK\r\n")
        assert await join.client.receive(17) == b"HTTP/1.1 200 OK\r\n"


@in_loop
async def test_fin_goes_through_each_way_for_itself_client_first() -> None:
    with Origin() as web, joined(web.address, b"x") as join:
        server = await web.accept()
        join.client.finish()
        assert await server.receive_all() == b"x"
        await server.send(b"answer")
        assert await join.client.receive(6) == b"answer"
        server.finish()
        await join.client.expect_fin()
        await join.ended()


@in_loop
async def test_fin_goes_through_each_way_for_itself_server_first() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        await server.send(b"bye")
        server.finish()
        assert await join.client.receive_all() == b"bye"
        await join.client.send(b"wait")
        assert await server.receive(4) == b"wait"
        join.client.finish()
        await server.expect_fin()
        await join.ended()


@in_loop
async def test_a_fin_that_was_read_already_is_passed_on() -> None:
    with Origin() as web, joined(web.address, b"last", read_ended=True) as join:
        server = await web.accept()
        assert await server.receive_all() == b"last"
        await server.send(b"ok")
        server.finish()
        assert await join.client.receive_all() == b"ok"
        await join.ended()


@in_loop
async def test_an_rst_of_the_client_reaches_the_server() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        join.client.reset()
        await server.expect_reset()
        await join.ended()


@in_loop
async def test_an_rst_of_the_server_reaches_the_client() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        await server.send(b"x")
        assert await join.client.receive(1) == b"x"
        server.reset()
        await join.client.expect_reset()
        await join.ended()


@in_loop
async def test_an_rst_of_the_server_that_is_noticed_by_sending_reaches_the_client() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        await until(lambda: join.fallback._client.is_reading)
        join.client.sock.send(b"x")
        server.reset()  # in the same turn of the loop
        await join.client.expect_reset()
        await join.ended()


@in_loop
async def test_a_first_read_that_the_server_does_not_take_at_once_comes_before_fin() -> None:
    first = bytes(range(256)) * 32_768
    with Origin(receive_buffer_bytes=SMALL_BUFFERS) as web, joined(web.address, first, read_ended=True) as join:
        server = await web.accept()
        await until(lambda: join.fallback._server and join.fallback._server.is_writing)
        assert await server.receive_all() == first


@in_loop
async def test_ending_it_with_a_reset_resets_both() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        join.fallback.end(reset=True)
        join.fallback.end(reset=False)
        await join.client.expect_reset()
        await server.expect_reset()
        await join.ended()


@in_loop
async def test_what_one_side_does_not_read_the_other_is_not_asked_for() -> None:
    with Origin(receive_buffer_bytes=SMALL_BUFFERS) as web, joined(web.address) as join:
        server = await web.accept()
        sent = 0

        async def send_until_stuck() -> int:
            """Until the fallback waits for its server, and this side for the fallback."""
            size = 0
            while not (join.fallback._server and join.fallback._server.backlog.size_bytes):
                size += join.client.fill()
                await asyncio.sleep(0)
            while more := join.client.fill():
                size += more
                await asyncio.sleep(0)
            return size

        sent += await send_until_stuck()
        assert join.fallback._server is not None
        assert join.fallback._server.backlog.size_bytes <= READ_BYTES
        join.client.finish()
        assert await server.receive_all() == bytes(sent)


@in_loop
async def test_a_mebibyte_each_way_at_once_arrives_whole_through_small_buffers() -> None:
    there, back = bytes(range(256)) * 4096, bytes(reversed(range(256))) * 4096
    with (
        Origin(receive_buffer_bytes=SMALL_BUFFERS) as web,
        joined(web.address, buffer_bytes=SMALL_BUFFERS) as join,
    ):
        server = await web.accept()

        async def send(end: End, data: bytes) -> None:
            await end.send(data)
            end.finish()

        results = await asyncio.gather(
            send(join.client, there), send(server, back), server.receive_all(), join.client.receive_all()
        )
        assert results[2] == there
        assert results[3] == back
        await join.ended()


@in_loop
async def test_an_rst_while_bytes_wait_for_the_other_side_is_noticed_when_they_cannot_be_sent() -> None:
    with Origin(receive_buffer_bytes=SMALL_BUFFERS) as web, joined(web.address) as join:
        server = await web.accept()
        while not (join.fallback._server and join.fallback._server.backlog.size_bytes):
            join.client.fill()
            await asyncio.sleep(0)
        server.reset()
        await join.client.expect_reset()
        await join.ended()


@in_loop
async def test_without_a_web_server_the_client_is_reset_as_the_web_servers_machine_would() -> None:
    with refusing_port() as port, joined(Address.of(HOST, port), b"x") as join:
        await join.client.expect_reset()
        await join.ended()


@in_loop
async def test_a_web_server_that_cannot_even_be_tried_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin_connect(address: Address) -> socket.socket:
        raise DialError(Status.NETWORK_UNREACHABLE, f"{address}: Network is unreachable")

    monkeypatch.setattr(fallback_module, "begin_connect", begin_connect)
    with Origin() as web, joined(web.address, b"x") as join:
        assert join.fallback.ended
        await join.client.expect_reset()


@in_loop
async def test_it_may_be_ended_before_the_web_server_is_connected() -> None:
    with Origin() as web, joined(web.address, b"x") as join:
        join.fallback.end(reset=True)
        await join.client.expect_reset()


@in_loop
async def test_a_web_server_that_resets_before_anything_was_sent_resets_the_client() -> None:
    with Origin() as web, joined(web.address, b"x" * 100) as join:
        web._sock.setblocking(True)
        End(web._sock.accept()[0]).reset()  # before the loop gets to see that it is connected
        await join.client.expect_reset()
        await join.ended()


@in_loop
async def test_a_readiness_that_was_none_changes_nothing() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        await until(lambda: join.fallback._client.is_reading)
        join.fallback._on_readable(join.fallback._client)
        await join.client.send(b"still there")
        assert await server.receive(11) == b"still there"


@in_loop
async def test_where_fin_cannot_be_passed_on_both_are_reset() -> None:
    with Origin() as web, joined(web.address) as join:
        await web.accept()
        await until(lambda: join.fallback._client.is_reading)
        side = join.fallback._server
        assert side is not None
        join.fallback._loop.remove_reader(side.fd)
        side.sock.close()  # as good as gone: shutdown fails
        join.client.finish()
        await join.client.expect_reset()
        await join.ended()


@in_loop
async def test_who_stays_after_the_web_server_has_left_is_forgotten_after_a_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fallback_module, "HALF_CLOSED_S", 0.05)
    with Origin() as web, joined(web.address, b"x") as join:
        server = await web.accept()
        await asyncio.sleep(0.1)  # silence before the web server's end counts for nothing
        assert not join.fallback.ended
        server.finish()
        await join.client.expect_fin()
        await join.ended()
        assert await server.receive_all() == b"x"


@in_loop
async def test_who_still_sends_after_the_web_servers_fin_is_heard_for_as_long_as_it_takes() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        server.finish()
        await join.client.expect_fin()
        first = join.fallback._timer
        assert first is not None
        for _ in range(3):
            await join.client.send(b"more")
            assert await server.receive(4) == b"more"
        second = join.fallback._timer
        assert first.cancelled()
        assert second is not None
        assert not second.cancelled()
        join.client.finish()
        await server.expect_fin()
        await join.ended()
        assert second.cancelled()


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The web server is on another machine: nobody is connected at once."""
    monkeypatch.setattr(fallback_module, "is_connected", lambda *_: False)


@in_loop
async def test_a_web_server_elsewhere_gets_the_first_bytes_when_it_is_connected(far_away: None) -> None:
    with Origin() as web, joined(web.address, b"first", read_ended=True) as join:
        server = await web.accept()
        assert await server.receive_all() == b"first"
        await server.send(b"answer")
        server.finish()
        assert await join.client.receive_all() == b"answer"
        await join.ended()


@in_loop
async def test_a_web_server_elsewhere_that_refuses_resets_the_client(far_away: None) -> None:
    with refusing_port() as port, joined(Address.of(HOST, port), b"x") as join:
        await join.client.expect_reset()
        await join.ended()


@in_loop
async def test_it_may_be_ended_before_a_web_server_elsewhere_is_connected(far_away: None) -> None:
    with Origin() as web, joined(web.address, b"x") as join:
        join.fallback.end(reset=True)
        await join.client.expect_reset()


@in_loop
async def test_a_web_server_that_refuses_at_once_resets_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_connected(_sock: socket.socket, address: Address) -> bool:
        raise DialError(Status.REFUSED, f"{address}: Connection refused")

    monkeypatch.setattr(fallback_module, "is_connected", is_connected)
    with Origin() as web, joined(web.address, b"x") as join:
        assert join.fallback.ended
        await join.client.expect_reset()


# A side that is gone, and no event tells of it.


QUICK_S = 0.002


@in_loop
async def test_a_reset_behind_bytes_is_passed_on_behind_them_where_the_loop_has_given_the_socket_up() -> None:
    with Origin() as web, joined(web.address, look_s=QUICK_S) as join:
        server = await web.accept()
        await until(lambda: join.fallback._client.is_reading)
        asyncio.get_running_loop().remove_reader(join.fallback._client.fd)  # as uvloop does after an error
        await join.client.send(b"x" * 50_000)
        join.client.reset()
        assert await server.receive(50_000) == b"x" * 50_000
        await server.expect_reset()
        await join.ended()


@in_loop
async def test_a_reset_after_fin_ends_both_sides() -> None:
    with Origin() as web, joined(web.address, look_s=QUICK_S) as join:
        server = await web.accept()
        join.client.finish()
        await server.expect_fin()
        await asyncio.sleep(0.01)  # some looks, at which nothing is wrong
        assert not join.fallback.ended
        join.client.reset()
        await join.ended()
        with pytest.raises(BrokenPipeError):
            await server.send(b"who has seen FIN sees RST when it sends")


@in_loop
async def test_a_side_that_is_not_read_is_only_looked_at() -> None:
    with Origin() as web, joined(web.address) as join:
        server = await web.accept()
        await until(lambda: join.fallback._client.is_reading)
        side = join.fallback._client
        side.is_reading = False
        asyncio.get_running_loop().remove_reader(side.fd)
        join.fallback._read_rest(side)
        await join.client.send(b"kept")
        join.fallback._read_rest(side)
        join.fallback._read_on(side)
        assert await server.receive(4) == b"kept"
        side.is_reading = False
        asyncio.get_running_loop().remove_reader(side.fd)
        join.client.reset()
        join.fallback._read_rest(side)
        await join.ended()
        join.fallback._read_rest(side)


# At the end of the daemon.


async def end_those_that_are_idle(joins: list[Joined], *, looks: int) -> None:
    """As at the end of a daemon, until the last of them has ended or it was looked so often."""
    ended = asyncio.Event()
    left = looks

    def fallbacks() -> list[Fallback]:
        nonlocal left
        left -= 1
        there = [join.fallback for join in joins if not join.fallback.ended]
        if not there or not left:
            ended.set()
        return there

    async with asyncio.timeout(DEADLINE_S):
        await end_idle(fallbacks, ended)


@in_loop
async def test_at_the_end_those_are_ended_that_are_not_served_once_nothing_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fallback_module, "IDLE_S", 0.02)
    with Origin() as web, joined(web.address) as silent, joined(web.address, b"asks") as answered:
        for join in (silent, answered):
            server = await web.accept()
            if join is answered:
                await server.send(b"answer")
                assert await join.client.receive(6) == b"answer"
        await end_those_that_are_idle([silent, answered], looks=1_000)
        for join in (silent, answered):
            await join.client.expect_fin()
            await join.ended()


@in_loop
async def test_at_the_end_who_waits_for_an_answer_or_reads_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_module, "IDLE_S", 0.02)
    with (
        Origin() as web,
        joined(web.address, b"asks") as waits,
        joined(web.address, b"asks", buffer_bytes=SMALL_BUFFERS) as reads,
    ):
        await web.accept()
        server = await web.accept()
        while not reads.fallback._client.backlog.size_bytes:
            server.fill()
            await asyncio.sleep(0)
        await end_those_that_are_idle([waits, reads], looks=20)
        assert not waits.fallback.ended
        assert not reads.fallback.ended
        assert waits.fallback.moved_bytes == 4
