"""reflex.net.lookups: each user's look-ups keep their places until the resolver is done with them."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from reflex.net.lookups import Lookups
from tests.pair import DEADLINE_S, in_loop, turns, until


class Resolver:
    """Takes the place of the system's: a name is answered when the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go_on: dict[str, threading.Event] = {}
        self.everybody = threading.Event()

    def getaddrinfo(self, host: str, *_: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        event = self.go_on.setdefault(host, threading.Event())
        while not event.wait(0.01) and not self.everybody.is_set():
            pass
        if host.startswith("bad"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(host,)]

    def answer(self, host: str) -> None:
        self.go_on.setdefault(host, threading.Event()).set()


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made.getaddrinfo)
    yield made
    made.everybody.set()


async def wait_for(task: asyncio.Task[Any]) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        return await task


@in_loop
async def test_localhost_is_looked_up() -> None:
    found = await Lookups(asyncio.Semaphore(1)).getaddrinfo("localhost", 80, family=socket.AF_INET)
    assert ("127.0.0.1", 80) in [info[4] for info in found]


def test_so_many_at_a_time_and_the_rest_in_their_order(resolver: Resolver) -> None:
    @in_loop
    async def run() -> None:
        mine = Lookups(asyncio.Semaphore(10), limit=2)
        tasks = [asyncio.create_task(mine.getaddrinfo(name, 1)) for name in "abcd"]
        await until(lambda: len(resolver.asked) == 2)
        await turns()
        assert sorted(resolver.asked) == ["a", "b"]
        resolver.answer("b")
        assert await wait_for(tasks[1]) == [("b",)]
        await until(lambda: len(resolver.asked) == 3)
        assert resolver.asked[2] == "c"
        for name in "acd":
            resolver.answer(name)
        for task, name in zip(tasks, "abcd", strict=True):
            assert await wait_for(task) == [(name,)]

    run()


def test_who_gives_up_keeps_the_place_and_who_gives_up_in_the_queue_is_never_looked_up(resolver: Resolver) -> None:
    @in_loop
    async def run() -> None:
        threads = asyncio.Semaphore(10)
        mine, theirs = Lookups(threads, limit=1), Lookups(threads, limit=1)
        begun = asyncio.create_task(mine.getaddrinfo("begun", 1))
        await until(lambda: resolver.asked == ["begun"])
        queued = [asyncio.create_task(mine.getaddrinfo(f"queued{each}", 1)) for each in range(100)]
        await turns()
        for task in (begun, *queued):
            task.cancel()
        await asyncio.wait([begun, *queued])
        last = asyncio.create_task(mine.getaddrinfo("last", 1))
        other = asyncio.create_task(theirs.getaddrinfo("other", 1))
        await until(lambda: "other" in resolver.asked)  # another user does not wait
        resolver.answer("other")
        await wait_for(other)
        assert resolver.asked == ["begun", "other"]
        resolver.answer("begun")
        resolver.answer("last")
        assert await wait_for(last) == [("last",)]
        assert resolver.asked == ["begun", "other", "last"]

    run()


def test_all_users_share_the_threads_and_who_gives_up_waiting_for_one_gives_the_place_back(resolver: Resolver) -> None:
    @in_loop
    async def run() -> None:
        threads = asyncio.Semaphore(1)
        first, second = Lookups(threads), Lookups(threads, limit=1)
        running = asyncio.create_task(first.getaddrinfo("first", 1))
        await until(lambda: resolver.asked == ["first"])
        given_up = asyncio.create_task(second.getaddrinfo("given up", 1))
        await turns()
        given_up.cancel()
        await asyncio.wait([given_up])
        again = asyncio.create_task(second.getaddrinfo("again", 1))
        await turns()
        assert resolver.asked == ["first"]
        resolver.answer("first")
        resolver.answer("again")
        await wait_for(running)
        assert await wait_for(again) == [("again",)]

    run()


def test_an_error_of_the_resolver_is_the_callers_and_the_place_is_free_again(resolver: Resolver) -> None:
    @in_loop
    async def run() -> None:
        mine = Lookups(asyncio.Semaphore(1), limit=1)
        resolver.answer("bad")
        for _ in range(2):
            with pytest.raises(socket.gaierror):
                await mine.getaddrinfo("bad", 1)

    run()


def test_where_no_thread_can_be_had_it_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> threading.Thread:
        raise RuntimeError("can't start new thread")

    @in_loop
    async def run() -> None:
        mine = Lookups(asyncio.Semaphore(1), limit=1)
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Thread", refuse)
            with pytest.raises(OSError, match="no thread"):
                await mine.getaddrinfo("localhost", 1)
        assert await mine.getaddrinfo("localhost", 1)

    run()


def test_an_answer_that_comes_after_the_loop_has_ended_is_dropped(resolver: Resolver) -> None:
    started = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(Lookups(asyncio.Semaphore(1)).getaddrinfo("late", 1))
        await until(lambda: resolver.asked == ["late"])
        started.set()
        task.cancel()

    asyncio.run(main())
    assert started.is_set()
    before = [thread for thread in threading.enumerate() if thread.name == "lookup"]
    assert len(before) == 1
    resolver.answer("late")
    before[0].join(DEADLINE_S)
    assert not before[0].is_alive()
