"""Keys for both halves, and the handshake by hand."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from reflex.protocol.handshake import (
    AcceptedHello,
    ClientCredentials,
    ClientHandshake,
    ServerCredentials,
    SessionSecrets,
)
from reflex.protocol.wire import CLIENT_HELLO_SIZE, SERVER_HELLO_SIZE, Suite

NOW_S: Final = 1_900_000_000  # a time for whoever needs one


@dataclass(frozen=True)
class Keys:
    """What the two halves share."""

    private_key: bytes
    public_key: bytes
    user_id: uuid.UUID
    user_key: bytes

    @classmethod
    def generate(cls) -> Keys:
        private = X25519PrivateKey.generate()
        return cls(
            private.private_bytes_raw(), private.public_key().public_bytes_raw(), uuid.uuid4(), secrets.token_bytes(32)
        )

    @property
    def server(self) -> ServerCredentials:
        return ServerCredentials(self.private_key, {self.user_id.bytes: self.user_key})

    @property
    def client(self) -> ClientCredentials:
        return ClientCredentials(self.public_key, self.user_id.bytes, self.user_key)

    def handshake(self, time_s: int) -> tuple[ClientHandshake, bytes]:
        """A client's handshake, and the hello that it begins with."""
        handshake = ClientHandshake(
            self.client, suite=Suite.AES_256_GCM, time_s=time_s, random_bytes=secrets.token_bytes
        )
        hello = bytearray(CLIENT_HELLO_SIZE)
        handshake.write_hello(memoryview(hello))
        return handshake, bytes(hello)

    def hello(self, time_s: int) -> bytes:
        return self.handshake(time_s)[1]


def answer_of(hello: AcceptedHello) -> tuple[bytes, SessionSecrets]:
    """A server's answer by hand, and the secrets."""
    answer = bytearray(SERVER_HELLO_SIZE)
    session_secrets = hello.write_answer(memoryview(answer), random_bytes=secrets.token_bytes)
    return bytes(answer), session_secrets
