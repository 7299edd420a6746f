"""reflex.net.backlog: bytes that wait, in order, in pooled buffers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reflex.net.backlog import LARGEST_SPARE_BYTES, Backlog
from reflex.pool import TIER_SIZES, TieredPool

SMALLEST = TIER_SIZES[0]


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
        backlog.keep(memoryview(piece))
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
