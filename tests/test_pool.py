"""reflex.pool: who holds what, what is kept, what is wiped, and figures that add up."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from reflex.errors import ForeignBuffer, PoolError, WrongSize
from reflex.pool import (
    TIER_SIZES,
    BufferPool,
    ObjectPool,
    Pool,
    PoolStatistics,
    TieredPool,
)

ROOT = Path(__file__).parents[1]
SIZE = 64
ZEROS = bytes(SIZE)
FILLED = b"\xff" * SIZE


def assert_adds_up(figures: PoolStatistics) -> None:
    """What the docstring of PoolStatistics promises."""
    assert figures.acquired == figures.hits + figures.misses == figures.released + figures.in_use
    assert min(figures.acquired, figures.hits, figures.misses, figures.released, figures.in_use) >= 0
    assert figures.hit_rate == (figures.hits / figures.acquired if figures.acquired else 0.0)
    assert figures.in_use <= figures.high_water <= figures.acquired
    assert figures.in_use + figures.free <= figures.created


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can, so that races show."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(number)`` in that many threads; raise what any of them raised."""
    with ThreadPoolExecutor(count) as executor:
        for done in [executor.submit(work, number) for number in range(count)]:
            done.result()


# Lending and returning.


def test_a_buffer_has_the_pools_size_and_is_writable_and_zero() -> None:
    pool = BufferPool(SIZE, 1)
    buffer = pool.acquire()
    assert isinstance(buffer, memoryview)
    assert bytes(buffer) == ZEROS
    assert not buffer.readonly
    pool.release(buffer)


def test_a_returned_buffer_is_lent_again() -> None:
    pool = BufferPool(SIZE, 1)
    first = pool.acquire()
    pool.release(first)
    second = pool.acquire()
    assert second is first
    pool.release(second)


def test_two_borrowers_never_share_a_buffer() -> None:
    pool = BufferPool(SIZE, 2, preallocate=1)
    first, second = pool.acquire(), pool.acquire()
    assert first is not second
    first[:] = FILLED
    assert bytes(second) == ZEROS
    pool.release(first)
    pool.release(second)


def test_a_second_return_is_refused_and_the_pool_unharmed() -> None:
    pool = BufferPool(SIZE, 4)
    buffer = pool.acquire()
    pool.release(buffer)
    before = pool.statistics()
    with pytest.raises(ForeignBuffer) as caught:
        pool.release(buffer)
    assert caught.value.pool == pool.name
    assert pool.statistics() == before
    first, second = pool.acquire(), pool.acquire()
    assert first is not second


@pytest.mark.parametrize(
    "foreign",
    [
        lambda lent: memoryview(bytearray(SIZE)),
        lambda lent: BufferPool(SIZE, 1).acquire(),
        lambda lent: lent[:],
        lambda lent: lent.obj,
    ],
    ids=["made by hand", "of another pool", "a view of a lent one", "the memory of a lent one"],
)
def test_a_foreign_buffer_is_refused_untouched_and_the_pool_unharmed(
    foreign: Callable[[memoryview], memoryview],
) -> None:
    pool = BufferPool(SIZE, 4)
    lent = pool.acquire()
    buffer = foreign(lent)
    buffer[:] = FILLED
    before = pool.statistics()
    with pytest.raises(ForeignBuffer):
        pool.release(buffer)
    assert bytes(buffer) == FILLED
    assert pool.statistics() == before
    pool.release(lent)


@pytest.mark.parametrize("size_bytes", [0, 1, SIZE - 1, SIZE + 1])
def test_a_buffer_of_another_size_is_refused_and_the_pool_unharmed(size_bytes: int) -> None:
    pool = BufferPool(SIZE, 4)
    lent = pool.acquire()
    before = pool.statistics()
    with pytest.raises(WrongSize) as caught:
        pool.release(memoryview(bytearray(size_bytes)))
    assert (caught.value.pool, caught.value.size_bytes, caught.value.expected_bytes) == (pool.name, size_bytes, SIZE)
    assert pool.statistics() == before
    pool.release(lent)


