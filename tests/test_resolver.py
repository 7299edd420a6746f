"""reflex.net.resolver: look-ups in threads, and how they are shared out."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from reflex.errors import DialError
from reflex.net.dial import is_own_fault
from reflex.net.resolver import MAX_ADDRESSES, Resolver, checked
from reflex.protocol.wire import Status
from tests.loops import DEADLINE_S, in_loop, turns, until

FOUND = [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("192.0.2.1", 80))]


class Hanging:
    """Stands for getaddrinfo: hangs for names that begin with ``slow``, until ``release``."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: bytes, _port: int, **_: Any) -> list[Any]:
        self.asked.append(host.decode())
        if host.startswith(b"slow"):
            assert self.gate.wait(DEADLINE_S)
        return FOUND


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    resolver = Hanging()
    yield resolver
    resolver.gate.set()


def ask(resolver: Resolver, owner: str, name: str) -> asyncio.Task[list[Any]]:
    return asyncio.get_running_loop().create_task(resolver.resolve(owner, name, 80))


@in_loop
async def test_a_name_of_this_machine_is_resolved_by_the_system() -> None:
    resolver = Resolver()
    found = await resolver.resolve("alice", "localhost", 80)
    assert {info[4][0] for info in found} <= {"127.0.0.1", "::1"}
    assert {info[1] for info in found} == {socket.SOCK_STREAM}
    assert resolver.running == resolver.waiting == 0


def test_of_a_name_with_thousands_of_addresses_the_first_of_each_family_are_used() -> None:
    kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    v6 = [(socket.AF_INET6, *kind, (f"2001:db8::{number:x}", 80, 0, 0)) for number in range(2_000)]
    v4 = [(socket.AF_INET, *kind, (f"192.0.2.{number}", 80)) for number in range(200)]
    assert checked("many.example", v6 + v4) == v6[:MAX_ADDRESSES] + v4[:MAX_ADDRESSES]
    assert checked("few.example", [*v4[:3], (socket.AF_UNIX, *kind, ("x",)), v6[0]]) == [*v4[:3], v6[0]]


@in_loop
async def test_names_that_hang_leave_threads_for_everybody_else(hanging: Hanging) -> None:
    resolver = Resolver(threads=8, look_up=hanging)
    slow = [ask(resolver, "mallory", f"slow{number}") for number in range(100)]
    await until(lambda: len(hanging.asked) == 4)  # half of them, and no more
    more = [ask(resolver, "trudy", f"slow{number}") for number in range(100)]
    await until(lambda: len(hanging.asked) == 6)  # half of the rest
    for number in range(20):
        for owner in ("alice", "bob"):
            assert await resolver.resolve(owner, f"fast{number}", 80) == FOUND
    assert resolver.running == 6
    assert resolver.waiting == 96 + 98
    hanging.gate.set()
    assert await asyncio.gather(*slow, *more) == [FOUND] * 200
    assert resolver.running == resolver.waiting == 0
    assert len(hanging.asked) == 240


@in_loop
async def test_a_look_up_that_is_given_up_keeps_its_thread_and_one_that_waits_is_forgotten(hanging: Hanging) -> None:
    resolver = Resolver(threads=2, look_up=hanging)
    running = ask(resolver, "alice", "slow-running")
    waiting = ask(resolver, "alice", "slow-waiting")
    await until(lambda: hanging.asked)
    assert (resolver.running, resolver.waiting) == (1, 1)
    for task in (running, waiting):
        task.cancel()
    await turns()
    assert (resolver.running, resolver.waiting) == (1, 0)
    hanging.gate.set()
    await until(lambda: resolver.running == 0)
    assert hanging.asked == ["slow-running"]
    assert await resolver.resolve("alice", "next", 80) == FOUND


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), Status.HOST_UNREACHABLE),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), Status.HOST_UNREACHABLE),
        (UnicodeError("label too long"), Status.HOST_UNREACHABLE),
        (OSError(errno.EMFILE, "Too many open files"), Status.GENERAL_FAILURE),
        (MemoryError(), Status.GENERAL_FAILURE),
        (None, Status.HOST_UNREACHABLE),
    ],
)
def test_a_failure_has_the_status_that_tells_the_truth(error: Exception | None, status: Status) -> None:
    def look_up(*_: Any, **__: Any) -> list[Any]:
        if error is not None:
            raise error
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", ("", 0))]

    @in_loop
    async def test() -> None:
        with pytest.raises(DialError) as caught:
            await Resolver(look_up=look_up).resolve("alice", "nowhere.example", 80)
        assert caught.value.status == status

    test()


@in_loop
async def test_a_name_is_not_at_fault_where_descriptors_have_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def no_socket(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", no_socket)
    with pytest.raises(DialError, match=r"cannot resolve nowhere\.example: Too many open files") as caught:
        await Resolver(look_up=look_up).resolve("alice", "nowhere.example", 80)
    assert caught.value.status == Status.GENERAL_FAILURE
    assert is_own_fault(caught.value)


@in_loop
async def test_a_system_that_grants_no_threads_is_lived_with(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(threads=8, look_up=hanging)
    ask(resolver, "alice", "slow")
    await until(lambda: hanging.asked)

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(DialError) as caught:
        await Resolver(look_up=hanging).resolve("alice", "fast", 80)
    assert caught.value.status == Status.GENERAL_FAILURE
    waiting = ask(resolver, "bob", "fast")
    await turns()
    assert not waiting.done()
    hanging.gate.set()
    assert await waiting == FOUND  # in the thread that there is


def test_a_look_up_that_ends_after_its_loop_is_nobodys(hanging: Hanging) -> None:
    resolver = Resolver(look_up=hanging)

    async def main() -> None:
        task = ask(resolver, "alice", "slow")
        await until(lambda: hanging.asked)
        task.cancel()

    asyncio.run(main())
    hanging.gate.set()
    again = Hanging()
    resolver._look_up = again
    assert asyncio.run(resolver.resolve("bob", "fast", 80)) == FOUND
