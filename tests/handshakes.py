"""Both halves of a handshake, by hand; and the same hello by another implementation of Noise."""

from __future__ import annotations

import functools
import hmac
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection  # type: ignore[import-untyped]

from reflex.protocol.handshake import (
    AcceptedHello,
    ClientCredentials,
    ClientHandshake,
    ServerCredentials,
    SessionSecrets,
    accept_hello,
)
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import (
    CLIENT_HELLO_SIZE,
    HELLO_TIME_LIMIT_S,
    KEY_SIZE,
    SERVER_HELLO_SIZE,
    Suite,
)
from tests.vectors import VECTORS

NOW = 1_900_000_000
LIMIT = HELLO_TIME_LIMIT_S
USER_ID = bytes(range(16))
USER_KEY = bytes(range(100, 132))
SERVER_PRIVATE = bytes(range(200, 232))
ROOTS = ("root_client_to_server", "root_server_to_client", "exporter", "handshake_hash")

each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v.client_hello[:4].hex()}-suite-{v.suite}")
each_suite = pytest.mark.parametrize("suite", list(Suite), ids=lambda s: s.name)
# Ephemeral private keys whose public halves begin with 16 03 and with "PRI".
LOOKALIKES = [(0xDA21).to_bytes(KEY_SIZE, "big"), (0xE8_D4BC_F636).to_bytes(KEY_SIZE, "big")]
keys = st.binary(min_size=KEY_SIZE, max_size=KEY_SIZE)


def script(*draws: bytes) -> Callable[[int], bytes]:
    """Random bytes that are not: each call gives the next draw, and must ask for just its size."""
    remaining = list(draws)

    def random_bytes(size: int) -> bytes:
        draw = remaining.pop(0)
        assert len(draw) == size
        return draw

    return random_bytes


def public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


@functools.cache
def server_credentials() -> ServerCredentials:
    return ServerCredentials(SERVER_PRIVATE, {USER_ID: USER_KEY, b"another user's..": b"k" * KEY_SIZE})


@functools.cache
def client_credentials() -> ClientCredentials:
    return ClientCredentials(public_of(SERVER_PRIVATE), USER_ID, USER_KEY)


def client(
    credentials: ClientCredentials | None = None,
    *,
    suite: Suite = Suite.AES_256_GCM,
    time_s: int = NOW,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> tuple[ClientHandshake, bytes]:
    made = ClientHandshake(credentials or client_credentials(), suite=suite, time_s=time_s, random_bytes=random_bytes)
    out = bytearray(CLIENT_HELLO_SIZE)
    made.write_hello(memoryview(out))
    return made, bytes(out)


def accept(
    hello: bytes | bytearray | memoryview,
    credentials: ServerCredentials | None = None,
    *,
    now_s: int = NOW,
    replay: ReplaySet | None = None,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> AcceptedHello:
    return accept_hello(
        hello,
        credentials or server_credentials(),
        now_s=now_s,
        replay=ReplaySet(0) if replay is None else replay,
        random_bytes=random_bytes,
    )


def answer_of(
    accepted: AcceptedHello, random_bytes: Callable[[int], bytes] = os.urandom
) -> tuple[SessionSecrets, bytes]:
    out = bytearray(SERVER_HELLO_SIZE)
    secrets = accepted.write_answer(memoryview(out), random_bytes=random_bytes)
    return secrets, bytes(out)


def roots(secrets: SessionSecrets) -> dict[str, bytes]:
    return {name: getattr(secrets, name) for name in ROOTS}


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def assert_tells_nothing(error: BaseException) -> None:
    """No cause and no context: nothing that was in hand when the error came about hangs on it."""
    assert error.__cause__ is None
    assert error.__context__ is None


def noise_half(*, private: bytes, prologue: bytes, psk: bytes, server: bytes, initiator: bool) -> Any:
    """``noiseprotocol`` as either half. ``server`` is the initiator's public or the responder's private key."""
    noise = NoiseConnection.from_name(b"Noise_NKpsk1_25519_ChaChaPoly_SHA256")
    noise.set_prologue(prologue)
    noise.set_psks(psk)
    if initiator:
        noise.set_as_initiator()
        noise.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, server)
    else:
        noise.set_as_responder()
        noise.set_keypair_from_private_bytes(Keypair.STATIC, server)
    noise.set_keypair_from_private_bytes(Keypair.EPHEMERAL, private)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of fixed ephemeral keys, which are the point here
        noise.start_handshake()
    return noise


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def masked_id_of(client_private: bytes, server_public: bytes, user_id: bytes) -> bytes:
    """EncID of section 2, from the standard library's HMAC."""
    ephemeral = X25519PrivateKey.from_private_bytes(client_private)
    es = ephemeral.exchange(X25519PublicKey.from_public_bytes(server_public))
    prk = hmac_sha256(ephemeral.public_key().public_bytes_raw(), es)
    mask = hmac_sha256(prk, b"reflex/1 id" + server_public + b"\x01")
    return bytes(a ^ b for a, b in zip(user_id, mask[:16], strict=True))


def noise_hello(client_private: bytes, time_options: bytes) -> bytes:
    """An authentic hello with any time and options, made without the code under test."""
    server_public = public_of(SERVER_PRIVATE)
    masked = masked_id_of(client_private, server_public, USER_ID)
    noise = noise_half(
        private=client_private,
        prologue=b"reflex/1" + masked,
        psk=hmac_sha256(USER_KEY, b"reflex/1 psk" + USER_ID + b"\x01"),
        server=server_public,
        initiator=True,
    )
    message = bytes(noise.write_message(time_options))
    return message[:KEY_SIZE] + masked + message[KEY_SIZE:]


def stranger(**changed: bytes) -> ClientCredentials:
    known = {"server_public": public_of(SERVER_PRIVATE), "user_id": USER_ID, "user_key": USER_KEY}
    return ClientCredentials(**(known | changed))
