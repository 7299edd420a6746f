"""Who may be dialled: public addresses, and what the rules of the operator add or take away.

1. A deny rule wins over everything.
2. An allow rule wins over the table below; one that matches a name vouches for the addresses of that
   name, except those that a deny rule matches.
3. What no rule matches must be a public address, by the table below, and not this machine's own: a
   client reaches nothing that listens here, the server itself least of all, as if it came from here.
4. An IPv6 address that holds an IPv4 one (NAT64, 6to4, Teredo, IPv4-compatible, IPv4-translated) leads
   there, so both are judged: a deny rule on either wins, and to allow the IPv6 network is not to allow
   the inner network behind it. An IPv4-mapped address *is* the IPv4 address.

A name is judged before it is resolved and its addresses after; what was judged is what is dialled
(``dial.py`` does not resolve twice), so a name that changes its addresses gains nothing.

The table is our own: ``ipaddress.is_global`` differs between versions of Python, and on 3.11 takes
NAT64, 6to4, IPv4-compatible, site-local and multicast addresses for global ones. Through each of
those an address of the inner network could be reached. It follows the IANA registries

- https://www.iana.org/assignments/iana-ipv4-special-registry (RFC 6890)
- https://www.iana.org/assignments/iana-ipv6-special-registry (RFC 6890)
- https://www.iana.org/assignments/ipv6-address-space (RFC 4291)

and is on the strict side: small anycast blocks within 192.0.0.0/24 and 2001::/23 are refused as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple, Protocol

from reflex.net.own_addresses import is_own

_NOT_PUBLIC_V4: Final = (
    IPv4Network("0.0.0.0/8"),  # this network, RFC 791; Linux dials 0.0.0.0 as itself
    IPv4Network("10.0.0.0/8"),  # private, RFC 1918
    IPv4Network("100.64.0.0/10"),  # shared behind carriers' NAT, RFC 6598
    IPv4Network("127.0.0.0/8"),  # loopback, RFC 1122
    IPv4Network("169.254.0.0/16"),  # link-local, RFC 3927; clouds keep their secrets at 169.254.169.254
    IPv4Network("172.16.0.0/12"),  # private, RFC 1918
    IPv4Network("192.0.0.0/24"),  # IETF protocol assignments, RFC 6890
    IPv4Network("192.0.2.0/24"),  # documentation, RFC 5737
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    IPv4Network("192.168.0.0/16"),  # private, RFC 1918
    IPv4Network("198.18.0.0/15"),  # benchmarks, RFC 2544
    IPv4Network("198.51.100.0/24"),  # documentation, RFC 5737
    IPv4Network("203.0.113.0/24"),  # documentation, RFC 5737
    IPv4Network("224.0.0.0/4"),  # multicast, RFC 5771
    IPv4Network("240.0.0.0/4"),  # reserved, RFC 1112; with the broadcast address
)

# Nothing outside this block is global unicast. Refused with the rest: ::, ::1, IPv4-compatible ::/96,
# NAT64 64:ff9b::/96 and 64:ff9b:1::/48, 100::/64, 5f00::/16, fc00::/7, fe80::/10, fec0::/10, ff00::/8.
_GLOBAL_UNICAST_V6: Final = IPv6Network("2000::/3")  # RFC 4291, section 2.4
_NOT_PUBLIC_V6: Final = (
    IPv6Network("2001::/23"),  # IETF protocol assignments, RFC 2928: Teredo, benchmarks, ORCHID
    IPv6Network("2001:db8::/32"),  # documentation, RFC 3849
    IPv6Network("2002::/16"),  # 6to4, RFC 3056: holds an IPv4 address
    IPv6Network("3fff::/20"),  # documentation, RFC 9637
)
_MAPPED: Final = IPv6Network("::ffff:0:0/96")  # RFC 4291, section 2.5.5.2: dialled as the IPv4 address it holds

_V4_RANGES: Final = tuple((int(n.network_address), int(n.netmask)) for n in _NOT_PUBLIC_V4)
_V6_RANGES: Final = tuple((int(n.network_address), int(n.netmask)) for n in _NOT_PUBLIC_V6)
_GLOBAL_UNICAST_SHIFT: Final = 128 - _GLOBAL_UNICAST_V6.prefixlen
_GLOBAL_UNICAST_PREFIX: Final = int(_GLOBAL_UNICAST_V6.network_address) >> _GLOBAL_UNICAST_SHIFT
_V4_BITS: Final = 32
_V4_MASK: Final = 2**_V4_BITS - 1

# Where IPv6 addresses hold IPv4 ones: the network, and how far they are from the right end, in bits.
_HOLDERS: Final = (
    (IPv6Network("::/96"), 0),  # IPv4-compatible, RFC 4291, section 2.5.5.1
    (IPv6Network("::ffff:0:0:0/96"), 0),  # IPv4-translated, RFC 7915 and RFC 2765
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64, RFC 6052
    (IPv6Network("2002::/16"), 80),  # 6to4, RFC 3056
    (IPv6Network("2001::/32"), 64),  # Teredo, RFC 4380: its server; its client is turned over, see _held
)
_TEREDO: Final = IPv6Network("2001::/32")
# NAT64 of one's own, RFC 8215. How long its prefix is, only its operator knows; by that the IPv4 address lies
# in one of four places (RFC 6052, section 2.2, which leaves out the bits 64 to 71).
_LOCAL_NAT64: Final = IPv6Network("64:ff9b:1::/48")
_LOCAL_NAT64_PREFIXES: Final = (48, 56, 64, 96)
_U_OCTET_SHIFT: Final = 56  # those bits, counted from the right end
_UNSPECIFIED_V6: Final = frozenset((IPv6Address("::"), IPv6Address("::1")))  # in ::/96, and hold nothing

_VERDICTS: Final = 4096  # judged addresses remembered by a policy; about 1 MiB when full


class Rule(Protocol):
    """One rule of the operator; every part that it names must match.

    ``network``: the addresses it is about; then ``host_pattern`` says nothing. Otherwise
    ``host_pattern`` is about names, and about addresses as text; ``*`` in it stands for any
    characters, so that ``*`` alone matches everything. ``port``: None for every port.
    """

    @property
    def host_pattern(self) -> str: ...

    @property
    def network(self) -> IPv4Network | IPv6Network | None: ...

    @property
    def port(self) -> int | None: ...


class NameVerdict(Enum):
    """What is known of a name before it is resolved."""

    DENIED = auto()  # by a rule; it need not be resolved
    ALLOWED = auto()  # by a rule, even where its addresses are not public; deny rules still judge those
    ON_ADDRESSES = auto()  # each of its addresses decides for itself


class _Matcher(NamedTuple):
    """A rule, made ready for matching."""

    network: IPv4Network | IPv6Network | None
    pattern: re.Pattern[str]
    port: int | None

    @classmethod
    def of(cls, rule: Rule) -> _Matcher:
        network = rule.network
        if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
            inner = int(network.network_address) & 0xFFFF_FFFF
            network = IPv4Network((inner, network.prefixlen - _MAPPED.prefixlen))
        parts = _plain_name(rule.host_pattern).split("*")
        return cls(network, re.compile(".*".join(map(re.escape, parts))), rule.port)

    def matches_name(self, name: str, port: int) -> bool:
        return (
            self.network is None
            and (self.port is None or self.port == port)
            and self.pattern.fullmatch(name) is not None
        )

    def matches_address(self, ip: IPv4Address | IPv6Address, port: int) -> bool:
        if self.port is not None and self.port != port:
            return False
        if self.network is None:
            return self.pattern.fullmatch(str(ip)) is not None
        return ip in self.network  # False where the versions differ


class TargetPolicy:
    """The operator's rules over the table of public addresses.

    Args:
        allow: what may be dialled although it is not public.
        deny: what may not, whatever else says so.
        is_own: whether an address is this machine's own; may raise OSError.
    """

    def __init__(
        self, allow: Iterable[Rule] = (), deny: Iterable[Rule] = (), *, is_own: Callable[[str], bool] = is_own
    ) -> None:
        self._allow = tuple(map(_Matcher.of, allow))
        self._deny = tuple(map(_Matcher.of, deny))
        self._is_own = is_own
        self._remembered = lru_cache(_VERDICTS)(self._judge)

    def allows_name(self, name: str, port: int) -> NameVerdict:
        """Judge a name, which is no IP address, before it is resolved. Case and a last dot do not matter."""
        plain = _plain_name(name)
        if any(rule.matches_name(plain, port) for rule in self._deny):
            return NameVerdict.DENIED
        if any(rule.matches_name(plain, port) for rule in self._allow):
            return NameVerdict.ALLOWED
        return NameVerdict.ON_ADDRESSES

    def allows_address(self, ip_text: str, port: int, *, verdict: NameVerdict = NameVerdict.ON_ADDRESSES) -> bool:
        """Say whether an address may be dialled.

        Args:
            ip_text: an IPv4 or IPv6 address; what is neither, or has a scope (``%eth0``), is refused.
            port: of the target.
            verdict: on the name that the address was resolved from, where there was one.

        Raises:
            OSError: whether it is this machine's own cannot be known now.
        """
        unless_own = self._remembered(ip_text, port, verdict)
        # Machines change their addresses, so that is asked each time.
        return unless_own is not None and not any(map(self._is_own, unless_own))

    def _judge(self, ip_text: str, port: int, verdict: NameVerdict) -> tuple[str, ...] | None:
        """None: refused. Else it may be dialled, unless this machine has one of the addresses given."""
        ip = _parse(ip_text)
        if ip is None or verdict is NameVerdict.DENIED:
            return None
        unless_own: list[str] = []
        for each in (ip, *_held(ip)):
            if any(rule.matches_address(each, port) for rule in self._deny):
                return None
            if verdict is NameVerdict.ALLOWED or any(rule.matches_address(each, port) for rule in self._allow):
                continue  # by a rule, this machine or not
            if not _is_public(each):
                return None
            unless_own.append(str(each))
        return tuple(unless_own)


def is_public(ip_text: str) -> bool:
    """Say whether the text is an address that the table above takes for public."""
    ip = _parse(ip_text)
    return ip is not None and _is_public(ip)


def _is_public(ip: IPv4Address | IPv6Address) -> bool:
    number = int(ip)
    if isinstance(ip, IPv4Address):
        return not any(number & mask == network for network, mask in _V4_RANGES)
    if number >> _GLOBAL_UNICAST_SHIFT != _GLOBAL_UNICAST_PREFIX:
        return False
    return not any(number & mask == network for network, mask in _V6_RANGES)


def _held(ip: IPv4Address | IPv6Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that an IPv6 address holds, and to which packets for it may go."""
    if isinstance(ip, IPv4Address) or ip in _UNSPECIFIED_V6:
        return
    number = int(ip)
    for network, shift in _HOLDERS:
        if ip in network:
            yield IPv4Address(number >> shift & _V4_MASK)
    if ip in _TEREDO:
        yield IPv4Address(~number & _V4_MASK)
    if ip in _LOCAL_NAT64:
        found = list(_held_by_local_nat64(number))
        # A place that holds zeros is not the one. Where all do, none is left out, and all are refused.
        yield from [each for each in found if int(each) >> 24] or found


def _held_by_local_nat64(number: int) -> Iterator[IPv4Address]:
    low = number & ((1 << _U_OCTET_SHIFT) - 1)
    without_octet = number >> (_U_OCTET_SHIFT + 8) << _U_OCTET_SHIFT | low  # 120 bits
    for prefix_bits in _LOCAL_NAT64_PREFIXES:
        if prefix_bits == _LOCAL_NAT64_PREFIXES[-1]:
            yield IPv4Address(number & _V4_MASK)
        else:
            yield IPv4Address(without_octet >> (120 - prefix_bits - _V4_BITS) & _V4_MASK)


def _parse(ip_text: str) -> IPv4Address | IPv6Address | None:
    """Read an address; an IPv4-mapped one is the IPv4 address it holds. None for what is none or has a scope."""
    try:
        if ":" not in ip_text:
            return IPv4Address(ip_text)
        ip = IPv6Address(ip_text)
    except ValueError:
        return None
    if ip.scope_id is not None:
        return None
    return ip.ipv4_mapped or ip


def _plain_name(name: str) -> str:
    return name.lower().removesuffix(".")
