"""reflex.complaints: one line about a trouble, however often it comes, and another when it has lasted."""

from __future__ import annotations

import itertools
import logging

from hypothesis import given
from hypothesis import strategies as st

from reflex.complaints import BURST_LINES, Complaints, Throttle


class Clock:
    def __init__(self) -> None:
        self.now_s = -5.0  # a monotonic clock may begin anywhere

    def __call__(self) -> float:
        return self.now_s


def test_the_first_is_written_and_the_next_after_the_interval() -> None:
    clock = Clock()
    complaints = Complaints(clock)
    written = []
    for clock.now_s in (-5.0, -4.0, 4.9, 5.0, 14.9, 40.0, 49.9, 50.0):
        if complaints.is_due():
            written.append(clock.now_s)
    assert written == [-5.0, 5.0, 40.0, 50.0]


def test_another_trouble_than_the_last_is_written_at_once() -> None:
    clock = Clock()
    complaints = Complaints(clock)
    due = [complaints.is_due(about) for about in ("one", "one", "two", "two", "one")]
    assert due == [True, False, True, False, True]
    clock.now_s += 10
    assert complaints.is_due("one")


@given(st.lists(st.floats(0, 5), max_size=100))
def test_never_more_than_one_in_an_interval_and_never_none_for_long(steps: list[float]) -> None:
    clock = Clock()
    complaints = Complaints(clock)
    written = [clock.now_s] if complaints.is_due() else []
    for step in steps:
        clock.now_s += step
        if complaints.is_due():
            written.append(clock.now_s)
    assert written
    assert written[0] == -5.0
    assert all(later - earlier >= 10.0 for earlier, later in itertools.pairwise(written))
    assert clock.now_s - written[-1] < 10.0


def test_by_default_it_is_the_systems_clock() -> None:
    complaints = Complaints(interval_s=3600)
    assert complaints.is_due()
    assert not complaints.is_due()


def test_of_each_kind_a_few_lines_keep_their_level_at_once_and_one_in_an_interval_then() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    levels = [throttle.level("lost", logging.INFO) for _ in range(BURST_LINES + 5)]
    assert levels == [logging.INFO] * BURST_LINES + [logging.DEBUG] * 5
    assert throttle.level("error", logging.WARNING) == logging.WARNING
    clock.now_s += 25
    assert [throttle.level("lost", logging.INFO) for _ in range(4)] == [logging.INFO] * 2 + [logging.DEBUG] * 2
    clock.now_s += 10_000
    assert [throttle.level("lost", logging.INFO) for _ in range(BURST_LINES + 1)].count(logging.INFO) == BURST_LINES
