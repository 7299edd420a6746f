"""Wycheproof's vectors, every one, through the primitives in the way that Reflex calls them.

Where Reflex has a function of its own around a primitive, the vectors go through that function: the exchange of
the handshake, the seals of a record. What a vector calls "acceptable" is decided here, flag by flag.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from reflex.errors import RecordError
from reflex.protocol.keys import CipherState
from reflex.protocol.noise import exchange
from reflex.protocol.wire import KEY_SIZE, LENGTH_CHUNK_SIZE, NONCE_SIZE, RECORD_OVERHEAD, TAG_SIZE, Suite

FOLDER: Final = Path(__file__).parent / "vectors" / "wycheproof"
# Nonces that the library takes for AES-GCM, in bytes; Reflex's have NONCE_SIZE.
AES_GCM_NONCES: Final = range(8, 129)
HKDF_MAX_SIZE: Final = 255 * 32  # RFC 5869, section 2.3

Vectors = list[dict[str, Any]]
Aead = type[AESGCM] | type[ChaCha20Poly1305]


@dataclass(frozen=True)
class File:
    """One file, and how many vectors of each result it must hold."""

    name: str
    results: dict[str, int]

    def vectors(self) -> Vectors:
        content = json.loads(self.unpacked())
        found: Vectors = [vector for group in content["testGroups"] for vector in group["tests"]]
        assert content["numberOfTests"] == len(found) == sum(self.results.values())
        assert Counter(vector["result"] for vector in found) == self.results
        return found

    def unpacked(self) -> bytes:
        return gzip.decompress((FOLDER / f"{self.name}.gz").read_bytes())


AES_GCM: Final = File("aes_gcm_test.json", {"valid": 229, "invalid": 87})
CHACHA20_POLY1305: Final = File("chacha20_poly1305_test.json", {"valid": 256, "invalid": 69})
HKDF_SHA256: Final = File("hkdf_sha256_test.json", {"valid": 83, "invalid": 3})
X25519: Final = File("x25519_test.json", {"valid": 264, "acceptable": 254})
FILES: Final = (AES_GCM, CHACHA20_POLY1305, HKDF_SHA256, X25519)

SEALS: Final[dict[Suite, tuple[File, Aead]]] = {
    Suite.AES_256_GCM: (AES_GCM, AESGCM),
    Suite.CHACHA20_POLY1305: (CHACHA20_POLY1305, ChaCha20Poly1305),
}
# Nonces that the library takes neither to seal nor to open: AES-GCM's standard allows those below 8 and above
# 128 bytes.
REFUSED_NONCES: Final = {Suite.AES_256_GCM: {"valid": 27, "invalid": 6}, Suite.CHACHA20_POLY1305: {"invalid": 9}}
# What is a body: keys of 32 bytes, nonces of 12, no associated data, a byte or more.
BODIES: Final = {Suite.AES_256_GCM: {"valid": 20, "invalid": 27}, Suite.CHACHA20_POLY1305: {"valid": 44}}

each_suite = pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.name)


def unhex(vector: dict[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def test_the_files_are_those_whose_sums_the_readme_tells() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+\.json)` \| `([0-9a-f]{64})` \|$", text, re.MULTILINE))
    assert told == {file.name: hashlib.sha256(file.unpacked()).hexdigest() for file in FILES}
    assert {path.name for path in FOLDER.glob("*.gz")} == {f"{name}.gz" for name in told}
    assert "Apache License" in (FOLDER / "LICENSE").read_text(encoding="utf-8")


# Records.


def sealed_into(aead: Any, nonce: bytes, message: bytes, aad: bytes) -> bytes:
    out = bytearray(len(message) + TAG_SIZE)
    aead.encrypt_into(nonce, message, aad or None, memoryview(out))
    return bytes(out)


def opened_into(aead: Any, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    out = bytearray(len(sealed) - TAG_SIZE)
    aead.decrypt_into(nonce, sealed, aad or None, memoryview(out))
    return bytes(out)


@each_suite
def test_every_seal_of_the_vectors_is_made_and_opened_or_refused_as_they_say(suite: Suite) -> None:
    file, aead = SEALS[suite]
    wrong = []
    refused_nonces: Counter[str] = Counter()
    for vector in file.vectors():
        key, nonce, message, aad, sealed, tag = unhex(vector, "key", "iv", "msg", "aad", "ct", "tag")
        allowed = AES_GCM_NONCES if aead is AESGCM else [NONCE_SIZE]
        try:
            opened: bytes | None = opened_into(aead(key), nonce, sealed + tag, aad)
            assert len(nonce) in allowed
        except InvalidTag:
            opened = None
        except ValueError:
            assert len(nonce) not in allowed
            with pytest.raises(ValueError, match=r"[Nn]once"):
                sealed_into(aead(key), nonce, message, aad)
            refused_nonces[vector["result"]] += 1
            continue
        if vector["result"] == "valid":
            is_right = opened == message and sealed_into(aead(key), nonce, message, aad) == sealed + tag
        else:
            is_right = opened is None
        if not is_right:
            wrong.append(vector["tcId"])
    assert wrong == []
    assert refused_nonces == REFUSED_NONCES[suite]


def record_cipher(suite: Suite, aead: Any, nonce: bytes, *, n: int) -> CipherState:
    """A direction's cipher with a given key, whose first body has this nonce; n = 1: its length has come."""
    cipher = CipherState(suite, bytes(KEY_SIZE))
    cipher._encrypt_into, cipher._decrypt, cipher._decrypt_into = aead.encrypt_into, aead.decrypt, aead.decrypt_into
    cipher._iv = int.from_bytes(nonce) ^ 1
    cipher._n = n
    return cipher


