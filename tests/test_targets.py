"""reflex.net.targets: the table of public addresses, and the rules over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.net.targets import NameVerdict, TargetPolicy, is_public


@dataclass(frozen=True)
class R:
    """A rule as settings make it."""

    host_pattern: str = "*"
    network: IPv4Network | IPv6Network | None = None
    port: int | None = None


def net(text: str, port: int | None = None) -> R:
    return R(text, ip_network(text), port)


NOT_PUBLIC_V4 = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
]
NOT_PUBLIC_V6 = [
    "::/128",
    "::1/128",
    "::/96",
    "::ffff:0:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "1000::/4",
    "2001::/32",
    "2001:2::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "4000::/3",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]


@pytest.mark.parametrize("text", NOT_PUBLIC_V4 + NOT_PUBLIC_V6)
def test_not_public_from_the_first_to_the_last_address(text: str) -> None:
    network = ip_network(text)
    assert not is_public(str(network[0]))
    assert not is_public(str(network[network.num_addresses // 2]))
    assert not is_public(str(network[-1]))


@pytest.mark.parametrize(
    "text",
    [
        "1.0.0.0",
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.0.3.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "203.0.112.255",
        "203.0.114.0",
        "223.255.255.255",
        "2000::",
        "2001:200::",
        "2001:db7:ffff::",
        "2001:db9::",
        "2003::",
        "2606:4700:4700::1111",
        "2a00:1450::1",
        "3fff:1000::",
        "3fff:ffff::",
        "::ffff:8.8.8.8",
        "::ffff:808:808",
    ],
)
def test_public(text: str) -> None:
    assert is_public(text)
    assert TargetPolicy().allows_address(text, 443)


@pytest.mark.parametrize(
    "text",
    [
        "64:ff9b::a00:1",
        "2002:a00:1::1",
        "::127.0.0.1",
        "fec0::1",
        "ff0e::1",
        "::ffff:127.0.0.1",
        "::ffff:a00:1",
        "::ffff:0.0.0.0",
        "fe80::1%eth0",
        "2606:4700::1%1",
        "255.255.255.255",
        "127.1",
        "0x7f000001",
        "example.org",
        "",
        ":",
        "1.2.3.4 ",
    ],
)
def test_refused_by_default(text: str) -> None:
    assert not is_public(text)
    assert not TargetPolicy().allows_address(text, 443)


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_as_its_ipv4(ip: IPv4Address) -> None:
    mapped = str(IPv6Address(0xFFFF_0000_0000 + int(ip)))
    assert is_public(mapped) == is_public(str(ip))
    policy = TargetPolicy([net("0.0.0.0/1")], [net("64.0.0.0/2")])
    assert policy.allows_address(mapped, 80) == policy.allows_address(str(ip), 80)


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_never_wider_than_the_standard_library(ip: IPv4Address | IPv6Address) -> None:
    if is_public(str(ip)):
        judged = getattr(ip, "ipv4_mapped", None) or ip
        assert judged.is_global


# Addresses that hold others.

TEREDO_SERVER = "65.54.227.120"  # of RFC 4380's own example, and public


def teredo(client: str, server: str = TEREDO_SERVER) -> str:
    turned_over = int(IPv4Address(client)) ^ 0xFFFF_FFFF
    return str(IPv6Address(0x2001_0000 << 96 | int(IPv4Address(server)) << 64 | turned_over))


def placed(prefix: str, ip: str, shift: int) -> str:
    return str(IPv6Address(int(IPv6Address(prefix)) | int(IPv4Address(ip)) << shift))


def rfc6052(ip: str, prefix_bits: int) -> str:
    """RFC 6052, section 2.2, for prefixes within 64:ff9b:1::/48; the bits 64 to 71 stay 0."""
    number = int(IPv4Address(ip))
    before = max(0, 64 - prefix_bits)
    high, low = (number >> (32 - before), number & (1 << (32 - before)) - 1) if before < 32 else (number, 0)
    if prefix_bits == 96:
        return placed("64:ff9b:1::", ip, 0)
    if before == 0:
        return placed("64:ff9b:1::", ip, 24)
    after = 32 - before
    whole = int(IPv6Address("64:ff9b:1::")) | high << 64 | low << (56 - after)
    return str(IPv6Address(whole))


HOLDERS: dict[str, Callable[[str], str]] = {
    "IPv4-compatible": lambda ip: placed("::", ip, 0),
    "IPv4-translated": lambda ip: placed("::ffff:0:0:0", ip, 0),
    "NAT64": lambda ip: placed("64:ff9b::", ip, 0),
    "6to4": lambda ip: placed("2002::1", ip, 80),
    "Teredo, its client": teredo,
    "Teredo, its server": lambda ip: teredo(TEREDO_SERVER, ip),
    "NAT64 of one's own, /48": lambda ip: rfc6052(ip, 48),
    "NAT64 of one's own, /56": lambda ip: rfc6052(ip, 56),
    "NAT64 of one's own, /64": lambda ip: rfc6052(ip, 64),
    "NAT64 of one's own, /96": lambda ip: rfc6052(ip, 96),
}
# What lies in the other places must pass as well.
IN_ANY_OF_FOUR_PLACES = ("NAT64 of one's own, /48", "NAT64 of one's own, /56", "NAT64 of one's own, /64")
EVERY_IPV6 = net("::/0")


def test_the_examples_of_rfc_6052() -> None:
    assert rfc6052("192.0.2.33", 48) == "64:ff9b:1:c000:2:2100::"
    assert rfc6052("192.0.2.33", 56) == "64:ff9b:1:c0:0:221::"
    assert rfc6052("192.0.2.33", 64) == "64:ff9b:1:0:c0:2:2100:0"


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("ip", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "100.64.0.1", "192.168.1.1", "224.0.0.1"])
def test_an_address_that_holds_another_is_judged_by_both(holder: str, ip: str) -> None:
    outer = HOLDERS[holder](ip)
    assert not TargetPolicy().allows_address(outer, 80)
    assert not TargetPolicy([EVERY_IPV6]).allows_address(outer, 80)
    assert not TargetPolicy([net(ip)]).allows_address(outer, 80)
    assert not TargetPolicy([EVERY_IPV6, net(ip)], [net(ip)]).allows_address(outer, 80)
    assert not TargetPolicy([EVERY_IPV6, net(ip)], [net(outer)]).allows_address(outer, 80)
    if holder not in IN_ANY_OF_FOUR_PLACES:
        assert TargetPolicy([EVERY_IPV6, net(ip)]).allows_address(outer, 80)
    assert TargetPolicy([EVERY_IPV6, net("0.0.0.0/0")]).allows_address(outer, 80)
    public = HOLDERS[holder]("8.8.8.8")
    assert not TargetPolicy().allows_address(public, 80)
    assert TargetPolicy([EVERY_IPV6]).allows_address(public, 80)
    assert not TargetPolicy([EVERY_IPV6], [net("8.8.8.0/24")]).allows_address(public, 80)
    assert not TargetPolicy([EVERY_IPV6], is_own=lambda own: own == "8.8.8.8").allows_address(public, 80)


@pytest.mark.parametrize("holder", HOLDERS)
@given(st.ip_addresses(v=4).filter(lambda ip: int(ip) >> 24))  # 0.0.0.0/8 is nowhere
def test_an_ipv6_network_that_is_allowed_opens_no_ipv4_address_that_is_not(holder: str, ip: IPv4Address) -> None:
    policy = TargetPolicy([EVERY_IPV6], [net("64.0.0.0/2")], is_own=lambda _: False)
    if policy.allows_address(HOLDERS[holder](str(ip)), 80):
        assert policy.allows_address(str(ip), 80)


@given(st.ip_addresses(v=6))
def test_no_ipv6_address_is_allowed_without_a_rule_that_holds_one(ip: IPv6Address) -> None:
    if any(ip in ip_network(text) for text in NOT_PUBLIC_V6):
        assert not TargetPolicy(is_own=lambda _: False).allows_address(str(ip), 80)


def test_loopback_and_the_unspecified_address_hold_nothing() -> None:
    assert TargetPolicy([net("::1/128")]).allows_address("::1", 80)
    assert TargetPolicy([net("::/128")]).allows_address("::", 80)


def test_a_name_that_is_allowed_vouches_for_what_its_addresses_hold_but_not_against_deny() -> None:
    policy = TargetPolicy([R("*.internal.example")], [net("10.6.0.0/16")])
    verdict = policy.allows_name("db.internal.example", 80)
    assert policy.allows_address("64:ff9b::10.1.1.1", 80, verdict=verdict)
    assert not policy.allows_address("64:ff9b::10.6.1.1", 80, verdict=verdict)


# This machine's own addresses.

OWN = ("9.9.9.9", "2620:fe::fe")


@pytest.mark.parametrize("ip", [*OWN, "::ffff:9.9.9.9"])
def test_an_own_address_is_refused_unless_a_rule_allows_it(ip: str) -> None:
    asked: list[str] = []

    def is_own(text: str) -> bool:
        asked.append(text)
        return text in OWN

    assert not TargetPolicy(is_own=is_own).allows_address(ip, 443)
    assert asked == [ip.removeprefix("::ffff:")]
    assert TargetPolicy([R("*", None, 443)], is_own=is_own).allows_address(ip, 443)
    assert TargetPolicy([net("9.9.9.9/32"), net("2620:fe::fe/128")], is_own=is_own).allows_address(ip, 443)
    by_name = TargetPolicy([R("me.example")], is_own=is_own)
    assert by_name.allows_address(ip, 443, verdict=by_name.allows_name("me.example", 443))
    assert len(asked) == 1  # what a rule allows need not be asked for


def test_an_address_that_becomes_this_machines_own_is_refused_from_then_on() -> None:
    own: set[str] = set()
    policy = TargetPolicy(is_own=own.__contains__)
    assert policy.allows_address("9.9.9.9", 443)
    own.add("9.9.9.9")
    assert not policy.allows_address("9.9.9.9", 443)
    assert policy.allows_address("8.8.8.8", 443)


@given(st.text(max_size=40), st.integers(1, 65_535))
def test_random_text_raises_nothing(text: str, port: int) -> None:
    policy = TargetPolicy([R("*.a")], [R("*.b")])
    policy.allows_address(text, port)
    policy.allows_name(text, port)


def test_allow_by_network_and_port() -> None:
    policy = TargetPolicy([net("10.1.0.0/16", 443), net("fd00::/8"), net("127.0.0.1/32", 8080)])
    assert policy.allows_address("10.1.2.3", 443)
    assert not policy.allows_address("10.1.2.3", 80)
    assert not policy.allows_address("10.2.2.3", 443)
    assert policy.allows_address("fd12::1", 1)
    assert policy.allows_address("127.0.0.1", 8080)
    assert policy.allows_address("::ffff:127.0.0.1", 8080)
    assert not policy.allows_address("::1", 8080)
    assert policy.allows_address("8.8.8.8", 80)


def test_rules_on_mapped_networks_are_about_ipv4() -> None:
    policy = TargetPolicy([net("::ffff:10.0.0.0/104")], [net("::ffff:10.9.0.0/112")])
    assert policy.allows_address("10.1.1.1", 80)
    assert policy.allows_address("::ffff:10.1.1.1", 80)
    assert not policy.allows_address("10.9.1.1", 80)


def test_deny_wins() -> None:
    policy = TargetPolicy([net("10.0.0.0/8"), R("*.example")], [net("10.6.0.0/16"), R("*", None, 25), R("bad.example")])
    assert policy.allows_address("10.1.1.1", 80)
    assert not policy.allows_address("10.6.1.1", 80)
    assert not policy.allows_address("10.1.1.1", 25)
    assert not policy.allows_address("8.8.8.8", 25)
    assert policy.allows_name("good.example", 80) is NameVerdict.ALLOWED
    assert policy.allows_name("good.example", 25) is NameVerdict.DENIED
    assert policy.allows_name("bad.example", 80) is NameVerdict.DENIED
    assert policy.allows_name("BAD.example.", 80) is NameVerdict.DENIED
    assert policy.allows_name("elsewhere.org", 80) is NameVerdict.ON_ADDRESSES


def test_an_allowed_name_vouches_for_its_addresses_but_not_against_deny() -> None:
    policy = TargetPolicy([R("*.internal.example")], [net("10.6.0.0/16")])
    verdict = policy.allows_name("db.internal.example", 5432)
    assert verdict is NameVerdict.ALLOWED
    assert policy.allows_address("10.1.1.1", 5432, verdict=verdict)
    assert not policy.allows_address("10.6.1.1", 5432, verdict=verdict)
    assert not policy.allows_address("fe80::1%eth0", 5432, verdict=verdict)
    assert not policy.allows_address("10.1.1.1", 5432)
    assert not policy.allows_address("8.8.8.8", 5432, verdict=NameVerdict.DENIED)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*", "anything", True),
        ("*.example", "a.example", True),
        ("*.example", "a.b.example", True),
        ("*.example", "example", False),
        ("*.example", "notexample", False),
        ("*.example", "a.example.org", False),
        ("*.Example.", "A.EXAMPLE", True),
        ("db-*.example", "db-1.example", True),
        ("a.example", "aXexample", False),
        ("a.example", "a.example", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:  # noqa: FBT001  pytest passes it by name
    expected = NameVerdict.DENIED if matches else NameVerdict.ON_ADDRESSES
    assert TargetPolicy(deny=[R(pattern)]).allows_name(name, 1) is expected


def test_a_rule_with_a_network_says_nothing_of_names() -> None:
    policy = TargetPolicy([R("*", ip_network("10.0.0.0/8"))], [R("*", ip_network("11.0.0.0/8"))])
    assert policy.allows_name("example.org", 80) is NameVerdict.ON_ADDRESSES


def test_a_pattern_matches_addresses_as_text() -> None:
    policy = TargetPolicy([R("*", None, 8080)], [R("8.8.*")])
    assert policy.allows_address("127.0.0.1", 8080)
    assert policy.allows_address("::1", 8080)
    assert not policy.allows_address("8.8.4.4", 8080)
    assert not policy.allows_address("::ffff:8.8.4.4", 8080)