def test_a_slice_of_a_lent_buffer_is_of_another_size() -> None:
    pool = BufferPool(SIZE, 4)
    lent = pool.acquire()
    with pytest.raises(WrongSize):
        pool.release(lent[1:])
    pool.release(lent)


# Wiping.


@pytest.mark.parametrize(
    ("used_bytes", "wiped_bytes"),
    [(None, SIZE), (0, 0), (1, 1), (SIZE // 2, SIZE // 2), (SIZE, SIZE), (SIZE + 1, SIZE), (100 * SIZE, SIZE)],
)
def test_the_used_part_and_no_more_is_wiped(used_bytes: int | None, wiped_bytes: int) -> None:
    pool = BufferPool(SIZE, 1)
    buffer = pool.acquire()
    buffer[:] = FILLED
    pool.release(buffer, used_bytes)
    again = pool.acquire()
    assert again is buffer
    assert bytes(again) == ZEROS[:wiped_bytes] + FILLED[wiped_bytes:]
    pool.release(again)


def test_what_goes_to_the_allocator_is_wiped_too() -> None:
    pool = BufferPool(SIZE, 0)
    buffer = pool.acquire()
    buffer[:] = FILLED
    pool.release(buffer)
    assert bytes(buffer) == ZEROS


# Limits.


def test_no_more_than_max_free_are_kept() -> None:
    pool = BufferPool(SIZE, 3)
    lent = [pool.acquire() for _ in range(5)]
    for buffer in lent:
        pool.release(buffer)
    figures = pool.statistics()
    assert (figures.free, figures.created, figures.released, figures.high_water) == (3, 5, 5, 5)
    assert_adds_up(figures)


def test_what_is_over_max_free_leaves_the_pool_for_good() -> None:
    class Thing:
        pass

    pool = ObjectPool(Thing, lambda _: None, max_free=1)
    kept, over = pool.acquire(), pool.acquire()
    pool.release(kept)
    pool.release(over)
    gone = weakref.ref(over)
    del over
    gc.collect()
    assert gone() is None


def test_a_pool_that_keeps_nothing_always_creates() -> None:
    pool = BufferPool(SIZE, 0)
    for _ in range(3):
        pool.release(pool.acquire())
    figures = pool.statistics()
    assert (figures.created, figures.misses, figures.hits, figures.free) == (3, 3, 0, 0)


def test_preallocated_buffers_are_created_at_once_and_lent_as_hits() -> None:
    pool = BufferPool(SIZE, 4, preallocate=2)
    assert pool.statistics() == PoolStatistics(
        acquired=0, released=0, created=2, hits=0, misses=0, hit_rate=0.0, in_use=0, free=2, high_water=0
    )
    lent = [pool.acquire() for _ in range(3)]
    assert pool.statistics() == PoolStatistics(
        acquired=3, released=0, created=3, hits=2, misses=1, hit_rate=2 / 3, in_use=3, free=0, high_water=3
    )
    for buffer in lent:
        pool.release(buffer)
    assert pool.statistics() == PoolStatistics(
        acquired=3, released=3, created=3, hits=2, misses=1, hit_rate=2 / 3, in_use=0, free=3, high_water=3
    )


@pytest.mark.parametrize(("max_free", "preallocate"), [(-1, 0), (1, -1), (1, 2), (0, 1)])
def test_limits_that_make_no_sense_are_refused(max_free: int, preallocate: int) -> None:
    with pytest.raises(PoolError, match=f"max_free {max_free} and preallocate {preallocate}"):
        BufferPool(SIZE, max_free, preallocate)


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_a_buffer_needs_a_byte(size_bytes: int) -> None:
    with pytest.raises(PoolError, match="expected 1 or more"):
        BufferPool(size_bytes, 1)


def test_a_pool_has_a_name_for_errors_and_reports() -> None:
    assert BufferPool(SIZE, 1).name == f"pool of {SIZE}-byte buffers"
    assert BufferPool(SIZE, 1, name="hellos").name == "hellos"
    assert ObjectPool(list, list.clear, 1).name == "pool of objects"


# Statistics.


def test_high_water_is_the_most_that_was_lent_at_a_time() -> None:
    pool = BufferPool(SIZE, 8)
    for count in (2, 5, 3):
        lent = [pool.acquire() for _ in range(count)]
        assert pool.in_use == count
        for buffer in lent:
            pool.release(buffer)
    assert pool.statistics().high_water == 5
    assert pool.in_use == 0


class PoolMachine(RuleBasedStateMachine):
    """A pool against plain counts: whatever is lent, returned, or returned wrongly."""

    lent = Bundle("lent")
    returned = Bundle("returned")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool(SIZE, 3, preallocate=1)
        self.holds: dict[int, memoryview] = {}
        self.counts = {"acquired": 0, "released": 0, "high_water": 0}

    @rule(target=lent)
    def acquire(self) -> memoryview:
        buffer = self.pool.acquire()
        assert id(buffer) not in self.holds
        assert bytes(buffer) == ZEROS
        buffer[:] = FILLED
        self.holds[id(buffer)] = buffer
        self.counts["acquired"] += 1
        self.counts["high_water"] = max(self.counts["high_water"], len(self.holds))
        return buffer

    @rule(target=returned, buffer=consumes(lent))
    def release(self, buffer: memoryview) -> memoryview:
        self.pool.release(buffer)
        del self.holds[id(buffer)]
        self.counts["released"] += 1
        return buffer

    @rule(buffer=returned)
    def return_again(self, buffer: memoryview) -> None:
        if id(buffer) not in self.holds:
            with pytest.raises(ForeignBuffer):
                self.pool.release(buffer)

    @rule(size_bytes=st.integers(0, 2 * SIZE))
    def return_what_was_not_lent(self, size_bytes: int) -> None:
        with pytest.raises(PoolError):
            self.pool.release(memoryview(bytearray(size_bytes)))

    @invariant()
    def figures_are_those_counted_here(self) -> None:
        figures = self.pool.statistics()
        assert_adds_up(figures)
        assert figures.in_use == len(self.holds)
        assert figures.free <= self.pool.max_free
        assert {name: getattr(figures, name) for name in self.counts} == self.counts


TestPoolMachine = PoolMachine.TestCase


# Threads.


def test_a_hundred_threads_at_once_hold_a_hundred_buffers(eager_switches: None) -> None:
    threads = 100
    pool = BufferPool(SIZE, threads // 2, preallocate=threads // 4)
    all_hold = Barrier(threads, timeout=60)
    held: list[memoryview] = []

    def work(number: int) -> None:
        buffer = pool.acquire()
        try:
            buffer[:] = bytes([number]) * SIZE
            held.append(buffer)
            all_hold.wait()
            assert bytes(buffer) == bytes([number]) * SIZE
        finally:
            pool.release(buffer)

    run_in_threads(threads, work)
    assert len({id(buffer) for buffer in held}) == threads
    figures = pool.statistics()
    assert_adds_up(figures)
    assert (figures.acquired, figures.in_use, figures.high_water) == (threads, 0, threads)
    assert (figures.created, figures.misses, figures.free) == (threads, threads * 3 // 4, threads // 2)


def test_fifty_workers_never_get_what_another_holds_nor_what_another_wrote(eager_switches: None) -> None:
    workers, rounds = 50, 200
    pool = BufferPool(SIZE, 10, preallocate=5)
    holders: dict[int, int] = {}

    def work(worker: int) -> None:
        for turn in range(rounds):
            buffer = pool.acquire()
            assert holders.setdefault(id(buffer), worker) == worker, "lent twice at a time"
            assert bytes(buffer) == ZEROS, "not wiped"
            used_bytes = (worker * rounds + turn) % SIZE + 1
            buffer[:used_bytes] = bytes([worker + 1]) * used_bytes
            assert bytes(buffer[:used_bytes]) == bytes([worker + 1]) * used_bytes, "written by another"
            del holders[id(buffer)]
            pool.release(buffer, used_bytes)

    run_in_threads(workers, work)
    figures = pool.statistics()
    assert_adds_up(figures)
    assert (figures.acquired, figures.released, figures.in_use) == (workers * rounds, workers * rounds, 0)
    assert figures.created == 5 + figures.misses
    assert 5 <= figures.free <= 10
    assert figures.high_water <= workers


def test_of_many_threads_that_return_the_same_buffer_one_succeeds(eager_switches: None) -> None:
    threads = 20
    pool = BufferPool(SIZE, 4)
    buffer = pool.acquire()
    start = Barrier(threads, timeout=60)
    outcomes: list[str] = []

    def work(_: int) -> None:
        start.wait()
        try:
            pool.release(buffer)
            outcomes.append("returned")
        except ForeignBuffer:
            outcomes.append("refused")

    run_in_threads(threads, work)
    assert sorted(outcomes) == ["refused"] * (threads - 1) + ["returned"]
    assert pool.statistics().free == 1


def test_tiers_are_safe_from_many_threads(eager_switches: None) -> None:
    workers, rounds = 16, 40
    pool = TieredPool(4)
    sizes = (1, *TIER_SIZES, TIER_SIZES[-1] + 1)

    def work(worker: int) -> None:
        for turn in range(rounds):
            size_bytes = sizes[(worker + turn) % len(sizes)]
            buffer = pool.acquire(size_bytes)
            assert not any(buffer[:16])
            buffer[:16] = bytes([worker + 1]) * min(16, len(buffer))
            assert bytes(buffer[:16]) == bytes([worker + 1]) * 16
            pool.release(buffer, 16)

    run_in_threads(workers, work)
    assert pool.in_use == 0
    assert sum(figures.acquired for figures in pool.statistics().values()) + pool.unpooled_created == workers * rounds
    for figures in pool.statistics().values():
        assert_adds_up(figures)


def test_a_buffer_may_be_returned_by_another_thread() -> None:
    pool = BufferPool(SIZE, 1)
    thread = Thread(target=pool.release, args=(pool.acquire(),))
    thread.start()
    thread.join()
    assert pool.in_use == 0


# Objects.


def test_an_object_is_reset_when_it_is_returned() -> None:
    pool: ObjectPool[list[str]] = ObjectPool(list, list.clear, max_free=1)
    item = pool.acquire()
    item.append("a secret")
    pool.release(item)
    assert item == []
    assert pool.acquire() is item
    pool.release(item)


def test_a_foreign_object_is_refused_and_not_reset() -> None:
    pool: ObjectPool[list[str]] = ObjectPool(list, list.clear, max_free=2, preallocate=1, name="lists")
    foreign = ["kept"]
    with pytest.raises(ForeignBuffer) as caught:
        pool.release(foreign)
    assert caught.value.pool == "lists"
    assert foreign == ["kept"]
    item = pool.acquire()
    pool.release(item)
    with pytest.raises(ForeignBuffer):
        pool.release(item)
    figures = pool.statistics()
    assert_adds_up(figures)
    assert (figures.created, figures.released, figures.free) == (1, 1, 1)


def test_objects_that_compare_equal_are_told_apart() -> None:
    pool: ObjectPool[list[str]] = ObjectPool(list, list.clear, max_free=2)
    first, second = pool.acquire(), pool.acquire()
    assert first == second
    pool.release(first)
    with pytest.raises(ForeignBuffer):
        pool.release(first)
    assert pool.in_use == 1
    pool.release(second)


def test_the_base_lends_what_it_is_told_to_make() -> None:
    pool: Pool[object] = Pool("things", object, max_free=1, preallocate=1)
    thing = pool.acquire()
    assert pool.in_use == 1
    assert type(thing) is object
