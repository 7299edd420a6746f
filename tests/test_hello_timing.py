"""How long a server takes to refuse a hello does not tell why: unknown user, wrong key, junk or a wrong bit.

That they do the same operations is counted in test_handshake.py. Here their time is taken, in turn, in one
process. What is compared is the fastest tenth of each kind: interruptions only ever add to a time, so that there the
work itself is seen. The short form has a wide margin, and finds an operation that is left out; ``make soak``
prints the figures and finds a few hundredths.
"""

from __future__ import annotations

import gc
import inspect
import os
import random
import time
from collections.abc import Callable
from typing import Final

import pytest

from reflex.errors import AuthenticationFailed
from reflex.protocol import handshake
from reflex.protocol.handshake import ServerCredentials, accept_hello
from reflex.protocol.noise import exchange
from reflex.protocol.replay import ReplaySet
from tests.distributions import ks_p_value, quantile
from tests.keys import Keys

NOW_S: Final = 1_900_000_000
FASTEST: Final = 0.1
TRIES: Final = 3
SERVER: Final = Keys.generate()
STRANGER: Final = Keys.generate()
USERS: Final = {**{os.urandom(16): os.urandom(32) for _ in range(100)}, SERVER.user_id.bytes: SERVER.user_key}
CREDENTIALS: Final = ServerCredentials(SERVER.private_key, USERS)


def keys_of(*, user: Keys, key: Keys) -> Keys:
    """A client of SERVER as this user, with that key."""
    return Keys(SERVER.private_key, SERVER.public_key, user.user_id, key.user_key)


def wrong_bit(first: int, last: int) -> bytes:
    changed = bytearray(SERVER.hello(NOW_S))
    bit = random.randrange(8 * first, 8 * last)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# All of them are refused.
KINDS: Final[dict[str, Callable[[], bytes]]] = {
    "junk": lambda: os.urandom(76),
    "unknown user": lambda: keys_of(user=STRANGER, key=STRANGER).hello(NOW_S),
    "wrong key": lambda: keys_of(user=SERVER, key=STRANGER).hello(NOW_S),
    "another server's": lambda: STRANGER.hello(NOW_S),
    "wrong bit in E": lambda: wrong_bit(0, 31),
    "wrong bit in EncID": lambda: wrong_bit(32, 48),
    "wrong bit in C1": lambda: wrong_bit(48, 76),
    "point of low order": lambda: bytes(32) + os.urandom(44),
}


def refusal_times_s(rounds: int) -> dict[str, list[float]]:
    """So many times of each kind, in turn, in an order that changes."""
    replay = ReplaySet(NOW_S)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    gc.disable()
    try:
        for _ in range(rounds):
            hellos = [(kind, make()) for kind, make in KINDS.items()]
            random.shuffle(hellos)
            for kind, hello in hellos:
                begun_s = time.perf_counter()
                try:
                    accept_hello(hello, CREDENTIALS, now_s=NOW_S, replay=replay, random_bytes=os.urandom)
                except AuthenticationFailed:
                    taken[kind].append(time.perf_counter() - begun_s)
    finally:
        gc.enable()
    assert all(len(each) == rounds for each in taken.values())  # each was refused, and for that reason
    return taken


def check(rounds: int, *, margin: float) -> None:
    found = []
    for _ in range(TRIES):
        taken = refusal_times_s(rounds)
        fastest = {kind: quantile(each, FASTEST) for kind, each in taken.items()}
        for kind, each in taken.items():
            print(
                f"{kind:20} fastest tenth below {fastest[kind] * 1e6:6.1f} us, median {quantile(each, 0.5) * 1e6:6.1f},"
                f" beside junk p = {ks_p_value(taken['junk'], each):.3f}"
            )
        found.append(max(fastest.values()) / min(fastest.values()))
        print(f"slowest kind / fastest kind: {found[-1]:.4f}")
        if found[-1] < 1 + margin:
            return
    pytest.fail(f"some kinds take longer: {found}")


def test_every_refusal_takes_the_same_time_within_a_wide_margin() -> None:
    check(300, margin=0.15)


@pytest.mark.soak
def test_every_refusal_takes_the_same_time() -> None:
    check(5_000, margin=0.04)


def test_a_shortcut_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no psk is refused at once: the test above would fail."""
    open_hello = handshake._open_hello

    def with_shortcut(
        client_public: bytes, masked_id: bytes, sealed: bytes, credentials: ServerCredentials, *, stand_in: bytes
    ) -> object:
        es = exchange(credentials.server_key, client_public) or stand_in
        user_id = handshake._mask_id(masked_id, client_public, es, credentials.server_public)
        if user_id not in credentials.psks:
            return None
        return open_hello(client_public, masked_id, sealed, credentials, stand_in=stand_in)

    monkeypatch.setattr(handshake, "_open_hello", with_shortcut)
    with pytest.raises(pytest.fail.Exception, match="some kinds take longer"):
        check(100, margin=0.15)


def test_secrets_are_compared_by_the_library_or_in_constant_time() -> None:
    """The server's tag is verified by the cipher, the client's by hmac.compare_digest; nothing else compares bytes."""
    assert "compare_digest(tag[:CONFIRMATION_SIZE], confirmation)" in inspect.getsource(handshake)
    for line in inspect.getsource(handshake).splitlines():
        code = line.partition("#")[0]
        if "==" in code or "!=" in code:
            assert "tag" not in code
            assert "psk" not in code.replace("psks", "")
            assert "confirmation" not in code
