"""reflex.net.connector: who wants a tunnel gets one, and no more are dialled than are needed."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest

from reflex.errors import TunnelError
from reflex.net.connector import OF_NO_USE, Connector
from reflex.net.tunnels import TunnelPool
from reflex.protocol.wire import Code
from tests.loops import in_loop, turns, until


@dataclass(eq=False)
class FakeTunnel:
    server: FakeServer
    stream_count: int = 0
    has_room: bool = True
    is_blocked: bool = False
    is_suspect: bool = False
    is_bulk: bool = False
    idle_since_s: float = 0.0
    ended: bool = False
    close_code: int | None = None


class FakeServer:
    """A server whose next attempts are answered by the test.

    Attributes:
        attempts: those that are under way, oldest first.
        count: how many there were.
    """

    def __init__(self, address: str = "a server") -> None:
        self.address = address
        self.not_before_s = 0.0
        self.retry_after_s = 0.0
        self.attempts: list[asyncio.Future[tuple[Any, Any]]] = []
        self.count = 0

    async def connect(self) -> tuple[Any, Any]:
        self.count += 1
        attempt: asyncio.Future[tuple[Any, Any]] = asyncio.get_running_loop().create_future()
        self.attempts.append(attempt)
        return await attempt

    def succeeded(self) -> None:
        self.not_before_s = 0.0

    def failed(self, now_s: float) -> None:
        self.not_before_s = now_s + self.retry_after_s

    async def answer(self) -> None:
        await until(lambda: self.attempts)
        self.attempts.pop(0).set_result((None, None))
        await turns()

    async def fail(self, error: BaseException | None = None) -> None:
        await until(lambda: self.attempts)
        self.attempts.pop(0).set_exception(error or TunnelError("it is down"))
        await turns()


@dataclass(eq=False)
class FakeWaiter:
    tunnels: list[FakeTunnel] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def on_tunnel(self, tunnel: Any) -> None:
        tunnel.stream_count += 1
        self.tunnels.append(tunnel)

    def on_no_tunnel(self, error: TunnelError) -> None:
        self.errors.append(str(error))


class Office:
    """A connector of fakes."""

    def __init__(
        self,
        *servers: FakeServer,
        max_tunnels: int = 8,
        max_streams: int = 2,
        min_idle: int = 0,
        patience_s: float = 3600,
    ) -> None:
        self.pool: TunnelPool[Any] = TunnelPool(
            min_idle=min_idle, max_idle=8, idle_timeout_s=60, max_streams=max_streams
        )
        self.made: list[FakeTunnel] = []
        self.closes_with: int | None = None  # what the server closes new tunnels with, at once
        real_servers: Any = servers
        self.connector = Connector(
            asyncio.get_running_loop(),
            real_servers,
            self.pool,
            self._make_tunnel,
            max_tunnels=max_tunnels,
            max_streams=max_streams,
            patience_s=patience_s,
        )

    def _make_tunnel(self, server: Any, sock: Any, secrets: Any) -> Any:
        assert sock is secrets is None
        tunnel = FakeTunnel(server)
        if self.closes_with is not None:
            tunnel.ended, tunnel.has_room, tunnel.close_code = True, False, self.closes_with
            return tunnel
        self.pool.add(server, tunnel)
        self.made.append(tunnel)
        return tunnel

    def ask(self, count: int) -> list[FakeWaiter]:
        waiters = [FakeWaiter() for _ in range(count)]
        for waiter in waiters:
            self.connector.request(waiter)
        return waiters


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (Code.LIMIT, "the server closed the new tunnel: this user has as many as it may have there"),
        (Code.NONE, OF_NO_USE),
    ],
)
def test_a_tunnel_that_is_closed_at_once_is_a_failure(
    code: Code, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    @in_loop
    async def run() -> None:
        server = FakeServer()
        server.retry_after_s = 3600
        office = Office(server)
        office.closes_with = code
        (waiter,) = office.ask(1)
        await server.answer()
        assert waiter.errors == [f"a server: {reason}"]
        (patient,) = office.ask(1)
        await turns()
        assert (server.count, patient.errors) == (1, [])  # it is not asked again at once
        office.connector.close()

    run()
    assert [record.getMessage() for record in caplog.records] == [f"a server: {reason}"]


@in_loop
async def test_requests_at_once_dial_as_few_tunnels_as_hold_them() -> None:
    server = FakeServer()
    office = Office(server, max_streams=3)
    waiters = office.ask(7)
    await turns()
    assert server.count == 3
    for _ in range(3):
        await server.answer()
    assert [len(waiter.tunnels) for waiter in waiters] == [1] * 7
    assert [tunnel.stream_count for tunnel in office.made] == [3, 3, 1]
    assert office.ask(1)[0].tunnels == [office.made[2]]
    assert server.count == 3


@in_loop
async def test_who_waits_is_served_in_order_also_by_room_that_was_made_elsewhere() -> None:
    server = FakeServer()
    office = Office(server, max_streams=1)
    first, second = office.ask(2)
    await server.answer()
    assert first.tunnels == office.made
    assert second.tunnels == []
    office.made[0].stream_count = 0
    office.connector.room_was_made()
    assert second.tunnels == office.made
    office.connector.room_was_made()
    await server.answer()  # the second dial was under way: a tunnel in hand
    assert len(office.made) == 2


@in_loop
async def test_never_more_than_max_tunnels_and_who_finds_all_full_is_told(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    office = Office(server, max_tunnels=2, max_streams=1)
    waiters = office.ask(4)
    await turns()
    assert server.count == 2
    await server.answer()
    await server.answer()
    assert [len(waiter.tunnels) for waiter in waiters] == [1, 1, 0, 0]
    assert waiters[3].errors == ["no tunnel has room: there are as many as there may be, 2 for each server"]
    assert office.ask(1)[0].errors == waiters[3].errors
    assert server.count == 2
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert line == f"pool: {waiters[3].errors[0]}"


@in_loop
async def test_who_does_not_want_one_any_more_gets_none() -> None:
    server = FakeServer()
    office = Office(server)
    gone, there = office.ask(2)
    office.connector.cancel(gone)
    office.connector.cancel(gone)
    await server.answer()
    assert not gone.tunnels
    assert not gone.errors
    assert len(there.tunnels) == 1


@in_loop
async def test_where_the_first_server_fails_the_second_is_tried_and_all_reasons_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    office = Office(first, second)
    (waiter,) = office.ask(1)
    await first.fail()
    await second.answer()
    assert waiter.tunnels[0].server is second
    for tunnel in office.made:
        tunnel.stream_count = 2  # full
    (waiter,) = office.ask(1)
    await first.fail()
    await second.fail()
    assert waiter.errors == ["first: it is down; second: it is down"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "first: it is down",  # and not again so soon
        "second: it is down",
    ]


@in_loop
async def test_a_server_that_failed_shortly_before_is_tried_last_and_then_not_at_all() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    first.retry_after_s = 3600
    office = Office(first, second)
    (waiter,) = office.ask(1)
    await first.fail()
    await second.fail()
    assert len(waiter.errors) == 1
    (waiter,) = office.ask(1)
    await second.fail()
    assert waiter.errors == ["second: it is down; first: failed shortly before"]
    assert first.count == 1


@in_loop
async def test_a_single_server_that_failed_is_tried_again_after_its_delay_and_all_wait_for_that() -> None:
    server = FakeServer()
    server.retry_after_s = 0.05
    office = Office(server)
    office.ask(1)
    await server.fail()
    loop = asyncio.get_running_loop()
    not_before_s = server.not_before_s
    waiters = office.ask(2)
    await turns()
    assert not server.attempts
    await server.answer()
    assert loop.time() >= not_before_s
    assert [len(waiter.tunnels) for waiter in waiters] == [1, 1]
    assert server.count == 2


@in_loop
async def test_a_tunnel_that_is_of_no_use_is_a_failure_of_its_server_and_not_dialled_again_at_once() -> None:
    """The handshake went well, and somebody on the way has changed what came behind it."""
    server = FakeServer()
    server.retry_after_s = 3600
    office = Office(server)

    async def ended(tunnel: Any) -> None:
        tunnel.has_room = False
        office.pool.remove(server, tunnel)

    office.connector._wait_settled = ended
    waiters = office.ask(3)
    await server.answer()
    await server.answer()
    await turns()
    assert [waiter.errors for waiter in waiters] == [[f"a server: {OF_NO_USE}"]] * 3
    assert server.count == 2
    office.ask(1)
    await turns()
    assert server.count == 2


@in_loop
async def test_a_tunnel_that_others_have_filled_meanwhile_is_no_failure() -> None:
    server = FakeServer()
    office = Office(server)

    async def filled(tunnel: Any) -> None:
        tunnel.stream_count, tunnel.has_room = 2, False

    office.connector._wait_settled = filled
    (waiter,) = office.ask(1)
    await server.answer()
    assert waiter.errors == []
    await until(lambda: server.count == 2)


@in_loop
async def test_a_tunnel_that_settles_for_somebody_is_not_closed_as_one_too_many() -> None:
    office, settled = Office(server := FakeServer()), asyncio.Event()

    async def settle(_: Any) -> None:
        await settled.wait()

    office.connector._wait_settled = settle
    (waiter,) = office.ask(1)
    await server.answer()
    (tunnel,) = office.made
    assert office.connector.expire() == []
    settled.set()
    await until(lambda: waiter.tunnels == [tunnel])
    tunnel.stream_count = 0
    assert len(office.connector.expire()) == 1


@in_loop
async def test_while_a_later_server_serves_the_first_one_is_asked_now_and_then() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    office = Office(first, second, max_streams=100)
    office.ask(1)
    await first.fail()
    await second.answer()
    (waiter,) = office.ask(1)
    assert waiter.tunnels[0].server is second
    await first.fail()  # nobody waits for the probe, and nobody is told
    assert waiter.errors == []
    office.ask(1)
    await first.answer()
    (waiter,) = office.ask(1)
    assert waiter.tunnels[0].server is first
    assert (first.count, second.count) == (3, 1)


@in_loop
async def test_a_probe_that_fails_is_no_reason_to_have_no_spare_tunnel() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    office = Office(first, second, max_streams=8)
    first.retry_after_s = 0.0
    office.ask(1)
    await first.fail()
    await second.answer()
    office.ask(1)
    first.retry_after_s = 3600.0
    await first.fail()  # the probe
    office.made[0].is_bulk = True
    office.connector.keep_warm()
    await second.answer()
    assert (first.count, second.count) == (2, 2)


@in_loop
async def test_once_it_is_closed_it_does_not_ask_after_the_first_server() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    office = Office(first, second, max_streams=8)
    office.ask(1)
    await first.fail()
    await second.answer()
    office.connector.close()
    (waiter,) = office.ask(1)
    await turns()
    assert waiter.tunnels == [office.made[0]]
    assert first.count == 1


@in_loop
async def test_who_comes_while_a_probe_fails_gets_a_dial_of_its_own() -> None:
    first, second = FakeServer("first"), FakeServer("second")
    office = Office(first, second, max_streams=1)
    office.ask(1)
    await first.fail()
    await second.answer()
    office.made[0].stream_count = 0
    office.ask(1)  # starts the probe, and fills the tunnel
    (waiter,) = office.ask(1)
    first.retry_after_s = 3600
    await first.fail()
    await second.answer()
    assert waiter.tunnels[0].server is second


@in_loop
async def test_an_error_that_nobody_expects_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    office = Office(server)
    (waiter,) = office.ask(1)
    await server.fail(ValueError("a bug"))
    assert waiter.errors == ["internal error: a bug"]
    assert "dialling failed unexpectedly" in caplog.text
    assert server.not_before_s > 0, "as after every failure, the next attempt waits"


@in_loop
async def test_after_the_end_nothing_is_dialled_and_who_waits_is_told() -> None:
    server = FakeServer()
    office = Office(server, min_idle=1)
    (waiter,) = office.ask(1)
    await until(lambda: server.attempts)
    office.connector.close()
    assert waiter.errors == ["shutting down"]
    await turns()
    assert server.attempts[0].cancelled()
    office.connector.keep_warm()
    await turns()
    assert server.count == 1


@in_loop
async def test_tunnels_that_are_to_be_there_are_dialled_unasked() -> None:
    server = FakeServer()
    office = Office(server, min_idle=2)
    office.connector.keep_warm()
    await server.answer()
    await server.answer()
    office.connector.keep_warm()
    await turns()
    assert server.count == 2
    assert office.connector.expire() == []


# Several dials at once.


@in_loop
async def test_of_two_dials_at_once_one_that_fails_takes_nobody_along() -> None:
    server = FakeServer()
    office = Office(server, max_streams=1)
    waiters = office.ask(2)
    await turns()
    assert server.count == 2
    await server.fail()
    assert [waiter.errors for waiter in waiters] == [[], []]
    await server.answer()
    assert waiters[0].tunnels == office.made
    # For the one who still waits there is a dial again, and its failure is the last one's.
    await server.fail()
    assert waiters[1].errors == ["a server: it is down"]


@in_loop
async def test_two_dials_that_fail_in_the_same_turn_fail_who_waits() -> None:
    server = FakeServer()
    office = Office(server, max_streams=1)
    waiters = office.ask(2)
    await until(lambda: len(server.attempts) == 2)
    for attempt in server.attempts:
        attempt.set_exception(TunnelError("it is down"))
    await turns()
    assert [len(waiter.errors) for waiter in waiters] == [1, 1]
    assert server.count == 2


@in_loop
async def test_who_comes_while_an_old_dial_hangs_gets_a_new_one_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reflex.net.connector.FRESH_DIAL_S", 0.05)
    server = FakeServer()
    office = Office(server, max_streams=8)
    (early,) = office.ask(1)
    await until(lambda: server.attempts)
    hanging = server.attempts.pop()
    began_s = asyncio.get_running_loop().time()
    office.ask(1)
    await turns()
    assert server.count == 1  # the first one is fresh
    await until(lambda: asyncio.get_running_loop().time() > began_s + 0.1)
    (late,) = office.ask(1)
    await server.answer()
    assert late.tunnels == early.tunnels == office.made
    hanging.set_exception(TunnelError("it took too long"))
    await turns()
    assert (late.errors, early.errors) == ([], [])


@in_loop
async def test_a_dial_that_hangs_alone_is_joined_by_another_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reflex.net.connector.FRESH_DIAL_S", 0.0)
    server = FakeServer()
    office = Office(server, max_tunnels=2)
    (waiter,) = office.ask(1)
    await until(lambda: server.attempts)
    began_s = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > began_s)
    for _ in range(3):  # never more than max_tunnels
        office.connector.keep_warm()
        await turns()
    assert server.count == 2
    server.attempts.pop(0)
    await server.answer()
    assert waiter.tunnels == office.made


@in_loop
async def test_who_has_waited_for_too_long_fails_with_the_next_dial_whatever_else_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reflex.net.connector.FRESH_DIAL_S", 0.05)
    server = FakeServer()
    office = Office(server, patience_s=0.1)
    loop = asyncio.get_running_loop()
    (early,) = office.ask(1)
    await until(lambda: server.attempts)
    began_s = loop.time()
    await until(lambda: loop.time() > began_s + 0.15)
    (late,) = office.ask(1)
    await until(lambda: len(server.attempts) == 2)
    await server.fail()
    assert early.errors == ["a server: it is down"]
    assert late.errors == []
    await server.fail()
    assert late.errors == early.errors


@in_loop
async def test_who_comes_after_the_end_is_told() -> None:
    server = FakeServer()
    office = Office(server)
    office.connector.close()
    (waiter,) = office.ask(1)
    assert waiter.errors == ["shutting down"]
    await turns()
    assert server.count == 0


@in_loop
async def test_suspects_are_not_used_nor_counted() -> None:
    server = FakeServer()
    office = Office(server, max_tunnels=1)
    office.ask(1)
    await server.answer()
    office.made[0].is_suspect = True
    (waiter,) = office.ask(1)
    await server.answer()
    assert waiter.tunnels == [office.made[1]]
    office.made[0].is_suspect = False
    assert office.ask(1)[0].tunnels == [office.made[0]]


@in_loop
async def test_beside_bulk_data_a_spare_tunnel_is_dialled_and_what_comes_next_goes_there() -> None:
    server = FakeServer()
    office = Office(server, max_streams=8, max_tunnels=2)
    first = office.ask(1)
    await server.answer()
    office.connector.keep_warm()
    assert server.count == 1
    office.made[0].is_bulk = True
    office.connector.keep_warm()
    office.connector.keep_warm()  # it is under way
    await server.answer()
    office.connector.keep_warm()  # it is there
    assert server.count == 2
    second = office.ask(1)
    assert [each.tunnels for each in first + second] == [[office.made[0]], [office.made[1]]]
    office.made[1].is_bulk = True
    office.connector.keep_warm()  # more are not allowed
    await turns()
    assert server.count == 2
    assert office.ask(1)[0].tunnels == [office.made[0]]


@in_loop
async def test_a_server_that_takes_no_spare_is_not_asked_for_one_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = FakeServer()
    office = Office(server, max_streams=8)
    office.ask(1)
    await server.answer()
    office.made[0].is_bulk = True
    office.closes_with = Code.LIMIT
    server.retry_after_s = 0.01
    office.connector.keep_warm()
    await server.answer()
    await until(lambda: server.not_before_s < asyncio.get_running_loop().time())
    office.connector.keep_warm()
    await turns()
    assert server.count == 2
    assert office.ask(1)[0].tunnels == [office.made[0]]  # what there is goes on
    monkeypatch.setattr(office.connector, "_no_spare_before_s", 0.0)  # the time has passed
    server.not_before_s = asyncio.get_running_loop().time() + 3600
    office.connector.keep_warm()  # it failed shortly before
    await turns()
    assert server.count == 2
    server.not_before_s = 0.0
    office.connector.keep_warm()
    await server.fail()
    assert server.count == 3
