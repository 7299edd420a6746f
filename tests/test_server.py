"""reflex.net.server: how a client comes to a tunnel, and what it says where it does not."""

from __future__ import annotations

import asyncio
import errno
import re
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from reflex.errors import DialError, TunnelError
from reflex.net import server as server_module
from reflex.net.server import FIRST_DELAY_S, MAX_CLOCK_SHIFT_S, MAX_DELAY_S, STEADY_S, Server
from reflex.protocol.address import Address
from reflex.protocol.handshake import accept_hello
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import Status, Suite
from tests.ends import HOST, End, Origin, refusing_port, silent_port
from tests.keys import Keys, answer_of
from tests.loops import DEADLINE_S, in_loop

KEYS = Keys.generate()
AGREE = "the clocks agree within 120 s, so the server's public key, the user id or the user key is wrong"
DATE_FORM = "%a, %d %b %Y %H:%M:%S GMT"


def make_server(
    address: Address, pools: Pools, *, connect_timeout_s: float = DEADLINE_S, handshake_timeout_s: float = DEADLINE_S
) -> Server:
    return Server(
        address,
        KEYS.client,
        Suite.AES_256_GCM,
        pools=pools,
        connect_timeout_s=connect_timeout_s,
        handshake_timeout_s=handshake_timeout_s,
        nodelay=True,
        keepalive_s=60,
    )


def answer_to(hello: bytes, *, now_s: int | None = None, started_s: int = 0) -> bytes:
    now_s = int(time.time()) if now_s is None else now_s
    accepted = accept_hello(
        memoryview(hello), KEYS.server, now_s=now_s, replay=ReplaySet(started_s), random_bytes=secrets.token_bytes
    )
    return answer_of(accepted)[0]


Play = Callable[[End], Coroutine[Any, Any, None]]


async def played(origin: Origin, *plays: Play) -> None:
    """Answer each connection as told."""
    for play in plays:
        await play(await origin.accept())


async def failure(pools: Pools, *plays: Play, handshake_timeout_s: float = DEADLINE_S) -> str:
    """Connect to a server that behaves so; the error's text."""
    with Origin() as origin:
        task = asyncio.create_task(played(origin, *plays))
        server = make_server(origin.address, pools, handshake_timeout_s=handshake_timeout_s)
        with pytest.raises(TunnelError) as caught:
            await server.connect()
        await task
    assert pools.in_use == 0
    return str(caught.value)


def tells_date(ahead_s: int) -> Play:
    async def play(end: End) -> None:
        await end.receive_some()
        date = time.strftime(DATE_FORM, time.gmtime(time.time() + ahead_s)).encode()
        await end.send(b"HTTP/1.1 400 Bad Request\r\nDate: " + date + b"\r\n\r\n")
        end.finish()

    return play


def tells_late_date(ahead_s: int) -> Play:
    """As a Date that was written just before a second's end, and read behind it."""
    return tells_date(ahead_s - 1)


async def hangs_up(end: End) -> None:
    await end.receive(76)
    end.finish()


async def resets(end: End) -> None:
    await end.receive(76)
    end.reset()


async def speaks_http(end: End) -> None:
    await end.receive(76)
    await end.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


async def says_nothing(end: End) -> None:
    await end.receive(76)


async def answers_in_pieces(end: End) -> None:
    answer = answer_to(await end.receive(76))
    for byte in answer:
        await end.send(bytes([byte]))
    await end.send(b"what is behind it stays unread")


@in_loop
async def test_a_server_that_answers_gives_a_socket_with_nothing_read_behind_the_hello(pools: Pools) -> None:
    with Origin() as origin:
        task = asyncio.create_task(played(origin, answers_in_pieces))
        sock, session_secrets = await make_server(origin.address, pools).connect()
        await task
        assert session_secrets.suite is Suite.AES_256_GCM
        with End(sock) as end:
            assert await end.receive(30) == b"what is behind it stays unread"
    assert pools.in_use == 0


@in_loop
async def test_each_way_not_to_answer_is_told(pools: Pools) -> None:
    silent = tells_date(0)
    assert await failure(pools, hangs_up, silent) == (
        f"the server closed the connection instead of answering the hello; {AGREE}"
    )
    assert await failure(pools, resets, silent) == (
        f"the connection was lost during the handshake: Connection reset by peer; {AGREE}"
    )
    assert await failure(pools, speaks_http, silent) == (
        f"what answers at the server's address is not that server's Reflex; {AGREE}"
    )
    assert await failure(pools, says_nothing, silent, handshake_timeout_s=0.05) == (
        f"the server did not answer the hello within 0.05 s; {AGREE}"
    )


