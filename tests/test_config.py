"""Settings: what a right file gives, and that a wrong one names every error and no secret."""

from __future__ import annotations

import base64
import copy
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reflex.config import (
    HostPort,
    InboundSettings,
    ListenSettings,
    OutboundSettings,
    Secret,
    TargetRule,
    TcpSettings,
    load_inbound,
    load_outbound,
    load_settings,
)
from reflex.config.reader import MAX_FILE_BYTES, MAX_KEY_FILE_BYTES
from reflex.config.secret import MAX_SHOWN_CHARACTERS, describe, may_hold_key, parse_key
from reflex.errors import ConfigError

KEY_A = base64.b64encode(bytes(range(32))).decode()
KEY_B = base64.b64encode(bytes(range(32, 64))).decode()
KEY_C = base64.b64encode(bytes(range(64, 96))).decode()
ZERO_KEY = base64.b64encode(bytes(32)).decode()
PASSWORD = "open sesame 4711"
ID = "b831381d-6324-4d53-ad4f-8cda48b30811"
ID_2 = "b831381d-6324-4d53-ad4f-8cda48b30812"
SECRETS = (KEY_A, KEY_B, PASSWORD)

INBOUND = f"""
listen = ["0.0.0.0:8443"]
private_key = "{KEY_A}"
[[users]]
name = "alice"
id = "{ID}"
key = "{KEY_B}"
"""
OUTBOUND = f"""
[[listen]]
protocol = "socks5"
address = "127.0.0.1:1080"
username = "u"
password = "{PASSWORD}"
[[servers]]
address = "vpn.example.org:8443"
public_key = "{KEY_C}"
user_id = "{ID}"
user_key = "{KEY_B}"
"""


