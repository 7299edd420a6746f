"""Hosts, ports and target rules as values: texts that are taken, and that come back as themselves."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.config.values import HostPort, TargetRule, is_loopback


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:80", "127.0.0.1", 80),
        ("[::1]:65535", "::1", 65535),
        ("[FD00:0:0::1]:1", "fd00::1", 1),
        ("Name.Example:443", "name.example", 443),
        ("a_b-c:1", "a_b-c", 1),
        ("xn--bcher-kva.example:1", "xn--bcher-kva.example", 1),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = HostPort.parse(text)
    assert address == HostPort(host, port)
    assert HostPort.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("127.0.0.1:8080", TargetRule("127.0.0.1/32", ipaddress.ip_network("127.0.0.1"), 8080)),
        ("10.1.0.0/16:443", TargetRule("10.1.0.0/16", ipaddress.ip_network("10.1.0.0/16"), 443)),
        ("[fd00::/8]:443", TargetRule("fd00::/8", ipaddress.ip_network("fd00::/8"), 443)),
        ("[::1]:*", TargetRule("::1/128", ipaddress.ip_network("::1"), None)),
        ("Name.Example:443", TargetRule("name.example", None, 443)),
        ("*.Internal.example:*", TargetRule("*.internal.example", None, None)),
        ("*:25", TargetRule("*", None, 25)),
        ("*:*", TargetRule("*", None, None)),
    ],
)
def test_target_rules(text: str, rule: TargetRule) -> None:
    assert TargetRule.parse(text) == rule
    assert TargetRule.parse(str(rule)) == rule


@given(text=st.text())
def test_any_address_parses_or_is_a_value_error(text: str) -> None:
    for parse in (HostPort.parse, HostPort.parse_listen, TargetRule.parse):
        try:
            parsed = parse(text)
        except ValueError:
            continue
        assert parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_what_only_this_machine_reaches(text: str) -> None:
    assert is_loopback(text)


@pytest.mark.parametrize("text", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_what_others_reach(text: str) -> None:
    assert not is_loopback(text)
