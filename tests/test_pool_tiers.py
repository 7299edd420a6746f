"""reflex.pool.TieredPool: which tier is lent, what is kept of each, and what is larger than all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import ForeignBuffer
from reflex.pool import (
    TIER_MAX_FREE,
    TIER_SIZES,
    TIER_SPARE,
    BufferPool,
    TieredPool,
)

SIZE = 64


@pytest.mark.parametrize(
    ("size_bytes", "tier"),
    [
        (0, 2_048),
        (1, 2_048),
        (2_048, 2_048),
        (2_049, 8_192),
        (8_192, 8_192),
        (8_193, 32_768),
        (32_768, 32_768),
        (32_769, 131_072),
        (131_072, 131_072),
    ],
)
def test_the_smallest_tier_that_fits_is_lent(size_bytes: int, tier: int) -> None:
    pool = TieredPool()
    buffer = pool.acquire(size_bytes)
    assert len(buffer) == tier
    assert {size: figures.in_use for size, figures in pool.statistics().items() if figures.in_use} == {str(tier): 1}
    assert pool.tier(tier).in_use == pool.in_use == 1
    pool.release(buffer)
    assert pool.in_use == 0


@given(st.integers(0, TIER_SIZES[-1]))
def test_every_size_up_to_the_top_tier_fits_and_none_smaller_would(size_bytes: int) -> None:
    pool = TieredPool()
    buffer = pool.acquire(size_bytes)
    assert len(buffer) == min(size for size in TIER_SIZES if size >= size_bytes)
    pool.release(buffer)


def test_above_the_top_tier_buffers_are_unpooled_and_counted_as_such() -> None:
    pool = TieredPool()
    size_bytes = TIER_SIZES[-1] + 1
    first, second = pool.acquire(size_bytes), pool.acquire(2 * size_bytes)
    assert (len(first), len(second)) == (size_bytes, 2 * size_bytes)
    assert (pool.unpooled_created, pool.unpooled_in_use, pool.in_use) == (2, 2, 2)
    pool.release(first)
    pool.release(second, 5)
    assert (pool.unpooled_created, pool.unpooled_in_use, pool.in_use) == (2, 0, 0)
    third = pool.acquire(size_bytes)
    assert third is not first
    assert pool.unpooled_created == 3
    pool.release(third)
    assert all(figures.acquired == 0 for figures in pool.statistics().values())


def test_an_unpooled_buffer_cannot_be_returned_twice_or_elsewhere() -> None:
    pool, other = TieredPool(), TieredPool()
    buffer = pool.acquire(TIER_SIZES[-1] + 1)
    with pytest.raises(ForeignBuffer):
        other.release(buffer)
    pool.release(buffer)
    with pytest.raises(ForeignBuffer):
        pool.release(buffer)
    assert (pool.in_use, other.in_use) == (0, 0)


@pytest.mark.parametrize("size_bytes", TIER_SIZES)
def test_a_tiers_buffer_cannot_be_returned_twice_or_elsewhere(size_bytes: int) -> None:
    pool, other = TieredPool(), TieredPool()
    buffer = pool.acquire(size_bytes)
    with pytest.raises(ForeignBuffer):
        other.release(buffer)
    with pytest.raises(ForeignBuffer):
        pool.release(buffer[: size_bytes - 1])
    pool.release(buffer)
    with pytest.raises(ForeignBuffer):
        pool.release(buffer)
    assert (pool.in_use, other.in_use) == (0, 0)


@pytest.mark.parametrize("size", TIER_SIZES)
def test_tiers_wipe_the_used_part_and_little_more(size: int) -> None:
    pool = TieredPool()
    step = size // 64
    for used_bytes, wiped_bytes in ((1, step), (step, step), (step + 1, 2 * step), (size - 1, size), (size + 1, size)):
        buffer = pool.acquire(size)
        buffer[:] = b"\xff" * size
        pool.release(buffer, used_bytes)
        again = pool.acquire(size)
        assert bytes(again) == bytes(wiped_bytes) + b"\xff" * (size - wiped_bytes)
        pool.release(again)


def test_a_tier_takes_back_what_another_one_lent_into_that_one() -> None:
    """They share their slots, so that no buffer comes into a wrong tier."""
    pool = TieredPool()
    small, large = pool.tier(TIER_SIZES[0]), pool.tier(TIER_SIZES[1])
    buffer = large.acquire()
    small.release(buffer)
    assert (small.in_use, large.in_use) == (0, 0)
    with pytest.raises(ForeignBuffer):
        large.release(buffer)
    assert large.acquire() is buffer
    large.release(buffer)


def test_each_tier_keeps_what_its_limit_says() -> None:
    assert {size: TieredPool().tier(size).max_free for size in TIER_SIZES} == TIER_MAX_FREE
    assert {TieredPool(7).tier(size).max_free for size in TIER_SIZES} == {7}
    limits = dict(zip(TIER_SIZES, itertools.count(1), strict=False))
    assert {size: TieredPool(limits).tier(size).max_free for size in TIER_SIZES} == limits


def test_trimming_leaves_what_was_needed_since_the_last_time() -> None:
    pool = BufferPool(100, 50, preallocate=10)
    burst = [pool.acquire() for _ in range(30)]
    kept, rest = burst[0], burst[1:]
    for buffer in rest:
        pool.release(buffer)
    assert pool.trim() == 0, "all 30 were needed at once a moment ago"
    assert (pool.statistics().free, pool.statistics().high_water) == (29, 30)
    twin = pool.acquire()
    pool.release(twin)
    assert pool.trim(spare=3) == 26, "one more than is lent was needed since; three are spared"
    assert (pool.statistics().free, pool.statistics().high_water) == (3, 30)
    assert pool.trim() == 3
    pool.release(kept)
    assert pool.trim() == 0, "it was lent a moment ago"
    assert pool.trim() == 1
    assert pool.statistics().free == 0
    with pytest.raises(ForeignBuffer):
        pool.release(twin)


def test_every_tier_is_trimmed_to_what_it_may_spare() -> None:
    pool = TieredPool()
    for size in TIER_SIZES:
        for buffer in [pool.acquire(size) for _ in range(TIER_SPARE[size] + 5)]:
            pool.release(buffer)
    pool.trim()
    pool.trim()
    assert {size: pool.tier(size).statistics().free for size in TIER_SIZES} == TIER_SPARE


def test_a_tiered_pool_of_nothing_allocates_every_time() -> None:
    pool = TieredPool(0)
    for size in TIER_SIZES:
        pool.release(pool.acquire(size))
        pool.release(pool.acquire(size))
        figures = pool.tier(size).statistics()
        assert (figures.created, figures.hits, figures.free) == (2, 0, 0)


def test_a_tier_is_asked_for_by_its_exact_size() -> None:
    pool = TieredPool()
    assert pool.tier(2_048).size_bytes == 2_048
    with pytest.raises(KeyError):
        pool.tier(2_047)