@in_loop
async def test_without_a_date_all_that_can_be_wrong_is_told(pools: Pools) -> None:
    text = await failure(pools, hangs_up, hangs_up_at_once)
    assert "the user key is wrong, or this machine's clock is off by more than 120 s (it says 2" in text


async def hangs_up_at_once(end: End) -> None:
    await end.receive_some()
    end.finish()


@in_loop
async def test_a_server_that_cannot_be_reached_is_told_with_the_reason(pools: Pools) -> None:
    with refusing_port() as port, pytest.raises(TunnelError) as refused:
        await make_server(Address.of(HOST, port), pools).connect()
    assert re.fullmatch("cannot connect to the server: .*Connection refused", str(refused.value))
    with silent_port() as port, pytest.raises(TunnelError) as silent:
        await make_server(Address.of(HOST, port), pools, connect_timeout_s=0.05).connect()
    assert re.fullmatch(r"cannot connect to the server: .*no connection within 0\.05 s", str(silent.value))


@in_loop
async def test_a_client_that_gives_up_leaves_nothing_open(pools: Pools) -> None:
    with Origin() as origin:
        task = asyncio.create_task(make_server(origin.address, pools).connect())
        end = await origin.accept()
        await end.receive(76)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await end.expect_fin()
    assert pools.in_use == 0


# The clock


def accepts_at(ahead_s: int) -> Play:
    """Answers a hello whose time is that of a clock so far ahead; hangs up otherwise."""

    async def play(end: End) -> None:
        hello = await end.receive(76)
        await end.send(answer_to(hello, now_s=int(time.time()) + ahead_s))

    return play


@pytest.mark.parametrize("ahead_s", [3600, -3600, MAX_CLOCK_SHIFT_S - 10])
def test_a_date_shifts_the_next_hello_and_those_that_follow(
    pools: Pools, ahead_s: int, caplog: pytest.LogCaptureFixture
) -> None:
    @in_loop
    async def shifts() -> None:
        with Origin() as origin:
            plays = (hangs_up, tells_date(ahead_s), accepts_at(ahead_s), accepts_at(ahead_s))
            task = asyncio.create_task(played(origin, *plays))
            server = make_server(origin.address, pools)
            for _ in range(2):
                sock, _ = await server.connect()
                sock.close()
            await task

    shifts()
    assert f"s {'behind' if ahead_s > 0 else 'ahead of'} the server's (by its web server's Date)" in caplog.text


@in_loop
async def test_a_date_that_was_cut_to_its_second_makes_no_hello_from_before_the_servers_start(pools: Pools) -> None:
    with Origin() as origin:
        started_s = int(time.time()) + 3600

        async def has_just_started(end: End) -> None:
            await end.send(answer_to(await end.receive(76), now_s=started_s, started_s=started_s))

        task = asyncio.create_task(played(origin, hangs_up, tells_late_date(3600), has_just_started))
        sock, _ = await make_server(origin.address, pools).connect()
        sock.close()
        await task


@in_loop
async def test_a_date_that_does_not_help_is_forgotten(pools: Pools) -> None:
    with Origin() as origin:
        task = asyncio.create_task(played(origin, hangs_up, tells_date(3600), hangs_up, accepts_at(0)))
        server = make_server(origin.address, pools)
        with pytest.raises(TunnelError, match="nor with the time corrected, so the server's public key"):
            await server.connect()
        sock, _ = await server.connect()
        sock.close()
        await task


@pytest.mark.parametrize("learnt_s", [1000, -1000])
def test_a_time_that_was_learnt_and_holds_no_longer_gives_way_to_a_date(pools: Pools, learnt_s: int) -> None:
    """The server's clock was wrong and was set: this machine's is right, and what it learnt is not."""

    @in_loop
    async def gives_way() -> None:
        with Origin() as origin:
            plays = (hangs_up, tells_date(0), accepts_at(0), accepts_at(0))
            task = asyncio.create_task(played(origin, *plays))
            server = make_server(origin.address, pools)
            server.learn_time(int(time.time() + learnt_s) * 1000)
            for _ in range(2):
                sock, _ = await server.connect()
                sock.close()
            await task

    gives_way()


