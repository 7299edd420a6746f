"""Bytes that were changed on the way: every bit of both hellos, every place of records, whole or byte by byte.

What is asked each time: it is refused, nothing behind the last whole record is given out, no more than one record
is held, and what comes later is refused as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import pytest

from reflex.errors import AuthenticationFailed, ProtocolError, RecordError
from reflex.pool import TIER_SIZES
from reflex.protocol.frames import EXACT_READ_BYTES, FrameDecoder
from reflex.protocol.handshake import ClientHandshake
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import (
    FRAME_HEADER_SIZE,
    KEY_SIZE,
    LENGTH_CHUNK_SIZE,
    MAX_BODY_SIZE,
    MAX_RECORD_SIZE,
    RECORD_OVERHEAD,
    SERVER_HELLO_SIZE,
    TAG_SIZE,
    FrameType,
    Suite,
)
from tests.handshakes import accept, answer_of, client, flip, script
from tests.sessions import SECRETS, Pair, frame
from tests.test_wycheproof import X25519

PlainFrame = tuple[int, int, bytes]  # type, stream, payload, as Frame.copy() gives them

FIRST: Final = frame(FrameType.DATA, 1, b"a whole record that came before")
BEHIND: Final = frame(FrameType.DATA, 1, b"a record that comes behind")
DIRECTIONS: Final = {
    "client to server": SECRETS.root_client_to_server,
    "server to client": SECRETS.root_server_to_client,
}

each_suite = pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.name)
each_direction = pytest.mark.parametrize("root", DIRECTIONS.values(), ids=DIRECTIONS)


# Both hellos.

TOP_BIT: Final = 8 * KEY_SIZE - 1  # of a public key, which X25519 ignores
NON_CANONICAL: Final = [
    bytes.fromhex(vector["public"]) for vector in X25519.vectors() if "NonCanonicalPublic" in vector["flags"]
]
LOW_ORDER: Final = [
    bytes.fromhex(vector["public"]) for vector in X25519.vectors() if "LowOrderPublic" in vector["flags"]
]


@each_suite
def test_every_flipped_bit_of_a_hello_is_refused_in_both_suites(suite: Suite) -> None:
    _, hello = client(suite=suite)
    replay = ReplaySet(0)
    for bit in range(8 * len(hello)):
        with pytest.raises(AuthenticationFailed):
            accept(flip(hello, bit), replay=replay)
    assert len(replay) == 0
    assert accept(hello, replay=replay).suite is suite


@each_suite
def test_every_flipped_bit_of_an_answer_is_refused_in_both_suites(suite: Suite) -> None:
    private = os.urandom(KEY_SIZE)

    def again() -> tuple[ClientHandshake, bytes]:
        return client(suite=suite, random_bytes=script(private, b"ab"))

    made, hello = again()
    _, answer = answer_of(accept(hello))
    for bit in range(8 * len(answer)):
        with pytest.raises(AuthenticationFailed):
            again()[0].read_answer(flip(answer, bit))
    assert made.read_answer(answer).suite is suite


@pytest.mark.parametrize("point", NON_CANONICAL + LOW_ORDER, ids=bytes.hex)
def test_wycheproofs_low_order_and_non_canonical_points_are_refused_in_both_hellos(point: bytes) -> None:
    made, hello = client()
    with pytest.raises(AuthenticationFailed):
        accept(point + hello[KEY_SIZE:])
    _, answer = answer_of(accept(hello))
    with pytest.raises(AuthenticationFailed):
        made.read_answer(point + answer[KEY_SIZE:])


def test_another_encoding_of_the_same_point_is_refused_in_both_hellos() -> None:
    """X25519 gives the same secret with the top bit set; the transcript holds the bytes, and they are others."""
    made, hello = client()
    with pytest.raises(AuthenticationFailed):
        accept(flip(hello, TOP_BIT))
    _, answer = answer_of(accept(hello))
    with pytest.raises(AuthenticationFailed):
        made.read_answer(flip(answer, TOP_BIT))


@pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)
def test_an_answer_whose_every_other_byte_fits_a_low_order_key_is_refused(point: bytes) -> None:
    """Only who holds all keys can write it; a client that took it would have no forward secrecy."""
    made, hello = client()
    tag = accept(hello)._transcript.confirm(point, bytes(KEY_SIZE))
    with pytest.raises(AuthenticationFailed):
        made.read_answer((point + tag)[:SERVER_HELLO_SIZE])


@pytest.mark.parametrize("size", [0, 1, KEY_SIZE, SERVER_HELLO_SIZE - 1])
def test_no_part_of_an_answer_is_an_answer(size: int) -> None:
    """The rest is zeros, as a buffer that was not filled would have it."""
    made, hello = client()
    _, answer = answer_of(accept(hello))
    with pytest.raises(AuthenticationFailed):
        made.read_answer(answer[:size] + bytes(SERVER_HELLO_SIZE - size))


# Records, at the decoder.


def sealed(suite: Suite, root: bytes, *bodies: bytes) -> list[bytes]:
    """A record of each body, in order."""
    cipher = CipherState(suite, root)
    records = []
    for body in bodies:
        record = bytearray(len(body) + RECORD_OVERHEAD)
        cipher.seal(memoryview(body), memoryview(record))
        records.append(bytes(record))
    return records


def data_body(size: int) -> bytes:
    """A body of this size: one DATA frame."""
    return frame(FrameType.DATA, 1, os.urandom(size - FRAME_HEADER_SIZE))


def plain(body: bytes) -> PlainFrame:
    return FrameType.DATA, 1, body[FRAME_HEADER_SIZE:]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def feed(decoder: FrameDecoder, pools: Pools, data: bytes, piece_bytes: int, got: list[PlainFrame]) -> None:
    """Feed it all in pieces; what is held never passes one record and the top tier, in one buffer."""
    for piece in pieces(data, piece_bytes):
        rest = piece
        while rest:
            taken = decoder.feed(rest)
            assert decoder.held_bytes <= MAX_RECORD_SIZE
            assert pools.buffers.in_use == 1
            rest = rest[taken:]
            got.extend(each.copy() for each in decoder)
            assert decoder.held_bytes < MAX_RECORD_SIZE
            assert pools.buffers.in_use == (1 if decoder.held_bytes else 0)
            assert pools.buffers.unpooled_in_use == 0


def refuse(suite: Suite, root: bytes, data: bytes, *, piece_bytes: int, whole: list[PlainFrame], pools: Pools) -> None:
    """The data gives out the whole records and is refused; and so is all that follows, the true bytes too."""
    decoder = FrameDecoder(CipherState(suite, root), pools.buffers, pools.frames)
    got: list[PlainFrame] = []
    with pytest.raises(RecordError):
        feed(decoder, pools, data, piece_bytes, got)
    assert got == whole
    assert decoder.held_bytes <= MAX_RECORD_SIZE
    with pytest.raises(RecordError):
        got.extend(each.copy() for each in decoder)
    assert got == whole
    decoder.close()
    assert pools.in_use == 0


def altered(data: bytes, at: int) -> bytes:
    """One bit of the byte is turned; which one goes with the place, so that all eight have their turn."""
    return flip(data, 8 * at + at % 8)


def offsets(size: int, step: int) -> list[int]:
    """Every ``step``th place of a record, and every one of its first and last length chunk's size."""
    edge = LENGTH_CHUNK_SIZE + TAG_SIZE
    return sorted({*range(min(edge, size)), *range(max(size - edge, 0), size), *range(0, size, step)})