def refuse(suite: Suite, aead: Any, nonce: bytes, chunk: bytes) -> None:
    """The body does not open, and nothing of it is left."""
    out = bytearray(b"\xff" * (len(chunk) - TAG_SIZE))
    with pytest.raises(RecordError):
        record_cipher(suite, aead, nonce, n=1).open_body(memoryview(chunk), memoryview(out))
    assert bytes(out) == bytes(len(out))


def tags_altered(tag: bytes) -> Iterator[bytes]:
    """The tag with each of its bits turned round."""
    for bit in range(8 * len(tag)):
        yield (int.from_bytes(tag) ^ 1 << bit).to_bytes(len(tag))


@each_suite
def test_every_vector_that_could_be_a_body_goes_through_a_records_cipher(suite: Suite) -> None:
    file, aead = SEALS[suite]
    results: Counter[str] = Counter()
    for vector in file.vectors():
        key, nonce, message, aad, sealed, tag = unhex(vector, "key", "iv", "msg", "aad", "ct", "tag")
        if (len(key), len(nonce), aad) != (KEY_SIZE, NONCE_SIZE, b"") or not message:
            continue
        results[vector["result"]] += 1
        if vector["result"] == "valid":
            out = bytearray(len(message))
            record_cipher(suite, aead(key), nonce, n=1).open_body(memoryview(sealed + tag), memoryview(out))
            assert bytes(out) == message, vector["tcId"]
            record = bytearray(len(message) + RECORD_OVERHEAD)
            sealer = record_cipher(suite, aead(key), nonce, n=0)
            assert sealer.seal(memoryview(message), memoryview(record)) == len(record)
            assert bytes(record[LENGTH_CHUNK_SIZE:]) == sealed + tag, vector["tcId"]
            for altered in tags_altered(tag):
                refuse(suite, aead(key), nonce, sealed + altered)
        else:
            refuse(suite, aead(key), nonce, sealed + tag)
    assert results == BODIES[suite]


# The handshake's exchange.


def test_every_exchange_of_the_vectors_is_theirs_and_a_secret_of_zeros_is_refused() -> None:
    """Points on the twist and points not in canonical form are taken, as RFC 7748 (section 5) has it.

    Nothing stands on their being refused: the secret enters the transcript together with the point itself and the
    psk. A point of low order gives everybody the same secret, zeros: the handshake refuses it.
    """
    wrong = []
    flags: Counter[str] = Counter()
    for vector in X25519.vectors():
        private, public, shared = unhex(vector, "private", "public", "shared")
        is_zero = "ZeroSharedSecret" in vector["flags"]
        assert is_zero == (not any(shared))
        expected = None if is_zero else shared
        if exchange(X25519PrivateKey.from_private_bytes(private), public) != expected:
            wrong.append(vector["tcId"])
        flags.update(vector["flags"])
    assert wrong == []
    assert (flags["ZeroSharedSecret"], flags["LowOrderPublic"], flags["Twist"], flags["NonCanonicalPublic"]) == (
        31,
        31,
        221,
        19,
    )


# Keys from keys.


def test_every_derivation_of_the_vectors_is_theirs_and_one_too_long_is_refused() -> None:
    wrong = []
    for vector in HKDF_SHA256.vectors():
        ikm, salt, info, okm = unhex(vector, "ikm", "salt", "info", "okm")
        size = vector["size"]
        if vector["result"] == "invalid":
            assert size > HKDF_MAX_SIZE
            for kdf in (lambda: HKDF(SHA256(), size, salt, info), lambda: HKDFExpand(SHA256(), size, info)):  # noqa: B023 - called at once
                with pytest.raises(ValueError, match="derive keys larger"):
                    kdf()
            continue
        # As the transcript calls it, and as psks, roots and traffic keys do (RFC 5869, section 2.3, alone).
        prk = hmac.digest(salt or bytes(32), ikm, "sha256")
        whole = HKDF(SHA256(), size, salt, info).derive(ikm)
        expanded = HKDFExpand(SHA256(), size, info).derive(prk)
        if not whole == expanded == okm:
            wrong.append(vector["tcId"])
    assert wrong == []
