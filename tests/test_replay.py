"""The replay set: exact, bounded, and never more forgetful than it admits."""

from __future__ import annotations

import hashlib
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import Replayed
from reflex.protocol.replay import DEFAULT_CAPACITY, DEFAULT_USER_CAPACITY, ReplaySet
from reflex.protocol.wire import HELLO_TIME_LIMIT_S

NOW = 1_900_000_000
LIMIT = HELLO_TIME_LIMIT_S
ALICE, BOB = b"a" * 16, b"b" * 16


def key(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


def held(replay: ReplaySet, user_id: bytes) -> int:
    return sum(len(bucket.get(user_id, ())) for bucket in replay._buckets.values())


def test_default_capacity_is_the_contracts() -> None:
    assert ReplaySet(NOW).capacity == DEFAULT_CAPACITY == 2**20
    assert ReplaySet(NOW).user_capacity == DEFAULT_USER_CAPACITY == 2**14
    assert ReplaySet(NOW, capacity=3).user_capacity == 1


def test_a_key_is_taken_once_whatever_its_time() -> None:
    replay = ReplaySet(NOW - LIMIT)
    replay.check_and_insert(key(1), ALICE, NOW, NOW)
    for time_s in (NOW, NOW + 1, NOW - 1):
        with pytest.raises(Replayed):
            replay.check_and_insert(key(1), ALICE, time_s, NOW)
    assert len(replay) == 1
    replay.check_and_insert(key(2), ALICE, NOW, NOW)
    assert len(replay) == 2


def test_a_key_is_kept_until_its_time_and_120_seconds() -> None:
    replay = ReplaySet(NOW)
    replay.check_and_insert(key(1), ALICE, NOW, NOW)
    with pytest.raises(Replayed, match="seen before"):
        replay.check_and_insert(key(1), ALICE, NOW, NOW + LIMIT)
    assert len(replay) == 1
    replay.check_and_insert(key(2), ALICE, NOW + LIMIT + 1, NOW + LIMIT + 1)
    assert len(replay) == 1  # the first was freed


def test_a_hello_from_before_the_start_is_refused() -> None:
    replay = ReplaySet(NOW)
    with pytest.raises(Replayed, match="knows nothing"):
        replay.check_and_insert(key(1), ALICE, NOW - 1, NOW)
    assert len(replay) == 0
    assert replay.known_since_s == NOW
    replay.check_and_insert(key(1), ALICE, NOW, NOW)


def test_a_full_set_refuses_until_keys_expire() -> None:
    replay = ReplaySet(NOW, capacity=3, user_capacity=3)
    for number, time_s in enumerate((NOW, NOW + 1, NOW + 1)):
        replay.check_and_insert(key(number), ALICE, time_s, NOW)
    with pytest.raises(Replayed, match="full"):
        replay.check_and_insert(key(3), ALICE, NOW + 1, NOW + LIMIT)
    with pytest.raises(Replayed, match="seen before"):
        replay.check_and_insert(key(0), ALICE, NOW, NOW + LIMIT)
    replay.check_and_insert(key(3), ALICE, NOW + 1, NOW + LIMIT + 1)
    assert len(replay) == 3
    with pytest.raises(Replayed, match="full"):
        replay.check_and_insert(key(4), ALICE, NOW + 2, NOW + LIMIT + 1)
    replay.check_and_insert(key(4), ALICE, NOW + 2, NOW + LIMIT + 2)
    assert len(replay) == 1


def test_a_user_who_makes_hellos_without_end_is_refused_and_others_go_on() -> None:
    replay = ReplaySet(NOW, capacity=64 * 10)
    for number in range(10):
        replay.check_and_insert(key(number), ALICE, NOW + number, NOW)
    for number in range(10, 1_000):
        with pytest.raises(Replayed, match="too many hellos of one user"):
            replay.check_and_insert(key(number), ALICE, NOW, NOW)
    assert len(replay) == 10
    replay.check_and_insert(key(1_000), BOB, NOW, NOW)
    with pytest.raises(Replayed, match="seen before"):
        replay.check_and_insert(key(0), BOB, NOW, NOW)
    # Each of the first one's keys that expires makes room for one.
    replay.check_and_insert(key(1_001), ALICE, NOW + LIMIT + 1, NOW + LIMIT + 1)
    with pytest.raises(Replayed, match="too many hellos of one user"):
        replay.check_and_insert(key(1_002), ALICE, NOW + LIMIT + 1, NOW + LIMIT + 1)
    assert (held(replay, ALICE), held(replay, BOB), replay._held) == (10, 0, {ALICE: 10})


def test_a_set_that_was_full_is_small_again_when_its_keys_have_expired() -> None:
    """Memory is bounded while it is full, and given back afterwards."""
    count = 20_000
    tracemalloc.start()
    try:
        replay = ReplaySet(NOW, capacity=count, user_capacity=count)
        empty_bytes = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            replay.check_and_insert(key(number), ALICE, NOW + number % LIMIT, NOW)
        each_bytes = (tracemalloc.get_traced_memory()[0] - empty_bytes) / count
        for number in range(count, count + 1_000):
            with pytest.raises(Replayed, match="full"):
                replay.check_and_insert(key(number), BOB, NOW, NOW)
        full_bytes = tracemalloc.get_traced_memory()[0] - empty_bytes
        replay.check_and_insert(key(count), BOB, NOW + 2 * LIMIT + 1, NOW + 2 * LIMIT + 1)
        freed_bytes = tracemalloc.get_traced_memory()[0] - empty_bytes
    finally:
        tracemalloc.stop()
    assert each_bytes < 200  # 2**20 keys: below 200 MB
    assert full_bytes < each_bytes * count + 100_000  # a thousand keys that were kept would be more
    # All but the set's own table, which Python makes smaller when it is next filled.
    assert full_bytes - freed_bytes > count * sys.getsizeof(key(0))
    assert len(replay) == 1


def test_a_clock_that_steps_back_does_not_welcome_what_was_freed() -> None:
    replay = ReplaySet(NOW)
    replay.check_and_insert(key(1), ALICE, NOW, NOW)
    later = NOW + LIMIT + 1
    replay.check_and_insert(key(2), ALICE, later, later)
    assert replay.known_since_s == NOW + 1
    with pytest.raises(Replayed, match="knows nothing"):
        replay.check_and_insert(key(1), ALICE, NOW, later - 5)
    replay.check_and_insert(key(3), ALICE, later - 5, later - 5)
    with pytest.raises(Replayed, match="seen before"):
        replay.check_and_insert(key(2), ALICE, later, later - 5)


def test_a_clock_wrongly_ahead_for_a_while_does_not_shut_the_server() -> None:
    replay = ReplaySet(NOW)
    replay.check_and_insert(key(1), ALICE, NOW, NOW)
    year = 365 * 86_400
    with pytest.raises(Replayed):
        replay.check_and_insert(key(1), ALICE, NOW, NOW + year)  # freed by the wrong clock, and still refused
    assert len(replay) == 0
    with pytest.raises(Replayed):
        replay.check_and_insert(key(1), ALICE, NOW, NOW + 1)
    replay.check_and_insert(key(2), ALICE, NOW + 1, NOW + 1)


def test_what_an_earlier_run_took_is_refused_and_freed_and_is_no_users() -> None:
    replay = ReplaySet(NOW, capacity=4, user_capacity=1)
    for number, time_s in ((1, NOW + 2), (2, NOW), (1, NOW + 1)):  # the latest of a key comes first
        replay.restore(key(number), time_s)
    assert len(replay) == 2
    for number, time_s in ((1, NOW + 2), (2, NOW)):
        with pytest.raises(Replayed, match="seen before"):
            replay.check_and_insert(key(number), ALICE, time_s, NOW)
    for number, user_id in ((3, ALICE), (4, BOB)):
        replay.check_and_insert(key(number), user_id, NOW, NOW)
    with pytest.raises(Replayed, match="full"):
        replay.check_and_insert(key(5), b"c" * 16, NOW, NOW)
    later = NOW + LIMIT + 2
    with pytest.raises(Replayed, match="seen before"):  # the earlier of the two times has expired
        replay.check_and_insert(key(1), ALICE, NOW + 2, later)
    with pytest.raises(Replayed, match="knows nothing"):
        replay.check_and_insert(key(1), ALICE, NOW + 2, later + 1)
    assert (len(replay), replay._held, replay.known_since_s) == (0, {}, NOW + 3)


Step = tuple[int, int, int]  # key number, hello time less the clock, step of the clock


@given(
    steps=st.lists(st.tuples(st.integers(0, 12), st.integers(-LIMIT, LIMIT), st.integers(-30, 90))),
    capacity=st.integers(1, 8),
)
def test_no_hello_is_ever_taken_twice_and_nothing_is_leaked(steps: list[Step], capacity: int) -> None:
    """A hello is a key with its time: whatever the clock does, the same hello is never taken again."""
    replay = ReplaySet(NOW - 60, capacity, user_capacity=capacity)
    taken: set[tuple[bytes, int]] = set()
    now_s = NOW
    for number, offset_s, step_s in steps:
        now_s += step_s
        hello = (key(number), now_s + offset_s)
        known_before, length_before = replay.known_since_s, len(replay)
        try:
            replay.check_and_insert(hello[0], ALICE, hello[1], now_s)
        except Replayed:
            assert len(replay) <= length_before
        else:
            assert hello not in taken
            assert hello[1] >= replay.known_since_s
            taken.add(hello)
        assert len(replay) <= capacity
        assert replay.known_since_s >= known_before
        assert len(replay) == held(replay, ALICE) == replay._held.get(ALICE, 0)
        assert sorted(replay._seconds) == sorted(replay._buckets)
        assert all(time_s + LIMIT >= now_s for time_s in replay._buckets)


@given(hellos=st.lists(st.tuples(st.integers(0, 30), st.integers(-LIMIT, LIMIT), st.integers(0, 60)), max_size=60))
def test_with_a_steady_clock_it_equals_a_set_that_forgets_nothing(hellos: list[Step]) -> None:
    """Nothing fresh is refused, as long as keys differ where hellos do and the clock does not step back."""
    replay = ReplaySet(NOW - LIMIT)
    taken: set[bytes] = set()
    now_s = NOW
    for number, offset_s, step_s in hellos:
        now_s += step_s
        time_s = now_s + offset_s
        ephemeral = hashlib.sha256(f"{number} {time_s}".encode()).digest()
        if ephemeral in taken:
            with pytest.raises(Replayed):
                replay.check_and_insert(ephemeral, ALICE, time_s, now_s)
        else:
            replay.check_and_insert(ephemeral, ALICE, time_s, now_s)
            taken.add(ephemeral)
