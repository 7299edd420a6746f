"""reflex.protocol.frames, the decoder: what it holds, where it receives, and who draws from it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest

from reflex.pool import TIER_SIZES
from reflex.protocol.frames import (
    EXACT_READ_BYTES,
    Frame,
    FrameDecoder,
)
from reflex.protocol.pools import Pools
from reflex.protocol.wire import (
    FRAME_HEADER_SIZE,
    LENGTH_CHUNK_SIZE,
    MAX_PAYLOAD_SIZE,
    MAX_RECORD_SIZE,
    TAG_SIZE,
)
from tests.framing import (
    DATA,
    SECRET,
    cipher,
    decoder,
    drawn,
    encoder,
    fed,
    frame_bytes,
    free_memory,
    payload_of,
    record_of,
    records_of,
    sealed,
    take_output,
)

# The decoder: what it holds and where it receives.


def test_an_idle_decoder_holds_nothing(pools: Pools) -> None:
    unpacker = decoder(pools)
    assert drawn(unpacker) == []
    assert (unpacker.held_bytes, pools.in_use) == (0, 0)
    assert len(unpacker.receive_buffer()) == MAX_RECORD_SIZE
    unpacker.received(0)
    assert pools.in_use == 0
    unpacker.received(0)
    assert pools.in_use == 0


@pytest.mark.parametrize("held", [1, 19, 2_048, 2_049, 8_192, 8_193, 32_768, 32_769, 100_000])
def test_what_has_not_arrived_whole_is_held_in_the_smallest_tier_that_fits(held: int, pools: Pools) -> None:
    (record,) = records_of(pools, [(DATA, 1, payload_of(MAX_PAYLOAD_SIZE, 3))], set())
    unpacker = decoder(pools)
    taken = held if held < LENGTH_CHUNK_SIZE else LENGTH_CHUNK_SIZE + held
    assert fed(unpacker, record[:taken], cycle([taken])) == []
    assert unpacker.held_bytes == held
    tier = min(size for size in TIER_SIZES if size >= held)
    assert pools.buffers.tier(tier).in_use == pools.in_use == 1
    unpacker.receive_buffer()
    unpacker.received(0)
    assert pools.buffers.tier(tier).in_use == pools.in_use == 1
    assert fed(unpacker, record[taken:], cycle([MAX_RECORD_SIZE])) == [(DATA, 1, payload_of(MAX_PAYLOAD_SIZE, 3))]
    assert pools.in_use == 0


def test_nothing_is_held_between_a_length_and_its_body(pools: Pools) -> None:
    for size in (100, MAX_PAYLOAD_SIZE):
        (record,) = records_of(pools, [(DATA, 1, payload_of(size, 1))], set())
        unpacker = decoder(pools)
        unpacker.feed(record[:LENGTH_CHUNK_SIZE])
        assert drawn(unpacker) == []
        assert (unpacker.held_bytes, pools.in_use) == (0, 0)
        unpacker.feed(record[LENGTH_CHUNK_SIZE:])
        assert len(drawn(unpacker)) == 1


class CountingDecoder(FrameDecoder):
    """Counts how often held bytes are moved."""

    moves = 0

    def _move(self, size_bytes: int) -> memoryview:
        self.moves += 1
        return super()._move(size_bytes)


def test_a_run_of_large_records_takes_one_read_each_and_moves_nothing(pools: Pools) -> None:
    frames = [(DATA, 1, payload_of(size, size)) for size in (MAX_PAYLOAD_SIZE, 16_376, 50_000, 20_000, 17_000)]
    records = records_of(pools, frames, set(range(len(frames))))
    data = b"".join(records)
    unpacker = CountingDecoder(cipher(), pools.buffers, pools.frames)
    unpacker.feed(data[:LENGTH_CHUNK_SIZE])
    assert drawn(unpacker) == []
    position = LENGTH_CHUNK_SIZE
    for frame, record in zip(frames, records, strict=True):
        room = unpacker.receive_buffer()
        assert len(room) == len(record), "the rest of this record and the length chunk of the next"
        size = min(len(room), len(data) - position)
        room[:size] = data[position : position + size]
        unpacker.received(size)
        position += size
        assert drawn(unpacker) == [frame]
        assert pools.in_use == 0
    assert position == len(data)
    assert unpacker.moves == 0


@pytest.mark.parametrize("body_size", [EXACT_READ_BYTES - 1, EXACT_READ_BYTES])
def test_small_records_are_read_as_they_come_and_large_ones_exactly(body_size: int, pools: Pools) -> None:
    record = record_of(cipher(), frame_bytes((DATA, 1, bytes(body_size - FRAME_HEADER_SIZE))))
    unpacker = decoder(pools)
    unpacker.feed(record[: LENGTH_CHUNK_SIZE + 10])
    assert drawn(unpacker) == []
    exact = body_size + TAG_SIZE + LENGTH_CHUNK_SIZE - 10
    assert len(unpacker.receive_buffer()) == (exact if body_size >= EXACT_READ_BYTES else MAX_RECORD_SIZE - 10)
    unpacker.close()


@pytest.mark.parametrize(
    "bring_there",
    [
        lambda unpacker, record: None,
        lambda unpacker, record: unpacker.receive_buffer(),
        lambda unpacker, record: unpacker.feed(record[:5]),
        lambda unpacker, record: (unpacker.feed(record[:50]), list(unpacker)),
        lambda unpacker, record: unpacker.feed(record),
        lambda unpacker, record: (unpacker.feed(record), list(unpacker)),
        lambda unpacker, record: unpacker.close(),
    ],
    ids=["new", "buffer lent", "fed", "inside a record", "whole record", "drained", "closed"],
)
def test_closing_a_decoder_gives_every_buffer_back_in_every_state(
    bring_there: Callable[[FrameDecoder, bytes], object], pools: Pools
) -> None:
    (record,) = records_of(pools, [(DATA, 1, bytes(100))], set())
    unpacker = decoder(pools)
    bring_there(unpacker, record)
    unpacker.close()
    assert (pools.in_use, unpacker.held_bytes) == (0, 0)
    assert drawn(unpacker) == []


# Consumers.


def test_a_frame_is_lent_until_the_next_one_is_drawn(pools: Pools) -> None:
    packer, unpacker = encoder(pools), decoder(pools)
    packer.write(DATA, 1, b"first")
    packer.write(DATA, 3, b"second")
    unpacker.feed(sealed(packer)[0])
    kept: list[Frame] = []
    for frame in unpacker:
        kept.append(frame)
        assert pools.frames.in_use == 1
    assert kept[0] is kept[1]
    assert kept[0].copy() == (0, 0, b"")
    assert pools.in_use == 0


class ConsumerFailed(Exception):
    """What a consumer raises in the middle."""


@pytest.fixture
def loaded(pools: Pools) -> FrameDecoder:
    """A decoder with two records of two frames each, and a part of a third record."""
    packer, unpacker = encoder(pools), decoder(pools)
    for number in range(6):
        packer.write(DATA, number + 1, SECRET)
        if number % 2:
            packer.seal()
    first, second, third = take_output(packer)
    unpacker.feed(first + second + third[:-1])
    return unpacker


def test_a_consumer_that_stops_half_way_leaves_the_pools_whole(loaded: FrameDecoder, pools: Pools) -> None:
    for frame in loaded:
        assert frame.stream_id == 1
        break
    assert pools.frames.in_use == 0
    assert pools.in_use == 1, "the ciphertext that has arrived"
    assert [frame.stream_id for frame in loaded] == [3, 4], "the rest of the record it left is gone"
    assert pools.in_use == 1
    loaded.close()
    assert pools.in_use == 0
    assert SECRET not in free_memory(pools)


def test_a_consumer_that_raises_leaves_the_pools_whole(loaded: FrameDecoder, pools: Pools) -> None:
    def consume() -> None:
        for frame in loaded:
            if frame.stream_id == 3:
                raise ConsumerFailed

    with pytest.raises(ConsumerFailed):
        consume()
    assert pools.frames.in_use == 0
    assert pools.in_use == 1
    loaded.close()
    assert pools.in_use == 0
    assert SECRET not in free_memory(pools)


def test_closing_while_frames_are_drawn_ends_the_iteration(loaded: FrameDecoder, pools: Pools) -> None:
    got = []
    for frame in loaded:
        got.append(frame.stream_id)
        loaded.close()
    assert got == [1], "the buffer is gone, and with it what was not given out"
    assert pools.in_use == 0


def test_an_iteration_that_was_never_started_holds_nothing(loaded: FrameDecoder, pools: Pools) -> None:
    frames = iter(loaded)
    loaded.close()
    assert pools.in_use == 0
    assert list(frames) == []
