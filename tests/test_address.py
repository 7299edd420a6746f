"""reflex.protocol.address: one form for every host, and the wire form's twins."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reflex.errors import AddressError
from reflex.protocol.address import (
    MAX_NAME_SIZE,
    Address,
    decode_address,
    encoded_size,
)
from reflex.protocol.wire import AddressType

V4, NAME, V6 = AddressType.IPV4, AddressType.NAME, AddressType.IPV6

VECTORS = [
    (Address(V4, "192.0.2.7", 80), "01 c0000207 0050"),
    (Address(V4, "0.0.0.0", 1), "01 00000000 0001"),
    (Address(V4, "255.255.255.255", 65_535), "01 ffffffff ffff"),
    (Address(NAME, "example.org", 443), "03 0b 6578616d706c652e6f7267 01bb"),
    (Address(NAME, "a", 256), "03 01 61 0100"),
    (Address(V6, "::1", 8080), "04 00000000000000000000000000000001 1f90"),
    (Address(V6, "2001:db8::8:800:200c:417a", 53), "04 20010db80000000000080800200c417a 0035"),
]

labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=63)
names = st.lists(labels, min_size=1, max_size=3).map(lambda parts: ".".join([*parts, "example"]))
ports = st.integers(1, 65_535)
addresses = st.one_of(
    st.builds(Address, st.just(V4), st.ip_addresses(v=4).map(str), ports),
    st.builds(Address, st.just(V6), st.ip_addresses(v=6).map(str), ports),
    st.builds(Address, st.just(NAME), names, ports),
)


@pytest.mark.parametrize(("address", "wire"), VECTORS)
def test_vectors(address: Address, wire: str) -> None:
    raw = bytes.fromhex(wire)
    assert address.encode() == raw
    assert decode_address(raw) == (address, len(raw))
    assert encoded_size(raw[0], raw[1]) == len(raw)
    assert Address.parse(str(address)) == address


@given(addresses, st.binary(max_size=5), st.binary(max_size=5))
def test_round_trip(address: Address, before: bytes, after: bytes) -> None:
    raw = address.encode()
    data = before + raw + after
    assert decode_address(data, len(before)) == (address, len(before) + len(raw))
    assert decode_address(memoryview(data), len(before)) == (address, len(before) + len(raw))
    assert Address.parse(str(address)) == address
    assert Address.of(address.host, address.port) == address


@given(addresses)
def test_every_shorter_prefix_is_an_error(address: Address) -> None:
    raw = address.encode()
    for size in range(len(raw)):
        with pytest.raises(AddressError):
            decode_address(raw[:size])


@given(
    st.one_of(
        st.binary(max_size=40),
        st.builds(bytes.__add__, st.sampled_from([b"\1", b"\3", b"\4"]), st.binary(max_size=300)),
    )
)
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    try:
        address, end = decode_address(data)
    except AddressError:
        return
    assert end <= len(data)
    assert decode_address(address.encode())[0] == address  # what was read is in its one form


@given(st.text(max_size=80))
@example("[::1%eth0]:1")
@example("[1.2.3.4]:80")
def test_random_text_raises_nothing_else(text: str) -> None:
    try:
        address = Address.parse(text)
    except AddressError:
        return
    assert decode_address(address.encode())[0] == address


@given(st.text("0123456789abcdefx.", min_size=1, max_size=20))
@example("127.1")
@example("0x7f.1")
@example("2130706433")
@example("0177.0.0.1")
def test_what_inet_aton_takes_never_stays_a_name(host: str) -> None:
    try:
        dialled = socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return
    try:
        address = Address.of(host, 80)
    except AddressError:
        return
    assert address == Address(V4, dialled, 80)


@pytest.mark.parametrize(
    "host",
    [
        "127.1",
        "0x7f.1",
        "0X7F.0.0.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "127.0.0.01",
        "127.0.0.256",
        "127.0.0.1.",
        "127.0.0.1.5",
        "1.2.3.0x",
        "name.7",
        "name.7.",
        "",
        "a b",
        "a\0b",
        "a/b",
        "a\nb",
        "user@host",
        "[::1]",
        "::1%eth0",
        "fe80::1%1",
        "1:2",
        ":::",
        "bücher.example",
        "x" * (MAX_NAME_SIZE + 1),
    ],
)
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(AddressError):
        Address.of(host, 80)
    raw = host.encode()
    if len(raw) <= MAX_NAME_SIZE:
        with pytest.raises(AddressError):
            decode_address(bytes((NAME, len(raw))) + raw + b"\0\x50")


@pytest.mark.parametrize(
    ("host", "kind", "form"),
    [
        ("EXAMPLE.Org", NAME, "example.org"),
        ("example.org.", NAME, "example.org."),
        ("_srv-1.example", NAME, "_srv-1.example"),
        ("7.name", NAME, "7.name"),
        ("xn--bcher-kva.example", NAME, "xn--bcher-kva.example"),
        ("10.0.0.1", V4, "10.0.0.1"),
        ("2001:DB8:0:0::1", V6, "2001:db8::1"),
        ("x" * MAX_NAME_SIZE, NAME, "x" * MAX_NAME_SIZE),
    ],
)
def test_one_form(host: str, kind: AddressType, form: str) -> None:
    expected = Address(kind, form, 80)
    raw = bytes((NAME, len(host))) + host.encode() + b"\0\x50"
    assert Address.of(host, 80) == expected
    assert decode_address(raw) == (expected, len(raw))


def test_a_mapped_address_keeps_its_bytes() -> None:
    packed = ipaddress.IPv6Address("::ffff:192.0.2.1").packed
    raw = bytes((V6,)) + packed + b"\0\x50"
    address, _ = decode_address(raw)
    assert address.kind == V6
    assert address.encode() == raw


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:0",
        "host:65536",
        "host:-1",
        "host:+1",
        "host: 1",
        "host:٣",
        "host:000080",
        "::1:80",
        "[::1]",
        "[::1]80",
        "[host]:80",
        "[::1:80",
        "::1]:80",
        "[]:80",
        "a:b:80",
    ],
)
def test_texts_that_are_none(text: str) -> None:
    with pytest.raises(AddressError):
        Address.parse(text)


@pytest.mark.parametrize("port", [-1, 0, 65_536])
def test_ports_out_of_range(port: int) -> None:
    with pytest.raises(AddressError):
        Address.of("host", port)
    with pytest.raises(AddressError):
        Address(V4, "1.2.3.4", port).encode()


@pytest.mark.parametrize("raw", ["01 7f000001 0000", "03 01 61 0000", "03 00 0050", "02 0000", "00 00", "05 0101"])
def test_wire_forms_that_are_none(raw: str) -> None:
    with pytest.raises(AddressError):
        decode_address(bytes.fromhex(raw))


@pytest.mark.parametrize(
    "address",
    [
        Address(V4, "1.2.3", 1),
        Address(V4, "1.2.3.x", 1),
        Address(V4, "1.2.3.256", 1),
        Address(V6, "::g", 1),
        Address(V6, "::1%eth0", 1),
        Address(NAME, "", 1),
        Address(NAME, "é", 1),
        Address(NAME, "x" * 256, 1),
    ],
)
def test_addresses_made_wrongly_by_hand(address: Address) -> None:
    with pytest.raises(AddressError):
        address.encode()


def test_sizes() -> None:
    assert len(Address(NAME, "x" * MAX_NAME_SIZE, 1).encode()) == 1 + 1 + MAX_NAME_SIZE + 2 == 259
    with pytest.raises(AddressError):
        encoded_size(2, 0)