@in_loop
async def test_a_time_that_was_learnt_and_agrees_with_the_date_is_not_to_blame(pools: Pools) -> None:
    with Origin() as origin:
        task = asyncio.create_task(played(origin, hangs_up, tells_date(3600)))
        server = make_server(origin.address, pools)
        server.learn_time(int(time.time() + 3601) * 1000)
        with pytest.raises(TunnelError, match="nor with the time corrected, so the server's public key"):
            await server.connect()
        await task
        assert server._learnt_shift_s in (3600, 3601)


@pytest.mark.parametrize("second", [hangs_up, None], ids=["refused", "not reached"])
def test_what_was_learnt_is_kept_where_a_date_does_not_help(pools: Pools, second: Play | None) -> None:
    """As where another web server than the server's answers, in a network that wants a login first."""

    @in_loop
    async def is_kept() -> None:
        with Origin() as origin:
            plays = [hangs_up, tells_date(0)] + ([second] if second else [])
            task = asyncio.create_task(played(origin, *plays))
            server = make_server(origin.address, pools)
            server.learn_time(int(time.time() + 3600) * 1000)
            if second is None:
                tell = server._shift_by_date

                async def then_gone() -> int | None:
                    shift_s = await tell()
                    server.address = Address.of(HOST, gone)
                    return shift_s

                server._shift_by_date = then_gone  # type: ignore[method-assign]
            with refusing_port() as gone, pytest.raises(TunnelError):
                await server.connect()
            await task
            assert server._learnt_shift_s in (3599, 3600)

    is_kept()


@in_loop
async def test_a_date_that_is_off_by_more_than_a_day_is_not_followed(pools: Pools) -> None:
    text = await failure(pools, hangs_up, tells_date(3 * MAX_CLOCK_SHIFT_S))
    assert "this machine's clock is off by -2" in text
    assert "too much to make up for: set it right" in text


@in_loop
async def test_a_clock_that_is_a_little_behind_is_made_up_for_since_the_server_may_have_just_started(
    pools: Pools,
) -> None:
    with Origin() as origin:
        task = asyncio.create_task(played(origin, hangs_up, tells_date(60), accepts_at(60)))
        sock, _ = await make_server(origin.address, pools).connect()
        sock.close()
        await task
    text = await failure(pools, hangs_up, tells_date(60), hangs_up)
    assert text.endswith(AGREE)


