"""The handshake: 76 bytes there, 40 back, and both halves hold the same secrets.

Source: ``docs/protocol.md``, sections 1 and 2, and the Noise Protocol Framework, revision 34. It is
``Noise_NKpsk1_25519_ChaChaPoly_SHA256`` with two deviations: the prologue carries the masked user id,
and the answer's 16-byte tag is cut to 8 on the wire::

    client                                                        server
    ClientHandshake(...).write_hello(out)  --  E, EncID, C1  -->  accept_hello(hello, ...)
    read_answer(answer)                    <--     F, T      --   AcceptedHello.write_answer(out)
    -> SessionSecrets                                             -> SessionSecrets

Every rejection up to the tag of ``C1`` costs the server the same: one X25519, one id look-up, one
open. What is missing on the way (a shared secret that X25519 refuses, the psk of an unknown user) is
replaced by random bytes, and the tag then fails. Errors are raised where no ``except`` block is left,
so that they carry neither a cause nor a context.

No I/O, no clock, no randomness of its own. Random bytes are drawn from the ``random_bytes(n)`` that
is passed in, in this order:

- client: 32, the ephemeral private key (again 32 while the public key looks like HTTP or TLS); then 2,
  the random half of the options;
- server: 32, what stands in for a missing secret (drawn for every hello, needed or not); then, in
  ``write_answer``, 32, the ephemeral private key.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from reflex.confidential import Confidential, FrozenConfidential
from reflex.errors import AuthenticationFailed, ClockSkew, ConfigError, HandshakeError, UnsupportedHello
from reflex.protocol.noise import Transcript, exchange
from reflex.protocol.replay import ReplayMemory
from reflex.protocol.wire import (
    CLIENT_HELLO,
    CONFIRMATION_SIZE,
    HELLO_TIME_LIMIT_S,
    ID_INFO,
    KEY_SIZE,
    PSK_INFO,
    SERVER_HELLO,
    TIME_OPTIONS,
    USER_ID_SIZE,
    VERSION,
    Suite,
)

BytesLike: TypeAlias = bytes | bytearray | memoryview
RandomBytes: TypeAlias = Callable[[int], bytes]

_SHA256: Final = SHA256()
_SUITES: Final = frozenset(Suite)

# The first two bytes of every TLS 1.x record that opens a connection: type 22 (handshake), major
# version 3 (RFC 8446, section 5.1). The methods of RFC 9110 (section 9.3) and RFC 5789, and the
# first three bytes of HTTP/2's preface (RFC 9113, section 3.4).
_HTTP_OR_TLS: Final = (
    b"\x16\x03",
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"CONNECT",
    b"OPTIONS",
    b"TRACE",
    b"PATCH",
    b"PRI",
)
_LONGEST_PREFIX: Final = max(map(len, _HTTP_OR_TLS))


def looks_like_http_or_tls(first_bytes: BytesLike) -> bool:
    """Whether a connection's first bytes are those of a TLS or HTTP client (section 6).

    What counts is a whole prefix: ``16 03``, or a method's name in full and in capitals, whatever
    follows it (``GETA`` counts, ``GE`` and ``get`` do not). A random key has one in about 65,000
    times, nearly always ``16 03``. Client and server share this rule: no hello that a client sends
    is taken for something else.

    Args:
        first_bytes: from the first byte on; at most seven are looked at.
    """
    return bytes(first_bytes[:_LONGEST_PREFIX]).startswith(_HTTP_OR_TLS)


def derive_psk(user_key: bytes, user_id: bytes) -> bytes:
    """A user's pre-shared key: ``HKDF-Expand(user key, "reflex/1 psk" ‖ user id, 32)`` (section 1).

    Args:
        user_key: 32 bytes from a CSPRNG.
        user_id: 16 bytes.

    Returns:
        32 bytes.

    Raises:
        ConfigError: a size is wrong; the text names the size only.
    """
    _check_size("user key", user_key, KEY_SIZE)
    _check_size("user id", user_id, USER_ID_SIZE)
    return HKDFExpand(_SHA256, KEY_SIZE, PSK_INFO + user_id).derive(user_key)


class SessionSecrets(FrozenConfidential):
    """What both halves hold after a handshake. Only the suite is shown by ``repr``.

    The two roots feed the key schedule of section 3; ``exporter`` is for keys of other uses;
    ``handshake_hash`` is the channel binding, Noise's ``h``. 32 bytes each.
    """

    __slots__ = ("exporter", "handshake_hash", "root_client_to_server", "root_server_to_client", "suite")

    suite: Suite
    root_client_to_server: bytes
    root_server_to_client: bytes
    exporter: bytes
    handshake_hash: bytes

    def __init__(
        self,
        suite: Suite,
        root_client_to_server: bytes,
        root_server_to_client: bytes,
        exporter: bytes,
        handshake_hash: bytes,
    ) -> None:
        self._set(
            suite=suite,
            root_client_to_server=root_client_to_server,
            root_server_to_client=root_server_to_client,
            exporter=exporter,
            handshake_hash=handshake_hash,
        )

    def __repr__(self) -> str:
        return f"SessionSecrets(suite={self.suite!r})"


class ClientCredentials(FrozenConfidential):
    """What a client knows of a server and of itself, prepared for many handshakes.

    Args:
        server_public: the server's public key ``S``, 32 bytes.
        user_id: 16 bytes.
        user_key: 32 bytes; not kept, only the psk made from it.

    Raises:
        ConfigError: a size is wrong, or no secret can be shared with the server's key (low-order point).
    """

    __slots__ = ("psk", "server_key", "server_public", "user_id")

    server_public: bytes
    user_id: bytes
    server_key: X25519PublicKey
    psk: bytes

    def __init__(self, server_public: bytes, user_id: bytes, user_key: bytes) -> None:
        _check_size("server public key", server_public, KEY_SIZE)
        # Whether a point is of low order does not depend on the private key that meets it.
        if exchange(X25519PrivateKey.from_private_bytes(b"\x01" * KEY_SIZE), server_public) is None:
            raise ConfigError(["server public key: a point of low order; expected a server's public key"])
        self._set(
            server_public=server_public,
            user_id=user_id,
            server_key=X25519PublicKey.from_public_bytes(server_public),
            psk=derive_psk(user_key, user_id),
        )


class ServerCredentials(FrozenConfidential):
    """A server's key and its users, prepared for many handshakes.

    Args:
        private_key: the server's private key ``s``, 32 bytes; not kept as bytes.
        users: user id (16 bytes) to user key (32 bytes); copied, only the psks are kept.

    Raises:
        ConfigError: a size is wrong; the text names the size only.
    """

    __slots__ = ("psks", "server_key", "server_public")

    server_public: bytes
    server_key: X25519PrivateKey
    psks: Mapping[bytes, bytes]

    def __init__(self, private_key: bytes, users: Mapping[bytes, bytes]) -> None:
        _check_size("server private key", private_key, KEY_SIZE)
        server_key = X25519PrivateKey.from_private_bytes(private_key)
        self._set(
            server_key=server_key,
            server_public=server_key.public_key().public_bytes_raw(),
            psks={user: derive_psk(key, user) for user, key in users.items()},
        )


class ClientHandshake(Confidential):
    """The client's side of one handshake. The hello is made at once; its answer is read at most once.

    Args:
        credentials: whom to reach, as whom.
        suite: the record cipher that the session is to use.
        time_s: the hello's time, in seconds since 1970.
        random_bytes: a CSPRNG; the order of draws is the module's.
    """

    __slots__ = ("_ephemeral", "_hello", "_suite", "_transcript")

    def __init__(self, credentials: ClientCredentials, *, suite: Suite, time_s: int, random_bytes: RandomBytes) -> None:
        ephemeral, public = _client_ephemeral(random_bytes)
        options = TIME_OPTIONS.pack(time_s, VERSION << 4 | suite, 0, random_bytes(2))
        es = ephemeral.exchange(credentials.server_key)
        masked_id = _mask_id(credentials.user_id, public, es, credentials.server_public)
        transcript = Transcript(masked_id, credentials.server_public)
        transcript.mix_hello_keys(public, es, credentials.psk)
        self._hello = CLIENT_HELLO.pack(public, masked_id, transcript.encrypt_and_hash(options))
        self._ephemeral = ephemeral
        self._suite = suite
        self._transcript = transcript

    def write_hello(self, out: memoryview) -> None:
        """Fill the first 76 bytes of ``out`` with the hello; the buffer stays the caller's."""
        out[: CLIENT_HELLO.size] = self._hello

    def read_answer(self, answer: BytesLike) -> SessionSecrets:
        """Verify the server's hello.

        Args:
            answer: exactly 40 bytes; the buffer stays the caller's, nothing of it is kept.

        Raises:
            AuthenticationFailed: it is not the answer of that server to this hello.
        """
        server_public, confirmation = SERVER_HELLO.unpack(answer)
        ee = exchange(self._ephemeral, server_public)
        if ee is None:
            raise AuthenticationFailed("the answer is not the server's")
        tag = self._transcript.confirm(server_public, ee)
        if not hmac.compare_digest(tag[:CONFIRMATION_SIZE], confirmation):
            raise AuthenticationFailed("the answer is not the server's")
        return SessionSecrets(self._suite, *self._transcript.split())


