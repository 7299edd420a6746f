"""reflex.protocol.noise, as the handshake uses it: against another implementation, and piece by piece."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from reflex.protocol.handshake import (
    ClientCredentials,
    ServerCredentials,
)
from reflex.protocol.noise import Transcript, exchange
from reflex.protocol.wire import (
    KEY_SIZE,
    SERVER_HELLO_SIZE,
    Suite,
)
from tests.handshakes import (
    accept,
    answer_of,
    client,
    hmac_sha256,
    keys,
    masked_id_of,
    noise_half,
    public_of,
    roots,
    script,
)


@given(
    server_private=keys,
    client_private=keys,
    answer_private=keys,
    user_id=st.binary(min_size=16, max_size=16),
    user_key=keys,
    suite=st.sampled_from(Suite),
    time_s=st.integers(0, 2**64 - 1),
    random=st.binary(min_size=2, max_size=2),
)
def test_both_halves_equal_noise_but_for_the_two_deviations(
    *,
    server_private: bytes,
    client_private: bytes,
    answer_private: bytes,
    user_id: bytes,
    user_key: bytes,
    suite: Suite,
    time_s: int,
    random: bytes,
) -> None:
    server_public = public_of(server_private)
    masked = masked_id_of(client_private, server_public, user_id)
    psk = hmac_sha256(user_key, b"reflex/1 psk" + user_id + b"\x01")
    prologue = b"reflex/1" + masked
    time_options = struct.pack(">QBB", time_s, 1 << 4 | suite, 0) + random
    initiator = noise_half(private=client_private, prologue=prologue, psk=psk, server=server_public, initiator=True)
    responder = noise_half(private=answer_private, prologue=prologue, psk=psk, server=server_private, initiator=False)
    noise_state = responder.noise_protocol.handshake_state.symmetric_state
    first = bytes(initiator.write_message(time_options))
    assert responder.read_message(first) == time_options
    second = bytes(responder.write_message())
    initiator.read_message(second)

    credentials = ClientCredentials(server_public, user_id, user_key)
    draws = script(client_private, random)
    made, hello = client(credentials, suite=suite, time_s=time_s, random_bytes=draws)
    assert hello == first[:KEY_SIZE] + masked + first[KEY_SIZE:]
    server = ServerCredentials(server_private, {user_id: user_key})
    draws = script(bytes(KEY_SIZE), answer_private)
    accepted = accept(hello, server, now_s=time_s, random_bytes=draws)
    secrets, answer = answer_of(accepted, draws)
    assert answer == second[:SERVER_HELLO_SIZE]
    assert roots(made.read_answer(answer)) == roots(secrets)

    assert secrets.root_client_to_server == initiator.noise_protocol.cipher_state_encrypt.k
    assert secrets.root_server_to_client == initiator.noise_protocol.cipher_state_decrypt.k
    assert secrets.handshake_hash == initiator.get_handshake_hash()
    prk = hmac_sha256(noise_state.ck, b"")
    assert secrets.exporter == hmac_sha256(prk, secrets.root_server_to_client + b"\x03")


def transcript(
    masked_id: bytes = b"i" * 16, server_public: bytes = b"S" * KEY_SIZE, psk: bytes = b"p" * KEY_SIZE
) -> Transcript:
    made = Transcript(masked_id, server_public)
    made.mix_hello_keys(b"E" * KEY_SIZE, b"s" * KEY_SIZE, psk)
    return made


def test_what_one_side_seals_the_other_opens_and_both_come_to_the_same() -> None:
    near, far = transcript(), transcript()
    assert far.decrypt_and_hash(near.encrypt_and_hash(b"options")) == b"options"
    assert near.confirm(b"F" * KEY_SIZE, b"e" * KEY_SIZE) == far.confirm(b"F" * KEY_SIZE, b"e" * KEY_SIZE)
    assert near.split() == far.split()
    assert [len(part) for part in near.split()] == [KEY_SIZE] * 4
    assert len(set(near.split())) == 4


@pytest.mark.parametrize("other", ["masked_id", "server_public", "psk"])
def test_a_tag_does_not_verify_where_anything_that_was_mixed_in_differs(other: str) -> None:
    sealed = transcript().encrypt_and_hash(b"options")
    size = 16 if other == "masked_id" else 32
    assert transcript(**{other: b"x" * size}).decrypt_and_hash(sealed) is None


def test_an_exchange_is_the_same_from_both_sides_and_there_is_none_with_a_low_order_point() -> None:
    one, other = (X25519PrivateKey.from_private_bytes(bytes([each]) * KEY_SIZE) for each in (1, 2))
    shared = exchange(one, other.public_key().public_bytes_raw())
    assert shared is not None
    assert shared == exchange(other, one.public_key().public_bytes_raw())
    assert exchange(one, bytes(KEY_SIZE)) is None


def test_a_transcript_shows_nothing_of_itself() -> None:
    assert repr(transcript()) == "Transcript(…)"
