"""reflex.net.listener: accepting, pausing, and ending without losing anybody."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys

import pytest

from reflex.errors import StartError
from reflex.net import listener as listener_module
from reflex.net import options as options_module
from reflex.net.listener import (
    ACCEPTS_PER_TURN,
    Listener,
    finish_listening,
    listening_address,
    open_listening,
    open_shared,
)
from reflex.net.options import PLAIN_CONTROL
from tests.conftest import require_ipv6
from tests.ends import HOST, End, connect
from tests.loops import in_loop, until
from tests.pair import port_of


class Guests:
    """Keeps whom a listener accepts."""

    def __init__(self) -> None:
        self.ends: list[End] = []

    def __call__(self, sock: socket.socket) -> None:
        assert not sock.getblocking()
        self.ends.append(End(sock))

    def __enter__(self) -> Guests:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends:
            end.close()


def make_listener(guests: Guests, host: str = HOST, port: int = 0) -> Listener:
    return Listener(asyncio.get_running_loop(), open_listening(host, port), guests)


@in_loop
async def test_who_connects_is_handed_on_until_it_is_closed() -> None:
    with Guests() as guests:
        listener = make_listener(guests)
        port = port_of(listener.address)
        assert listener.address == f"{HOST}:{port}"
        with await connect(port) as end:
            await until(lambda: guests.ends)
            await end.send(b"hello")
            assert await guests.ends[0].receive(5) == b"hello"
        listener.close()
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            await connect(port)


@in_loop
async def test_more_than_one_turn_accepts_are_all_accepted() -> None:
    with Guests() as guests:
        listener = make_listener(guests)
        port = port_of(listener.address)
        socks = [socket.create_connection((HOST, port)) for _ in range(ACCEPTS_PER_TURN + 5)]
        await until(lambda: len(guests.ends) == len(socks))
        for sock in socks:
            sock.close()
        listener.close()


@in_loop
async def test_after_so_many_accepts_it_is_the_others_turn() -> None:
    loop = asyncio.get_running_loop()
    with Guests() as guests, Guests() as others:
        listeners = [
            Listener(loop, open_listening(HOST, 0), guests, accepts_per_turn=2),
            Listener(loop, open_listening(HOST, 0), others, accepts_per_turn=3),
        ]
        socks = [
            socket.create_connection((HOST, port_of(listener.address))) for listener in listeners for _ in range(5)
        ]
        for listener in listeners:
            listener._accept()
        assert (len(guests.ends), len(others.ends)) == (2, 3)
        await until(lambda: len(guests.ends) == len(others.ends) == 5)
        for sock in socks:
            sock.close()
        for listener in listeners:
            listener.close()


@in_loop
async def test_ipv6_is_listened_on_alone_and_shown_in_brackets() -> None:
    require_ipv6()
    with Guests() as guests:
        listener = make_listener(guests, "::1")
        assert listener.address.startswith("[::1]:")
        listener.close()
        every = open_listening("::", 0)
        assert every.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        assert listening_address(every).startswith("[::]:")
        every.close()


@in_loop
async def test_what_cannot_be_listened_on_is_named_with_the_reason() -> None:
    with Guests() as guests:
        listener = make_listener(guests)
        port = port_of(listener.address)
        with pytest.raises(StartError, match=f"cannot listen on {HOST}:{port}: Address already in use"):
            make_listener(guests, HOST, port)
        listener.close()
        with pytest.raises(StartError, match=r"cannot listen on 192\.0\.2\.1:1234: Cannot assign"):
            make_listener(guests, "192.0.2.1", 1234)
        with pytest.raises(StartError, match=r"cannot listen on \[::ffff:192\.0\.2\.1\]:1: "):
            make_listener(guests, "::ffff:192.0.2.1", 1)
        with pytest.raises(StartError, match=r"cannot listen on no such name:1: "):
            make_listener(guests, "no such name", 1)


class FailingAccept:
    """Takes the place of ``socket.accept``: fails so many times, then works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, *, times: int) -> None:
        self.calls = 0
        real = socket.socket.accept

        def accept(sock: socket.socket) -> tuple[socket.socket, object]:
            self.calls += 1
            if self.calls <= times:
                raise OSError(number, os.strerror(number))
            return real(sock)

        monkeypatch.setattr(socket.socket, "accept", accept)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_it_pauses_where_descriptors_have_run_out_and_goes_on(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener_module, "PAUSE_S", 0.01)
    failing = FailingAccept(monkeypatch, number, times=3)

    @in_loop
    async def pauses_and_goes_on() -> None:
        with Guests() as guests:
            listener = make_listener(guests)
            with await connect(port_of(listener.address)):
                await until(lambda: guests.ends)
            listener.close()

    pauses_and_goes_on()
    assert failing.calls > 3
    lines = [record.getMessage() for record in caplog.records]
    assert sum(f"{os.strerror(number)}; pausing" in line for line in lines) == 1  # not at each try


