"""reflex.net.tunnels: who gets which tunnel, and which are to be closed."""

from __future__ import annotations

from dataclasses import dataclass, field

from reflex.net.tunnels import TunnelPool


@dataclass(eq=False)
class FakeTunnel:
    stream_count: int = 0
    has_room: bool = True
    is_blocked: bool = False
    is_suspect: bool = False
    is_bulk: bool = False
    idle_since_s: float = field(default=0.0)


A, B = "server a", "server b"


def make_pool(
    *, min_idle: int = 0, max_idle: int = 2, idle_timeout_s: float = 60, max_streams: int = 3
) -> TunnelPool[FakeTunnel]:
    return TunnelPool(min_idle=min_idle, max_idle=max_idle, idle_timeout_s=idle_timeout_s, max_streams=max_streams)


def test_an_empty_pool_has_none_to_give() -> None:
    pool = make_pool()
    assert pool.acquire(A) is None
    assert pool.count(A) == 0
    assert pool.idle_count() == pool.idle_count(A) == len(pool) == 0
    assert list(pool) == []
    assert pool.expire(1e9) == []
    assert pool.missing() == 0


def test_a_tunnel_is_shared_until_it_is_full() -> None:
    pool = make_pool(max_streams=2)
    first, second = FakeTunnel(), FakeTunnel()
    pool.add(A, first)
    pool.add(A, second)
    assert pool.acquire(A) is first
    first.stream_count = 1
    assert pool.acquire(A) is first
    first.stream_count = 2
    assert pool.acquire(A) is second
    second.stream_count = 2
    assert pool.acquire(A) is None
    assert pool.count(A) == 2
    assert pool.count(B) == 0
    assert pool.acquire(B) is None


def test_one_that_does_not_answer_gets_nothing_and_counts_for_nothing_but_is_kept() -> None:
    pool = make_pool(min_idle=1, max_idle=8)
    suspect = FakeTunnel(is_suspect=True)
    pool.add(A, suspect)
    assert pool.acquire(A) is None
    assert pool.count(A) == 0
    assert pool.missing() == 1
    assert pool.expire(0.0, A) == []
    pool.add(A, other := FakeTunnel())
    assert pool.acquire(A) is other
    assert pool.missing() == 0
    assert pool.expire(1e9, A) == []  # the one that answers is the one that is to stay
    suspect.is_suspect = False
    assert pool.acquire(A) is suspect


def test_one_that_is_on_its_way_out_is_no_reason_to_close_another() -> None:
    pool = make_pool(max_idle=1)
    pool.add(A, FakeTunnel(idle_since_s=1))
    pool.add(A, leaving := FakeTunnel(has_room=False, idle_since_s=2))
    assert pool.expire(3) == [(A, leaving)]


def test_a_tunnel_without_room_is_passed_over() -> None:
    pool = make_pool()
    pool.add(A, FakeTunnel(has_room=False))
    assert pool.acquire(A) is None
    pool.add(A, other := FakeTunnel())
    assert pool.acquire(A) is other


def test_one_that_is_not_blocked_comes_first_then_the_blocked_one_with_the_fewest_streams() -> None:
    pool = make_pool()
    two, one = FakeTunnel(stream_count=2, is_blocked=True), FakeTunnel(stream_count=1, is_blocked=True)
    pool.add(A, two)
    pool.add(A, one)
    pool.add(A, FakeTunnel(stream_count=2, is_blocked=True))
    assert pool.acquire(A) is one
    pool.add(A, free := FakeTunnel(stream_count=2))
    assert pool.acquire(A) is free


def test_what_comes_beside_bulk_data_goes_elsewhere_if_it_can() -> None:
    pool = make_pool(max_idle=8)
    assert not pool.wants_spare(A)
    first, second, third = (FakeTunnel(is_bulk=True), FakeTunnel(), FakeTunnel(is_blocked=True))
    pool.add(A, first)
    assert pool.wants_spare(A)
    assert not pool.wants_spare(B)
    pool.add(A, second)
    pool.add(A, third)
    assert not pool.wants_spare(A)
    assert pool.acquire(A) is second
    second.is_bulk = True
    assert pool.acquire(A) is first
    first.has_room = False
    assert pool.acquire(A) is second
    second.is_blocked = True
    assert pool.acquire(A) is second
    second.stream_count = 1
    assert pool.acquire(A) is third
    third.is_suspect = True
    assert pool.wants_spare(A)


