"""reflex.protocol.keys: known answers, round trips, and nothing altered gets through."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import ProtocolError, RecordError
from reflex.protocol.keys import CipherState, next_root, traffic_key
from reflex.protocol.wire import (
    LENGTH,
    LENGTH_CHUNK_SIZE,
    MAX_BODY_SIZE,
    MAX_RECORD_SIZE,
    RECORD_OVERHEAD,
    RECORDS_PER_KEY,
    TAG_SIZE,
    Suite,
)
from tests.vectors import VECTORS, SealedRecord, Vector

ROOT = bytes(range(32))
REKEY_OF_VECTORS = 3

each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v.client_hello[:4].hex()}-suite-{v.suite}")
each_suite = pytest.mark.parametrize("suite", list(Suite), ids=lambda s: s.name)


def seal(cipher: CipherState, body: bytes) -> bytes:
    out = bytearray(len(body) + RECORD_OVERHEAD)
    assert cipher.seal(memoryview(body), memoryview(out)) == len(out)
    return bytes(out)


def open_record(cipher: CipherState, record: bytes, out: memoryview | None = None) -> bytes:
    """Open one record that is whole; ``out``, if given, is where the body goes."""
    view = memoryview(record)
    size = cipher.open_length(view[:LENGTH_CHUNK_SIZE])
    if out is None:
        out = memoryview(bytearray(size))
    cipher.open_body(view[LENGTH_CHUNK_SIZE:], out)
    return bytes(out)


def directions(vector: Vector) -> list[tuple[bytes, int, tuple[SealedRecord, ...]]]:
    """Root, records a key, and records of both directions of a vector."""
    return [
        (vector.root_client_to_server, RECORDS_PER_KEY, vector.client_to_server_records),
        (vector.root_server_to_client, REKEY_OF_VECTORS, vector.server_to_client_records_with_rekey_after_3),
    ]


def expand(prk: bytes, info: bytes, size: int) -> bytes:
    """HKDF-Expand of RFC 5869, section 2.3, written down a second time."""
    blocks = [b""]
    while sum(map(len, blocks)) < size:
        blocks.append(hmac.digest(prk, blocks[-1] + info + bytes([len(blocks)]), hashlib.sha256))
    return b"".join(blocks)[:size]


# Known answers.


@each_vector
def test_every_record_of_the_vectors_is_sealed_to_the_byte(vector: Vector) -> None:
    for root, records_per_key, records in directions(vector):
        cipher = CipherState(Suite(vector.suite), root, records_per_key=records_per_key)
        assert [seal(cipher, record.body) for record in records] == [record.record for record in records]


@each_vector
def test_every_record_of_the_vectors_opens_to_its_body(vector: Vector) -> None:
    for root, records_per_key, records in directions(vector):
        cipher = CipherState(Suite(vector.suite), root, records_per_key=records_per_key)
        assert [open_record(cipher, record.record) for record in records] == [record.body for record in records]


@each_vector
def test_the_vectors_hold_a_rekey_that_a_cipher_without_it_refuses(vector: Vector) -> None:
    root, _, records = directions(vector)[1]
    cipher = CipherState(Suite(vector.suite), root)
    for record in records[:REKEY_OF_VECTORS]:
        assert open_record(cipher, record.record) == record.body
    with pytest.raises(RecordError):
        open_record(cipher, records[REKEY_OF_VECTORS].record)


@each_suite
@given(root=st.binary(min_size=32, max_size=32))
def test_the_key_schedule_is_hkdf_expand(suite: Suite, root: bytes) -> None:
    key, iv = traffic_key(root, suite)
    assert key + iv == expand(root, b"reflex/1 key" + bytes([suite]), 32 + 12)
    assert len(key) == 32
    assert next_root(root) == expand(root, b"reflex/1 next", 32)


def test_suites_have_keys_of_their_own() -> None:
    assert traffic_key(ROOT, Suite.AES_256_GCM) != traffic_key(ROOT, Suite.CHACHA20_POLY1305)


# Round trips.


@each_suite
@given(bodies=st.lists(st.binary(min_size=1, max_size=300), max_size=12), records_per_key=st.integers(1, 5))
def test_whatever_is_sealed_opens_across_any_number_of_keys(
    suite: Suite, bodies: list[bytes], records_per_key: int
) -> None:
    sealer = CipherState(suite, ROOT, records_per_key=records_per_key)
    opener = CipherState(suite, ROOT, records_per_key=records_per_key)
    assert [open_record(opener, seal(sealer, body)) for body in bodies] == bodies


@each_suite
def test_a_cipher_after_its_rekey_is_that_of_the_next_root(suite: Suite) -> None:
    cipher = CipherState(suite, ROOT, records_per_key=2)
    seal(cipher, b"one")
    seal(cipher, b"two")
    assert seal(cipher, b"three") == seal(CipherState(suite, next_root(ROOT)), b"three")


def test_the_contracts_key_lasts_65536_records() -> None:
    cipher, fresh = CipherState(Suite.AES_256_GCM, ROOT), CipherState(Suite.AES_256_GCM, next_root(ROOT))
    body, out = memoryview(b"x"), memoryview(bytearray(1 + RECORD_OVERHEAD))
    opener, plain = CipherState(Suite.AES_256_GCM, ROOT), memoryview(bytearray(1))
    for _ in range(65_536):
        cipher.seal(body, out)
        opener.open_length(out[:LENGTH_CHUNK_SIZE])
        opener.open_body(out[LENGTH_CHUNK_SIZE:], plain)
    record = seal(cipher, b"the first of the next key")
    assert record == seal(fresh, b"the first of the next key")
    assert open_record(opener, record) == b"the first of the next key"


@each_suite
def test_the_smallest_and_the_largest_body(suite: Suite) -> None:
    sealer, opener = CipherState(suite, ROOT), CipherState(suite, ROOT)
    for size in (1, MAX_BODY_SIZE):
        body = bytes([size & 0xFF]) * size
        record = seal(sealer, body)
        assert len(record) == size + RECORD_OVERHEAD <= MAX_RECORD_SIZE
        assert open_record(opener, record) == body


def test_sealing_leaves_the_body_and_what_lies_behind_the_record_as_they_were() -> None:
    body = bytearray(b"plaintext")
    out = bytearray(b"\xaa" * 100)
    size = CipherState(Suite.AES_256_GCM, ROOT).seal(memoryview(body), memoryview(out))
    assert body == b"plaintext"
    assert out[size:] == b"\xaa" * (100 - size)


# Altered, swapped and missing.


@each_suite
def test_any_flipped_bit_is_refused_and_no_unverified_plaintext_is_left(suite: Suite) -> None:
    body = b"sixteen bytes and some more"
    record = seal(CipherState(suite, ROOT), body)
    for bit in range(8 * len(record)):
        altered = bytearray(record)
        altered[bit // 8] ^= 1 << bit % 8
        out = memoryview(bytearray(b"\xff" * len(body)))
        with pytest.raises(RecordError):
            open_record(CipherState(suite, ROOT), bytes(altered), out)
        if bit >= 8 * LENGTH_CHUNK_SIZE:
            assert bytes(out) == bytes(len(body)), f"bit {bit}"


@each_vector
def test_any_flipped_bit_of_the_vectors_largest_record_is_refused(vector: Vector) -> None:
    root, _, records = directions(vector)[0]
    record = max(records, key=lambda r: len(r.record))
    position = records.index(record)
    for at in range(0, len(record.record), 97):
        cipher = CipherState(Suite(vector.suite), root)
        for earlier in records[:position]:
            open_record(cipher, earlier.record)
        altered = bytearray(record.record)
        altered[at] ^= 0x10
        out = memoryview(bytearray(len(record.body)))
        with pytest.raises(RecordError):
            open_record(cipher, bytes(altered), out)
        assert not any(out)


@each_suite
def test_records_open_in_their_order_only(suite: Suite) -> None:
    sealer = CipherState(suite, ROOT)
    first, second = seal(sealer, b"first"), seal(sealer, b"other")
    cipher = CipherState(suite, ROOT)
    with pytest.raises(RecordError):
        open_record(cipher, second)
    assert open_record(cipher, first) == b"first"
    with pytest.raises(RecordError):
        open_record(cipher, first)
    assert open_record(cipher, second) == b"other"


@each_suite
def test_a_length_chunk_is_no_body_and_a_body_no_length_chunk(suite: Suite) -> None:
    record = memoryview(seal(CipherState(suite, ROOT), b"four"))
    cipher = CipherState(suite, ROOT)
    with pytest.raises(RecordError):
        cipher.open_length(record[LENGTH_CHUNK_SIZE:])
    cipher.open_length(record[:LENGTH_CHUNK_SIZE])
    with pytest.raises(RecordError):
        cipher.open_body(record[:LENGTH_CHUNK_SIZE], memoryview(bytearray(LENGTH.size)))


@each_suite
def test_another_root_opens_nothing(suite: Suite) -> None:
    record = seal(CipherState(suite, ROOT), b"body")
    with pytest.raises(RecordError):
        open_record(CipherState(suite, next_root(ROOT)), record)


@each_suite
@pytest.mark.parametrize("length", [0, MAX_BODY_SIZE + 1, MAX_RECORD_SIZE, 2**24, 2**32 - 1])
def test_a_verified_length_outside_of_its_range_is_refused(suite: Suite, length: int) -> None:
    key, iv = traffic_key(ROOT, suite)
    aead = AESGCM(key) if suite == Suite.AES_256_GCM else ChaCha20Poly1305(key)
    chunk = aead.encrypt(iv, LENGTH.pack(length), None)
    with pytest.raises(RecordError, match=f"a record's body of {length} bytes"):
        CipherState(suite, ROOT).open_length(memoryview(chunk))


@each_suite
@pytest.mark.parametrize("length", [1, MAX_BODY_SIZE])
def test_a_verified_length_at_the_edge_of_its_range_is_taken(suite: Suite, length: int) -> None:
    key, iv = traffic_key(ROOT, suite)
    aead = AESGCM(key) if suite == Suite.AES_256_GCM else ChaCha20Poly1305(key)
    chunk = aead.encrypt(iv, LENGTH.pack(length), None)
    assert CipherState(suite, ROOT).open_length(memoryview(chunk)) == length


@each_suite
@given(noise=st.binary(min_size=LENGTH_CHUNK_SIZE, max_size=LENGTH_CHUNK_SIZE + 100))
def test_random_bytes_are_refused_as_record_errors(suite: Suite, noise: bytes) -> None:
    cipher = CipherState(suite, ROOT)
    with pytest.raises(RecordError):
        cipher.open_length(memoryview(noise)[:LENGTH_CHUNK_SIZE])
    out = memoryview(bytearray(b"\xff" * (len(noise) - TAG_SIZE)))
    with pytest.raises(ProtocolError):
        cipher.open_body(memoryview(noise), out)
    assert not any(out)
