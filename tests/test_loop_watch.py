"""reflex.loop, DirectLoop.expect_soon: a process watches for an answer before it sleeps, and not at others' cost."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from reflex.loop import MAX_MISSES, POLLS_TO_SLEEP, WATCH_S, DirectLoop

NOBODY: list[tuple[int, int]] = []
SOMEBODY = [(7, 1)]
STEP_S = WATCH_S / 10  # what a poll takes here


class Machine:
    """The kernel's part, by hand: what polls answer, what giving the processor away takes, and what the time is."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.answers: list[list[tuple[int, int]]] = []
        self.yield_s = 0.0
        self.watched = self.slept = self.yields = 0

    def poll(self, timeout: float | None, _: int) -> list[tuple[int, int]]:
        if timeout != 0:
            self.slept += 1
            return SOMEBODY
        self.watched += 1
        self.now_s += STEP_S
        return self.answers.pop(0) if self.answers else NOBODY

    def sched_yield(self) -> None:
        self.yields += 1
        self.now_s += self.yield_s

    def monotonic(self) -> float:
        return self.now_s

    def close(self) -> None:
        """As an epoll object."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(time, "monotonic", machine.monotonic)
    monkeypatch.setattr(os, "sched_yield", machine.sched_yield)
    return machine


@pytest.fixture
def selector(machine: Machine) -> Iterator[Any]:
    loop = DirectLoop()
    selector: Any = loop._direct
    epoll, selector.epoll = selector.epoll, machine
    yield selector
    selector.epoll = epoll
    loop.close()


def test_an_answer_that_comes_soon_is_found_without_sleeping(selector: Any, machine: Machine) -> None:
    machine.answers = [NOBODY, NOBODY, SOMEBODY]
    assert selector._watch(None) == SOMEBODY
    assert (machine.watched, machine.yields, machine.slept) == (3, 2, 0)


def test_what_does_not_come_soon_is_slept_for_and_after_some_of_these_nobody_watches_for_a_while(
    selector: Any, machine: Machine
) -> None:
    for count in range(1, MAX_MISSES + 1):
        assert selector._watch(None) == SOMEBODY
        assert machine.slept == count
    watched = machine.watched
    assert watched <= MAX_MISSES * 11
    for _ in range(POLLS_TO_SLEEP):
        selector._watch(None)
    assert machine.watched == watched
    selector._watch(None)
    assert machine.watched > watched


def test_an_answer_in_between_makes_up_for_the_misses(selector: Any, machine: Machine) -> None:
    for _ in range(10 * MAX_MISSES):
        machine.answers = [NOBODY, SOMEBODY]
        selector._watch(None)
        machine.answers = []
        selector._watch(None)
    assert machine.slept == 10 * MAX_MISSES
    assert selector._polls_to_sleep == 0


def test_where_others_take_the_processor_nobody_watches_for_longer(selector: Any, machine: Machine) -> None:
    machine.yield_s = WATCH_S
    for count in range(1, MAX_MISSES + 1):
        assert selector._watch(5.0) == SOMEBODY
        assert (machine.watched, machine.yields, machine.slept) == (count, count, count)
    selector._watch(5.0)
    assert machine.watched == MAX_MISSES


@pytest.mark.parametrize("timeout", [0.0, WATCH_S / 2])
def test_a_timer_that_is_due_sooner_is_not_held_up(timeout: float, selector: Any, machine: Machine) -> None:
    machine.answers = [NOBODY]
    selector._watch(timeout)
    assert machine.yields == 0


def test_it_holds_for_one_poll_and_the_answer_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = DirectLoop()
    watches = 0
    watch = loop._direct._watch

    def counted(timeout: float | None) -> list[tuple[int, int]]:
        nonlocal watches
        watches += 1
        return watch(timeout)

    monkeypatch.setattr(loop._direct, "_watch", counted)
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        got: asyncio.Future[bytes] = loop.create_future()

        def read() -> None:
            got.set_result(one.recv(10))

        loop.add_reader(one.fileno(), read)
        loop.expect_soon()
        other.send(b"answer")

        async def wait() -> bytes:
            async with asyncio.timeout(20):
                return await got

        assert loop.run_until_complete(wait()) == b"answer"
    loop.close()
    assert watches == 1
