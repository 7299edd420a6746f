"""reflex.net.pace: so many bytes, so many dials in a second, by a clock that the test moves."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest

from reflex.net.pace import BURST_S, MIN_BURST_BYTES, TICK_S, DialPace, Pace
from reflex.worker import UserField, UserTable

RATE: Final = 1_048_576
WINDOW_S: Final = 0.5


class Timer:
    def __init__(self, loop: FakeLoop, delay_s: float, callback: Callable[[], None]) -> None:
        self.when_s = loop.now_s + delay_s
        self.callback = callback


class FakeLoop:
    """A clock and its timers."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, Timer]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self, delay_s, callback)
        heapq.heappush(self._timers, (timer.when_s, next(self._order), timer))
        return timer

    def run(self, seconds: float) -> None:
        """Let so much time go by."""
        end_s = self.now_s + seconds
        while self._timers and self._timers[0][0] <= end_s:
            self.now_s, _, timer = heapq.heappop(self._timers)
            timer.callback()
        self.now_s = end_s

    @property
    def is_idle(self) -> bool:
        return not self._timers


class Greedy:
    """Takes what it may, so many bytes at a time, and waits for more."""

    def __init__(self, loop: FakeLoop, pace: Pace, size: int = 131_072) -> None:
        self._loop, self._pace, self._size = loop, pace, size
        self.is_done = False
        self.total = 0
        self.times: list[tuple[float, int]] = []

    def go(self) -> None:
        while not self.is_done and (allowed := self._pace.allowance(self._size)):
            self._pace.take(allowed)
            self.total += allowed
            self.times.append((self._loop.now_s, allowed))
        if not self.is_done:
            self._pace.wait(self.go)


def most_in_a_window(times: list[tuple[float, int]]) -> int:
    most = current = first = 0
    for when, size in sorted(times):
        current += size
        while times[first][0] <= when - WINDOW_S:
            current -= times[first][1]
            first += 1
        most = max(most, current)
    return most


def pace_of(loop: Any, rate: int = RATE, *, table: UserTable | None = None, worker: int = 1) -> Pace:
    row = (table or UserTable(1, 1)).row(worker, 0)
    return Pace(loop, rate, row, UserField.BYTES_UP, lambda: None)


@pytest.mark.parametrize("rate", [8_192, 100_000, RATE, 10**9])
def test_a_greedy_one_gets_the_rate_and_no_more_than_half_as_much_again_in_half_a_second(rate: int) -> None:
    loop = FakeLoop()
    greedy = Greedy(loop, pace_of(loop, rate))
    greedy.go()
    loop.run(20)
    assert greedy.total == pytest.approx(20 * rate, rel=0.02)
    assert most_in_a_window(greedy.times) <= 1.5 * rate * WINDOW_S
    assert len(greedy.times) <= 1.1 * (20 / TICK_S + 20 * rate / 131_072)  # no busy loop


def test_the_slowest_goes_on_as_well() -> None:
    loop = FakeLoop()
    greedy = Greedy(loop, pace_of(loop, 1_024))
    greedy.go()
    loop.run(20)
    assert greedy.total == pytest.approx(20 * 1_024 + MIN_BURST_BYTES, rel=0.1)


def test_what_nobody_wanted_is_not_saved_up() -> None:
    loop = FakeLoop()
    pace = pace_of(loop)
    loop.run(3600)
    greedy = Greedy(loop, pace)
    greedy.go()
    assert greedy.total == RATE * BURST_S
    loop.run(1)
    assert greedy.total == pytest.approx(RATE * (1 + BURST_S), rel=0.1)


def test_the_timer_stops_when_nobody_waits() -> None:
    loop = FakeLoop()
    pace = pace_of(loop)
    greedy = Greedy(loop, pace)
    greedy.go()
    assert not loop.is_idle
    greedy.is_done = True
    loop.run(1)
    assert loop.is_idle
    assert pace.allowance(100) == 100


def test_a_thousand_share_alike_whatever_they_ask_for() -> None:
    loop = FakeLoop()
    pace = pace_of(loop)
    crowd = [Greedy(loop, pace, 4_096 if number % 2 else 131_072) for number in range(1000)]
    for each in crowd:
        each.go()
    loop.run(40)
    totals = sorted(each.total for each in crowd[100:])  # some had the first burst
    assert totals[0] > 0.5 * RATE * 40 / 1000
    assert totals[-1] < 2 * RATE * 40 / 1000


def test_a_small_one_does_not_wait_behind_a_large_one_for_long() -> None:
    loop = FakeLoop()
    pace = pace_of(loop)
    large = Greedy(loop, pace)
    large.go()
    for _ in range(20):
        small = Greedy(loop, pace, 100)
        assert pace.allowance(100) == 0  # who waits came first
        pace.wait(small.go)
        loop.run(3 * TICK_S)
        assert small.total
        small.is_done = True


def test_who_waits_twice_is_called_once() -> None:
    loop = FakeLoop()
    waits = []
    pace = Pace(loop, RATE, UserTable(1, 1).row(1, 0), UserField.BYTES_UP, lambda: waits.append(1))  # type: ignore[arg-type]
    calls = []

    def waiter() -> None:
        calls.append(1)

    pace.take(pace.allowance(RATE))
    pace.wait(waiter)
    pace.wait(waiter)
    loop.run(1)
    assert (len(calls), len(waits)) == (1, 1)