# Body size, size of the pieces that arrive, and which places are altered (1: all of them).
RECORDS: Final = [
    pytest.param(FRAME_HEADER_SIZE, 1, 1, id="least, byte by byte"),
    pytest.param(60, 1, 1, id="60, byte by byte"),
    pytest.param(60, 1 << 20, 1, id="60, at once"),
    pytest.param(300, 7, 1, id="300, by 7"),
    pytest.param(2_000, 1 << 20, 1, id="2000, at once"),
    pytest.param(2_000, 700, 3, id="2000, by 700"),
    pytest.param(EXACT_READ_BYTES - 1, 1 << 20, 41, id="below exact reads"),
    pytest.param(EXACT_READ_BYTES, 1 << 20, 41, id="exact reads"),
    pytest.param(MAX_BODY_SIZE, 1 << 20, 1_009, id="largest, at once"),
    pytest.param(MAX_BODY_SIZE, 9_973, 4_099, id="largest, in pieces"),
]


@each_suite
@each_direction
@pytest.mark.parametrize(("body_size", "piece_bytes", "step"), RECORDS)
def test_a_changed_byte_is_refused_wherever_it_stands_and_nothing_is_given_out_behind_the_last_whole_record(
    *, suite: Suite, root: bytes, body_size: int, piece_bytes: int, step: int, pools: Pools
) -> None:
    body = data_body(body_size)
    first, record, behind = sealed(suite, root, FIRST, body, BEHIND)
    for at in offsets(len(record), step):
        data = first + altered(record, at) + behind
        refuse(suite, root, data, piece_bytes=piece_bytes, whole=[plain(FIRST)], pools=pools)


