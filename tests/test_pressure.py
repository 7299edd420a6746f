"""reflex.net.pressure: whether to refuse, and what is logged of it."""

from __future__ import annotations

import logging

import pytest

from reflex.net.pressure import Pressure
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