def test_who_is_forgotten_is_not_called_and_not_kept() -> None:
    loop = FakeLoop()
    pace = pace_of(loop)
    called: list[int] = []
    waiters = [partial(called.append, number) for number in range(4)]
    pace.take(pace.allowance(RATE))
    for waiter in waiters:
        pace.wait(waiter)
    for _ in range(2):
        pace.forget(waiters[1])
    assert waiters[1] not in pace._waiting
    loop.run(1)
    assert called == [0, 2, 3]


def test_who_is_forgotten_while_others_are_served_is_not_called() -> None:
    loop = FakeLoop()
    pace = pace_of(loop)
    called = []

    def last() -> None:
        called.append("last")

    def first() -> None:
        called.append("first")
        pace.forget(last)

    pace.take(pace.allowance(RATE))
    pace.wait(first)
    pace.wait(last)
    loop.run(1)
    assert called == ["first"]
    assert loop.is_idle


# Several workers


def test_workers_keep_the_rate_together_and_one_alone_gets_all_of_it() -> None:
    loop = FakeLoop()
    table = UserTable(3, 1)
    three = [Greedy(loop, pace_of(loop, table=table, worker=number)) for number in (1, 2, 3)]
    for each in three:
        each.go()
        loop.run(TICK_S / 3)  # they have no step in common
    loop.run(10)
    totals = [each.total for each in three]
    assert sum(totals) == pytest.approx(10 * RATE, rel=0.1)
    assert max(totals) < 3 * min(totals)
    steady = sorted(time for each in three for time in each.times if time[0] > 102)
    assert most_in_a_window(steady) <= 1.5 * RATE * WINDOW_S
    three[1].is_done = three[2].is_done = True
    loop.run(1)
    before = three[0].total
    loop.run(10)
    assert three[0].total - before == pytest.approx(10 * RATE, rel=0.05)


def test_a_worker_that_was_idle_does_not_pay_for_what_others_took_meanwhile() -> None:
    loop = FakeLoop()
    table = UserTable(2, 1)
    busy, idle = (Greedy(loop, pace_of(loop, table=table, worker=number)) for number in (1, 2))
    busy.go()
    loop.run(60)
    busy.is_done = True
    idle.go()
    loop.run(1)
    assert idle.total > 0.7 * RATE


def test_a_worker_that_was_replaced_begins_at_nothing() -> None:
    loop = FakeLoop()
    table = UserTable(2, 1)
    one, two = (Greedy(loop, pace_of(loop, table=table, worker=number)) for number in (1, 2))
    one.go()
    two.go()
    loop.run(5)
    two.is_done = True
    table.clear(2)
    again = Greedy(loop, pace_of(loop, table=table, worker=2))
    again.go()
    before = one.total
    loop.run(10)
    assert one.total - before + again.total == pytest.approx(10 * RATE, rel=0.1)


# Dials


def dials_of(loop: Any, rate: float, *, table: UserTable | None = None, worker: int = 1) -> DialPace:
    return DialPace(loop, rate, (table or UserTable(1, 1)).row(worker, 0), max_wait_s=2.0)


def test_a_seconds_worth_of_dials_goes_at_once_and_the_next_ones_in_turn() -> None:
    loop = FakeLoop()
    dials = dials_of(loop, 5)
    assert [dials.book() for _ in range(5)] == [0.0] * 5
    assert [dials.book() for _ in range(10)] == pytest.approx([number / 5 for number in range(1, 11)])
    assert dials.book() is None  # it would have waited for 2.2 s
    assert dials.book() is None  # who was refused takes nobody's place
    loop.run(0.2)
    assert dials.book() == pytest.approx(2.0)
    loop.run(3600)
    assert [dials.book() for _ in range(6)] == pytest.approx([0, 0, 0, 0, 0, 0.2])


def test_less_than_one_dial_a_second() -> None:
    loop = FakeLoop()
    dials = dials_of(loop, 0.5)
    assert dials.book() == 0.0
    assert dials.book() == pytest.approx(2.0)
    assert dials.book() is None


def test_dials_of_all_workers_count() -> None:
    loop = FakeLoop()
    table = UserTable(2, 1)
    one, two = (dials_of(loop, 5, table=table, worker=number) for number in (1, 2))
    assert [one.book() for _ in range(3)] == [0.0] * 3
    assert [two.book() for _ in range(3)] == pytest.approx([0, 0, 0.2])
    assert one.book() == pytest.approx(0.4)


def test_a_worker_that_was_idle_knows_what_the_others_have_dialled_meanwhile() -> None:
    loop = FakeLoop()
    table = UserTable(4, 1)
    workers = [dials_of(loop, 20, table=table, worker=number) for number in (1, 2, 3, 4)]
    loop.run(10)
    waits = [dials.book() for dials in workers for _ in range(20)]
    assert waits == pytest.approx([0.0] * 20 + [number / 20 for number in range(1, 41)] + [None] * 20)
    loop.run(0.5)
    assert [workers[3].book() for _ in range(2)] == pytest.approx([1.55, 1.6])


def test_workers_that_dial_by_turns_keep_the_rate_together() -> None:
    loop = FakeLoop()
    table = UserTable(3, 1)
    workers = [dials_of(loop, 4, table=table, worker=number) for number in (1, 2, 3)]
    dialled = 0
    for number in range(600):
        dialled += workers[number * number % 3].book() is not None
        loop.run(0.1)
    # In 60 s, after a second's worth, and with what waits for up to 2 s.
    assert dialled == pytest.approx(4 * (60 + 1 + 2), abs=1)
