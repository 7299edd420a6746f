"""reflex.protocol.liveness: when to ping, when a peer is dead, how long a round trip takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.protocol.liveness import (
    MAX_KEEPALIVE_S,
    MIN_KEEPALIVE_S,
    ROUND_TRIP_INTERVAL_S,
    ROUND_TRIP_RETRY_S,
    ROUND_TRIP_WEIGHT,
    Liveness,
)
from reflex.protocol.wire import KEEPALIVE_GRACE_S, KEEPALIVE_S, PING_SIZE

START_S = 1000.0


def test_a_ping_is_due_when_this_side_was_silent_for_its_interval() -> None:
    liveness = Liveness(5.0, START_S)
    assert not liveness.ping_is_due(START_S + 4.9)
    assert liveness.ping_is_due(START_S + 5.0)
    liveness.sent_s = START_S + 5.0
    assert not liveness.ping_is_due(START_S + 9.9)
    assert liveness.ping_is_due(START_S + 10.0)


def test_a_peer_that_named_no_interval_is_dead_after_the_contracts_40_s() -> None:
    liveness = Liveness(5.0, START_S)
    assert KEEPALIVE_S + KEEPALIVE_GRACE_S == 40
    assert not liveness.is_dead(START_S + 40)
    assert liveness.is_dead(START_S + 40.1)
    liveness.received_s = START_S + 30
    assert not liveness.is_dead(START_S + 70)
    assert liveness.is_dead(START_S + 70.1)


def test_a_peer_that_named_its_interval_is_dead_10_s_after_it() -> None:
    liveness = Liveness(5.0, START_S)
    liveness.set_peer_interval(2_500)
    assert not liveness.is_dead(START_S + 12.5)
    assert liveness.is_dead(START_S + 12.6)


def test_how_long_a_peer_may_still_be_silent_counts_from_what_was_heard_last() -> None:
    liveness = Liveness(5.0, START_S)
    assert liveness.silence_left_s(START_S) == 40
    liveness.received_s = START_S + 30
    assert liveness.silence_left_s(START_S + 31) == 39
    assert liveness.silence_left_s(START_S + 71) == -1


def test_a_ping_is_awaited_until_its_own_pong_comes() -> None:
    liveness = Liveness(5.0, START_S)
    assert not liveness.awaits_pong
    assert not liveness.is_measured
    first, second = bytes(liveness.next_ping(START_S)), liveness.next_ping(START_S)
    liveness.pong(memoryview(first), START_S)
    assert liveness.awaits_pong
    assert not liveness.is_measured
    liveness.pong(memoryview(second), START_S)
    assert not liveness.awaits_pong
    assert liveness.is_measured  # although the clock shows no time between
    assert liveness.round_trip_s == 0.0


@given(st.integers(0, 2**64 - 1))
def test_a_peers_interval_is_believed_within_bounds_so_that_a_dead_one_is_always_found(interval_ms: int) -> None:
    liveness = Liveness(5.0, START_S)
    liveness.set_peer_interval(interval_ms)
    assert not liveness.is_dead(START_S + MIN_KEEPALIVE_S + KEEPALIVE_GRACE_S)
    assert liveness.is_dead(START_S + MAX_KEEPALIVE_S + KEEPALIVE_GRACE_S + 1)
    believed_s = min(max(interval_ms / 1000, MIN_KEEPALIVE_S), MAX_KEEPALIVE_S)
    assert not liveness.is_dead(START_S + believed_s + KEEPALIVE_GRACE_S - 0.01)
    assert liveness.is_dead(START_S + believed_s + KEEPALIVE_GRACE_S + 0.01)


def test_pings_are_eight_bytes_and_each_another() -> None:
    liveness = Liveness(5.0, START_S)
    pings = [liveness.next_ping(START_S) for _ in range(300)]
    assert {len(ping) for ping in pings} == {PING_SIZE}
    assert len(set(pings)) == len(pings)


def test_the_first_pong_is_the_round_trip_and_later_ones_move_it_by_a_quarter() -> None:
    liveness = Liveness(5.0, START_S)
    assert liveness.round_trip_s == 0.0
    liveness.pong(memoryview(liveness.next_ping(START_S)), START_S + 0.5)
    assert liveness.round_trip_s == pytest.approx(0.5)
    liveness.pong(memoryview(liveness.next_ping(START_S + 1)), START_S + 1.1)
    assert ROUND_TRIP_WEIGHT == 0.25
    assert liveness.round_trip_s == pytest.approx(0.5 + 0.25 * (0.1 - 0.5))


def test_a_pong_that_answers_no_ping_or_an_older_one_is_ignored() -> None:
    liveness = Liveness(5.0, START_S)
    liveness.pong(memoryview(bytes(PING_SIZE)), START_S + 1)
    assert liveness.round_trip_s == 0.0
    older = liveness.next_ping(START_S)
    newer = liveness.next_ping(START_S + 1)
    liveness.pong(memoryview(older), START_S + 2)
    liveness.pong(memoryview(b"\xff" * PING_SIZE), START_S + 2)
    assert liveness.round_trip_s == 0.0
    liveness.pong(memoryview(newer), START_S + 3)
    assert liveness.round_trip_s == pytest.approx(2.0)
    liveness.pong(memoryview(newer), START_S + 100)
    assert liveness.round_trip_s == pytest.approx(2.0)


def test_a_clock_that_went_back_makes_no_negative_round_trip() -> None:
    liveness = Liveness(5.0, START_S)
    liveness.pong(memoryview(liveness.next_ping(START_S)), START_S - 1)
    assert liveness.round_trip_s == 0.0


@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=20))
def test_the_round_trip_stays_within_its_samples(samples_s: list[float]) -> None:
    liveness = Liveness(5.0, START_S)
    now_s = START_S
    for sample_s in samples_s:
        ping = liveness.next_ping(now_s)
        now_s += sample_s
        liveness.pong(memoryview(ping), now_s)
    assert min(samples_s) - 1e-6 <= liveness.round_trip_s <= max(samples_s) + 1e-6


def test_a_measurement_is_due_at_once_then_once_an_interval_and_never_while_one_is_under_way() -> None:
    liveness = Liveness(5.0, START_S)
    assert liveness.measurement_is_due(START_S)
    ping = liveness.next_ping(START_S)
    assert not liveness.measurement_is_due(START_S + 60)
    liveness.pong(memoryview(ping), START_S + 0.1)
    assert ROUND_TRIP_INTERVAL_S == 1.0
    assert not liveness.measurement_is_due(START_S + 0.9)
    assert liveness.measurement_is_due(START_S + 1.0)


def test_round_trips_too_short_for_the_clock_are_measured_again_soon_but_not_at_every_turn() -> None:
    liveness = Liveness(5.0, START_S)
    assert liveness.measurement_is_due(START_S)
    liveness.pong(memoryview(liveness.next_ping(START_S)), START_S)
    assert liveness.round_trip_s == 0
    assert not liveness.measurement_is_due(START_S + ROUND_TRIP_RETRY_S / 2)
    assert liveness.measurement_is_due(START_S + ROUND_TRIP_RETRY_S * 1.01)
