"""reflex.config.shared: what both files have alike is read alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from reflex.config import HostPort, TargetRule, load_inbound, load_outbound
from tests.settings_files import ID, INBOUND, KEY_B, OUTBOUND, inbound_problem, outbound_problem, problems, write

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


@pytest.mark.parametrize("user_id", ["", ID[:-1], f"{{{ID}}}", ID.replace("-", ""), KEY_B])
def test_bad_ids(tmp_path: Path, user_id: str) -> None:
    expected = f"a text of {len(user_id)} characters; expected a UUID such as"
    assert f"users[0].id: {expected}" in inbound_problem(tmp_path, INBOUND.replace(ID, user_id))
    assert f"servers[0].user_id: {expected}" in outbound_problem(tmp_path, OUTBOUND.replace(ID, user_id))
