"""Noise's part of the handshake: the symmetric state with this pattern's token runs, and X25519.

Source: the Noise Protocol Framework, revision 34; what is mixed in, and in which order, is section 2 of
``docs/protocol.md``. Which bytes go where is :mod:`reflex.protocol.handshake`'s affair.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from reflex.confidential import Confidential
from reflex.protocol.wire import KEY_SIZE, NOISE_NAME, NONCE_SIZE, PROLOGUE

_SHA256: Final = SHA256()
_FRESH_HASH: Final = Hash(_SHA256)

# Every sealing of the handshake follows a MixKey, which puts Noise's counter back to 0.
_NONCE_0: Final = bytes(NONCE_SIZE)


class Transcript(Confidential):
    """Noise's SymmetricState (revision 34, section 5.2), with the token runs of this one pattern.

    Noise's HKDF is RFC 5869's with an empty info.
    """

    __slots__ = ("_chaining_key", "_hash", "_key")

    def __init__(self, masked_id: bytes, server_public: bytes) -> None:
        """``Initialize; MixHash("reflex/1" ‖ EncID); MixHash(S)``."""
        self._chaining_key = self._hash = _INITIAL_HASH
        self._key = b""  # none yet: set by the first MixKey
        self._mix_hash(PROLOGUE + masked_id)
        self._mix_hash(server_public)

    def mix_hello_keys(self, client_public: bytes, es: bytes, psk: bytes) -> None:
        """``MixHash(E); MixKey(E); MixKey(es); MixKeyAndHash(psk)``."""
        self._mix_hash(client_public)
        self._mix_key(client_public)
        self._mix_key(es)
        mixed = HKDF(_SHA256, 3 * KEY_SIZE, self._chaining_key, b"").derive(psk)
        self._chaining_key, self._key = mixed[:KEY_SIZE], mixed[2 * KEY_SIZE :]
        self._mix_hash(mixed[KEY_SIZE : 2 * KEY_SIZE])

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """The sealed text: 16 bytes longer than ``plaintext``."""
        sealed = ChaCha20Poly1305(self._key).encrypt(_NONCE_0, plaintext, self._hash)
        self._mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes | None:
        """The plaintext; None where the tag does not verify."""
        try:
            plaintext = ChaCha20Poly1305(self._key).decrypt(_NONCE_0, sealed, self._hash)
        except InvalidTag:
            return None
        self._mix_hash(sealed)
        return plaintext

    def confirm(self, server_public: bytes, ee: bytes) -> bytes:
        """``MixHash(F); MixKey(F); MixKey(ee)``, then ``T16``: all 16 bytes of it enter the hash."""
        self._mix_hash(server_public)
        self._mix_key(server_public)
        self._mix_key(ee)
        return self.encrypt_and_hash(b"")

    def split(self) -> tuple[bytes, bytes, bytes, bytes]:
        """``r_c2s, r_s2c, exporter = Noise-HKDF(ck, "", 3)``; and the channel binding, which is ``h``."""
        roots = HKDF(_SHA256, 3 * KEY_SIZE, self._chaining_key, b"").derive(b"")
        return roots[:KEY_SIZE], roots[KEY_SIZE : 2 * KEY_SIZE], roots[2 * KEY_SIZE :], self._hash

    def _mix_hash(self, data: bytes) -> None:
        self._hash = _sha256(self._hash + data)

    def _mix_key(self, input_key: bytes) -> None:
        mixed = HKDF(_SHA256, 2 * KEY_SIZE, self._chaining_key, b"").derive(input_key)
        self._chaining_key, self._key = mixed[:KEY_SIZE], mixed[KEY_SIZE:]


def exchange(private: X25519PrivateKey, public: bytes) -> bytes | None:
    """The shared secret; None for a point of low order, which X25519 refuses (RFC 7748, section 6.1)."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return None


def _sha256(data: bytes) -> bytes:
    digest = _FRESH_HASH.copy()  # half the price of a new one
    digest.update(data)
    return digest.finalize()


# Noise revision 34, section 5.2: a name longer than the hash is hashed.
_INITIAL_HASH: Final = _sha256(NOISE_NAME)
