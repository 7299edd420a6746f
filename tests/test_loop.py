"""reflex.loop: readiness without a detour, and asyncio as it is beside it."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from reflex import loop as loop_module
from reflex.errors import StartError
from reflex.loop import FIRST_DESCRIPTORS, MAX_EVENTS, DirectLoop, new_event_loop

DEADLINE_S = 20.0


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = DirectLoop()
    yield loop
    loop.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected pair; the first is the loop's."""
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        yield one, other


def run(loop: DirectLoop, condition: Callable[[], object]) -> None:
    """Run the loop until the condition holds; it is looked at by a task, beside what the selector calls."""

    async def wait() -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - what it looks at tells nobody
                await asyncio.sleep(0.001)

    loop.run_until_complete(wait())


Ends = tuple[socket.socket, socket.socket]


def in_turn(*calls: Callable[[], object]) -> Callable[[], None]:
    """One callback that makes several calls."""

    def call_all() -> None:
        for call in calls:
            call()

    return call_all


def test_a_reader_is_called_for_as_long_as_there_is_something_to_read(loop: DirectLoop, ends: Ends) -> None:
    got = bytearray()
    loop.add_reader(ends[0], lambda: got.extend(ends[0].recv(2)))
    ends[1].send(b"four")
    run(loop, lambda: got == b"four")
    assert loop.remove_reader(ends[0])
    ends[1].send(b"more")
    assert not loop.remove_reader(ends[0])
    run(loop, lambda: True)
    assert got == b"four"


def test_a_writer_is_called_while_there_is_room(loop: DirectLoop, ends: Ends) -> None:
    calls: list[int] = []

    def write() -> None:
        calls.append(ends[0].send(b"x"))
        if len(calls) == 3:
            assert loop.remove_writer(ends[0].fileno())

    loop.add_writer(ends[0].fileno(), write)
    run(loop, lambda: len(calls) == 3)
    assert ends[1].recv(10) == b"xxx"
    assert not loop.remove_writer(ends[0])


def test_a_descriptor_may_have_both_and_lose_each_for_itself(loop: DirectLoop, ends: Ends) -> None:
    called: list[str] = []
    loop.add_reader(ends[0], lambda: called.append("read"))
    loop.add_writer(ends[0], lambda: called.append("write"))
    run(loop, lambda: "write" in called)
    assert "read" not in called
    loop.remove_writer(ends[0])
    ends[1].send(b"x")
    run(loop, lambda: "read" in called)
    loop.add_writer(ends[0], lambda: called.append("write"))
    called.clear()
    run(loop, lambda: {"read", "write"} <= set(called))
    loop.remove_reader(ends[0])
    called.clear()
    run(loop, lambda: "write" in called)
    assert "read" not in called
    loop.remove_writer(ends[0])


def test_a_second_callback_takes_the_firsts_place_and_arguments_are_passed_on(loop: DirectLoop, ends: Ends) -> None:
    called: list[Any] = []

    def stop_reading() -> None:
        loop.remove_reader(ends[0])

    def stop_writing() -> None:
        loop.remove_writer(ends[0])

    loop.add_reader(ends[0], called.append, "first")
    loop.add_reader(ends[0], lambda *given: in_turn(lambda: called.append(given), stop_reading)(), 1, 2)
    ends[1].send(b"x")
    run(loop, lambda: called)
    assert called == [(1, 2)]
    loop.add_writer(ends[0], lambda *given: in_turn(lambda: called.append(given), stop_writing)(), 3)
    run(loop, lambda: len(called) == 2)
    assert called[1] == (3,)


@pytest.mark.parametrize("registered", ["reader", "writer"])
def test_the_end_of_a_connection_is_told_to_whom_there_is(loop: DirectLoop, ends: Ends, registered: str) -> None:
    ends[0].send(b"unread")
    told: list[str] = []
    if registered == "reader":
        loop.add_reader(ends[0], in_turn(lambda: told.append("end"), lambda: loop.remove_reader(ends[0])))
    else:
        while True:
            try:
                ends[0].send(bytes(65_536))
            except BlockingIOError:
                break
        loop.add_writer(ends[0], in_turn(lambda: told.append("end"), lambda: loop.remove_writer(ends[0])))
    ends[1].close()
    run(loop, lambda: told)


