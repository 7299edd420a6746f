"""reflex.config.secret: secrets show themselves to nobody, and what may be a key is not shown."""

from __future__ import annotations

import copy

import pytest

from reflex.config import Secret
from reflex.config.secret import MAX_SHOWN_CHARACTERS, describe, may_hold_key, parse_key
from tests.settings_files import ID, KEY_A, KEY_B


def test_secret() -> None:
    secret = Secret(b"abc")
    assert secret == Secret(b"abc")
    assert secret != Secret(b"abd")
    assert secret != b"abc"
    assert hash(secret) == hash(Secret(b"abc"))
    assert repr(secret) == str(secret) == f"{secret}" == "Secret(…)"
    assert copy.copy(secret) is copy.deepcopy(secret) is secret


def test_key_with_stray_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^$"):
        parse_key(KEY_A[:-2] + "9=")


@pytest.mark.parametrize("text", [KEY_A, KEY_A[:32], f"a key: {KEY_B}!", bytes(range(32)).hex(), "F00D" * 8])
def test_what_looks_like_a_key_may_be_one(text: str) -> None:
    assert may_hold_key(text)


@pytest.mark.parametrize(
    "text",
    [
        ID,
        KEY_A[:31],
        "/etc/reflex/keys/of/the/server/private.key",
        "a-long-host-name-of-a-machine-in-the-cellar",
        "x" * 64,
    ],
)
def test_what_does_not_look_like_a_key_is_shown(text: str) -> None:
    assert not may_hold_key(text)
    assert text[:MAX_SHOWN_CHARACTERS] in describe(text)


def test_describe_knows_every_kind() -> None:
    values = [True, "a", 1, 1.5, {}, [], None]
    assert [describe(value) for value in values] == [
        "true",
        "the text 'a'",
        "the number 1",
        "the number 1.5",
        "a table",
        "a list of 0",
        "a date or time",
    ]