def write(folder: Path, text: str | bytes, name: str = "reflex.toml", mode: int = 0o600) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def problems(load: Callable[[Path], object], folder: Path, text: str | bytes) -> list[str]:
    """The problems of a file with this text, without the file's name, which each must begin with."""
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for secret in SECRETS:
        assert secret not in str(caught.value)
    assert all(problem.startswith(f"{path}: ") and "\n" not in problem for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def inbound_problem(folder: Path, text: str) -> str:
    (problem,) = problems(load_inbound, folder, text)
    return problem


def outbound_problem(folder: Path, text: str) -> str:
    (problem,) = problems(load_outbound, folder, text)
    return problem


# What a right file gives


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


def test_least_outbound_has_the_defaults(tmp_path: Path) -> None:
    loaded = load_outbound(write(tmp_path, OUTBOUND))
    (listen,) = loaded.listen
    assert listen == ListenSettings(
        address=HostPort("127.0.0.1", 1080), username="u", password=Secret(PASSWORD.encode())
    )
    (server,) = loaded.servers
    assert server.address == HostPort("vpn.example.org", 8443)
    assert server.public_key == bytes(range(64, 96))
    assert (server.user_id, server.user_key, server.cipher) == (uuid.UUID(ID), Secret(bytes(range(32, 64))), "auto")
    pool, limits = loaded.pool, loaded.limits
    assert (pool.max_idle, pool.idle_timeout_s, pool.max_streams, pool.max_tunnels) == (8, 60, 256, 8)
    assert (pool.min_idle, loaded.workers) == (0, 1)
    assert (limits.max_connections, limits.connect_timeout_s, limits.handshake_timeout_s) == (5000, 10, 10)
    assert (limits.idle_timeout_s, limits.drain_s) == (300, 30)
    assert loaded.warnings == ()


def test_forward(tmp_path: Path) -> None:
    text = OUTBOUND + '[[listen]]\nprotocol = "forward"\naddress = "[::1]:0"\ntarget = "[fd00::1]:443"\n'
    listen = load_outbound(write(tmp_path, text)).listen[1]
    assert (listen.protocol, str(listen.address), str(listen.target)) == ("forward", "[::1]:0", "[fd00::1]:443")


@pytest.mark.parametrize("cipher", ["auto", "aes-256-gcm", "chacha20-poly1305"])
def test_ciphers(tmp_path: Path, cipher: str) -> None:
    (server,) = load_outbound(write(tmp_path, f'{OUTBOUND}cipher = "{cipher}"')).servers
    assert server.cipher == cipher


def test_settings_of_either_kind(tmp_path: Path) -> None:
    assert isinstance(load_settings(write(tmp_path, INBOUND)), InboundSettings)
    assert isinstance(load_settings(write(tmp_path, OUTBOUND)), OutboundSettings)
    (problem,) = problems(load_settings, tmp_path, "[tcp]\nnodelay = true")
    assert problem == "neither [[users]] nor [[servers]]; expected those of inbound.toml or of outbound.toml"


# Secrets


def test_no_repr_shows_a_secret(tmp_path: Path) -> None:
    for loaded in (load_inbound(write(tmp_path, INBOUND)), load_outbound(write(tmp_path, OUTBOUND))):
        for shown in (repr(loaded), str(loaded), f"{loaded}", repr(copy.deepcopy(loaded))):
            assert "Secret(…)" in shown
            assert PASSWORD not in shown
            assert repr(bytes(range(32)))[2:-1] not in shown
            assert repr(bytes(range(32, 64)))[2:-1] not in shown


def test_secret() -> None:
    secret = Secret(b"abc")
    assert secret == Secret(b"abc")
    assert secret != Secret(b"abd")
    assert secret != b"abc"
    assert hash(secret) == hash(Secret(b"abc"))
    assert repr(secret) == str(secret) == f"{secret}" == "Secret(…)"
    assert copy.copy(secret) is copy.deepcopy(secret) is secret


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ('"tooshort1234"', "a text of 12 characters"),
        (f'"{base64.b64encode(bytes(33)).decode()}"', "a text of 44 characters"),
        (f'"{KEY_B[:-1]}"', "a text of 43 characters"),
        (f'"{KEY_B}\\n"', "a text of 45 characters"),
        (f'"!{KEY_B[1:]}"', "a text of 44 characters"),
        (f'"{"ä" * 44}"', "a text of 44 characters"),
        ('""', "a text of 0 characters"),
        ("4711", "a number"),
        ("47.11", "a number"),
        ("true", "true"),
        ("2026-01-01", "a date or time"),
        ("{ a = 1 }", "a table"),
        ("[1]", "a list of 1"),
    ],
)
def test_bad_keys(tmp_path: Path, key: str, found: str) -> None:
    for name in ("public_key", "user_key"):
        value = KEY_C if name == "public_key" else KEY_B
        text = OUTBOUND.replace(f'{name} = "{value}"', f"{name} = {key}")
        assert outbound_problem(tmp_path, text) == f"servers[0].{name}: {found}; expected base64 of 32 bytes"


def test_key_with_stray_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^$"):
        parse_key(KEY_A[:-2] + "9=")


def test_zero_keys(tmp_path: Path) -> None:
    assert "private_key: a key of zeros; expected" in inbound_problem(tmp_path, INBOUND.replace(KEY_A, ZERO_KEY))
    assert "users[0].key: a key of zeros; expected" in inbound_problem(tmp_path, INBOUND.replace(KEY_B, ZERO_KEY))
    assert "servers[0].public_key: a key of zeros" in outbound_problem(tmp_path, OUTBOUND.replace(KEY_C, ZERO_KEY))
    assert "servers[0].user_key: a key of zeros" in outbound_problem(tmp_path, OUTBOUND.replace(KEY_B, ZERO_KEY))


def test_key_files(tmp_path: Path) -> None:
    write(tmp_path, f"{KEY_A}\n", "server.key")
    text = INBOUND.replace(f'private_key = "{KEY_A}"', 'private_key_file = "server.key"')
    assert load_inbound(write(tmp_path, text)).private_key.reveal() == bytes(range(32))
    path = write(tmp_path, f" {KEY_B}\r\n", "user.key")
    text = OUTBOUND.replace(f'user_key = "{KEY_B}"', f'user_key_file = "{path}"')
    assert load_outbound(write(tmp_path, text)).servers[0].user_key.reveal() == bytes(range(32, 64))


