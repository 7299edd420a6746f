"""reflex.net.backlog: bytes that wait, in order, in pooled buffers."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from reflex.net.backlog import LARGEST_SPARE_BYTES, Backlog
from reflex.pool import TIER_SIZES, TieredPool
from reflex.protocol.share import Share
from reflex.protocol.window import Budget

SMALLEST = TIER_SIZES[0]


class Owner:
    """Calls what it was given."""

    def __init__(self, on_memory_used_up: Callable[[], object]) -> None:
        self._on_memory_used_up = on_memory_used_up

    def on_memory_used_up(self) -> None:
        self._on_memory_used_up()


def take_all(backlog: Backlog, at_most: int = 1 << 20) -> bytes:
    """Drain it, so many bytes at a time."""
    taken = bytearray()
    while backlog.size_bytes:
        piece = backlog.first()[:at_most]
        taken += piece
        backlog.taken(len(piece))
    return bytes(taken)


def test_an_empty_backlog_holds_nothing() -> None:
    buffers = TieredPool()
    backlog = Backlog(buffers)
    assert backlog.size_bytes == 0
    assert len(backlog.first()) == 0
    assert backlog.clear() == 0
    assert buffers.in_use == 0


@given(st.lists(st.binary(min_size=1, max_size=9000), max_size=12), st.integers(1, 5000))
def test_bytes_come_out_as_they_went_in(pieces: list[bytes], at_most: int) -> None:
    buffers = TieredPool()
    backlog = Backlog(buffers)
    for piece in pieces:
        assert backlog.keep(memoryview(piece)) == len(piece)
    assert backlog.size_bytes == sum(map(len, pieces))
    assert take_all(backlog, at_most) == b"".join(pieces)
    assert backlog.size_bytes == 0
    assert buffers.in_use == 0


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=4000), st.integers(0, 4000)), max_size=20))
def test_bytes_come_out_in_order_while_more_go_in(steps: list[tuple[bytes, int]]) -> None:
    buffers = TieredPool()
    backlog = Backlog(buffers)
    taken = bytearray()
    kept = 0
    for data, wanted in steps:
        backlog.keep(memoryview(data))
        piece = backlog.first()[:wanted]
        taken += piece
        if piece:
            backlog.taken(len(piece))
        kept += len(data)
        assert backlog.size_bytes == kept - len(taken)
    taken += take_all(backlog)
    assert bytes(taken) == b"".join(data for data, _ in steps)
    assert buffers.in_use == 0


def test_a_few_bytes_take_the_smallest_buffer() -> None:
    buffers = TieredPool()
    backlog = Backlog(buffers)
    backlog.keep(memoryview(b"x"))
    assert buffers.tier(SMALLEST).in_use == 1
    backlog.clear()


def test_many_small_pieces_share_buffers_that_grow_with_what_waits() -> None:
    buffers = TieredPool()
    backlog = Backlog(buffers)
    for _ in range(20_000):
        backlog.keep(memoryview(b"seven b"))
    assert buffers.in_use <= 2 + 20_000 * 7 // LARGEST_SPARE_BYTES + 4
    assert buffers.tier(TIER_SIZES[-1]).in_use == 0
    assert take_all(backlog) == b"seven b" * 20_000


def test_each_buffer_goes_back_as_soon_as_its_last_byte_was_taken() -> None:
    buffers = TieredPool()
    backlog = Backlog(buffers)
    backlog.keep(memoryview(bytes(SMALLEST)))
    backlog.keep(memoryview(bytes(SMALLEST)))
    assert buffers.in_use == 2
    backlog.taken(SMALLEST - 1)
    assert buffers.in_use == 2
    backlog.taken(1)
    assert buffers.in_use == 1
    assert backlog.clear() == SMALLEST


def test_what_was_dropped_is_counted_wiped_and_given_back() -> None:
    buffers = TieredPool()
    backlog = Backlog(buffers)
    backlog.keep(memoryview(b"secret" * 600))
    backlog.taken(100)
    assert backlog.clear() == 3500
    assert backlog.size_bytes == 0
    assert buffers.in_use == 0
    again = buffers.acquire(3600)
    assert not any(again)
    buffers.release(again, 0)


@given(st.integers(1, 400_000))
def test_memory_is_filled_by_three_quarters_but_for_one_buffer_that_has_room_for_more(size: int) -> None:
    buffers = TieredPool()
    budget = Budget()
    backlog = Backlog(buffers, Share(budget))
    assert backlog.keep(memoryview(bytes(size))) == size
    assert budget.kept == backlog.kept_bytes >= size
    assert backlog.kept_bytes <= size * 4 / 3 + max(SMALLEST, min(size, LARGEST_SPARE_BYTES))
    assert len(take_all(backlog)) == size
    assert budget.kept == backlog.kept_bytes == buffers.in_use == 0


@given(st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 20_000)), max_size=30))
def test_what_is_reserved_is_the_memory_in_use(steps: list[tuple[int, int]]) -> None:
    buffers = TieredPool()
    budget = Budget()
    backlog = Backlog(buffers, Share(budget))
    for size, wanted in steps:
        assert backlog.keep(memoryview(bytes(size))) == size
        if piece := backlog.first()[:wanted]:
            backlog.taken(len(piece))
        in_use = sum(each.in_use * int(tier) for tier, each in buffers.statistics().items())
        assert budget.kept == backlog.kept_bytes == in_use
    backlog.clear()
    assert budget.kept == buffers.in_use == 0


def test_where_there_is_no_room_a_part_is_kept_and_told() -> None:
    buffers = TieredPool()
    budget = Budget(buffered_limit=2 * SMALLEST)
    backlog = Backlog(buffers, Share(budget))
    data = bytes(range(256)) * 20
    assert backlog.keep(memoryview(data)) == 2 * SMALLEST
    assert backlog.size_bytes == 2 * SMALLEST == budget.kept
    assert take_all(backlog) == data[: 2 * SMALLEST]
    assert budget.kept == buffers.in_use == 0


def test_one_that_is_shed_tells_its_owner_and_gives_everything_back() -> None:
    buffers = TieredPool()
    budget = Budget(buffered_limit=2 * SMALLEST)
    told: list[int] = []
    large = Backlog(buffers, Share(budget), Owner(lambda: told.append(large.size_bytes)))
    assert large.keep(memoryview(bytes(2 * SMALLEST))) == 2 * SMALLEST
    assert Backlog(buffers, Share(budget)).keep(memoryview(b"x")) == 1
    assert told == [2 * SMALLEST]
    assert large.size_bytes == large.kept_bytes == 0
    assert budget.kept == SMALLEST
    assert buffers.in_use == 1


def test_one_whose_owner_ends_together_with_another_that_was_shed_keeps_nothing() -> None:
    buffers = TieredPool()
    budget = Budget(buffered_limit=3 * SMALLEST)
    share = Share(budget)
    dropped: list[int] = []
    large = Backlog(buffers, share, Owner(lambda: dropped.append(small.clear())))
    small = Backlog(buffers, share, Owner(lambda: None))
    assert small.keep(memoryview(b"before")) == 6
    assert large.keep(memoryview(bytes(2 * SMALLEST))) == 2 * SMALLEST
    # Fills its buffer, and then needs another: what was copied is dropped, and what was not is told.
    assert small.keep(memoryview(bytes(2 * SMALLEST))) == SMALLEST - 6
    assert dropped == [SMALLEST]
    assert budget.kept == small.kept_bytes == buffers.in_use == 0
