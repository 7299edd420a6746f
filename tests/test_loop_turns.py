"""reflex.loop: what a turn holds, and who has the processor after it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from reflex.loop import BUSY_EVENTS, MAX_EVENTS, POLLS_PER_TURN, TURN_S, DirectLoop


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = DirectLoop()
    yield loop
    loop.close()


class Crowd:
    """Readers that are ready all at once, and what the loop did: their numbers, "end" for a turn's end, "yield"."""

    def __init__(self, loop: DirectLoop, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop = loop
        self._pairs = [socket.socketpair() for _ in range(count)]
        self.did: list[int | str] = []
        self.reads = True
        self.on_first: Callable[[], object] = lambda: None  # called by the first of a turn
        for number, (one, other) in enumerate(self._pairs):
            other.send(b"x")
            loop.add_reader(one, self._take, number, one)
        monkeypatch.setattr(os, "sched_yield", lambda: self.did.append("yield"))

    def _take(self, number: int, sock: socket.socket) -> None:
        if self.reads:
            sock.recv(1)
        if not self.did or self.did[-1] in ("end", "yield"):
            self._loop.at_turn_end(lambda: self.did.append("end"))
            self.on_first()
        self.did.append(number)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for one, other in self._pairs:
            self._loop.remove_reader(one)
            one.close()
            other.close()


def test_a_turn_holds_all_that_is_ready_and_then_others_have_the_processor(
    loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 2 * MAX_EVENTS + 10
    monkeypatch.setattr("reflex.loop.TURN_S", 60.0)
    with Crowd(loop, count, monkeypatch) as crowd:
        loop._direct.select(0.0)
        assert sorted(each for each in crowd.did[:-2] if isinstance(each, int)) == list(range(count))
        assert crowd.did[-2:] == ["end", "yield"]


def test_a_turn_has_an_end_although_more_and_more_is_ready(loop: DirectLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    with Crowd(loop, MAX_EVENTS, monkeypatch) as crowd:
        crowd.reads = False
        monkeypatch.setattr("reflex.loop.TURN_S", 60.0)
        loop._direct.select(0.0)
        assert crowd.did.index("end") == MAX_EVENTS * POLLS_PER_TURN


def test_a_turn_has_an_end_although_each_callback_takes_long(loop: DirectLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    with Crowd(loop, 4 * MAX_EVENTS, monkeypatch) as crowd:
        now_s = time.monotonic()
        ticks = iter((now_s, now_s, now_s + TURN_S, now_s + 1))  # the call, and after each full poll
        monkeypatch.setattr("reflex.loop.time.monotonic", lambda: next(ticks))
        loop._direct.select(0.0)
        assert crowd.did.index("end") == 2 * MAX_EVENTS


def test_a_turn_ends_where_asyncio_has_something_to_do(loop: DirectLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    with Crowd(loop, 3 * MAX_EVENTS, monkeypatch) as crowd:
        crowd.on_first = lambda: loop.call_soon(lambda: None)
        loop._direct.select(0.0)
        assert crowd.did.index("end") == MAX_EVENTS


@pytest.mark.parametrize("count", [1, BUSY_EVENTS - 1, BUSY_EVENTS])
def test_after_a_turn_with_little_to_do_nobody_else_is_asked(
    loop: DirectLoop, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    with Crowd(loop, count, monkeypatch) as crowd:
        loop._direct.select(0.0)
        assert crowd.did[count:] == ["end", "yield"][: 1 + (count >= BUSY_EVENTS)]