@pytest.mark.parametrize(
    ("value", "content", "problem"),
    [
        ('"no.key"', None, "the text 'no.key' cannot be read: No such file or directory; expected the path of a file"),
        ('"."', None, "the text '.' cannot be read: Is a directory; expected"),
        ('"a\\u0000b"', None, "the text 'a\\x00b' cannot be read: no path, or too large a file; expected"),
        ('"a.key"', b"\xff" * 10, "the text 'a.key' cannot be read: not a text; expected"),
        ('"a.key"', b" " * (MAX_KEY_FILE_BYTES + 1), "the text 'a.key' cannot be read: no path, or too large"),
        ('"a.key"', b"short", "a text of 5 characters; expected base64 of 32 bytes"),
        ('"a.key"', ZERO_KEY.encode(), "a key of zeros; expected"),
        (f'"{KEY_A}"', None, "a text of 44 characters; expected the path of a file that holds base64 of 32 bytes"),
        ("5", None, "a number; expected the path of a file that holds"),
    ],
)
def test_bad_key_files(tmp_path: Path, value: str, content: bytes | None, problem: str) -> None:
    if content is not None:
        write(tmp_path, content, "a.key")
    text = INBOUND.replace(f'private_key = "{KEY_A}"', f"private_key_file = {value}")
    assert inbound_problem(tmp_path, text).startswith(f"private_key_file: {problem}")


def test_key_given_twice_or_not_at_all(tmp_path: Path) -> None:
    problem = inbound_problem(tmp_path, f'private_key_file = "x"\n{INBOUND}')
    assert problem == "private_key: given twice, here and as private_key_file; expected one of the two"
    problem = inbound_problem(tmp_path, INBOUND.replace("private_key =", "# "))
    assert problem == "private_key: nothing; expected base64 of 32 bytes, or private_key_file"
    problem = inbound_problem(tmp_path, INBOUND.replace(f'key = "{KEY_B}"', ""))
    assert problem == "users[0].key: nothing; expected base64 of 32 bytes"


def test_files_that_others_can_read(tmp_path: Path) -> None:
    path = write(tmp_path, INBOUND, mode=0o640)
    assert load_inbound(path).warnings == (
        f"{path}: holds secrets, and others can read it (mode 0640); expected mode 0600",
    )
    write(tmp_path, KEY_A, "server.key", mode=0o604)
    path = write(tmp_path, INBOUND.replace(f'private_key = "{KEY_A}"', 'private_key_file = "server.key"'))
    assert load_inbound(path).warnings == (
        f"{path}: private_key_file: others can read the text 'server.key' (mode 0604); expected mode 0600",
    )
    write(tmp_path, KEY_B, "user.key")
    text = OUTBOUND.replace(f'user_key = "{KEY_B}"', 'user_key_file = "user.key"')
    path = write(tmp_path, text, mode=0o644)
    assert "holds secrets" in load_outbound(path).warnings[0], "the password is one"
    text = text.replace('username = "u"', "").replace(f'password = "{PASSWORD}"', "")
    assert load_outbound(write(tmp_path, text, mode=0o644)).warnings == ()


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


def test_the_usage_files_path_starts_at_the_settings_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, f'usage_file = "var/usage.sqlite"{INBOUND}')
    monkeypatch.chdir(tmp_path)
    assert load_inbound(path.name).usage_file == tmp_path / "var" / "usage.sqlite"
    path = write(tmp_path, f'usage_file = "/var/lib/usage.sqlite"{INBOUND}')
    assert load_inbound(path).usage_file == Path("/var/lib/usage.sqlite")


# Files as a whole