@each_suite
@each_direction
def test_every_bit_of_a_record_counts(suite: Suite, root: bytes, pools: Pools) -> None:
    first, record, behind = sealed(suite, root, FIRST, data_body(40), BEHIND)
    for bit in range(8 * len(record)):
        refuse(suite, root, first + flip(record, bit) + behind, piece_bytes=1 << 20, whole=[plain(FIRST)], pools=pools)


@each_suite
def test_a_large_record_that_comes_byte_by_byte_is_held_once_and_refused_at_its_last_byte(
    suite: Suite, pools: Pools
) -> None:
    root = SECRETS.root_client_to_server
    (record,) = sealed(suite, root, data_body(EXACT_READ_BYTES + 1))
    decoder = FrameDecoder(CipherState(suite, root), pools.buffers, pools.frames)
    got: list[PlainFrame] = []
    feed(decoder, pools, record[:-1], 1, got)
    assert got == []
    assert decoder.held_bytes == len(record) - 1 - LENGTH_CHUNK_SIZE
    decoder.feed(flip(record[-1:], 0))
    with pytest.raises(RecordError):
        list(decoder)
    decoder.close()


@each_suite
def test_what_ends_before_its_record_does_gives_nothing_out_at_any_length(suite: Suite, pools: Pools) -> None:
    root = SECRETS.root_client_to_server
    first, record = sealed(suite, root, FIRST, data_body(120))
    for size in range(len(record)):
        decoder = FrameDecoder(CipherState(suite, root), pools.buffers, pools.frames)
        got: list[PlainFrame] = []
        feed(decoder, pools, first + record[:size], 1 << 20, got)
        assert got == [plain(FIRST)]
        # A length that has verified is not kept: it is known.
        assert decoder.held_bytes == (size if size < LENGTH_CHUNK_SIZE else size - LENGTH_CHUNK_SIZE)
        assert sum(pools.buffers.tier(tier).in_use for tier in TIER_SIZES if tier > MAX_RECORD_SIZE) == 0
        decoder.close()
        assert pools.in_use == 0


def test_whatever_is_sent_without_keys_ends_at_its_first_twenty_bytes(pools: Pools) -> None:
    decoder = FrameDecoder(CipherState(Suite.AES_256_GCM, SECRETS.root_client_to_server), pools.buffers, pools.frames)
    noise = os.urandom(LENGTH_CHUNK_SIZE)
    for byte in noise[:-1]:
        decoder.feed(bytes([byte]))
        assert list(decoder) == []
    decoder.feed(noise[-1:])
    with pytest.raises(RecordError):
        list(decoder)
    assert decoder.held_bytes == LENGTH_CHUNK_SIZE
    decoder.close()


# Records, at the sessions.


def conversation(pools: Pools) -> Pair:
    """A pair with a stream, and bytes under way in both directions, in three records each."""
    pair = Pair(pools)
    near, far = pair.open()
    for number in range(3):
        pair.client.session.send(near, b"there %d" % number)
        pair.client.session.seal()
        pair.server.session.send(far, b"back %d" % number)
        pair.server.session.seal()
    return pair


@pytest.mark.parametrize("direction", ["client to server", "server to client"])
def test_a_session_ends_at_a_changed_byte_and_has_given_out_whole_records_only(direction: str, pools: Pools) -> None:
    word = b"there" if direction == "client to server" else b"back"
    size = 3 * (RECORD_OVERHEAD + FRAME_HEADER_SIZE + len(word) + 2)
    for at in range(size):
        pair = conversation(pools)
        sender, receiver = pair.client, pair.server
        if direction == "server to client":
            sender, receiver = receiver, sender
        data = sender.take_output()
        assert len(data) == size
        with pytest.raises(ProtocolError):
            receiver.feed(altered(data, at))
        assert bytes(receiver.got.get(1, b"")) == b"".join(word + b" %d" % number for number in range(3 * at // size))
        with pytest.raises(ProtocolError):
            receiver.feed(data)
        pair.end()
    assert pools.in_use == 0