def test_more_descriptors_than_there_was_room_for_at_first_and_than_one_poll_tells(loop: DirectLoop) -> None:
    pairs = [socket.socketpair() for _ in range(FIRST_DESCRIPTORS)]
    seen: set[int] = set()

    def read(sock: socket.socket) -> None:
        sock.recv(1)
        seen.add(sock.fileno())

    try:
        for one, other in pairs:
            one.setblocking(False)
            loop.add_reader(one, read, one)
            other.send(b"x")
        assert len(pairs) > MAX_EVENTS
        run(loop, lambda: len(seen) == len(pairs))
        assert max(seen) >= FIRST_DESCRIPTORS
        assert not loop.remove_reader(100_000)
        for one, _ in pairs:
            assert loop.remove_reader(one)
    finally:
        for one, other in pairs:
            one.close()
            other.close()


def test_an_event_is_not_given_to_the_next_connection_with_the_number(loop: DirectLoop) -> None:
    """Both are ready in one poll; the first one called closes the other, whose number another socket gets."""
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[str] = []
    new: list[socket.socket] = []

    def first(own: socket.socket, victim: socket.socket) -> None:
        called.append("old")
        loop.remove_reader(own)
        if new:
            return
        loop.remove_reader(victim)
        number = victim.fileno()
        victim.close()
        one, other = socket.socketpair()
        new.extend((one, other))
        assert number in (one.fileno(), other.fileno())
        loop.add_reader(number, called.append, "new")
        loop.add_writer(number, called.append, "new")
        loop.remove_writer(number)

    try:
        for index, (one, other) in enumerate(pairs):
            loop.add_reader(one, first, one, pairs[1 - index][0])
            other.send(b"x")
        run(loop, lambda: called)
        run(loop, lambda: True)
        assert called == ["old"]
    finally:
        for sock in [*new, *(sock for pair in pairs for sock in pair)]:
            sock.close()


class Panic(BaseException):
    """No Exception, as what a panic in a library written in Rust becomes."""


@pytest.mark.parametrize("fault", [LookupError("broken"), Panic("broken")], ids=["error", "panic"])
def test_a_callback_that_fails_is_reported_and_the_others_go_on(
    loop: DirectLoop, ends: Ends, fault: BaseException
) -> None:
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    other = socket.socketpair()
    got: list[bytes] = []

    def broken() -> None:
        raise fault

    with other[0], other[1]:
        for sock in (ends[0], other[0]):
            sock.setblocking(False)
        loop.add_reader(ends[0], broken)
        loop.add_writer(ends[0], broken)
        loop.at_turn_end(broken)
        loop.add_reader(other[0], lambda: got.append(other[0].recv(10)))
        ends[1].send(b"x")
        other[1].send(b"y")
        run(loop, lambda: got and len(errors) >= 3)
    assert got == [b"y"]
    assert all(error["exception"] is fault and "broken" in error["message"] for error in errors)


def test_an_exit_is_not_kept(loop: DirectLoop, ends: Ends) -> None:
    loop.add_reader(ends[0], sys.exit, 3)
    ends[1].send(b"x")
    with pytest.raises(SystemExit):
        loop.run_forever()


def test_the_turns_end_comes_after_what_was_ready_and_once(loop: DirectLoop, ends: Ends) -> None:
    other = socket.socketpair()
    order: list[str] = []

    def ready(sock: socket.socket) -> None:
        sock.recv(1)
        order.append("ready")
        if len(order) == 1:
            loop.at_turn_end(lambda: order.append("end"))

    with other[0], other[1]:
        for one, far in (ends, other):
            one.setblocking(False)
            loop.add_reader(one, ready, one)
            far.send(b"x")
        run(loop, lambda: "end" in order)
    assert order == ["ready", "ready", "end"]


def test_the_turns_end_of_a_task_is_not_left_waiting(loop: DirectLoop) -> None:
    """Nothing is ready and nothing comes: what a task collected is called before the poll that would wait."""
    called: list[str] = []

    async def main() -> None:
        done = loop.create_future()
        loop.at_turn_end(in_turn(lambda: called.append("end"), lambda: done.set_result(None)))
        async with asyncio.timeout(DEADLINE_S):
            await done

    loop.run_until_complete(main())
    assert called == ["end"]


def test_what_a_turns_end_collects_comes_with_the_next(loop: DirectLoop) -> None:
    called: list[int] = []

    def again() -> None:
        called.append(1)
        if len(called) < 3:
            loop.at_turn_end(again)
        else:
            loop.stop()

    loop.at_turn_end(again)
    loop.call_later(DEADLINE_S, loop.stop)
    loop.call_soon(lambda: None)
    while len(called) < 3:
        loop.run_until_complete(asyncio.sleep(0))


def test_what_a_turns_end_collects_does_not_wait_for_the_next_event(loop: DirectLoop, ends: Ends) -> None:
    called: list[str] = []

    def later() -> None:
        called.append("later")
        loop.call_soon(loop.stop)

    def read() -> None:
        ends[0].recv(10)
        loop.at_turn_end(lambda: loop.at_turn_end(later))

    loop.add_reader(ends[0], read)
    ends[1].send(b"x")
    loop.call_later(DEADLINE_S / 2, in_turn(lambda: called.append("something else came"), loop.stop))
    loop.run_forever()
    assert called == ["later"]