def test_every_problem_at_once(tmp_path: Path) -> None:
    text = f"""
listen = ["0.0.0.0", "127.0.0.1:1"]
private_key = "short"
fallbak = "127.0.0.1:80"
[[users]]
name = ""
id = "{KEY_B}"
[limits]
max_conections = 5
drain_s = -1
"""
    found = problems(load_inbound, tmp_path, text)
    assert [problem.partition(":")[0] for problem in found] == [
        "listen[0]",
        "private_key",
        "users[0].name",
        "users[0].id",
        "users[0].key",
        "limits.drain_s",
        "fallbak",
        "limits.max_conections",
    ]
    assert "did you mean fallback?" in found[6]
    assert "did you mean max_connections?" in found[7]


def test_unknown_keys(tmp_path: Path) -> None:
    assert inbound_problem(tmp_path, f"{INBOUND}[tcp]\nzzz = 1") == (
        "tcp.zzz: an unknown key; expected one of keepalive_s, nodelay"
    )
    problem = inbound_problem(tmp_path, f'{INBOUND}"odd \\u001b[31m key" = 1')
    assert problem.startswith(
        "users[0].'odd \\x1b[31m key': an unknown key; expected one of bytes_per_s, dials_per_s, "
    )
    problem = inbound_problem(tmp_path, f"{INBOUND}{'x' * 1000} = 1")
    assert problem.startswith(f"users[0].'{'x' * 40}…': an unknown key;")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("listen = [", "not valid TOML: Invalid value (at end of document)"),
        ("\n\nx = ?", "not valid TOML: Invalid value (at line 3, column 5)"),
        (b"\n\xff", "line 2: not UTF-8"),
        (f"x = {'9' * 5000}", "not valid TOML: a value that cannot be read"),
        ("x = " + "[" * 100_000, "not valid TOML: a value that cannot be read"),
        (b"#" * (MAX_FILE_BYTES + 1), "cannot be read: no path, or too large a file"),
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, text: str | bytes, problem: str) -> None:
    (found,) = problems(load_inbound, tmp_path, text)
    assert found.startswith(f"{problem}")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load_outbound(path)
        assert caught.value.problems == (f"{path}: cannot be read: {reason}; expected a readable TOML file",)
    with pytest.raises(ConfigError, match="cannot be read: no path"):
        load_outbound("a\0b")


def test_an_error_without_a_text_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ConfigError, match="cannot be read: input/output error"):
        load_inbound(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ["listen: nothing", "private_key: nothing", "users: nothing"]),
        ("listen = []\nusers = []", ["private_key: nothing", "listen: an empty list", "users: an empty list"]),
        ('listen = "0.0.0.0:1"\nusers = {}', ["listen: a text of 9 characters", "users: a table"]),
        ("users = ['a', 5]", ["users[0]: a text of 1 characters; expected a table", "users[1]: a number"]),
        ("listen = [5, true]", ["listen[0]: the number 5", "listen[1]: true"]),
        ("limits = 5\ntcp = []\ntargets = true", ["limits: a number", "tcp: a list of 0", "targets: true"]),
    ],
)
def test_wrong_shapes(tmp_path: Path, text: str, found: list[str]) -> None:
    shown = problems(load_inbound, tmp_path, text)
    for start in found:
        assert any(problem.startswith(start) for problem in shown), shown


def test_nothing_in_outbound(tmp_path: Path) -> None:
    assert problems(load_outbound, tmp_path, "") == [
        "listen: nothing; expected a list of tables, [[listen]]",
        "servers: nothing; expected a list of tables, [[servers]]",
    ]
    found = problems(load_outbound, tmp_path, "[[listen]]\n[[servers]]")
    assert [problem.partition(";")[0] for problem in found] == [
        "listen[0].address: nothing",
        "servers[0].address: nothing",
        "servers[0].public_key: nothing",
        "servers[0].user_id: nothing",
        "servers[0].user_key: nothing",
    ]


