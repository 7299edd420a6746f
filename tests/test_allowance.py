"""reflex.protocol.allowance: what a peer may spend on frames without use, and when it gets it back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import ProtocolError
from reflex.protocol.allowance import (
    ABANDONED_COST,
    BURST_UNITS,
    UNITS_PER_S,
    UNITS_PER_STREAM,
    Allowance,
)

START_S = 1000.0


def test_a_burst_is_allowed_and_one_unit_more_is_fatal() -> None:
    allowance = Allowance(START_S)
    for _ in range(BURST_UNITS):
        allowance.charge(1, START_S)
    with pytest.raises(ProtocolError, match="without use"):
        allowance.charge(1, START_S)


def test_time_gives_units_back_up_to_the_burst() -> None:
    allowance = Allowance(START_S)
    allowance.charge(BURST_UNITS, START_S)
    allowance.charge(UNITS_PER_S // 2, START_S + 0.5)
    with pytest.raises(ProtocolError):
        allowance.charge(1, START_S + 0.5)
    allowance = Allowance(START_S)
    with pytest.raises(ProtocolError):
        allowance.charge(BURST_UNITS + 1, START_S + 3600)


def test_more_streams_are_a_larger_burst_at_once_and_fewer_change_nothing() -> None:
    assert UNITS_PER_STREAM == 2 * ABANDONED_COST
    allowance = Allowance(START_S)
    allowance.allow_streams(BURST_UNITS // UNITS_PER_STREAM)
    assert allowance.burst_units == BURST_UNITS
    allowance.charge(BURST_UNITS, START_S)
    for count in (2_001, 1, 2_001):
        allowance.allow_streams(count)
        assert allowance.burst_units == 2_001 * UNITS_PER_STREAM
    allowance.charge(2_001 * UNITS_PER_STREAM - BURST_UNITS, START_S)
    with pytest.raises(ProtocolError):
        allowance.charge(1, START_S)
    allowance.charge(2_001 * UNITS_PER_STREAM, START_S + 3600)


def test_what_could_not_be_charged_is_not() -> None:
    allowance = Allowance(START_S)
    with pytest.raises(ProtocolError):
        allowance.charge(BURST_UNITS + 1, START_S)
    allowance.charge(BURST_UNITS, START_S)


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    allowance = Allowance(START_S)
    allowance.charge(1, START_S - 100)
    allowance.charge(BURST_UNITS - 1, START_S - 100)


@given(st.lists(st.tuples(st.integers(1, BURST_UNITS), st.floats(0, 5)), max_size=40))
def test_nobody_ever_spends_more_than_the_burst_and_what_time_gave(steps: list[tuple[int, float]]) -> None:
    allowance, now_s, spent = Allowance(START_S), START_S, 0
    for cost, wait_s in steps:
        now_s += wait_s
        try:
            allowance.charge(cost, now_s)
        except ProtocolError:
            continue
        spent += cost
        assert spent <= BURST_UNITS + (now_s - START_S) * UNITS_PER_S + 1e-3
