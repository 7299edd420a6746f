"""Traffic keys and the cipher state of one direction (docs/protocol.md, sections 3 and 4)."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from reflex.confidential import Confidential
from reflex.errors import RecordError
from reflex.protocol.wire import (
    KEY_INFO,
    KEY_SIZE,
    LENGTH,
    LENGTH_CHUNK_SIZE,
    MAX_BODY_SIZE,
    NEXT_INFO,
    NONCE_SIZE,
    RECORDS_PER_KEY,
    TAG_SIZE,
    Suite,
)


def traffic_key(root: bytes, suite: Suite) -> tuple[bytes, bytes]:
    """Key (32 bytes) and iv (12 bytes) of a root: ``HKDF-Expand(r, "reflex/1 key" ‖ suite, 32 + 12)``."""
    info = KEY_INFO + bytes([suite])
    material = HKDFExpand(SHA256(), KEY_SIZE + NONCE_SIZE, info).derive(root)
    return material[:KEY_SIZE], material[KEY_SIZE:]


def next_root(root: bytes) -> bytes:
    """The root that follows: ``HKDF-Expand(r, "reflex/1 next", 32)``."""
    return HKDFExpand(SHA256(), KEY_SIZE, NEXT_INFO).derive(root)


_pack_length = LENGTH.pack


class CipherState(Confidential):
    """Seals, or opens, the records of one direction, in order; moves to the next key by itself.

    Args:
        suite: the cipher.
        root: 32 bytes, from the handshake.
        records_per_key: the contract's number; another only to check the mechanism against vectors.
    """

    __slots__ = ("_decrypt", "_decrypt_into", "_encrypt_into", "_iv", "_n", "_n_limit", "_root", "_suite")

    def __init__(self, suite: Suite, root: bytes, *, records_per_key: int = RECORDS_PER_KEY) -> None:
        self._suite = suite
        self._root = root
        self._n_limit = 2 * records_per_key  # each record is two AEAD calls: length and body
        self._start_key()

    def _start_key(self) -> None:
        key, iv = traffic_key(self._root, self._suite)
        aead = AESGCM(key) if self._suite == Suite.AES_256_GCM else ChaCha20Poly1305(key)
        self._encrypt_into = aead.encrypt_into  # bound once: each is called for every record
        self._decrypt = aead.decrypt
        self._decrypt_into = aead.decrypt_into
        self._iv = int.from_bytes(iv)
        self._n = 0

    def _next_key(self) -> None:
        self._root = next_root(self._root)
        self._start_key()

    def seal(self, body: memoryview, out: memoryview) -> int:
        """Seal one record.

        Args:
            body: 1 to MAX_BODY_SIZE bytes of plaintext; the caller's, unchanged.
            out: at least ``len(body) + RECORD_OVERHEAD`` bytes; the caller's, filled from the front.

        Returns:
            How many bytes of ``out`` the record takes.
        """
        n = self._n
        iv = self._iv
        size = len(body)
        end = LENGTH_CHUNK_SIZE + size + TAG_SIZE
        encrypt_into = self._encrypt_into
        encrypt_into((iv ^ n).to_bytes(NONCE_SIZE), _pack_length(size), None, out[:LENGTH_CHUNK_SIZE])
        encrypt_into((iv ^ (n + 1)).to_bytes(NONCE_SIZE), body, None, out[LENGTH_CHUNK_SIZE:end])
        n += 2
        self._n = n
        if n >= self._n_limit:
            self._next_key()
        return end

    def open_length(self, chunk: memoryview) -> int:
        """Verify a length chunk (LENGTH_CHUNK_SIZE bytes) and return the body's length in bytes.

        Raises:
            RecordError: it does not verify, or the length is not 1 to MAX_BODY_SIZE.
        """
        try:
            plain = self._decrypt((self._iv ^ self._n).to_bytes(NONCE_SIZE), chunk, None)
        except InvalidTag:
            raise RecordError("a record's length does not verify") from None
        self._n += 1
        size = int.from_bytes(plain)
        if not 1 <= size <= MAX_BODY_SIZE:
            raise RecordError(f"a record's body of {size} bytes; 1 to {MAX_BODY_SIZE} are allowed")
        return size

    def open_body(self, chunk: memoryview, out: memoryview) -> None:
        """Verify and decrypt a body chunk.

        Args:
            chunk: the body and its tag.
            out: exactly ``len(chunk) - TAG_SIZE`` bytes; the caller's. On an error it holds zeros:
                the cipher leaves unverified plaintext there (design trap), which is wiped here.

        Raises:
            RecordError: it does not verify.
        """
        try:
            self._decrypt_into((self._iv ^ self._n).to_bytes(NONCE_SIZE), chunk, None, out)
        except InvalidTag:
            out[:] = bytes(len(out))
            raise RecordError("a record's body does not verify") from None
        self._n += 1
        if self._n >= self._n_limit:
            self._next_key()