# Numbers and flags


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("max_connections = 0", "the number 0; expected a whole number from 1 to 1000000"),
        ("buffered_bytes = 1000", "the number 1000; expected a whole number from 1048576 to 1099511627776"),
        ("max_connections = -5", "the number -5; expected a whole number"),
        ("max_connections = 5000000", "the number 5000000; expected a whole number"),
        ("max_connections = 5.0", "the number 5.0; expected a whole number"),
        ("max_connections = true", "true; expected a whole number"),
        ('max_connections = "5"', "the text '5'; expected a whole number"),
        (f"max_connections = 0x{'f' * 10_000}", "a number of 40000 bits; expected a whole number"),
        ("drain_s = -0.5", "the number -0.5; expected a number of seconds from 0 to 3600"),
        ("drain_s = nan", "the number nan; expected a number of seconds"),
        ("drain_s = inf", "the number inf; expected a number of seconds"),
        ("drain_s = false", "false; expected a number of seconds"),
        ("drain_s = [30]", "a list of 1; expected a number of seconds"),
        ("idle_timeout_s = 0", "the number 0; expected a number of seconds from 0.001 to 604800"),
        (f"handshake_timeout_s = 0x{'f' * 10_000}", "a number of 40000 bits; expected a number of seconds"),
    ],
)
def test_bad_numbers(tmp_path: Path, line: str, problem: str) -> None:
    key = line.partition(" ")[0]
    for load, text in ((load_inbound, INBOUND), (load_outbound, OUTBOUND)):
        (found,) = problems(load, tmp_path, f"{text}[limits]\n{line}")
        assert found.startswith(f"limits.{key}: {problem}")


def test_workers(tmp_path: Path) -> None:
    for load, text in ((load_inbound, INBOUND), (load_outbound, OUTBOUND)):
        assert load(write(tmp_path, f"workers = 64\n{text}")).workers == 64
        for value, found in (
            ("0", "the number 0"),
            ("65", "the number 65"),
            ("true", "true"),
            ("1.0", "the number 1.0"),
        ):
            (problem,) = problems(load, tmp_path, f"workers = {value}\n{text}")
            assert problem == f"workers: {found}; expected a whole number from 1 to 64"


def test_min_idle(tmp_path: Path) -> None:
    for lines, key, most in (
        ("min_idle = 9", "max_idle", 8),
        ("max_idle = 1\nmin_idle = 2", "max_idle", 1),
        ("max_tunnels = 3\nmin_idle = 4", "max_tunnels", 3),
    ):
        problem = outbound_problem(tmp_path, f"{OUTBOUND}[pool]\n{lines}")
        number = lines.rpartition(" ")[2]
        assert (
            problem == f"pool.min_idle: the number {number}; expected a whole number from 0 to {key}, which is {most}"
        )
    problem = outbound_problem(tmp_path, f"{OUTBOUND}[pool]\nmin_idle = -1")
    assert problem == "pool.min_idle: the number -1; expected a whole number from 0 to 1000"
    text = f"{OUTBOUND}[pool]\nmin_idle = 2\nmax_idle = 2\nmax_tunnels = 2"
    assert load_outbound(write(tmp_path, text)).pool.min_idle == 2


def test_bad_tcp_and_pool(tmp_path: Path) -> None:
    found = problems(
        load_outbound, tmp_path, f"{OUTBOUND}[tcp]\nnodelay = 1\nkeepalive_s = 40000\n[pool]\nmax_idle = -1"
    )
    assert found == [
        "pool.max_idle: the number -1; expected a whole number from 0 to 1000",
        "tcp.nodelay: the number 1; expected true or false",
        "tcp.keepalive_s: the number 40000; expected a whole number from 0 to 32767",
    ]


# Addresses


BAD_HOSTS = ["", "::1", "-a", "a-", "a..b", ".a", "a.", "a b", "bücher.example", "1.2.3", "256.1.1.1", "0x7f.1", "7"]
BAD_HOSTS += [
    "x" * 64,
    ".".join(["x" * 60] * 5),
    "[::1",
    "[",
    "[]",
    "[127.0.0.1]",
    "[fe80::1%eth0]",
    "[name]",
    "http://a",
]
BAD_PORTS = ["", "-1", "65536", "123456", "٣", "+1", " 1", "http", "1:1"]


