"""reflex.protocol.window: credit that adds up whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from reflex.errors import FlowControlError
from reflex.protocol.window import (
    BUFFER_BUDGET,
    GROWTH_PART,
    GROWTH_ROUND_TRIPS,
    MAX_STREAM_RECEIVE_WINDOW,
    MAX_UPDATE_BYTES,
    Budget,
    ReceiveWindow,
    SendWindow,
)
from reflex.protocol.wire import MAX_WINDOW, Code

sizes = st.integers(0, MAX_WINDOW)


def test_limits_of_this_implementation() -> None:
    assert MAX_STREAM_RECEIVE_WINDOW == 16 * 2**20
    assert GROWTH_PART == 2
    assert BUFFER_BUDGET == 256 * 2**20


# The budget that all windows share.


def test_a_budget_starts_empty_with_the_process_limits() -> None:
    budget = Budget()
    assert (budget.growth, budget.growth_limit) == (0, BUFFER_BUDGET // GROWTH_PART)
    assert (budget.buffered, budget.buffered_limit) == (0, BUFFER_BUDGET)
    assert Budget(growth_limit=5, buffered_limit=6).growth_limit == 5
    assert Budget(growth_limit=5, buffered_limit=6).buffered_limit == 6
    assert Budget(buffered_limit=6).growth_limit == 3


def test_a_budget_is_nearly_full_from_95_percent_on() -> None:
    budget = Budget(buffered_limit=1000)
    budget.kept = 949
    assert not budget.is_nearly_full
    budget.kept = 950
    assert budget.is_nearly_full


# Sending.


@given(available=sizes, increment=st.integers(-1, 2**32 - 1))
def test_a_window_is_raised_by_one_or_more_and_never_above_its_maximum(available: int, increment: int) -> None:
    window = SendWindow(available)
    if increment >= 1 and available + increment <= MAX_WINDOW:
        window.add(increment)
        assert window.available == available + increment
        assert window.size == window.available
        return
    with pytest.raises(FlowControlError) as caught:
        window.add(increment)
    assert caught.value.code == Code.FLOW_CONTROL
    assert window.available == available


@pytest.mark.parametrize(
    ("available", "increment", "allowed"),
    [
        (0, 0, False),
        (0, 1, True),
        (0, MAX_WINDOW, True),
        (1, MAX_WINDOW, False),
        (MAX_WINDOW - 1, 1, True),
        (MAX_WINDOW, 1, False),
        (0, 2**32 - 1, False),
    ],
)
def test_increments_at_the_edges(available: int, increment: int, *, allowed: bool) -> None:
    window = SendWindow(available)
    if allowed:
        window.add(increment)
    else:
        with pytest.raises(FlowControlError):
            window.add(increment)
    assert window.available == window.size == available + increment * allowed


def test_a_window_knows_the_most_that_it_ever_was() -> None:
    window = SendWindow(100)
    window.available -= 80
    window.add(70)
    assert (window.available, window.size) == (90, 100)
    window.add(20)
    assert (window.available, window.size) == (110, 110)


# Receiving.


def test_overrunning_a_window_is_refused_and_counts_nothing() -> None:
    window = ReceiveWindow(100)
    window.receive(99)
    with pytest.raises(FlowControlError):
        window.receive(2)
    assert window.available == 1
    window.receive(1)
    with pytest.raises(FlowControlError):
        window.receive(1)


@pytest.mark.parametrize("size", [100, 101])
def test_the_peer_is_told_at_half_a_window(size: int) -> None:
    window = ReceiveWindow(size)
    window.receive(size)
    half = (size + 1) // 2
    assert not window.release(half - 1)
    assert window.release(1)
    assert window.update(now_s=1.0) == half
    assert (window.available, window.owed) == (half, 0)


def test_a_window_wants_growth_if_half_of_it_went_by_within_two_round_trips() -> None:
    window = ReceiveWindow(100)
    window.update(now_s=10.0)
    assert window.updated_s == 10.0
    assert GROWTH_ROUND_TRIPS == 2.0
    window.receive(50)
    assert window.release(50)
    assert window.wants_growth(now_s=10.99, round_trip_s=0.5)
    assert not window.wants_growth(now_s=11.0, round_trip_s=0.5)
    assert not window.wants_growth(now_s=10.0, round_trip_s=0.0), "no round trip was measured yet"


def test_of_a_large_window_the_peer_is_told_long_before_half_and_growth_is_judged_by_that_share() -> None:
    window = ReceiveWindow(8 * MAX_UPDATE_BYTES)
    window.update(now_s=10.0)
    window.receive(MAX_UPDATE_BYTES)
    assert not window.release(MAX_UPDATE_BYTES - 1)
    assert window.release(1)
    # A quarter of half a window in a quarter of two round trips is as fast as half a window in two.
    assert window.wants_growth(now_s=10.24, round_trip_s=0.5)
    assert not window.wants_growth(now_s=10.26, round_trip_s=0.5)


def test_growth_is_credit_that_the_next_update_tells_of() -> None:
    window = ReceiveWindow(100)
    window.grow(100)
    assert (window.size, window.available, window.owed) == (200, 100, 100)
    assert window.update(now_s=0.0) == 100
    assert (window.size, window.available, window.owed) == (200, 200, 0)


def test_an_update_never_raises_the_peers_window_above_its_maximum() -> None:
    window = ReceiveWindow(MAX_WINDOW - 10)
    window.grow(30)
    assert window.update(now_s=0.0) == 10
    assert (window.available, window.owed) == (MAX_WINDOW, 20)
    assert window.update(now_s=0.0) == 0
    window.receive(15)
    assert window.update(now_s=0.0) == 15
    assert window.owed == 5


class CreditMachine(RuleBasedStateMachine):
    """One sender's window against one receiver's, with updates that may be under way."""

    @initialize(size=st.integers(1, 1000))
    def start(self, size: int) -> None:
        self.sender = SendWindow(size)
        self.receiver = ReceiveWindow(size)
        self.held = 0
        self.sent_not_received = 0
        self.told_not_heard: list[int] = []

    @rule(size=st.integers(0, 1500))
    def send(self, size: int) -> None:
        size = min(size, self.sender.available)
        self.sender.available -= size
        self.sent_not_received += size

    @rule(part=st.floats(0, 1))
    def receive(self, part: float) -> None:
        size = int(self.sent_not_received * part)
        self.receiver.receive(size)
        self.sent_not_received -= size
        self.held += size

    @rule(part=st.floats(0, 1))
    def read(self, part: float) -> None:
        size = int(self.held * part)
        self.held -= size
        if self.receiver.release(size) and (increment := self.receiver.update(now_s=0.0)):
            self.told_not_heard.append(increment)

    @rule(size=st.integers(0, 1000))
    def grow(self, size: int) -> None:
        self.receiver.grow(size)

    @rule()
    def hear(self) -> None:
        for increment in self.told_not_heard:
            self.sender.add(increment)
        self.told_not_heard = []

    @invariant()
    def credit_adds_up(self) -> None:
        receiver = self.receiver
        assert receiver.available + receiver.owed + self.held == receiver.size
        assert min(receiver.available, receiver.owed, self.sender.available) >= 0
        assert self.sender.available + self.sent_not_received + sum(self.told_not_heard) == receiver.available


TestCredit = CreditMachine.TestCase
