"""reflex.protocol.socks5: the conversation in any split, and everything that is not one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import SocksError
from reflex.protocol.address import Address
from reflex.protocol.socks5 import MAX_REST_SIZE, Socks5Parser, reply
from reflex.protocol.wire import AddressType, Status

CREDENTIALS = (b"user", b"secret")
GREETING = bytes.fromhex("05 01 00")
GREETING_AUTH = bytes.fromhex("05 02 00 02")
AUTH = b"\x01\x04user\x06secret"
TARGETS = [
    (bytes.fromhex("01 c0000207 0050"), Address(AddressType.IPV4, "192.0.2.7", 80)),
    (b"\x03\x0bExample.ORG\x01\xbb", Address(AddressType.NAME, "example.org", 443)),
    (b"\x03\x07" + b"8.8.8.8\x00\x35", Address(AddressType.IPV4, "8.8.8.8", 53)),
    (b"\x04" + bytes(15) + b"\x01\x00\x50", Address(AddressType.IPV6, "::1", 80)),
]
REQUEST = b"\x05\x01\x00" + TARGETS[0][0]

Outcome = tuple[bytes, Address | None, bytes, bool]


def converse(pieces: list[bytes], credentials: tuple[bytes, bytes] | None) -> Outcome:
    """Feed the pieces; give all that was answered, the request, the rest, and whether it failed."""
    parser = Socks5Parser(credentials)
    answers = b""
    for piece in pieces:
        try:
            answers += parser.feed(piece)
        except SocksError as error:
            assert parser.request is None
            assert parser.rest == b""
            with pytest.raises(SocksError) as again:
                parser.feed(b"\x05")
            assert again.value.reply == b""
            return answers + error.reply, None, b"", True
    return answers, parser.request, parser.rest, False


def single_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def both_ways(data: bytes, credentials: tuple[bytes, bytes] | None = None) -> Outcome:
    whole = converse([data], credentials)
    assert converse(single_bytes(data), credentials) == whole
    return whole


@pytest.mark.parametrize(("wire", "address"), TARGETS)
def test_a_request_without_credentials(wire: bytes, address: Address) -> None:
    data = GREETING + b"\x05\x01\x00" + wire
    assert both_ways(data) == (b"\x05\x00", address, b"", False)
    assert both_ways(data + b"GET /") == (b"\x05\x00", address, b"GET /", False)


@pytest.mark.parametrize(("wire", "address"), TARGETS)
def test_a_request_with_credentials(wire: bytes, address: Address) -> None:
    data = GREETING_AUTH + AUTH + b"\x05\x01\x00" + wire + b"rest"
    assert both_ways(data, CREDENTIALS) == (b"\x05\x02\x01\x00", address, b"rest", False)


def test_step_by_step() -> None:
    parser = Socks5Parser(CREDENTIALS)
    assert parser.feed(b"") == b""
    assert parser.feed(GREETING_AUTH) == b"\x05\x02"
    assert parser.feed(memoryview(AUTH)) == b"\x01\x00"
    assert parser.feed(bytearray(REQUEST[:4])) == b""
    assert parser.request is None
    assert parser.rest == b""
    assert parser.feed(REQUEST[4:]) == b""
    assert parser.request == TARGETS[0][1]
    assert parser.feed(b"early ") == b""
    assert parser.feed(b"data") == b""
    assert parser.rest == b"early data"


@given(st.data())
def test_any_split_gives_the_same(data: st.DataObject) -> None:
    credentials = data.draw(st.sampled_from([None, CREDENTIALS]))
    messages = [GREETING_AUTH, *([AUTH] if credentials else []), REQUEST, b"rest"]
    raw = bytearray(b"".join(messages))
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [bytes(raw[a:b]) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    # What comes after a failure is not read, in any split: the outcome is the same all the same.
    assert converse(pieces, credentials) == converse([bytes(raw)], credentials)


@given(
    st.sampled_from([b"", b"\x05", GREETING, GREETING_AUTH, GREETING_AUTH + AUTH, GREETING + b"\x05\x01\x00"]),
    st.binary(max_size=600),
    st.sampled_from([None, CREDENTIALS]),
)
def test_random_bytes_raise_nothing_else(head: bytes, tail: bytes, credentials: tuple[bytes, bytes] | None) -> None:
    both_ways(head + tail, credentials)


@pytest.mark.parametrize(
    ("greeting", "credentials"),
    [("05 00", None), ("05 01 02", None), ("05 02 01 80", None), ("05 01 00", CREDENTIALS), ("05 00", CREDENTIALS)],
)
def test_no_method_in_common(greeting: str, credentials: tuple[bytes, bytes] | None) -> None:
    assert both_ways(bytes.fromhex(greeting), credentials) == (b"\x05\xff", None, b"", True)


@pytest.mark.parametrize(
    "auth",
    [
        b"\x01\x04user\x06Secret",
        b"\x01\x04User\x06secret",
        b"\x01\x03use\x06secret",
        b"\x01\x04user\x05secre",
        b"\x01\x00\x00",
        b"\x01\xff" + b"u" * 255 + b"\xff" + b"p" * 255,
        b"\x02",
        b"\x05",
    ],
)
def test_wrong_credentials(auth: bytes) -> None:
    assert both_ways(GREETING_AUTH + auth, CREDENTIALS) == (b"\x05\x02\x01\x01", None, b"", True)


def test_the_largest_messages() -> None:
    credentials = (b"u" * 255, b"p" * 255)
    greeting = b"\x05\xff" + bytes(range(255))
    auth = b"\x01\xff" + credentials[0] + b"\xff" + credentials[1]
    request = b"\x05\x01\x00\x03\xff" + b"x" * 255 + b"\x00\x50"
    answers, address, rest, failed = both_ways(greeting + auth + request, credentials)
    assert (answers, rest, failed) == (b"\x05\x02\x01\x00", b"", False)
    assert address == Address(AddressType.NAME, "x" * 255, 80)


@pytest.mark.parametrize(
    ("request_hex", "status"),
    [
        ("05 02 00 01 00000000 0000", Status.NOT_SUPPORTED),  # BIND
        ("05 03 00 01 00000000 0000", Status.NOT_SUPPORTED),  # UDP ASSOCIATE
        ("05 00 00 01 00000000 0000", Status.NOT_SUPPORTED),
        ("05 f0 00 01 00000000 0000", Status.NOT_SUPPORTED),  # Tor's RESOLVE
        ("05 01 00 02 00000000 0000", Status.ADDRESS_TYPE_NOT_SUPPORTED),
        ("05 01 00 00 00", Status.ADDRESS_TYPE_NOT_SUPPORTED),
        ("04 01 00 01 00000000 0050", Status.GENERAL_FAILURE),
        ("05 01 00 01 01010101 0000", Status.GENERAL_FAILURE),  # port 0
        ("05 01 00 03 00 0050", Status.GENERAL_FAILURE),  # no name
        ("05 01 00 03 03 61 00 62 0050", Status.GENERAL_FAILURE),  # NUL in the name
        ("05 01 00 03 05 3132372e31 0050", Status.GENERAL_FAILURE),  # 127.1
    ],
)
def test_requests_that_are_refused(request_hex: str, status: Status) -> None:
    answers, address, _, failed = both_ways(GREETING + bytes.fromhex(request_hex))
    assert answers == b"\x05\x00" + reply(status)
    assert address is None
    assert failed


def test_the_reserved_byte_is_not_looked_at() -> None:
    assert both_ways(GREETING + b"\x05\x01\x7f" + TARGETS[0][0])[1] == TARGETS[0][1]


def test_strangers_are_told_in_their_own_tongue() -> None:
    assert both_ways(b"\x04\x01\x00\x50\x01\x01\x01\x01\x00") == (b"\x00\x5b" + bytes(6), None, b"", True)
    for line in (b"GET / HTTP/1.1\r\n", b"CONNECT example.org:443 HTTP/1.1\r\n"):
        answer, _, _, failed = both_ways(line)
        assert failed
        head, body = answer.split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"Content-Length: %d" % len(body) in head
        assert b"SOCKS5" in body
    assert both_ways(b"\x16\x03\x01\x02\x00") == (b"", None, b"", True)


def test_the_rest_is_bounded() -> None:
    parser = Socks5Parser()
    parser.feed(GREETING + REQUEST + bytes(MAX_REST_SIZE))
    assert len(parser.rest) == MAX_REST_SIZE
    with pytest.raises(SocksError) as caught:
        parser.feed(b"\x00")
    assert caught.value.reply == reply(Status.GENERAL_FAILURE)
    assert parser.request is None


@pytest.mark.parametrize("credentials", [(b"", b"p"), (b"u", b""), (b"u" * 256, b"p"), (b"u", b"p" * 256)])
def test_credentials_that_cannot_be_sent(credentials: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="255"):
        Socks5Parser(credentials)


def test_replies() -> None:
    for status in Status:
        assert reply(status) == bytes((5, status, 0, 1, 0, 0, 0, 0, 0, 0))
    assert reply(0, TARGETS[0][1]) == b"\x05\x00\x00" + TARGETS[0][0]
    assert reply(77) == reply(Status.GENERAL_FAILURE)
    assert reply(77, TARGETS[3][1]) == b"\x05\x01\x00" + TARGETS[3][0]