@pytest.mark.parametrize(
    "text", [f"{host}:80" for host in BAD_HOSTS] + [f"a.b:{port}" for port in BAD_PORTS] + ["a.b", "[::1]"]
)
def test_bad_addresses(tmp_path: Path, text: str) -> None:
    for parse in (HostPort.parse, TargetRule.parse):
        with pytest.raises(ValueError):  # noqa: PT011 - which of them, and its text, is no contract
            parse(text)
    assert inbound_problem(tmp_path, INBOUND.replace("0.0.0.0:8443", text)).startswith("listen[0]: the text ")


def test_port_zero_is_for_listening_only(tmp_path: Path) -> None:
    assert load_inbound(write(tmp_path, INBOUND.replace(":8443", ":0"))).listen[0].port == 0
    assert "fallback: the text '127.0.0.1:0'" in inbound_problem(tmp_path, f'fallback = "127.0.0.1:0"\n{INBOUND}')
    assert "servers[0].address: the text" in outbound_problem(tmp_path, OUTBOUND.replace(":8443", ":0"))
    with pytest.raises(ValueError, match="port"):
        TargetRule.parse("a.b:0")


def test_repeated_listen_addresses(tmp_path: Path) -> None:
    problem = inbound_problem(tmp_path, INBOUND.replace('"0.0.0.0:8443"', '"[::1]:5", "[0::1]:5"'))
    assert problem == "listen[1]: the same as listen[0]; expected an address that is listened on only once"
    problem = outbound_problem(tmp_path, f'{OUTBOUND}[[listen]]\naddress = "127.0.0.1:1080"\n')
    assert problem.startswith("listen[1].address: the same as listen[0].address; expected")


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


# Users, SOCKS5 and forwards


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