def test_the_servers_own_time_is_learnt_and_worth_a_warning_where_it_is_far(
    pools: Pools, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(Address.of(HOST, 1), pools)
    now_s = 1_900_000_000
    monkeypatch.setattr(time, "time", lambda: now_s)
    server.learn_time((now_s + 59) * 1000)
    assert server._learnt_shift_s == 59
    assert not caplog.records
    server.learn_time((now_s - 61) * 1000)
    assert server._learnt_shift_s == -61
    assert "this machine's clock is 61 s ahead of the server's" in caplog.text
    server.learn_time((now_s + 1000) * 1000)
    assert "this machine's clock is 1000 s behind the server's" in caplog.text
    server.learn_time((now_s + MAX_CLOCK_SHIFT_S + 1) * 1000)
    assert server._learnt_shift_s == 1000


class Clocks:
    """The wall clock, to be set, and the boot clock, which is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s, self.boot_s = 1_900_000_000.0, 50.0
        monkeypatch.setattr(time, "time", lambda: self.wall_s)
        monkeypatch.setattr("reflex.net.server.boot_time_s", lambda: self.boot_s)


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_time_that_was_learnt_holds_when_the_clock_is_set(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    clocks = Clocks(monkeypatch)
    server = make_server(Address.of(HOST, 1), pools)
    assert int(time.time()) + server._hello_shift_s == 1_900_000_000
    server.learn_time(1_900_000_010_000)
    clocks.boot_s += 600
    clocks.wall_s += 600 + jump_s
    assert int(time.time()) + server._hello_shift_s == 1_900_000_610


def test_where_what_was_learnt_does_not_help_the_own_clock_is_tried_in_turn(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks(monkeypatch)
    server = make_server(Address.of(HOST, 1), pools)
    server.learn_time(1_900_000_000_000)
    clocks.wall_s += 3600  # a virtual machine was stopped for an hour, its boot clock with it

    @in_loop
    async def tries(*, times: int) -> None:
        with Origin() as origin:
            server.address = origin.address
            for _ in range(times):
                task = asyncio.create_task(played(origin, hangs_up, hangs_up_at_once))
                with pytest.raises(TunnelError, match="clock is off by more than"):
                    await server.connect()
                await task

    assert int(time.time()) + server._hello_shift_s == 1_900_000_000
    tries(times=1)
    assert int(time.time()) + server._hello_shift_s == 1_900_003_600
    tries(times=1)
    assert int(time.time()) + server._hello_shift_s == 1_900_000_000
    tries(times=1)
    server.learn_time(1_900_003_601_000)
    assert int(time.time()) + server._hello_shift_s == 1_900_003_601


# How often


@pytest.mark.parametrize(("random", "share"), [(0, 0.5), (500, 1.0)])
def test_delays_double_up_to_a_bound_and_are_jittered(
    pools: Pools, random: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "randbelow", lambda _: random)
    server = make_server(Address.of(HOST, 1), pools)
    delays = []
    for _ in range(40):
        server.failed(100.0)
        delays.append(server.not_before_s - 100.0)
    expected = [min(FIRST_DELAY_S * 2**n, MAX_DELAY_S) * share for n in range(40)]
    assert delays == pytest.approx(expected)
    server.succeeded()
    assert server.not_before_s == 0
    server.failed(0.0)
    assert server.not_before_s == pytest.approx(FIRST_DELAY_S * share)


@in_loop
async def test_an_attempt_that_fails_for_want_of_descriptors_is_not_held_against_the_server(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dial_fails(*_: object, **__: object) -> socket.socket:
        error = DialError(Status.GENERAL_FAILURE, "Too many open files")
        raise error from OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(server_module, "dial", dial_fails)
    monkeypatch.setattr(secrets, "randbelow", lambda _: 500)
    server = make_server(Address.of(HOST, 1), pools)
    for _ in range(5):
        with pytest.raises(TunnelError, match="cannot connect to the server: Too many open files"):
            await server.connect()
        server.failed(100.0)
        assert server.not_before_s - 100.0 == pytest.approx(FIRST_DELAY_S)


# Sessions that break.


def left_alone_s(server: Server, now_s: float) -> float:
    """For how long from now on."""
    return max(0.0, server.not_before_s - now_s)


def test_sessions_that_break_in_a_row_make_it_wait_longer_each_time_but_for_the_first(pools: Pools) -> None:
    server = make_server(Address.of(HOST, 1), pools)
    now_s = 100.0
    for number in range(12):
        server.succeeded()  # each of them was had
        server.broke(now_s + 1, began_s=now_s)
        base_s = 0.0 if number == 0 else min(FIRST_DELAY_S * 2 ** (number - 1), MAX_DELAY_S)
        assert 0.5 * base_s - 1e-6 <= left_alone_s(server, now_s + 1) <= base_s + 1e-6
        now_s += 10


def test_a_dial_that_fails_with_its_session_does_not_shorten_the_wait(pools: Pools) -> None:
    server = make_server(Address.of(HOST, 1), pools)
    for began_s in (100.0, 101.0, 102.0, 103.0, 104.0, 105.0):
        server.broke(began_s + 0.5, began_s=began_s)
    wait_s = left_alone_s(server, 106.0)
    server.failed(106.0)  # the first failure of a dial: a short wait
    assert left_alone_s(server, 106.0) == wait_s > FIRST_DELAY_S


def test_sessions_that_were_there_when_another_one_broke_tell_nothing_new(pools: Pools) -> None:
    server = make_server(Address.of(HOST, 1), pools)
    for _ in range(8):
        server.broke(101.0, began_s=100.0)
    assert left_alone_s(server, 101.0) == 0


def test_a_session_that_lasted_or_ended_well_makes_the_next_break_the_first_one(pools: Pools) -> None:
    server = make_server(Address.of(HOST, 1), pools)
    server.broke(101.0, began_s=100.0)
    server.broke(102.0 + STEADY_S, began_s=102.0)
    assert left_alone_s(server, 102.0 + STEADY_S) == 0
    server.ended_well(began_s=100.5)  # it was there before that one broke: it says nothing of those that come now
    server.broke(202.0, began_s=201.0)
    assert left_alone_s(server, 202.0) > 0
    server.succeeded()
    server.ended_well(began_s=203.0)
    server.broke(205.0, began_s=204.0)
    assert left_alone_s(server, 205.0) == 0
