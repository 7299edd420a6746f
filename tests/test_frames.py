"""reflex.protocol.frames: the twins against known answers, against each other, and against altered bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflex.errors import FrameError, ProtocolError, RecordError
from reflex.protocol.frames import (
    EXACT_READ_BYTES,
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
    FrameType,
    Suite,
)
from tests.framing import (
    DATA,
    SECRET,
    PlainFrame,
    any_frames,
    any_payloads,
    at_most_pieces,
    cipher,
    decoder,
    drawn,
    each_suite,
    each_vector,
    encoder,
    fed,
    frame_bytes,
    free_memory,
    payload_of,
    received,
    record_of,
    records_of,
    sealed,
    small_frames,
    splits,
    stream_ids,
)
from tests.vectors import SealedRecord, Vector

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