def accept_hello(
    hello: BytesLike,
    credentials: ServerCredentials,
    *,
    now_s: int,
    replay: ReplayMemory,
    random_bytes: RandomBytes,
) -> AcceptedHello:
    """The server's side of one handshake, up to the answer: every check of section 2, in its order.

    One X25519, one id look-up, one open of ``C1``; then version and suite; then the time; then the
    replay set, which only a hello that passed all the rest enters.

    Args:
        hello: exactly 76 bytes; the buffer stays the caller's, nothing of it is kept.
        credentials: the server's key and users.
        now_s: the server's time, in seconds since 1970.
        replay: the hellos taken so far; this one is added.
        random_bytes: a CSPRNG; the order of draws is the module's.

    Raises:
        AuthenticationFailed: unknown user, wrong key or altered bytes; never told apart. The others name the user.
        UnsupportedHello: authentic, but of another version or an unknown suite.
        ClockSkew: authentic, but more than 120 s off.
        Replayed: the replay set refuses it: seen before, or not to be remembered.
    """
    client_public, masked_id, sealed = CLIENT_HELLO.unpack(hello)
    opened = _open_hello(client_public, masked_id, sealed, credentials, stand_in=random_bytes(KEY_SIZE))
    if opened is None:
        raise AuthenticationFailed("the hello is not of a known user")
    user_id, transcript, options = opened
    time_s, version_suite, _flags, _random = TIME_OPTIONS.unpack(options)
    version, suite = version_suite >> 4, version_suite & 0x0F
    try:
        if version != VERSION or suite not in _SUITES:
            raise UnsupportedHello(version, suite)
        skew_s = time_s - now_s
        if abs(skew_s) > HELLO_TIME_LIMIT_S:
            raise ClockSkew(skew_s, HELLO_TIME_LIMIT_S)
        replay.check_and_insert(client_public, user_id, time_s, now_s)
    except HandshakeError as error:
        error.user_id = user_id
        raise
    return AcceptedHello(user_id, Suite(suite), time_s, client_public, transcript)


