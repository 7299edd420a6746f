"""The handshake against known answers and against liars."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import (
    AuthenticationFailed,
    ClockSkew,
    ConfigError,
    HandshakeError,
    Replayed,
    UnsupportedHello,
)
from reflex.protocol import handshake, noise
from reflex.protocol.handshake import (
    ClientCredentials,
    ServerCredentials,
    derive_psk,
    looks_like_http_or_tls,
)
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import (
    CLIENT_HELLO_SIZE,
    KEY_SIZE,
    SERVER_HELLO_SIZE,
    TIME_OPTIONS,
    Suite,
)
from tests.handshakes import (
    LIMIT,
    LOOKALIKES,
    NOW,
    ROOTS,
    SERVER_PRIVATE,
    USER_ID,
    USER_KEY,
    accept,
    answer_of,
    assert_tells_nothing,
    client,
    client_credentials,
    each_suite,
    each_vector,
    flip,
    keys,
    noise_hello,
    public_of,
    roots,
    script,
    server_credentials,
    stranger,
)
from tests.vectors import VECTORS, Vector

# Known answers.


@each_vector
def test_the_psk_is_the_vectors(vector: Vector) -> None:
    assert derive_psk(vector.user_key, vector.user_id) == vector.psk


@each_vector
def test_the_client_equals_the_vector(vector: Vector) -> None:
    credentials = ClientCredentials(vector.server_public, vector.user_id, vector.user_key)
    draws = script(vector.client_ephemeral_private, vector.options[2:])
    made, hello = client(credentials, suite=Suite(vector.suite), time_s=vector.time, random_bytes=draws)
    assert hello == vector.client_hello
    secrets = made.read_answer(vector.server_hello)
    assert secrets.suite is Suite(vector.suite)
    assert roots(secrets) == {name: getattr(vector, name) for name in ROOTS}


@each_vector
def test_the_server_equals_the_vector(vector: Vector) -> None:
    credentials = ServerCredentials(vector.server_private, {vector.user_id: vector.user_key})
    assert credentials.server_public == vector.server_public
    draws = script(bytes(KEY_SIZE), vector.server_ephemeral_private)
    accepted = accept(vector.client_hello, credentials, now_s=vector.time, random_bytes=draws)
    assert (accepted.user_id, accepted.suite, accepted.time_s) == (vector.user_id, vector.suite, vector.time)
    secrets, answer = answer_of(accepted, draws)
    assert answer == vector.server_hello
    assert secrets.suite is Suite(vector.suite)
    assert roots(secrets) == {name: getattr(vector, name) for name in ROOTS}


def test_the_vectors_cover_both_suites() -> None:
    assert {vector.suite for vector in VECTORS} == set(Suite)


# Round trips.


@each_suite
def test_two_halves_come_to_the_same_secrets(suite: Suite) -> None:
    made, hello = client(suite=suite)
    secrets, answer = answer_of(accept(hello))
    seen = made.read_answer(answer)
    assert roots(seen) == roots(secrets)
    assert len(set(roots(seen).values())) == len(ROOTS)
    assert seen.suite is secrets.suite is suite


def test_buffers_may_be_of_any_kind_and_nothing_of_them_is_kept() -> None:
    made, hello = client()
    buffer = bytearray(hello)
    accepted = accept(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    secrets, answer = answer_of(accepted)
    assert roots(made.read_answer(memoryview(bytearray(answer)))) == roots(secrets)


def test_only_the_hellos_own_bytes_of_a_buffer_are_written() -> None:
    out = bytearray(b"\xaa" * 100)
    made, hello = client()
    made.write_hello(memoryview(out))
    assert bytes(out) == hello + b"\xaa" * (100 - CLIENT_HELLO_SIZE)
    out = bytearray(b"\xaa" * 100)
    accept(hello).write_answer(memoryview(out), random_bytes=os.urandom)
    assert bytes(out[SERVER_HELLO_SIZE:]) == b"\xaa" * (100 - SERVER_HELLO_SIZE)


def test_every_handshake_has_secrets_of_its_own() -> None:
    seen: set[bytes] = set()
    for _ in range(8):
        secrets, answer = answer_of(accept(client()[1]))
        seen |= {answer, *roots(secrets).values()}
    assert len(seen) == 8 * (1 + len(ROOTS))


# Altered bytes.


def test_every_flipped_bit_of_a_hello_is_refused() -> None:
    _, hello = client()
    replay = ReplaySet(0)
    for bit in range(8 * CLIENT_HELLO_SIZE):
        with pytest.raises(AuthenticationFailed):
            accept(flip(hello, bit), replay=replay)
    assert len(replay) == 0
    accept(hello, replay=replay)


def test_every_flipped_bit_of_an_answer_is_refused() -> None:
    private = os.urandom(KEY_SIZE)
    made, hello = client(random_bytes=script(private, b"ab"))
    _, answer = answer_of(accept(hello))
    for bit in range(8 * SERVER_HELLO_SIZE):
        again, _ = client(random_bytes=script(private, b"ab"))
        with pytest.raises(AuthenticationFailed):
            again.read_answer(flip(answer, bit))
    made.read_answer(answer)


@given(bit=st.integers(0, 8 * CLIENT_HELLO_SIZE - 1), private=keys, suite=st.sampled_from(Suite))
def test_a_flipped_bit_of_any_hello_is_refused(bit: int, private: bytes, suite: Suite) -> None:
    _, hello = client(suite=suite, random_bytes=script(private, b"ab"))
    with pytest.raises(AuthenticationFailed):
        accept(flip(hello, bit))


@given(bit=st.integers(0, 8 * SERVER_HELLO_SIZE - 1), private=keys, answer_private=keys)
def test_a_flipped_bit_of_any_answer_is_refused(bit: int, private: bytes, answer_private: bytes) -> None:
    made, hello = client(random_bytes=script(private, b"ab"))
    _, answer = answer_of(accept(hello), script(answer_private))
    with pytest.raises(AuthenticationFailed):
        made.read_answer(flip(answer, bit))


@given(hello=st.binary(min_size=CLIENT_HELLO_SIZE, max_size=CLIENT_HELLO_SIZE))
def test_random_bytes_are_no_hello(hello: bytes) -> None:
    with pytest.raises(HandshakeError):
        accept(hello)


@given(answer=st.binary(min_size=SERVER_HELLO_SIZE, max_size=SERVER_HELLO_SIZE))
def test_random_bytes_are_no_answer(answer: bytes) -> None:
    with pytest.raises(HandshakeError):
        client()[0].read_answer(answer)


def test_an_answer_to_another_hello_is_refused() -> None:
    _, answer = answer_of(accept(client()[1]))
    with pytest.raises(AuthenticationFailed) as caught:
        client()[0].read_answer(answer)
    assert_tells_nothing(caught.value)


# Wrong keys.


@pytest.mark.parametrize(
    "credentials",
    [
        pytest.param(stranger(user_id=b"nobody's user id"), id="unknown user"),
        pytest.param(stranger(user_id=b"another user's.."), id="another user's id"),
        pytest.param(stranger(user_key=flip(USER_KEY, 0)), id="wrong user key"),
        pytest.param(stranger(server_public=public_of(b"s" * KEY_SIZE)), id="wrong server key"),
    ],
)
def test_a_client_with_wrong_credentials_is_refused(credentials: ClientCredentials) -> None:
    replay = ReplaySet(0)
    with pytest.raises(AuthenticationFailed) as caught:
        accept(client(credentials)[1], replay=replay)
    assert_tells_nothing(caught.value)
    assert len(replay) == 0


P = 2**255 - 19
ORDER_8_A = 325606250916557431795983626356110631294008115727848805560023387167927233504
ORDER_8_B = 39382357235489614581723060781553021112529911719440698176882885853963445705823
# X25519 ignores the top bit (RFC 7748, section 5), so each point is there with the bit clear and set.
LOW_ORDER = [
    (point + top).to_bytes(KEY_SIZE, "little")
    for point in (0, 1, ORDER_8_A, ORDER_8_B, P - 1, P, P + 1)
    for top in (0, 2**255)
]
# The rest of the well-known list: of low order only where the top bit is not ignored.
LOW_ORDER_UNMASKED = [
    point.to_bytes(KEY_SIZE, "little") for point in (P + ORDER_8_A, P + ORDER_8_B, 2 * P - 1, 2 * P, 2 * P + 1)
]
each_low_order = pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)
each_listed_point = pytest.mark.parametrize("point", LOW_ORDER + LOW_ORDER_UNMASKED, ids=bytes.hex)


@each_listed_point
def test_a_low_order_key_in_a_hello_is_refused(point: bytes) -> None:
    _, hello = client()
    with pytest.raises(AuthenticationFailed) as caught:
        accept(point + hello[KEY_SIZE:])
    assert_tells_nothing(caught.value)


def test_a_hello_made_for_an_all_zero_secret_is_refused() -> None:
    """Whoever sends a low-order E knows what a careless server would take for ``es``; and that is not it."""

    class Zero:
        """An ephemeral key of low order: its every exchange gives zeros."""

        def exchange(self, _peer: object) -> bytes:
            return bytes(KEY_SIZE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handshake, "_client_ephemeral", lambda _random: (Zero(), bytes(KEY_SIZE)))
        _, hello = client()
    with pytest.raises(AuthenticationFailed):
        accept(hello)


@each_listed_point
def test_a_low_order_key_in_an_answer_is_refused(point: bytes) -> None:
    made, hello = client()
    _, answer = answer_of(accept(hello))
    with pytest.raises(AuthenticationFailed) as caught:
        made.read_answer(point + answer[KEY_SIZE:])
    assert_tells_nothing(caught.value)


@each_low_order
def test_a_low_order_server_key_is_a_configuration_error(point: bytes) -> None:
    with pytest.raises(ConfigError, match="low order"):
        stranger(server_public=point)


# What an authentic hello may still get wrong, and in which order it is found.


@pytest.mark.parametrize("off_s", [-LIMIT, -1, 0, 1, LIMIT])
def test_a_clock_within_the_limit_is_accepted(off_s: int) -> None:
    assert accept(client(time_s=NOW + off_s)[1]).time_s == NOW + off_s


@pytest.mark.parametrize("off_s", [-NOW, -LIMIT - 1, LIMIT + 1, 2**64 - 1 - NOW])
def test_a_clock_beyond_the_limit_is_refused_and_leaves_no_trace(off_s: int) -> None:
    replay = ReplaySet(0)
    _, hello = client(time_s=NOW + off_s)
    with pytest.raises(ClockSkew) as caught:
        accept(hello, replay=replay)
    assert (caught.value.skew_s, caught.value.limit_s, caught.value.user_id) == (off_s, LIMIT, USER_ID)
    assert_tells_nothing(caught.value)
    assert len(replay) == 0
    accept(hello, now_s=NOW + off_s, replay=replay)


@pytest.mark.parametrize("version", range(16))
@pytest.mark.parametrize("suite", range(16))
def test_only_version_1_and_the_two_suites_are_accepted(version: int, suite: int) -> None:
    replay = ReplaySet(0)
    hello = noise_hello(b"e" * KEY_SIZE, TIME_OPTIONS.pack(NOW, version << 4 | suite, 0, b"ab"))
    if version == 1 and suite in (0, 1):
        assert accept(hello, replay=replay).suite == suite
        return
    with pytest.raises(UnsupportedHello) as caught:
        accept(hello, replay=replay)
    assert (caught.value.version, caught.value.suite, caught.value.user_id) == (version, suite, USER_ID)
    assert_tells_nothing(caught.value)
    assert len(replay) == 0


@given(flags=st.integers(0, 255), random=st.binary(min_size=2, max_size=2))
def test_flags_and_random_bytes_are_ignored(flags: int, random: bytes) -> None:
    hello = noise_hello(b"e" * KEY_SIZE, TIME_OPTIONS.pack(NOW, 1 << 4 | 1, flags, random))
    accepted = accept(hello)
    assert (accepted.user_id, accepted.suite, accepted.time_s) == (USER_ID, Suite.CHACHA20_POLY1305, NOW)


def test_a_hello_is_taken_once() -> None:
    replay = ReplaySet(0)
    _, hello = client()
    accept(hello, replay=replay)
    with pytest.raises(Replayed) as caught:
        accept(hello, now_s=NOW + LIMIT, replay=replay)
    assert caught.value.user_id == USER_ID
    assert_tells_nothing(caught.value)
    assert len(replay) == 1


def test_a_hello_from_before_the_servers_start_is_refused() -> None:
    with pytest.raises(Replayed):
        accept(client(time_s=NOW - 1)[1], replay=ReplaySet(NOW))


class Untouchable(ReplaySet):
    """A replay set that must not be asked."""

    def check_and_insert(self, ephemeral: bytes, user_id: bytes, time_s: int, now_s: int) -> None:
        pytest.fail("the replay set was asked about a hello that fails an earlier check")


def test_the_checks_come_in_the_contracts_order() -> None:
    """Tag, then version and suite, then time, then the replay set: a hello fails at its first fault."""
    replay = Untouchable(0)
    options = 2 << 4 | 7
    wrong_in_all = noise_hello(b"e" * KEY_SIZE, TIME_OPTIONS.pack(NOW - LIMIT - 1, options, 0, b"ab"))
    with pytest.raises(AuthenticationFailed) as caught:
        accept(flip(wrong_in_all, 8 * CLIENT_HELLO_SIZE - 1), replay=replay)
    assert caught.value.user_id is None
    with pytest.raises(UnsupportedHello):
        accept(wrong_in_all, replay=replay)
    with pytest.raises(ClockSkew):
        accept(client(time_s=NOW - LIMIT - 1)[1], replay=replay)


def count_primitives(monkeypatch: pytest.MonkeyPatch, hello: bytes) -> Counter[str]:
    """How often a refused hello calls each cryptographic primitive, and what it draws."""
    calls: Counter[str] = Counter()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for module, name in (
            (handshake, "HKDF"),
            (handshake, "exchange"),
            (noise, "HKDF"),
            (noise, "Hash"),
            (noise, "ChaCha20Poly1305"),
        ):
            patch.setattr(module, name, counted(name, getattr(module, name)))
        with pytest.raises(AuthenticationFailed):
            accept(hello, random_bytes=counted("random_bytes", os.urandom))
    return calls


def test_every_rejection_up_to_the_tag_does_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hello = client()
    refused = {
        "altered tag": flip(hello, 8 * CLIENT_HELLO_SIZE - 1),
        "unknown user": client(stranger(user_id=b"nobody's user id"))[1],
        "wrong user key": client(stranger(user_key=b"w" * KEY_SIZE))[1],
        "low-order point": bytes(KEY_SIZE) + hello[KEY_SIZE:],
        "noise": os.urandom(CLIENT_HELLO_SIZE),
    }
    work = {what: count_primitives(monkeypatch, sent) for what, sent in refused.items()}
    expected = work["altered tag"]
    assert expected["exchange"] == expected["ChaCha20Poly1305"] == expected["random_bytes"] == 1
    assert all(calls == expected for calls in work.values()), work


# What a hello must not look like.


@pytest.mark.parametrize(
    "method", [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"PRI"]
)
def test_http_is_recognised_by_its_whole_method(method: bytes) -> None:
    for kind in (bytes, bytearray, memoryview):
        assert looks_like_http_or_tls(kind(method + b" / HTTP/1.1\r\n"))
    assert looks_like_http_or_tls(method)
    assert not looks_like_http_or_tls(method[:-1])
    assert not looks_like_http_or_tls(method.lower())
    assert not looks_like_http_or_tls(b" " + method)


@pytest.mark.parametrize("version", range(5))
def test_tls_is_recognised_by_two_bytes(version: int) -> None:
    assert looks_like_http_or_tls(bytes([0x16, 0x03, version]))
    assert looks_like_http_or_tls(b"\x16\x03")
    assert not looks_like_http_or_tls(b"\x16")
    assert not looks_like_http_or_tls(b"\x17\x03" + bytes([version]))
    assert not looks_like_http_or_tls(b"")


@pytest.mark.parametrize("private", LOOKALIKES, ids=lambda p: repr(public_of(p)[:4]))
def test_a_key_that_looks_like_tls_or_http_is_drawn_again(private: bytes) -> None:
    assert looks_like_http_or_tls(public_of(private))
    good = hashlib.sha256(b"a key that looks like nothing").digest()
    _, hello = client(random_bytes=script(private, private, good, b"ab"))
    assert hello[:KEY_SIZE] == public_of(good)
    accept(hello)


# Credentials and what is shown of them.


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_is_a_configuration_error(size: int) -> None:
    key = b"\x5a" * size
    for make in (
        lambda: derive_psk(key, USER_ID),
        lambda: stranger(user_key=key),
        lambda: stranger(server_public=key),
        lambda: ServerCredentials(key, {}),
        lambda: ServerCredentials(SERVER_PRIVATE, {USER_ID: key}),
    ):
        with pytest.raises(ConfigError, match=f"{size} bytes; expected 32") as caught:
            make()
        assert_tells_nothing(caught.value)
        assert size == 0 or key.hex() not in str(caught.value)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_user_id_of_another_size_is_a_configuration_error(size: int) -> None:
    with pytest.raises(ConfigError, match=f"user id: {size} bytes; expected 16"):
        stranger(user_id=bytes(size))
    with pytest.raises(ConfigError, match=f"user id: {size} bytes; expected 16"):
        ServerCredentials(SERVER_PRIVATE, {bytes(size): USER_KEY})


def test_repr_shows_no_secret() -> None:
    made, hello = client()
    accepted = accept(hello)
    secrets, _ = answer_of(accepted)
    assert repr(secrets) == f"SessionSecrets(suite={Suite.AES_256_GCM!r})"
    hidden = [USER_KEY, SERVER_PRIVATE, derive_psk(USER_KEY, USER_ID), *roots(secrets).values()]
    for shown in (secrets, accepted, made, client_credentials(), server_credentials()):
        for secret in hidden:
            assert repr(secret)[2:-1] not in repr(shown)
            assert secret.hex() not in repr(shown)


def test_credentials_and_secrets_cannot_be_changed() -> None:
    accepted = accept(client()[1])
    secrets, _ = answer_of(accepted)
    for frozen, name in (
        (client_credentials(), "psk"),
        (server_credentials(), "psks"),
        (accepted, "user_id"),
        (secrets, "exporter"),
    ):
        with pytest.raises(AttributeError):
            setattr(frozen, name, b"")


def test_the_servers_users_are_a_copy() -> None:
    users = {USER_ID: USER_KEY}
    credentials = ServerCredentials(SERVER_PRIVATE, users)
    users.clear()
    assert accept(client()[1], credentials).user_id == USER_ID