@pytest.mark.parametrize("user_id", ["", ID[:-1], f"{{{ID}}}", ID.replace("-", ""), KEY_B])
def test_bad_ids(tmp_path: Path, user_id: str) -> None:
    expected = f"a text of {len(user_id)} characters; expected a UUID such as"
    assert f"users[0].id: {expected}" in inbound_problem(tmp_path, INBOUND.replace(ID, user_id))
    assert f"servers[0].user_id: {expected}" in outbound_problem(tmp_path, OUTBOUND.replace(ID, user_id))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('username = "u"', "", "listen[0].username: nothing; expected 1 to 255 bytes, to go with password"),
        (f'password = "{PASSWORD}"', "", "listen[0].password: nothing; expected 1 to 255 bytes, to go with username"),
        ('"u"', '""', "listen[0].username: the text ''; expected 1 to 255 bytes"),
        ('"u"', f'"{"ü" * 128}"', f"listen[0].username: the text '{'ü' * 40}…'; expected 1 to 255 bytes"),
        (f'"{PASSWORD}"', '""', "listen[0].password: a text of 0 characters; expected 1 to 255 bytes"),
        (f'"{PASSWORD}"', f'"{"p" * 256}"', "listen[0].password: a text of 256 characters; expected 1 to 255 bytes"),
        (f'"{PASSWORD}"', "4711", "listen[0].password: a number; expected 1 to 255 bytes"),
        ('"socks5"', '"socks4"', "listen[0].protocol: the text 'socks4'; expected socks5 or forward"),
        ('"socks5"', '"socks5"\ntarget = "a:1"', "listen[0].target: a target for protocol socks5; expected"),
        ("[[servers]]", '[[servers]]\ncipher = "rot13"', "servers[0].cipher: the text 'rot13'; expected auto or"),
        ("[[servers]]", "[[servers]]\ncipher = 1", "servers[0].cipher: the number 1; expected auto or aes-256-gcm or"),
    ],
)
def test_bad_listen_and_server_texts(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert outbound_problem(tmp_path, OUTBOUND.replace(old, new)).startswith(problem)


def test_bad_forwards(tmp_path: Path) -> None:
    found = problems(load_outbound, tmp_path, OUTBOUND.replace('"socks5"', '"forward"'))
    assert [problem.partition(";")[0] for problem in found] == [
        "listen[0].target: nothing",
        "listen[0].username: a username for protocol forward",
        "listen[0].password: a password for protocol forward",
    ]
    text = f'{OUTBOUND}[[listen]]\naddress = "127.0.0.1:1"\nprotocol = "forward"\ntarget = "a:0"'
    assert outbound_problem(tmp_path, text).startswith("listen[1].target: the text 'a:0'; expected host:port")


@pytest.mark.parametrize(
    ("address", "open_to_all"),
    [("127.0.0.2:1", False), ("[::1]:1", False), ("localhost:1", False), ("0.0.0.0:1", True), ("box.lan:1", True)],
)
def test_open_proxies_are_warned_of(tmp_path: Path, address: str, open_to_all: bool) -> None:  # noqa: FBT001 - pytest's
    path = write(tmp_path, f'{OUTBOUND}[[listen]]\naddress = "{address}"')
    warning = f"{path}: listen[1].address: everybody who reaches {address} may use this proxy; "
    warning += "expected a username and password"
    assert load_outbound(path).warnings == ((warning,) if open_to_all else ())


# Anything at all


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


KNOWN_KEYS = [
    "listen",
    "private_key",
    "private_key_file",
    "fallback",
    "users",
    "name",
    "id",
    "key",
    "targets",
    "allow",
    "deny",
    "limits",
    "max_connections",
    "max_streams",
    "handshake_timeout_s",
    "drain_s",
    "protocol",
    "address",
    "username",
    "password",
    "target",
    "servers",
    "public_key",
    "user_id",
    "user_key",
    "user_key_file",
    "cipher",
    "pool",
    "min_idle",
    "max_idle",
    "workers",
    "tcp",
    "nodelay",
    "keepalive_s",
    "usage_file",
    "max_tunnels",
    "dials_per_s",
    "bytes_per_s",
    "monthly_bytes",
]
keys = st.sampled_from(KNOWN_KEYS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=8
)
texts = st.sampled_from([KEY_A, ID, "127.0.0.1:1", "[::1]:2", "socks5", "forward", "*:*", "u"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=50
)
scalars = texts | st.integers() | st.floats() | st.booleans()
trees = st.recursive(
    scalars,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(keys, children, max_size=6),
    max_leaves=30,
)


def toml(value: object) -> str:
    """A value as TOML's inline text."""
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(item)}" for key, item in value.items())
            + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def load_anything(path: Path) -> None:
    for load in (load_inbound, load_outbound, load_settings):
        try:
            shown, found = repr(load(path)), None
        except ConfigError as error:
            shown, found = str(error), error.problems
        assert KEY_A not in shown
        assert found is None or (found and all(problem.startswith(f"{path}: ") for problem in found))


ANYTHING = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@ANYTHING
@given(tree=st.dictionaries(keys, trees, max_size=8))
def test_any_tree_loads_or_is_a_config_error(tmp_path: Path, tree: dict[str, object]) -> None:
    text = "\n".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(value)}" for key, value in tree.items())
    load_anything(write(tmp_path, text))


@ANYTHING
@given(text=st.text() | st.binary())
def test_any_text_loads_or_is_a_config_error(tmp_path: Path, text: str | bytes) -> None:
    load_anything(write(tmp_path, text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text))


@ANYTHING
@given(place=st.integers(0, len(INBOUND)), length=st.integers(0, 20), new=st.text(max_size=5))
def test_any_damage_loads_or_is_a_config_error(tmp_path: Path, place: int, length: int, new: str) -> None:
    damaged = INBOUND[:place] + new + INBOUND[place + length :]
    load_anything(write(tmp_path, damaged.encode("utf-8", "surrogatepass")))


def test_paths_may_be_texts(tmp_path: Path) -> None:
    assert load_inbound(os.fspath(write(tmp_path, INBOUND))).users