def test_who_keeps_no_idle_tunnels_keeps_no_spare() -> None:
    pool = make_pool(max_idle=0)
    pool.add(A, FakeTunnel(is_bulk=True))
    assert not pool.wants_spare(A)


def test_the_spare_beside_bulk_data_stays_for_as_long_as_there_is_bulk_data() -> None:
    pool = make_pool(idle_timeout_s=60)
    bulk, spare, other = FakeTunnel(stream_count=1, is_bulk=True), FakeTunnel(), FakeTunnel(idle_since_s=5)
    for each in (bulk, spare, other):
        pool.add(A, each)
    assert pool.expire(100) == [(A, spare)]
    pool.remove(A, spare)
    assert pool.expire(100) == []
    bulk.is_bulk = False
    assert pool.expire(100) == [(A, other)]


def test_a_tunnel_is_idle_from_its_last_streams_end() -> None:
    pool = make_pool()
    tunnel = FakeTunnel(stream_count=1)
    pool.add(A, tunnel)
    pool.release(tunnel, 10)
    assert tunnel.idle_since_s == 0
    assert pool.idle_count() == 0
    tunnel.stream_count = 0
    pool.release(tunnel, 20)
    assert tunnel.idle_since_s == 20
    assert pool.idle_count() == pool.idle_count(A) == 1
    assert pool.idle_count(B) == 0


def test_a_tunnel_that_is_idle_too_long_expires_and_stays_until_it_is_removed() -> None:
    pool = make_pool(idle_timeout_s=60)
    old, busy = FakeTunnel(idle_since_s=0), FakeTunnel(stream_count=1)
    pool.add(A, old)
    pool.add(A, busy)
    assert pool.expire(59.9) == []
    assert pool.expire(60) == [(A, old)]
    assert pool.count(A) == 2
    pool.remove(A, old)
    pool.remove(A, old)
    pool.remove(B, old)
    assert pool.count(A) == len(pool) == 1
    pool.remove(A, busy)
    assert len(pool) == 0


def test_above_max_idle_the_longest_idle_go_per_server() -> None:
    pool = make_pool(max_idle=1)
    young, old, elsewhere = FakeTunnel(idle_since_s=20), FakeTunnel(idle_since_s=10), FakeTunnel(idle_since_s=5)
    pool.add(A, young)
    pool.add(A, old)
    pool.add(B, elsewhere)
    assert pool.expire(30) == [(A, old)]
    assert sorted(map(id, pool)) == sorted(map(id, [young, old, elsewhere]))


def test_an_idle_tunnel_that_takes_no_more_streams_goes_at_once() -> None:
    pool = make_pool()
    pool.add(A, tunnel := FakeTunnel(has_room=False))
    assert pool.expire(0) == [(A, tunnel)]
    tunnel.stream_count = 1
    assert pool.expire(1e9) == []


def test_as_many_are_missing_as_min_idle_asks_for_to_whatever_server() -> None:
    pool = make_pool(min_idle=2)
    assert pool.missing() == 2
    pool.add(B, FakeTunnel(stream_count=1))
    assert pool.missing() == 1
    pool.add(A, FakeTunnel(has_room=False))
    assert pool.missing() == 1
    pool.add(A, FakeTunnel())
    pool.add(A, FakeTunnel())
    assert pool.missing() == 0


def test_min_idle_tunnels_to_the_favourite_stay_however_old() -> None:
    pool = make_pool(min_idle=1)
    first, second, elsewhere = FakeTunnel(idle_since_s=0), FakeTunnel(idle_since_s=1), FakeTunnel()
    pool.add(A, first)
    pool.add(A, second)
    pool.add(B, elsewhere)
    assert pool.expire(1e9, A) == [(A, first), (B, elsewhere)]
    pool.remove(A, first)
    pool.remove(B, elsewhere)
    assert pool.expire(1e9, A) == []


def test_a_tunnel_that_is_being_closed_does_not_stand_in_the_way_of_another() -> None:
    # Idle and without room: it only waits for its peer's FIN.
    pool = make_pool()
    pool.add(A, FakeTunnel(has_room=False))
    assert pool.count(A) == 0
    assert len(pool) == 1
