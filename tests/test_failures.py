"""reflex.net.failures: failed hellos by address, in bounded memory."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.net.failures import FAILURES_PER_S, MAX_ADDRESSES, Failures, source_of

A, B = b"aaaa", b"bbbb"


def tries(failures: Failures, source: bytes, now_s: float, count: int) -> int:
    """How many of so many hellos at this moment are looked at, if all fail."""
    looked_at = 0
    for _ in range(count):
        if not failures.is_over(source, now_s):
            failures.count(source, now_s)
            looked_at += 1
    return looked_at


def test_twenty_at_once_are_looked_at_and_no_more() -> None:
    failures = Failures()
    assert tries(failures, A, 5.0, 1_000) == FAILURES_PER_S == 20
    assert failures.is_over(A, 5.0)


def test_then_twenty_a_second() -> None:
    failures = Failures()
    tries(failures, A, 0.0, 1_000)
    assert sum(tries(failures, A, step / 1_000, 5) for step in range(1, 10_001)) == 10 * FAILURES_PER_S


def test_nineteen_a_second_are_looked_at_for_ever() -> None:
    failures = Failures()
    assert all(tries(failures, A, step / (FAILURES_PER_S - 1), 1) for step in range(1_000))


def test_after_a_second_of_peace_nothing_is_held_against_an_address() -> None:
    failures = Failures()
    tries(failures, A, 100.0, 1_000)
    assert tries(failures, A, 101.0, 1_000) == FAILURES_PER_S


def test_addresses_do_not_pay_for_each_other() -> None:
    failures = Failures()
    tries(failures, A, 1.0, 1_000)
    assert not failures.is_over(B, 1.0)
    assert tries(failures, B, 1.0, 1_000) == FAILURES_PER_S


def test_many_addresses_take_bounded_memory_and_the_oldest_is_forgotten() -> None:
    failures = Failures()
    tracemalloc.start()
    try:
        for number in range(10 * MAX_ADDRESSES):
            failures.count(number.to_bytes(8), 1.0)
            assert len(failures) <= MAX_ADDRESSES
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(failures) == MAX_ADDRESSES
    assert size < 1_000_000
    small = Failures(2)
    tries(small, A, 1.0, FAILURES_PER_S)
    tries(small, B, 1.0, 1)
    small.count(A, 1.0)  # A is the youngest now
    small.count(b"cccc", 1.0)
    assert small.is_over(A, 1.0)
    assert len(small) == 2
    small.count(B, 1.0)  # which was the oldest, and forgotten; now A goes
    assert not small.is_over(A, 1.0)


def test_what_is_made_up_for_is_freed() -> None:
    failures = Failures()
    for number in range(1_000):
        failures.count(number.to_bytes(4), 1.0)
    for step in range(1_000):
        failures.count(A, 2.0 + step)
    assert len(failures) == 1


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.2), st.integers(1, 30)), max_size=50),
    max_addresses=st.integers(1, 4),
)
def test_it_is_never_larger_than_allowed_and_never_lets_more_than_the_rate_through(
    steps: list[tuple[int, float, int]], max_addresses: int
) -> None:
    failures, roomy = Failures(max_addresses), Failures()
    now_s, passed = 0.0, dict.fromkeys(range(6), 0)
    for number, pause_s, count in steps:
        now_s += pause_s
        tries(failures, bytes([number]), now_s, count)
        assert 1 <= len(failures) <= max_addresses
        passed[number] += tries(roomy, bytes([number]), now_s, count)
        assert passed[number] <= FAILURES_PER_S * (1 + now_s) + 1


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.1", "c0000201"),
        ("::ffff:192.0.2.1", "c0000201"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002"),
        ("2001:db8:1:2::", "20010db800010002"),
        ("fe80::1%eth0", "fe80000000000000"),
    ],
)
def test_an_address_is_ipv4_or_the_first_half_of_ipv6(host: str, source: str) -> None:
    assert source_of(host).hex() == source


@pytest.mark.parametrize("host", ["", "example.org", "1.2.3", "2001:db8::x"])
def test_what_is_no_address_is_an_error(host: str) -> None:
    with pytest.raises(OSError, match="illegal IP address"):
        source_of(host)
