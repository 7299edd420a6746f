"""reflex.config.reader: files, tables, unknown keys, keys in files, and paths."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from reflex.config import load_inbound, load_outbound
from reflex.config.reader import MAX_FILE_BYTES, MAX_KEY_FILE_BYTES
from reflex.errors import ConfigError
from tests.settings_files import (
    INBOUND,
    KEY_A,
    KEY_B,
    KEY_C,
    OUTBOUND,
    PASSWORD,
    ZERO_KEY,
    inbound_problem,
    outbound_problem,
    problems,
    write,
)


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


@pytest.mark.parametrize("key", ["usage_file", "replay_file"])
def test_a_files_path_starts_at_the_settings_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    path = write(tmp_path, f'{key} = "var/file.sqlite"{INBOUND}')
    monkeypatch.chdir(tmp_path)
    assert getattr(load_inbound(path.name), key) == tmp_path / "var" / "file.sqlite"
    path = write(tmp_path, f'{key} = "/var/lib/file.sqlite"{INBOUND}')
    assert getattr(load_inbound(path), key) == Path("/var/lib/file.sqlite")
    assert inbound_problem(tmp_path, f'{key} = ""{INBOUND}').startswith(f"{key}: the ")


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


def test_paths_may_be_texts(tmp_path: Path) -> None:
    assert load_inbound(os.fspath(write(tmp_path, INBOUND))).users
