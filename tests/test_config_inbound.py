"""reflex.config.inbound: what a right inbound.toml gives, and what a wrong one is told."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from reflex.config import HostPort, TcpSettings, load_inbound
from tests.settings_files import ID, ID_2, INBOUND, KEY_A, KEY_B, KEY_C, inbound_problem, problems, write


def test_least_inbound_has_the_defaults(tmp_path: Path) -> None:
    loaded = load_inbound(write(tmp_path, INBOUND))
    assert loaded.listen == (HostPort("0.0.0.0", 8443),)
    assert loaded.private_key.reveal() == bytes(range(32))
    assert loaded.fallback is None
    (user,) = loaded.users
    assert (user.name, user.id, user.key.reveal()) == ("alice", uuid.UUID(ID), bytes(range(32, 64)))
    assert loaded.targets.allow == loaded.targets.deny == ()
    limits = loaded.limits
    assert (limits.max_connections, limits.max_streams) == (5000, 1000)
    assert limits.buffered_bytes == 256 * 2**20
    assert (limits.handshake_timeout_s, limits.dial_timeout_s) == (10, 10)
    assert (limits.idle_timeout_s, limits.drain_s) == (300, 30)
    assert loaded.tcp == TcpSettings(nodelay=True, keepalive_s=600)
    assert loaded.workers == 1
    assert loaded.usage_file is None
    assert loaded.replay_file is None
    assert not user.has_limits
    assert loaded.limited_users == ()
    assert loaded.warnings == ()


def test_full_inbound(tmp_path: Path) -> None:
    text = f"""
