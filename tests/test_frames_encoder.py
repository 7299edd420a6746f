"""reflex.protocol.frames, the encoder: what is packed, what is received straight into place, and what waits sealed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reflex.errors import WindowExceeded
from reflex.pool import TIER_SIZES
from reflex.protocol.frames import (
    FIRST_RECORD_BUFFER,
    MIN_RESERVED_BYTES,
    MOVABLE_BODY_BYTES,
    FrameEncoder,
)
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.wire import (
    FRAME_HEADER_SIZE,
    MAX_BODY_SIZE,
    MAX_PAYLOAD_SIZE,
    MAX_RECORD_SIZE,
    RECORD_OVERHEAD,
    FrameType,
    Suite,
)
from tests.framing import (
    DATA,
    ROOT,
    SECRET,
    PlainFrame,
    any_payloads,
    body_acquires,
    cipher,
    decoder,
    drawn,
    encoder,
    fed,
    frame_bytes,
    free_memory,
    payload_of,
    received,
    record_of,
    sealed,
    take_output,
)

# The encoder: packing.


def test_frames_of_a_turn_share_a_record(pools: Pools) -> None:
    packer = encoder(pools)
    for stream_id in range(1, 100):
        packer.write(DATA, stream_id, b"small")
    assert not packer.has_output
    assert packer.output() is None
    assert len(sealed(packer)) == 1


def test_nothing_is_held_before_the_first_frame_nor_after_the_last_byte(pools: Pools) -> None:
    packer = encoder(pools)
    assert (pools.in_use, packer.unsent_bytes, packer.has_output) == (0, 0, False)
    packer.seal()
    assert packer.output() is None
    packer.write(DATA, 1, b"x")
    assert pools.buffers.tier(FIRST_RECORD_BUFFER).in_use == pools.in_use == 1
    packer.seal()
    assert pools.buffers.tier(FIRST_RECORD_BUFFER).in_use == pools.in_use == 1, "it is sealed where it was packed"
    take_output(packer)
    assert (pools.in_use, packer.unsent_bytes, packer.has_output) == (0, 0, False)


def test_what_has_to_wait_is_kept_in_the_smallest_buffer_that_fits(pools: Pools) -> None:
    packer, twin = encoder(pools), encoder(pools)
    for each in (packer, twin):
        for payload in (b"small", payload_of(MAX_PAYLOAD_SIZE, 1), payload_of(20_000, 2)):
            each.write(DATA, 1, payload)
            each.seal()
        each.sent(3)
    packer.shrink()
    assert [len(buffer) for buffer, _ in packer.records] == [TIER_SIZES[0], MAX_RECORD_SIZE, FIRST_RECORD_BUFFER]
    assert packer.unsent_bytes == twin.unsent_bytes
    assert take_output(packer) == take_output(twin)
    assert pools.in_use == 0


def test_a_record_that_cannot_be_sealed_gives_its_buffer_back_wiped(pools: Pools) -> None:
    class Broken(CipherState):
        def seal(self, body: memoryview, out: memoryview) -> int:
            raise RuntimeError("no cipher")

    packer = FrameEncoder(Broken(Suite.AES_256_GCM, ROOT), pools.buffers)
    packer.write(DATA, 1, SECRET)
    with pytest.raises(RuntimeError, match="no cipher"):
        packer.seal()
    assert (pools.in_use, packer.unsent_bytes) == (0, 0)
    assert SECRET not in free_memory(pools)


def test_a_body_fills_its_buffer_but_for_the_records_overhead(pools: Pools) -> None:
    packer = encoder(pools)
    room = FIRST_RECORD_BUFFER - RECORD_OVERHEAD
    packer.write(DATA, 1, bytes(room - 2 * FRAME_HEADER_SIZE))
    packer.write(DATA, 1)
    assert not packer.has_output
    packer.write(DATA, 1)
    assert packer.has_output
    assert [len(record) for record in sealed(packer)] == [
        FIRST_RECORD_BUFFER,
        FRAME_HEADER_SIZE + RECORD_OVERHEAD,
    ]


def test_a_nearly_empty_body_moves_to_a_larger_buffer(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, SECRET)
    packer.write(DATA, 3, payload_of(100_000, 1))
    assert not packer.has_output
    assert pools.buffers.tier(MAX_RECORD_SIZE).in_use == pools.in_use == 1
    assert SECRET not in free_memory(pools)
    (record,) = sealed(packer)
    assert fed(decoder(pools), record, cycle([MAX_RECORD_SIZE])) == [
        (DATA, 1, SECRET),
        (DATA, 3, payload_of(100_000, 1)),
    ]


@pytest.mark.parametrize(
    ("first_bytes", "records"),
    [(MOVABLE_BODY_BYTES - FRAME_HEADER_SIZE, 1), (MOVABLE_BODY_BYTES - FRAME_HEADER_SIZE + 1, 2)],
)
def test_a_body_with_more_in_it_ends_its_record_instead(first_bytes: int, records: int, pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, bytes(first_bytes))
    packer.write(DATA, 3, bytes(FIRST_RECORD_BUFFER))
    assert len(sealed(packer)) == records


def test_a_frame_that_no_longer_fits_the_largest_body_goes_into_the_next_record(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, b"x")
    packer.write(DATA, 3, bytes(MAX_PAYLOAD_SIZE))
    assert [len(record) for record in sealed(packer)] == [
        1 + FRAME_HEADER_SIZE + RECORD_OVERHEAD,
        MAX_RECORD_SIZE,
    ]


# The encoder: received straight into place.


def fill(packer: FrameEncoder, stream_id: int, payload: bytes) -> int:
    """Reserve room, fill it as ``recv_into`` would, and commit; return how much went in."""
    view = packer.reserve(len(payload))
    view[:] = payload[: len(view)]
    packer.commit(DATA, stream_id, len(view))
    return len(view)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["write", "fill", "reserve", "seal"]), any_payloads),
        max_size=12,
    )
)
@example([("write", b"x"), ("reserve", bytes(MAX_PAYLOAD_SIZE)), ("fill", bytes(MAX_PAYLOAD_SIZE))])
@settings(max_examples=60)
def test_frames_written_and_frames_filled_in_place_come_back_in_their_order(steps: list[tuple[str, bytes]]) -> None:
    pools = Pools()
    packer = encoder(pools)
    frames: list[PlainFrame] = []
    for number, (step, payload) in enumerate(steps):
        if step == "write":
            packer.write(DATA, number, payload)
            frames.append((DATA, number, payload))
        elif step == "seal":
            packer.seal()
        elif payload:
            view = packer.reserve(len(payload))
            assert min(len(payload), MIN_RESERVED_BYTES) <= len(view) <= len(payload)
            if step == "fill":
                view[:] = payload[: len(view)]
                packer.commit(DATA, number, len(view))
                frames.append((DATA, number, payload[: len(view)]))
    records = sealed(packer)
    assert received(decoder(pools), b"".join(records), cycle([MAX_RECORD_SIZE])) == frames
    assert all(len(record) > RECORD_OVERHEAD for record in records)
    assert pools.in_use == 0


def test_filling_in_place_gives_the_bytes_that_writing_gives(pools: Pools) -> None:
    writer, filler = encoder(pools), encoder(pools)
    for stream_id, payload in enumerate([b"one", payload_of(30_000, 1), b"three"], 1):
        writer.write(DATA, stream_id, payload)
        assert fill(filler, stream_id, payload) == len(payload)
    assert sealed(filler) == sealed(writer)


def test_less_than_was_reserved_may_be_committed(pools: Pools) -> None:
    packer = encoder(pools)
    packer.reserve(1000)[:4] = b"four"
    packer.commit(DATA, 1, 4)
    packer.reserve(1000)
    packer.commit(FrameType.DATA_FIN, 1, 0)
    (record,) = sealed(packer)
    assert fed(decoder(pools), record, cycle([100])) == [(DATA, 1, b"four"), (FrameType.DATA_FIN, 1, b"")]


def test_reserved_room_is_as_large_as_wanted_up_to_the_largest_payload(pools: Pools) -> None:
    for wanted in (1, 100, FIRST_RECORD_BUFFER - RECORD_OVERHEAD - FRAME_HEADER_SIZE, 40_000, MAX_PAYLOAD_SIZE):
        packer = encoder(pools)
        assert len(packer.reserve(wanted)) == wanted
        packer.close()


def test_reserved_room_behind_something_packed_may_be_shorter_than_wanted(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, bytes(20_000))
    packed = FRAME_HEADER_SIZE + 20_000
    room = FIRST_RECORD_BUFFER - RECORD_OVERHEAD - packed - FRAME_HEADER_SIZE
    assert len(packer.reserve(60_000)) == room
    assert not packer.has_output
    packer.close()


def test_reserving_much_moves_a_nearly_empty_body_to_a_larger_buffer(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, SECRET)
    packed = FRAME_HEADER_SIZE + len(SECRET)
    view = packer.reserve(MAX_PAYLOAD_SIZE)
    assert len(view) == MAX_BODY_SIZE - packed - FRAME_HEADER_SIZE
    assert not packer.has_output
    assert pools.buffers.tier(MAX_RECORD_SIZE).in_use == pools.in_use == 1
    assert SECRET not in free_memory(pools)
    view[:] = payload_of(len(view), 9)
    packer.commit(DATA, 3, len(view))
    (record,) = sealed(packer)
    assert len(record) == MAX_RECORD_SIZE
    assert fed(decoder(pools), record, cycle([MAX_RECORD_SIZE])) == [
        (DATA, 1, SECRET),
        (DATA, 3, payload_of(MAX_BODY_SIZE - packed - FRAME_HEADER_SIZE, 9)),
    ]


@pytest.mark.parametrize(("room", "ends_early"), [(MIN_RESERVED_BYTES, False), (MIN_RESERVED_BYTES - 1, True)])
def test_a_record_with_little_room_left_is_ended_early(
    room: int,
    ends_early: bool,  # noqa: FBT001
    pools: Pools,
) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, bytes(FIRST_RECORD_BUFFER - RECORD_OVERHEAD - 2 * FRAME_HEADER_SIZE - room))
    view = packer.reserve(10_000)
    assert packer.has_output == ends_early
    assert len(view) == (10_000 if ends_early else room)
    packer.close()


def test_little_room_is_enough_for_little(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, bytes(FIRST_RECORD_BUFFER - RECORD_OVERHEAD - 2 * FRAME_HEADER_SIZE - 10))
    assert len(packer.reserve(10)) == 10
    assert not packer.has_output
    assert len(packer.reserve(11)) == 11
    assert packer.has_output
    packer.close()


def test_a_body_without_room_for_a_header_is_ended(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, bytes(FIRST_RECORD_BUFFER - RECORD_OVERHEAD - FRAME_HEADER_SIZE))
    assert len(packer.reserve(MAX_PAYLOAD_SIZE)) == MAX_PAYLOAD_SIZE
    assert packer.has_output
    packer.close()


def test_reserving_again_what_was_not_used_neither_moves_nor_ends_anything(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, b"x")
    first = len(packer.reserve(MAX_PAYLOAD_SIZE))
    assert len(packer.reserve(first)) == first
    assert not packer.has_output
    assert body_acquires(pools, MAX_RECORD_SIZE) == 1
    packer.close()


def test_reserving_again_more_than_the_largest_body_holds_does_not_end_a_nearly_empty_record(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, b"x")
    first = len(packer.reserve(MAX_PAYLOAD_SIZE))
    assert len(packer.reserve(MAX_PAYLOAD_SIZE)) == first
    assert not packer.has_output
    packer.close()


@pytest.mark.parametrize(("packed", "moves"), [(MOVABLE_BODY_BYTES, True), (MOVABLE_BODY_BYTES + 1, False)])
def test_only_a_nearly_empty_body_moves_for_more_room(
    packed: int,
    moves: bool,  # noqa: FBT001
    pools: Pools,
) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, bytes(packed - FRAME_HEADER_SIZE))
    room = FIRST_RECORD_BUFFER - RECORD_OVERHEAD - packed - FRAME_HEADER_SIZE
    assert len(packer.reserve(50_000)) == (50_000 if moves else room)
    assert not packer.has_output
    packer.close()


def test_committing_beyond_the_room_is_refused_and_packs_nothing(pools: Pools) -> None:
    packer = encoder(pools)
    with pytest.raises(WindowExceeded) as caught:
        packer.commit(DATA, 1, 0)
    assert (caught.value.size_bytes, caught.value.window_bytes) == (0, 0)
    packer.reserve(100)
    room = FIRST_RECORD_BUFFER - RECORD_OVERHEAD - FRAME_HEADER_SIZE
    with pytest.raises(WindowExceeded) as caught:
        packer.commit(DATA, 1, room + 1)
    assert (caught.value.size_bytes, caught.value.window_bytes) == (room + 1, room)
    assert packer.unsent_bytes == 0
    packer.commit(DATA, 1, room)
    assert [len(record) for record in sealed(packer)] == [FIRST_RECORD_BUFFER]
    with pytest.raises(WindowExceeded):
        packer.commit(DATA, 1, 1)


def test_a_body_that_was_reserved_and_never_filled_goes_back_unsealed(pools: Pools) -> None:
    packer = encoder(pools)
    packer.reserve(5000)
    assert pools.in_use == 1
    packer.seal()
    assert (pools.in_use, packer.unsent_bytes, packer.output()) == (0, 0, None)
    packer.write(DATA, 1, b"x")
    assert sealed(packer) == [record_of(cipher(), frame_bytes((DATA, 1, b"x")))]


# The encoder: sealed bytes.


def test_sealed_bytes_are_taken_in_any_pieces(pools: Pools) -> None:
    packer = encoder(pools)
    for number in range(1, 4):
        packer.write(DATA, number, payload_of(100 * number, number))
        packer.seal()
    data = bytearray()
    sizes = cycle([1, 7, 50])
    while (view := packer.output()) is not None:
        unsent = packer.unsent_bytes
        size = min(next(sizes), len(view))
        data += view[:size]
        packer.sent(size)
        assert packer.unsent_bytes == unsent - size
    assert packer.unsent_bytes == pools.in_use == 0
    assert [frame[1] for frame in fed(decoder(pools), bytes(data), cycle([64]))] == [1, 2, 3]


def test_output_that_was_not_taken_is_given_again(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, b"payload")
    packer.seal()
    first = packer.output()
    assert first is not None
    packer.sent(0)
    again = packer.output()
    assert again is not None
    assert bytes(again) == bytes(first)
    packer.close()


def test_unsent_bytes_are_what_is_packed_and_what_is_sealed_less_what_was_taken(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, bytes(92))
    assert packer.unsent_bytes == 100
    packer.seal()
    assert packer.unsent_bytes == 100 + RECORD_OVERHEAD
    packer.write(DATA, 1, bytes(42))
    packer.sent(36)
    assert packer.unsent_bytes == 100 + 50
    packer.sent(100)
    assert packer.unsent_bytes == 50
    packer.close()
    assert packer.unsent_bytes == 0


@pytest.mark.parametrize(
    "bring_there",
    [
        lambda packer: None,
        lambda packer: packer.write(DATA, 1, SECRET),
        lambda packer: packer.reserve(50_000),
        lambda packer: (packer.write(DATA, 1, SECRET), packer.seal()),
        lambda packer: (packer.write(DATA, 1, SECRET), packer.seal(), packer.sent(3)),
        lambda packer: (packer.write(DATA, 1, SECRET), packer.seal(), packer.write(DATA, 1, SECRET)),
        lambda packer: [packer.write(DATA, 1, bytes(MAX_PAYLOAD_SIZE)) for _ in range(3)],
        lambda packer: packer.close(),
    ],
    ids=["new", "packed", "reserved", "sealed", "partly sent", "sealed and packed", "many records", "closed"],
)
def test_close_gives_every_buffer_back_in_every_state(
    bring_there: Callable[[FrameEncoder], object], pools: Pools
) -> None:
    packer = encoder(pools)
    bring_there(packer)
    packer.close()
    assert (pools.in_use, packer.unsent_bytes, packer.has_output, packer.output()) == (0, 0, False, None)
    assert SECRET not in free_memory(pools)


def test_no_plaintext_is_left_in_a_free_buffer(pools: Pools) -> None:
    packer, unpacker = encoder(pools), decoder(pools)
    packer.write(DATA, 1, SECRET)
    fill(packer, 3, SECRET * 1000)
    fill(packer, 3, SECRET * 100)
    for record in sealed(packer):
        unpacker.feed(record)
        assert all(SECRET in payload for _, _, payload in drawn(unpacker))
    assert pools.in_use == 0
    assert SECRET not in free_memory(pools)
