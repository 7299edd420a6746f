"""reflex.protocol.frames: the twins against known answers, against each other, and against altered bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, cycle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reflex.errors import FrameError, ProtocolError, RecordError, WindowExceeded
from reflex.pool import TIER_SIZES
from reflex.protocol.frames import (
    EXACT_READ_BYTES,
    FIRST_RECORD_BUFFER,
    MIN_RESERVED_BYTES,
    MOVABLE_BODY_BYTES,
    Frame,
    FrameDecoder,
    FrameEncoder,
)
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.wire import (
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    LENGTH_CHUNK_SIZE,
    MAX_BODY_SIZE,
    MAX_PAYLOAD_SIZE,
    MAX_RECORD_SIZE,
    MAX_STREAM_ID,
    RECORD_OVERHEAD,
    RECORDS_PER_KEY,
    TAG_SIZE,
    FrameType,
    Suite,
)
from tests.vectors import VECTORS, SealedRecord, Vector

PlainFrame = tuple[int, int, bytes]  # type, stream, payload, as Frame.copy() gives them

ROOT = bytes(range(32))
DATA = int(FrameType.DATA)
SECRET = b"a secret that nobody may find in a free buffer "

each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v.client_hello[:4].hex()}-suite-{v.suite}")
each_suite = pytest.mark.parametrize("suite", list(Suite), ids=lambda s: s.name)


# Helpers.


def cipher(suite: Suite = Suite.AES_256_GCM) -> CipherState:
    return CipherState(suite, ROOT)


def encoder(pools: Pools) -> FrameEncoder:
    return FrameEncoder(cipher(), pools.buffers)


def decoder(pools: Pools) -> FrameDecoder:
    return FrameDecoder(cipher(), pools.buffers, pools.frames)


def frame_bytes(frame: PlainFrame) -> bytes:
    """A frame as the contract lays it out, written down a second time."""
    frame_type, stream_id, payload = frame
    return bytes([frame_type]) + len(payload).to_bytes(3) + stream_id.to_bytes(4) + payload


def record_of(sealer: CipherState, body: bytes) -> bytes:
    """One sealed record with any body, well-formed or not."""
    out = bytearray(len(body) + RECORD_OVERHEAD)
    sealer.seal(memoryview(body), memoryview(out))
    return bytes(out)


def take_output(of: FrameEncoder) -> list[bytes]:
    """Every sealed piece, taken as a socket with room would."""
    pieces = []
    while (view := of.output()) is not None:
        pieces.append(bytes(view))
        of.sent(len(view))
    return pieces


def sealed(of: FrameEncoder) -> list[bytes]:
    """End the record, then every record."""
    of.seal()
    return take_output(of)


def drawn(of: FrameDecoder) -> list[PlainFrame]:
    """The frames that can be drawn now."""
    return [frame.copy() for frame in of]


def fed(of: FrameDecoder, data: bytes, sizes: Iterator[int]) -> list[PlainFrame]:
    """All of ``data`` by ``feed``, cut into pieces of ``sizes``."""
    frames = []
    position = 0
    while position < len(data):
        size = next(sizes)
        position += of.feed(data[position : position + size])
        frames += drawn(of)
    return frames


def received(
    of: FrameDecoder, data: bytes, sizes: Iterator[int], frames: list[PlainFrame] | None = None
) -> list[PlainFrame]:
    """The same by ``receive_buffer`` and ``received``, as a socket does it; into ``frames``, which outlive an error."""
    frames = [] if frames is None else frames
    position = 0
    while position < len(data):
        room = of.receive_buffer()
        size = min(len(room), next(sizes), len(data) - position)
        assert size > 0
        room[:size] = data[position : position + size]
        of.received(size)
        position += size
        frames.extend(frame.copy() for frame in of)
    return frames


def at_most_pieces(total: int, sizes: Iterator[int]) -> Iterator[int]:
    """The same sizes, but none so small that the total falls into more than some hundred pieces."""
    return (max(size, total // 300) for size in sizes)


def free_memory(pools: Pools) -> bytes:
    """Everything that the free buffers of all tiers hold."""
    return b"".join(bytes(buffer) for size in TIER_SIZES for buffer in pools.buffers.tier(size)._free)


def body_acquires(pools: Pools, size: int) -> int:
    return pools.buffers.tier(size).statistics().acquired


def payload_of(size: int, seed: int) -> bytes:
    """A payload that is cheap to make and whose bytes differ from place to place."""
    pattern = bytes((seed + 7 * at) & 0xFF for at in range(min(size, 251)))
    return (pattern * (size // max(len(pattern), 1) + 1))[:size]


payloads = st.builds(payload_of, st.integers(0, 300), st.integers(0, 255))
any_payloads = st.one_of(
    payloads,
    payloads,
    st.builds(
        payload_of,
        st.one_of(st.integers(0, MAX_PAYLOAD_SIZE), st.sampled_from([2_047, 16_384, 32_724, 32_725, MAX_PAYLOAD_SIZE])),
        st.integers(0, 255),
    ),
)
stream_ids = st.one_of(st.integers(0, 9), st.just(MAX_STREAM_ID), st.integers(0, MAX_STREAM_ID))
small_frames = st.lists(st.tuples(st.integers(0, 255), stream_ids, payloads), max_size=12)
any_frames = st.lists(st.tuples(st.integers(0, 255), stream_ids, any_payloads), max_size=8)
splits = st.lists(st.integers(1, 60_000), min_size=1, max_size=8).map(cycle)


def records_of(pools: Pools, frames: list[PlainFrame], seal_before: set[int]) -> list[bytes]:
    """Frames packed into records that end before the given frames, and where they are full."""
    packer = encoder(pools)
    records = []
    for number, frame in enumerate(frames):
        if number in seal_before:
            packer.seal()
        packer.write(*frame)
        records += take_output(packer)
    return records + sealed(packer)


# Known answers.


def directions(vector: Vector) -> list[tuple[bytes, int, tuple[SealedRecord, ...]]]:
    return [
        (vector.root_client_to_server, RECORDS_PER_KEY, vector.client_to_server_records),
        (vector.root_server_to_client, 3, vector.server_to_client_records_with_rekey_after_3),
    ]


@each_vector
def test_the_vectors_records_decode_to_frames_that_encode_to_the_same_records(vector: Vector, pools: Pools) -> None:
    for root, records_per_key, records in directions(vector):
        suite = Suite(vector.suite)
        unpacker = FrameDecoder(CipherState(suite, root, records_per_key=records_per_key), pools.buffers, pools.frames)
        packer = FrameEncoder(CipherState(suite, root, records_per_key=records_per_key), pools.buffers)
        for record in records:
            frames = fed(unpacker, record.record, cycle([len(record.record)]))
            assert b"".join(map(frame_bytes, frames)) == record.body
            for frame in frames:
                packer.write(*frame)
            assert sealed(packer) == [record.record]
    assert pools.in_use == 0


@each_vector
@pytest.mark.parametrize("read", [fed, received])
def test_the_vectors_byte_by_byte(
    vector: Vector, read: Callable[[FrameDecoder, bytes, Iterator[int]], list[PlainFrame]], pools: Pools
) -> None:
    for root, records_per_key, records in directions(vector):
        opener = CipherState(Suite(vector.suite), root, records_per_key=records_per_key)
        unpacker = FrameDecoder(opener, pools.buffers, pools.frames)
        frames = read(unpacker, b"".join(record.record for record in records), cycle([1]))
        assert b"".join(map(frame_bytes, frames)) == b"".join(record.body for record in records)
        assert unpacker.held_bytes == 0
    assert pools.in_use == 0


def test_a_known_body(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(FrameType.DATA, 0x01020304, b"hello")
    packer.write(FrameType.CLOSE, 0, bytes(4))
    body = bytes.fromhex("01 000005 01020304 68656c6c6f  0c 000004 00000000 00000000")
    assert sealed(packer) == [record_of(cipher(), body)]


# Round trips.


@each_suite
@given(frames=any_frames, seal_before=st.sets(st.integers(0, 8)), sizes=splits)
@settings(max_examples=60)
def test_any_frames_in_any_records_and_any_split_come_back_equal(
    suite: Suite, frames: list[PlainFrame], seal_before: set[int], sizes: Iterator[int]
) -> None:
    pools = Pools()
    packer = FrameEncoder(cipher(suite), pools.buffers)
    for number, frame in enumerate(frames):
        if number in seal_before:
            packer.seal()
        packer.write(*frame)
    records = sealed(packer)
    assert all(RECORD_OVERHEAD < len(record) <= MAX_RECORD_SIZE for record in records)
    assert sum(map(len, records)) == sum(len(frame_bytes(f)) for f in frames) + RECORD_OVERHEAD * len(records)
    for read in (fed, received):
        unpacker = FrameDecoder(cipher(suite), pools.buffers, pools.frames)
        data = b"".join(records)
        assert read(unpacker, data, at_most_pieces(len(data), sizes)) == frames
        assert unpacker.held_bytes == 0
    assert pools.in_use == 0


@given(frames=small_frames, seal_before=st.sets(st.integers(0, 12)))
@settings(max_examples=40)
def test_the_whole_input_gives_what_byte_by_byte_gives(frames: list[PlainFrame], seal_before: set[int]) -> None:
    pools = Pools()
    data = b"".join(records_of(pools, frames, seal_before))
    whole = fed(decoder(pools), data, cycle([max(len(data), 1)]))
    assert whole == frames
    assert fed(decoder(pools), data, cycle([1])) == whole
    assert received(decoder(pools), data, cycle([1])) == whole
    assert pools.in_use == 0


def test_a_record_that_is_read_exactly_comes_back_byte_by_byte_too(pools: Pools) -> None:
    frames = [(DATA, 1, payload_of(EXACT_READ_BYTES, 1)), (DATA, 3, payload_of(20_000, 2))]
    data = b"".join(records_of(pools, frames, {1}))
    assert received(decoder(pools), data, cycle([1])) == frames


@given(frames=small_frames, seal_before=st.sets(st.integers(0, 12)), part=st.floats(0, 1))
def test_a_stream_that_is_cut_gives_the_frames_of_its_whole_records(
    frames: list[PlainFrame], seal_before: set[int], part: float
) -> None:
    pools = Pools()
    records = records_of(pools, frames, seal_before)
    data = b"".join(records)
    cut = int(len(data) * part)
    whole_records = [number for number in range(len(records) + 1) if sum(map(len, records[:number])) <= cut][-1]
    whole_bytes = sum(map(len, records[:whole_records]))
    unpacker = decoder(pools)
    got = fed(unpacker, data[:cut], cycle([997]))
    assert got == frames[: len(got)]
    assert sum(len(frame_bytes(frame)) for frame in got) == whole_bytes - whole_records * RECORD_OVERHEAD
    length_taken = LENGTH_CHUNK_SIZE if cut - whole_bytes >= LENGTH_CHUNK_SIZE else 0
    assert unpacker.held_bytes == cut - whole_bytes - length_taken
    unpacker.close()
    assert pools.in_use == 0


@each_suite
def test_the_largest_frame_fills_the_largest_record(suite: Suite, pools: Pools) -> None:
    packer = FrameEncoder(cipher(suite), pools.buffers)
    frame = (DATA, MAX_STREAM_ID, payload_of(MAX_PAYLOAD_SIZE, 5))
    packer.write(*frame)
    packer.write(*frame)
    records = sealed(packer)
    assert [len(record) for record in records] == [MAX_RECORD_SIZE, MAX_RECORD_SIZE]
    unpacker = FrameDecoder(cipher(suite), pools.buffers, pools.frames)
    assert fed(unpacker, b"".join(records), cycle([MAX_RECORD_SIZE])) == [frame, frame]
    assert pools.in_use == 0


def test_a_larger_payload_is_refused_and_what_was_packed_stays(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(DATA, 1, b"before")
    with pytest.raises(FrameError, match=f"{MAX_PAYLOAD_SIZE + 1} bytes"):
        packer.write(DATA, 1, bytes(MAX_PAYLOAD_SIZE + 1))
    packer.write(DATA, 1, b"behind")
    (record,) = sealed(packer)
    assert fed(decoder(pools), record, cycle([100])) == [(DATA, 1, b"before"), (DATA, 1, b"behind")]


def test_many_records_in_one_feed(pools: Pools) -> None:
    frames = [(DATA, number, payload_of(number % 50, number)) for number in range(1, 500)]
    data = b"".join(records_of(pools, frames, set(range(500))))
    assert len(data) < MAX_RECORD_SIZE
    unpacker = decoder(pools)
    assert unpacker.feed(data) == len(data)
    assert unpacker.held_bytes == len(data)
    assert drawn(unpacker) == frames
    assert drawn(unpacker) == []
    assert pools.in_use == 0


def test_feed_takes_what_there_is_room_for_and_says_how_much(pools: Pools) -> None:
    frames = [(DATA, number, payload_of(60_000, number)) for number in range(1, 6)]
    data = b"".join(records_of(pools, frames, set(range(6))))
    unpacker = decoder(pools)
    assert unpacker.feed(data) == MAX_RECORD_SIZE
    assert unpacker.feed(data[MAX_RECORD_SIZE:]) == 0
    got = drawn(unpacker)
    assert got == frames[:2]
    assert got + fed(unpacker, data[MAX_RECORD_SIZE:], cycle([len(data)])) == frames


def test_a_frame_may_be_fed_as_a_view(pools: Pools) -> None:
    packer = encoder(pools)
    packer.write(FrameType.DATAGRAM, 3, memoryview(b"view"))
    unpacker = decoder(pools)
    unpacker.feed(memoryview(sealed(packer)[0]))
    assert drawn(unpacker) == [(FrameType.DATAGRAM, 3, b"view")]


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


# Malformed and altered.


@pytest.mark.parametrize("trailing", range(1, FRAME_HEADER_SIZE))
@pytest.mark.parametrize("before", [[], [(DATA, 1, b"whole")]], ids=["alone", "behind a frame"])
def test_a_body_that_ends_inside_a_header_is_a_frame_error(
    trailing: int, before: list[PlainFrame], pools: Pools
) -> None:
    body = b"".join(map(frame_bytes, before)) + FRAME_HEADER.pack(0, 0)[:trailing]
    assert_frame_error(pools, body, before, f"{trailing} bytes at the end of a body")


@pytest.mark.parametrize(("claimed", "there"), [(1, 0), (6, 5), (2**24 - 1, 0), (2**24 - 1, 1000), (MAX_BODY_SIZE, 5)])
def test_a_frame_that_passes_the_end_of_its_body_is_a_frame_error(claimed: int, there: int, pools: Pools) -> None:
    before = [(DATA, 1, b"whole")]
    body = frame_bytes(before[0]) + FRAME_HEADER.pack(DATA << 24 | claimed, 1) + bytes(there)
    assert_frame_error(pools, body, before, f"passes the end of its body by {claimed - there} bytes")


def assert_frame_error(pools: Pools, body: bytes, before: list[PlainFrame], text: str) -> None:
    """The frames before the malformed one are given out, then the error is raised."""
    unpacker = decoder(pools)
    unpacker.feed(record_of(cipher(), body))
    got: list[PlainFrame] = []
    with pytest.raises(FrameError, match=text):
        got.extend(frame.copy() for frame in unpacker)
    assert got == before
    unpacker.close()
    assert pools.in_use == 0


@given(
    st.one_of(
        st.binary(min_size=1, max_size=200),
        st.builds(lambda frames, tail: b"".join(map(frame_bytes, frames)) + tail, small_frames, st.binary(min_size=1)),
    )
)
def test_any_body_is_frames_that_encode_to_it_or_a_frame_error(body: bytes) -> None:
    pools = Pools()
    unpacker = decoder(pools)
    unpacker.feed(record_of(cipher(), body))
    got: list[PlainFrame] = []
    try:
        got.extend(frame.copy() for frame in unpacker)
    except FrameError:
        assert body.startswith(b"".join(map(frame_bytes, got)))
    else:
        assert b"".join(map(frame_bytes, got)) == body
    unpacker.close()
    assert pools.in_use == 0


@each_suite
def test_any_flipped_bit_is_a_record_error_and_only_whole_records_before_it_are_given_out(
    suite: Suite, pools: Pools
) -> None:
    frames = [(DATA, 1, b"first"), (FrameType.OPENED, 3, b"\x00"), (DATA, 5, b"third, of some more bytes")]
    sealer = cipher(suite)
    records = [record_of(sealer, frame_bytes(frame)) for frame in frames]
    data = b"".join(records)
    record_of_byte = list(chain.from_iterable([number] * len(record) for number, record in enumerate(records)))
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        unpacker = FrameDecoder(cipher(suite), pools.buffers, pools.frames)
        unpacker.feed(bytes(altered))
        got: list[PlainFrame] = []
        with pytest.raises(RecordError):
            got.extend(frame.copy() for frame in unpacker)
        assert got == frames[: record_of_byte[bit // 8]]
        with pytest.raises(RecordError):
            drawn(unpacker)
        unpacker.close()
        assert pools.in_use == 0


@given(
    frames=st.lists(st.tuples(st.just(DATA), stream_ids, any_payloads), min_size=1, max_size=4),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    sizes=splits,
)
@settings(max_examples=40)
def test_a_flipped_bit_in_any_split_gives_nothing_beyond_the_last_whole_record(
    frames: list[PlainFrame], where: float, bit: int, sizes: Iterator[int]
) -> None:
    pools = Pools()
    sealer = cipher()
    records = [record_of(sealer, frame_bytes(frame)) for frame in frames]
    data = bytearray(b"".join(records))
    at = int(where * len(data))
    data[at] ^= 1 << bit
    whole = [number for number in range(len(records)) if sum(map(len, records[:number])) <= at][-1]
    unpacker = decoder(pools)
    got: list[PlainFrame] = []
    with pytest.raises(RecordError):
        received(unpacker, bytes(data), at_most_pieces(len(data), sizes), got)
    assert got == frames[:whole]
    unpacker.close()
    assert pools.in_use == 0


def test_records_of_length_zero_or_swapped_or_repeated_are_refused(pools: Pools) -> None:
    sealer = cipher()
    first, second = (record_of(sealer, frame_bytes((DATA, number, b"same size"))) for number in (1, 2))
    for data, whole in [(second + first, 0), (first + first, 1), (second, 0)]:
        unpacker = decoder(pools)
        unpacker.feed(data)
        got: list[PlainFrame] = []
        with pytest.raises(RecordError):
            got.extend(frame.copy() for frame in unpacker)
        assert len(got) == whole
        unpacker.close()
    empty = decoder(pools)
    empty.feed(record_of(cipher(), b""))
    with pytest.raises(RecordError, match="a record's body of 0 bytes"):
        drawn(empty)
    with pytest.raises(RecordError):
        drawn(empty)
    empty.close()


@given(noise=st.binary(max_size=500), sizes=splits)
def test_random_bytes_raise_protocol_errors_and_give_no_frame(noise: bytes, sizes: Iterator[int]) -> None:
    pools = Pools()
    unpacker = decoder(pools)
    got: list[PlainFrame] = []
    try:
        got = fed(unpacker, noise, sizes)
    except ProtocolError:
        assert len(noise) >= LENGTH_CHUNK_SIZE
    else:
        assert len(noise) < LENGTH_CHUNK_SIZE
    assert got == []
    unpacker.close()
    assert pools.in_use == 0


def test_a_body_that_does_not_verify_leaves_no_plaintext_behind(pools: Pools) -> None:
    record = bytearray(record_of(cipher(), frame_bytes((DATA, 1, SECRET))))
    record[-1] ^= 1
    unpacker = decoder(pools)
    unpacker.feed(bytes(record))
    with pytest.raises(RecordError):
        drawn(unpacker)
    unpacker.close()
    assert SECRET not in free_memory(pools)


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