listen = ["0.0.0.0:8443", "[::]:8443", "127.0.0.1:0", "127.0.0.1:0"]
private_key = "{KEY_A}"
fallback = "WWW.Example.org:80"
[[users]]
name = "alice"
id = "{ID.upper()}"
key = "{KEY_B}"
[[users]]
name = "björn \\"b\\""
id = "{ID_2}"
key = "{KEY_C}"
[targets]
allow = ["127.0.0.1:8080", "*.internal.example:*"]
deny = ["*:25"]
[limits]
max_connections = 1
max_streams = 2
handshake_timeout_s = 0.5
dial_timeout_s = 3
idle_timeout_s = 4.0
drain_s = 0
[tcp]
nodelay = false
keepalive_s = 0
"""
    loaded = load_inbound(write(tmp_path, text))
    assert [str(address) for address in loaded.listen[:2]] == ["0.0.0.0:8443", "[::]:8443"]
    assert loaded.fallback == HostPort("www.example.org", 80)
    assert [user.name for user in loaded.users] == ["alice", 'björn "b"']
    assert [str(rule) for rule in loaded.targets.allow] == ["127.0.0.1/32:8080", "*.internal.example:*"]
    assert loaded.limits.handshake_timeout_s == 0.5
    assert isinstance(loaded.limits.dial_timeout_s, float)
    assert loaded.limits.drain_s == 0
    assert loaded.tcp == TcpSettings(nodelay=False, keepalive_s=0)


def test_a_fallback_that_is_listened_on_is_refused(tmp_path: Path) -> None:
    text = INBOUND.replace('"0.0.0.0:8443"', '"0.0.0.0:8443", "127.0.0.1:8443"')
    assert text != INBOUND
    problem = inbound_problem(tmp_path, f'fallback = "127.0.0.1:8443"\n{text}')
    assert problem == "fallback: the same as listen[1]; expected the address of a web server"


# Limits of a user


USER_LIMITS = """
max_tunnels = 2
max_streams = 50
dials_per_s = 0.5
bytes_per_s = 1_048_576
monthly_bytes = 100_000_000_000
"""


def test_limits_of_a_user(tmp_path: Path) -> None:
    loaded = load_inbound(write(tmp_path, f'usage_file = "usage.sqlite"{INBOUND}{USER_LIMITS}'))
    (user,) = loaded.users
    assert (user.max_tunnels, user.max_streams, user.dials_per_s) == (2, 50, 0.5)
    assert (user.bytes_per_s, user.monthly_bytes) == (1_048_576, 100_000_000_000)
    assert loaded.limited_users == (user,)


@pytest.mark.parametrize("line", [line for line in USER_LIMITS.split("\n") if line and "month" not in line])
def test_each_limit_alone_makes_a_user_limited(tmp_path: Path, line: str) -> None:
    text = f'{INBOUND}{line}\n[[users]]\nname = "bob"\nid = "{ID_2}"\nkey = "{KEY_C}"'
    loaded = load_inbound(write(tmp_path, text))
    assert [user.name for user in loaded.limited_users] == ["alice"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_tunnels = 0", "the number 0; expected a whole number from 1 to 1000000"),
        ("max_streams = true", "true; expected a whole number from 1 to 1000000"),
        ("dials_per_s = 0", "the number 0; expected a number from 0.01 to 1000000"),
        ("dials_per_s = nan", "the number nan; expected a number from 0.01 to 1000000"),
        ("bytes_per_s = 1000", "the number 1000; expected a whole number from 1024 to 1000000000000"),
        ("bytes_per_s = 1e6", "the number 1000000.0; expected a whole number from 1024 to 1000000000000"),
        ("monthly_bytes = 0", "the number 0; expected a whole number from 1 to 1000000000000000000"),
    ],
)
def test_a_limit_that_is_none(tmp_path: Path, line: str, expected: str) -> None:
    assert inbound_problem(tmp_path, f"{INBOUND}{line}") == f"users[0].{line.partition(' ')[0]}: {expected}"


def test_a_monthly_limit_needs_a_file(tmp_path: Path) -> None:
    problem = inbound_problem(tmp_path, f"{INBOUND}monthly_bytes = 1")
    assert problem == "usage_file: nothing; expected the path of a file, because alice has monthly_bytes"
    for text in ('usage_file = ""', 'usage_file = "a\\u0000b"', "usage_file = 1"):
        assert inbound_problem(tmp_path, f"{text}{INBOUND}monthly_bytes = 1").startswith("usage_file: the ")


@pytest.mark.parametrize("again", ["usage.sqlite", "./usage.sqlite", "a/../usage.sqlite"])
def test_usage_and_replays_do_not_share_a_file(tmp_path: Path, again: str) -> None:
    problem = inbound_problem(tmp_path, f'usage_file = "usage.sqlite"\nreplay_file = "{again}"\n{INBOUND}')
    assert problem == "replay_file: the same as usage_file; expected a file of its own"


# Target rules


BAD_RULES = [
    "*",
    "*.:1",
    "a.*:1",
    "**:1",
    "*a.b:1",
    "10.1.2.3/16:1",
    "10.0.0.0/33:1",
    "[fd00::1/8]:1",
    "[*]:1",
    "fd00::/8:1",
]


@pytest.mark.parametrize("text", BAD_RULES)
def test_bad_target_rules(tmp_path: Path, text: str) -> None:
    for key in ("allow", "deny"):
        problem = inbound_problem(tmp_path, f'{INBOUND}[targets]\n{key} = ["*:1", "{text}"]')
        assert problem.startswith(f"targets.{key}[1]: the text '{text}'; expected host:port, where the host is")


# Users


def test_repeated_users(tmp_path: Path) -> None:
    again = INBOUND[INBOUND.index("[[users]]") :]
    found = problems(load_inbound, tmp_path, INBOUND + again.replace(ID, ID.upper()))
    assert found == [
        "users[1].name: the same as users[0].name; expected a name of its own",
        "users[1].id: the same as users[0].id; expected an id of its own",
    ]


@pytest.mark.parametrize("name", ["", "x" * 65, "a\\nb", "\\u001b[31m"])
def test_bad_user_names(tmp_path: Path, name: str) -> None:
    problem = inbound_problem(tmp_path, INBOUND.replace('"alice"', f'"{name}"'))
    assert problem.startswith("users[0].name: the text ")