@dataclass(frozen=True, slots=True, eq=False)
class AcceptedHello(Confidential):
    """A hello that passed every check: who sent it, and what is needed to answer it once.

    ``user_id`` is 16 bytes, ``suite`` the client's choice for the records, ``time_s`` the hello's
    time in seconds since 1970.
    """

    user_id: bytes
    suite: Suite
    time_s: int
    _client_public: bytes = field(repr=False)
    _transcript: Transcript = field(repr=False)

    def write_answer(self, out: memoryview, *, random_bytes: RandomBytes) -> SessionSecrets:
        """Fill the first 40 bytes of ``out`` with the server's hello; the buffer stays the caller's.

        To be called once: a second answer to the same hello would not verify.
        """
        ephemeral = X25519PrivateKey.from_private_bytes(random_bytes(KEY_SIZE))
        public = ephemeral.public_key().public_bytes_raw()
        # Cannot be refused: a low-order E would have been at the first exchange.
        ee = ephemeral.exchange(X25519PublicKey.from_public_bytes(self._client_public))
        tag = self._transcript.confirm(public, ee)
        SERVER_HELLO.pack_into(out, 0, public, tag[:CONFIRMATION_SIZE])
        return SessionSecrets(self.suite, *self._transcript.split())


def _open_hello(
    client_public: bytes, masked_id: bytes, sealed: bytes, credentials: ServerCredentials, *, stand_in: bytes
) -> tuple[bytes, Transcript, bytes] | None:
    """User id, transcript and options of an authentic hello; None for any other, at the same cost.

    ``stand_in`` is 32 random bytes for the secrets that such a hello may lack.
    """
    es = exchange(credentials.server_key, client_public)
    if es is None:
        es = stand_in
    user_id = _mask_id(masked_id, client_public, es, credentials.server_public)
    psk = credentials.psks.get(user_id, stand_in)
    transcript = Transcript(masked_id, credentials.server_public)
    transcript.mix_hello_keys(client_public, es, psk)
    options = transcript.decrypt_and_hash(sealed)
    return None if options is None else (user_id, transcript, options)


def _client_ephemeral(random_bytes: RandomBytes) -> tuple[X25519PrivateKey, bytes]:
    """A key pair whose public half cannot be taken for the start of TLS or HTTP."""
    while True:
        private = X25519PrivateKey.from_private_bytes(random_bytes(KEY_SIZE))
        public = private.public_key().public_bytes_raw()
        if not looks_like_http_or_tls(public):
            return private, public


def _mask_id(user_id: bytes, client_public: bytes, es: bytes, server_public: bytes) -> bytes:
    """``id XOR HKDF(salt = E, ikm = es, "reflex/1 id" ‖ S, 16)``: masks an id, and unmasks a masked one."""
    mask = HKDF(_SHA256, USER_ID_SIZE, client_public, ID_INFO + server_public).derive(es)
    return (int.from_bytes(user_id, "big") ^ int.from_bytes(mask, "big")).to_bytes(USER_ID_SIZE, "big")


def _check_size(what: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise ConfigError([f"{what}: {len(value)} bytes; expected {size}"])
