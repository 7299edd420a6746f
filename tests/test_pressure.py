"""reflex.net.pressure: whether to refuse, and what is logged of it."""

from __future__ import annotations

import logging

import pytest

from reflex.complaints import Complaints
from reflex.net import pressure as pressure_module
from reflex.net.pressure import Pressure, log_shed
from reflex.protocol.window import Budget


def test_it_is_high_from_95_percent_on_and_each_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    budget = Budget(buffered_limit=1000)
    pressure = Pressure(budget, "new streams are refused")
    assert not pressure.is_high()
    budget.kept = 950
    assert [pressure.is_high() for _ in range(3)] == [True] * 3
    budget.kept = 1000
    assert pressure.is_high()
    budget.kept = 949
    assert [pressure.is_high() for _ in range(3)] == [False] * 3
    assert caplog.messages == [
        "new streams are refused: 950 of 1000 bytes (limits.buffered_bytes) wait for slow readers",
        "enough bytes were read by now: nothing is refused any more",
    ]


def test_streams_that_are_reset_for_want_of_memory_are_logged_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times_s = iter((0.0, 0.0, 9.0, 10.0))
    monkeypatch.setattr(pressure_module, "_SHED", Complaints(lambda: next(times_s), interval_s=10))
    budget = Budget(buffered_limit=1000)
    budget.kept = 990
    for _ in range(4):
        log_shed(budget)
    line = "streams are reset: 990 of 1000 bytes (limits.buffered_bytes) wait for slow readers, and more came"
    assert caplog.messages == [line] * 2