def test_closing_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "PAUSE_S", 3600)
    failing = FailingAccept(monkeypatch, errno.EMFILE, times=1)

    @in_loop
    async def is_closed_while_it_pauses() -> None:
        with Guests() as guests:
            listener = make_listener(guests)
            with await connect(port_of(listener.address)) as end:
                await until(lambda: failing.calls)
                listener.close()
                await end.expect_reset()
            assert not guests.ends

    is_closed_while_it_pauses()


def test_who_waits_while_it_pauses_is_accepted_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "PAUSE_S", 3600)
    failing = FailingAccept(monkeypatch, errno.EMFILE, times=1)

    @in_loop
    async def is_accepted() -> None:
        with Guests() as guests:
            listener = make_listener(guests)
            with await connect(port_of(listener.address)):
                await until(lambda: failing.calls)
                await listener.finish()
                assert len(guests.ends) == 1

    is_accepted()


def test_one_that_left_before_it_was_accepted_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = FailingAccept(monkeypatch, errno.ECONNABORTED, times=1)

    @in_loop
    async def accepts_the_next_one() -> None:
        with Guests() as guests:
            listener = make_listener(guests)
            with await connect(port_of(listener.address)):
                await until(lambda: guests.ends)
            listener.close()

    accepts_the_next_one()
    assert failing.calls > 1


def test_an_error_that_nobody_expects_is_the_loops_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    FailingAccept(monkeypatch, errno.EPROTO, times=1)

    @in_loop
    async def fails() -> None:
        with Guests() as guests:
            listener = make_listener(guests)
            with await connect(port_of(listener.address)):
                await until(lambda: guests.ends)
            listener.close()

    with pytest.raises(AssertionError, match="Protocol error"):
        fails()


@in_loop
async def test_at_its_end_those_who_are_connected_are_accepted_and_others_are_refused() -> None:
    with Guests() as guests:
        listener = Listener(asyncio.get_running_loop(), open_listening(HOST, 0), guests)
        port = port_of(listener.address)
        early = [socket.create_connection((HOST, port)) for _ in range(3)]
        await listener.finish()
        assert len(guests.ends) == 3
        with pytest.raises(ConnectionRefusedError):
            await connect(port)
        for sock in early:
            sock.close()
        await asyncio.gather(listener.finish(), return_exceptions=True)


@in_loop
async def test_it_may_be_closed_while_it_finishes() -> None:
    with Guests() as guests:
        listener = make_listener(guests)
        task = asyncio.create_task(listener.finish())
        await asyncio.sleep(0)
        listener.close()
        await task


@in_loop
async def test_the_end_of_listening_waits_until_all_is_settled_or_the_time_is_up() -> None:
    with Guests() as guests:
        answers = [False, False, True]
        await finish_listening([make_listener(guests), make_listener(guests)], lambda: answers.pop(0))
        assert answers == []
        await finish_listening([make_listener(guests)], lambda: False, at_most_s=0.01)


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_without_a_packet_filter_it_ends_as_well(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @in_loop
    async def ends() -> None:
        with Guests() as guests:
            listener = make_listener(guests)
            with socket.create_connection((HOST, port_of(listener.address))):
                await listener.finish()
            assert len(guests.ends) == 1

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(listener_module, "_SO_ATTACH_FILTER", -1)
    ends()


@in_loop
async def test_who_is_not_on_this_machine_gets_more_time_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_GRACE_S", 0.0)
    monkeypatch.setattr(listener_module, "LOOPBACK_GRACE_S", 3600.0)
    with Guests() as guests:
        await make_listener(guests, "0.0.0.0").finish()


@in_loop
async def test_several_sockets_share_one_port_with_nobody_else() -> None:
    first, second, third = open_shared(HOST, 0, count=3)
    try:
        assert listening_address(first) == listening_address(second) == listening_address(third)
        with pytest.raises(StartError, match="already in use"):
            open_listening(HOST, first.getsockname()[1])
    finally:
        for sock in (first, second, third):
            sock.close()


@in_loop
async def test_where_a_port_cannot_be_shared_nothing_is_left_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[socket.socket] = []
    real = open_listening

    def open_once(host: str, port: int, *, share: str) -> socket.socket:
        if opened:
            raise StartError("no more")
        opened.append(real(host, port, share="after"))
        return opened[0]

    monkeypatch.setattr(listener_module, "open_listening", open_once)
    with pytest.raises(StartError, match="no more"):
        open_shared(HOST, 0, count=2)
    assert opened[0].fileno() == -1


@in_loop
async def test_who_is_accepted_has_the_listeners_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in ("linux", "another"):
        with Guests() as guests, monkeypatch.context() as context:
            context.setattr(options_module, "_is_paced", lambda: True)
            context.setattr(sys, "platform", platform)
            listener = make_listener(guests)
            listener.set_options(nodelay=True, keepalive_s=600)
            with await connect(port_of(listener.address)):
                await until(lambda: guests.ends)
                sock = guests.ends[0].sock
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == PLAIN_CONTROL
            listener.close()
