"""reflex.pool: who holds what, what is kept, what is wiped, and figures that add up."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from reflex.errors import ForeignBuffer, PoolError, WrongSize
from reflex.pool import (
    TIER_MAX_FREE,
    TIER_SIZES,
    TIER_SPARE,
    BufferPool,
    ObjectPool,
    Pool,
    PoolStatistics,
    TieredPool,
    report_leaks,
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


# Tiers.


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


# The debug switch.


@pytest.fixture
def recording() -> Iterator[BufferPool]:
    """A pool that records holders, and is made whole when the test ends, so that the exit report stays empty."""
    pool = BufferPool(SIZE, 4, name="recording pool")
    pool.record_holders()
    yield pool
    for buffer in [item for slot in pool._slots.values() for item in slot if item is not pool]:
        pool.release(buffer)


def test_holders_are_not_recorded_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "0"):
        if value is None:
            monkeypatch.delenv("REFLEX_POOL_DEBUG", raising=False)
        else:
            monkeypatch.setenv("REFLEX_POOL_DEBUG", value)
        pool = BufferPool(SIZE, 1)
        pool.acquire()
        assert pool.leaks() == []


def test_the_environment_switches_recording_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLEX_POOL_DEBUG", "1")
    pool = BufferPool(SIZE, 1)
    buffer = pool.acquire()
    assert len(pool.leaks()) == 1
    pool.release(buffer)
    assert pool.leaks() == []


def test_a_leak_names_the_place_that_borrowed(recording: BufferPool) -> None:
    def forgetful() -> None:
        recording.acquire()

    forgetful()
    recording.release(recording.acquire())
    (holder,) = recording.leaks()
    assert "in forgetful" in holder
    assert Path(__file__).name in holder


def test_recording_twice_forgets_nothing(recording: BufferPool) -> None:
    recording.acquire()
    recording.record_holders()
    assert len(recording.leaks()) == 1


def test_what_was_lent_before_recording_began_can_be_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFLEX_POOL_DEBUG", raising=False)
    pool = BufferPool(SIZE, 1)
    buffer = pool.acquire()
    pool.record_holders()
    assert pool.leaks() == []
    pool.release(buffer)
    assert pool.in_use == 0


def test_the_report_writes_every_leak_and_counts_them(
    recording: BufferPool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report_leaks()
    capsys.readouterr()
    held = [recording.acquire() for _ in range(3)]
    assert report_leaks() == before + 3
    written = capsys.readouterr().err
    assert written.count("recording pool: never returned, borrowed at\n") == 3
    for buffer in held:
        recording.release(buffer)
    assert report_leaks() == before
    assert "recording pool" not in capsys.readouterr().err


def test_a_buffer_that_is_lent_again_while_its_return_ends_keeps_its_new_holder(recording: BufferPool) -> None:
    """Between putting a buffer back and the end of ``release``, another thread may borrow it: done here by hand."""

    class TakenAtOnce(deque[memoryview]):
        def append(self, item: memoryview) -> None:
            super().append(item)
            borrowed_again.append(recording.acquire())

    borrowed_again: list[memoryview] = []
    recording._free = TakenAtOnce()
    buffer = recording.acquire()
    recording.release(buffer)
    assert borrowed_again == [buffer]
    assert recording.in_use == len(recording.leaks()) == 1


LEAKING_PROGRAM = """
from reflex.pool import BufferPool, TieredPool

def borrows_and_forgets():
    return tiers.acquire(100)

tiers = TieredPool()
hellos = BufferPool(76, 1, name="hellos")
hellos.release(hellos.acquire())
forgotten = borrows_and_forgets()
"""


@pytest.mark.parametrize(("switch", "reported"), [("1", True), ("0", False), ("", False)])
def test_leaks_are_reported_when_the_process_ends(switch: str, reported: bool) -> None:  # noqa: FBT001
    done = subprocess.run(
        [sys.executable, "-c", LEAKING_PROGRAM],
        env={**os.environ, "REFLEX_POOL_DEBUG": switch},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ("pool of 2048-byte buffers: never returned, borrowed at" in done.stderr) == reported
    assert ("borrows_and_forgets" in done.stderr) == reported
    assert "hellos" not in done.stderr


def test_the_base_lends_what_it_is_told_to_make() -> None:
    pool: Pool[object] = Pool("things", object, max_free=1, preallocate=1)
    thing = pool.acquire()
    assert pool.in_use == 1
    assert type(thing) is object