def test_a_callback_starts_tasks_and_timers_that_run_although_more_is_ready(loop: DirectLoop, ends: Ends) -> None:
    """The reader reads nothing, so it is ready for ever."""
    done: list[str] = []

    async def task() -> None:
        done.append("task")

    def ready() -> None:
        if not done:
            done.append("ready")
            tasks.append(loop.create_task(task()))
            loop.call_later(0.01, done.append, "timer")

    tasks: list[asyncio.Task[None]] = []
    loop.add_reader(ends[0], ready)
    ends[1].send(b"x")
    run(loop, lambda: len(done) == 3)
    assert done == ["ready", "task", "timer"]


def test_threads_names_and_signals_are_asyncios(loop: DirectLoop) -> None:
    signals: list[int] = []

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            assert await asyncio.to_thread(lambda: 3) == 3
            assert await loop.getaddrinfo("127.0.0.1", 80)
            came = loop.create_future()
            threading.Timer(0.01, loop.call_soon_threadsafe, (came.set_result, "from a thread")).start()
            assert await came == "from a thread"
            taken = asyncio.Event()
            loop.add_signal_handler(signal.SIGUSR2, in_turn(lambda: signals.append(1), taken.set))
            os.kill(os.getpid(), signal.SIGUSR2)
            await taken.wait()
            loop.remove_signal_handler(signal.SIGUSR2)

    loop.run_until_complete(main())
    assert signals == [1]


def test_asyncios_own_socket_calls_work_beside_it(loop: DirectLoop) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
            server.setblocking(False)
            client.setblocking(False)
            await loop.sock_connect(client, server.getsockname())
            peer, _ = await loop.sock_accept(server)
            with peer:
                data = bytes(4_000_000)
                received = bytearray()

                async def receive() -> None:
                    while len(received) < len(data):
                        received.extend(await loop.sock_recv(peer, 65_536))

                await asyncio.gather(loop.sock_sendall(client, data), receive())
                assert received == data
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print(input())", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert (await process.communicate(b"echo\n"))[0] == b"echo\n"

    loop.run_until_complete(asyncio.wait_for(main(), DEADLINE_S))


def test_the_selector_keeps_asyncios_descriptors_as_any_selector(ends: Ends) -> None:
    with loop_module._DirectSelector(lambda *_: None) as selector:
        key = selector.register(ends[0], selectors.EVENT_WRITE, "data")
        assert key == selectors.SelectorKey(ends[0], ends[0].fileno(), selectors.EVENT_WRITE, "data")
        assert dict(selector.get_map()) == {ends[0].fileno(): key}
        with pytest.raises(KeyError):
            selector.register(ends[0], selectors.EVENT_READ)
        assert selector.select(0) == [(key, selectors.EVENT_WRITE)]
        key = selector.modify(ends[0], selectors.EVENT_READ, "other")
        assert selector.select(0) == []
        assert selector.modify(ends[0], selectors.EVENT_READ, "again").data == "again"
        ends[1].send(b"x")
        assert [(key.data, events) for key, events in selector.select(1)] == [("again", selectors.EVENT_READ)]
        number = ends[0].fileno()
        ends[0].close()
        assert selector.unregister(number).fd == number, "a closed descriptor is forgotten all the same"
        with pytest.raises(KeyError):
            selector.unregister(number)


# Which loop a daemon runs on


@pytest.mark.parametrize(
    ("wanted", "kind"), [("", DirectLoop), ("direct", DirectLoop), ("uvloop", uvloop.Loop), ("asyncio", object)]
)
def test_the_loop_that_is_wanted(wanted: str, kind: type[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLEX_LOOP", wanted)
    loop = new_event_loop()
    loop.close()
    assert isinstance(loop, kind)


def test_a_loop_that_nobody_knows_is_an_error_that_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLEX_LOOP", "libev")
    with pytest.raises(StartError, match="REFLEX_LOOP: expected one of direct, uvloop, asyncio, found 'libev'"):
        new_event_loop()


def test_without_epoll_it_is_uvloop_and_without_that_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFLEX_LOOP", raising=False)
    monkeypatch.delattr(select, "epoll")
    loop = new_event_loop()
    loop.close()
    assert isinstance(loop, uvloop.Loop)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setenv("REFLEX_LOOP", "uvloop")
    with pytest.raises(StartError, match="uvloop is not available"):
        new_event_loop()
