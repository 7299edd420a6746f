"""What the fuzzers call: one function a target, which takes any bytes.

A target returns where the bytes were taken or refused as documented; whatever else comes out of it is a
finding. The first byte of its input often chooses how the rest is used: as it stands, or laid over something
valid, which is how a fuzzer gets past a tag or a checksum. Used by hypothesis (tests/test_fuzz.py) and, where
it is installed, by the coverage-guided fuzzer (tests/fuzz.py).
"""

from __future__ import annotations

import base64
import contextlib
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

from reflex.config import load_inbound, load_outbound, load_settings
from reflex.errors import AddressError, ConfigError, HandshakeError, ProtocolError, SocksError
from reflex.protocol.address import Address, decode_address
from reflex.protocol.allowance import BURST_UNITS
from reflex.protocol.frames import FrameDecoder
from reflex.protocol.handshake import ClientCredentials, ClientHandshake, ServerCredentials, accept_hello
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from reflex.protocol.session import MAX_UNSENT_BYTES
from reflex.protocol.socks5 import MAX_REST_SIZE, Socks5Parser
from reflex.protocol.wire import (
    CLIENT_HELLO_SIZE,
    FRAME_HEADER_SIZE,
    MAX_BODY_SIZE,
    MAX_RECORD_SIZE,
    PING_SIZE,
    SERVER_HELLO_SIZE,
    FrameType,
    Suite,
)
from tests.sessions import SECRETS, TARGET, frame, peer_of

NOW_S: Final = 1_900_000_000
STREAMS: Final = 8
SOCKS_CONVERSATION: Final = 2 + 255 + 1 + 1 + 255 + 1 + 255 + 3 + 259  # the most that comes before a request is whole
LONGEST_ANSWER: Final = 1_024  # of a SOCKS5 conversation: a few replies, or the text for HTTP
KEY: Final = bytes(range(32))
KEY_TEXT: Final = base64.b64encode(KEY).decode()
USER_ID: Final = bytes(range(16))
PASSWORD: Final = "open sesame 4711"

SECRETS_OF_SETTINGS: Final = (KEY_TEXT.encode(), PASSWORD.encode())

INBOUND: Final = f"""
listen = ["0.0.0.0:8443", "[::]:8443"]
private_key = "{KEY_TEXT}"
fallback = "127.0.0.1:8080"
workers = 2
[[users]]
name = "alice"
id = "b831381d-6324-4d53-ad4f-8cda48b30811"
key = "{KEY_TEXT}"
[targets]
allow = ["127.0.0.1:8080", "10.1.0.0/16:443", "[fd00::/8]:*", "*.internal.example:*"]
deny = ["*:25"]
[limits]
max_streams = 100
drain_s = 1.5
[tcp]
nodelay = true
""".encode()
OUTBOUND: Final = f"""
[[listen]]
protocol = "socks5"
address = "127.0.0.1:1080"
username = "u"
password = "{PASSWORD}"
[[listen]]
protocol = "forward"
address = "127.0.0.1:5432"
target = "db.example.org:5432"
[[servers]]
address = "vpn.example.org:8443"
public_key = "{KEY_TEXT}"
user_id = "b831381d-6324-4d53-ad4f-8cda48b30811"
user_key = "{KEY_TEXT}"
cipher = "auto"
[pool]
max_tunnels = 4
""".encode()


def laid_over(valid: bytes, data: bytes) -> bytes:
    """``valid`` changed as ``data`` says: triples of position (2 bytes) and what to XOR there."""
    changed = bytearray(valid)
    for start in range(0, len(data) - 2, 3):
        changed[int.from_bytes(data[start : start + 2]) % len(changed)] ^= data[start + 2]
    return bytes(changed)


def edited(valid: bytes, data: bytes) -> bytes:
    """``valid`` with pieces replaced: position (2 bytes), how much to cut (1), how much to put in (1), that much."""
    text = bytearray(valid)
    while len(data) >= 4:
        start, cut, size = int.from_bytes(data[:2]) % (len(text) + 1), data[2], data[3]
        text[start : start + cut] = data[4 : 4 + size]
        data = data[4 + size :]
    return bytes(text)


def fixed_random(size: int) -> bytes:
    """Random bytes that are the same in every run."""
    return bytes((7 * each + size) % 256 for each in range(size))


def pieces(data: bytes, sizes: bytes) -> list[bytes]:
    """``data`` in pieces of these sizes, over and over; whole where there are none."""
    result, start, turn = [], 0, 0
    while start < len(data):
        size = (sizes[turn % len(sizes)] + 1) if sizes else len(data)
        result.append(data[start : start + size])
        start += size
        turn += 1
    return result


@cache
def _server() -> ServerCredentials:
    return ServerCredentials(KEY, {USER_ID: KEY})


def _client_handshake() -> tuple[ClientHandshake, bytes]:
    handshake = ClientHandshake(
        ClientCredentials(_server().server_public, USER_ID, KEY),
        suite=Suite.CHACHA20_POLY1305,
        time_s=NOW_S,
        random_bytes=fixed_random,
    )
    hello = bytearray(CLIENT_HELLO_SIZE)
    handshake.write_hello(memoryview(hello))
    return handshake, bytes(hello)


@cache
def _valid_hellos() -> tuple[bytes, bytes]:
    handshake, hello = _client_handshake()
    accepted = accept_hello(
        memoryview(hello), _server(), now_s=NOW_S, replay=ReplaySet(NOW_S - 1), random_bytes=fixed_random
    )
    answer = bytearray(SERVER_HELLO_SIZE)
    accepted.write_answer(memoryview(answer), random_bytes=fixed_random)
    handshake.read_answer(memoryview(answer))
    return hello, bytes(answer)


def hello(data: bytes) -> None:
    """Both hellos: nothing but the valid one, byte for byte, opens a session; a refused one is not remembered."""
    kind, rest = data[:1], data[1:]
    valid_hello, valid_answer = _valid_hellos()
    if kind < b"\x80":
        replay = ReplaySet(NOW_S - 1)
        given = laid_over(valid_hello, rest) if kind < b"\x40" else rest[:CLIENT_HELLO_SIZE].ljust(CLIENT_HELLO_SIZE)
        try:
            accept_hello(memoryview(given), _server(), now_s=NOW_S, replay=replay, random_bytes=fixed_random)
        except HandshakeError:
            assert given != valid_hello
            assert len(replay) == 0
        else:
            assert given == valid_hello
            assert len(replay) == 1
        return
    handshake, _ = _client_handshake()
    given = laid_over(valid_answer, rest) if kind < b"\xc0" else rest[:SERVER_HELLO_SIZE].ljust(SERVER_HELLO_SIZE)
    try:
        handshake.read_answer(memoryview(bytearray(given)))
    except HandshakeError:
        assert given != valid_answer
    else:
        assert given == valid_answer


@cache
def _valid_records() -> tuple[bytes, list[tuple[int, int, bytes]]]:
    frames = [(FrameType.PING, 0, bytes(PING_SIZE)), (FrameType.DATA, 1, bytes(3_000)), (FrameType.PAD, 0, b"")]
    cipher = CipherState(SECRETS.suite, SECRETS.root_client_to_server)
    records = b""
    for kind, stream_id, payload in frames:
        record = memoryview(bytearray(len(payload) + FRAME_HEADER_SIZE + 36))
        cipher.seal(memoryview(frame(kind, stream_id, payload)), record)
        records += record
    return records, [(int(kind), stream_id, payload) for kind, stream_id, payload in frames]


def record(data: bytes) -> None:
    """Sealed records, in any pieces: an altered byte and all behind it give nothing out, and little is ever held."""
    kind, split, rest = data[:1], data[1:4], data[4:]
    valid, expected = _valid_records()
    given = laid_over(valid, rest) if kind < b"\x80" else rest
    pools = Pools()
    decoder = FrameDecoder(CipherState(SECRETS.suite, SECRETS.root_client_to_server), pools.buffers, pools.frames)
    seen: list[tuple[int, int, bytes]] = []
    try:
        for piece in pieces(given, split if kind[:1] >= b"\x20" else b""):
            left = memoryview(piece)
            while left:
                left = left[decoder.feed(left) :]
                seen += [each.copy() for each in decoder]
                assert decoder.held_bytes <= MAX_RECORD_SIZE
    except ProtocolError:
        assert given != valid
    finally:
        decoder.close()
    assert seen == expected[: len(seen)]
    assert len(seen) == len(expected) or given[: len(valid)] != valid
    assert pools.in_use == 0


def body(data: bytes) -> None:
    """Whatever a peer that holds the keys seals: the session takes it or says ProtocolError, and keeps little."""
    of_server = data[:1] < b"\x80"
    with peer_of(Pools(), of_server=of_server, max_streams=STREAMS) as peer:
        if of_server:
            peer.open(1)
            peer.call(3)
        else:
            for _ in range(2):
                peer.side.open()
            peer.write(FrameType.OPENED, 1, b"\0")
        rest = data[1:]
        with contextlib.suppress(ProtocolError):
            while len(rest) >= 2:
                size = int.from_bytes(rest[:2])
                peer.write_body(_framed(rest[2 : 2 + size]) or b"\0")
                rest = rest[2 + size :]
        assert len(peer.session.streams) <= STREAMS
        assert peer.session.unsent_bytes <= MAX_UNSENT_BYTES + 2 * len(data)
        assert peer.budget.buffered == sum(stream.held_bytes for stream in peer.side.streams.values())
        assert 0 <= peer.session._allowance._left <= BURST_UNITS


def _framed(data: bytes) -> bytes:
    """Frames out of bytes: mostly with a length that is right, since a fuzzer seldom guesses one."""
    if data[:1] >= b"\xe0":
        return data[1 : MAX_BODY_SIZE + 1]
    frames = b""
    while len(data) >= 3:
        kind, stream_id, size = data[0] & 0x8F, data[1] & 0x0F, data[2]
        frames += frame(kind, stream_id, data[3 : 3 + size])
        data = data[3 + size :]
    return frames[:MAX_BODY_SIZE]


def socks5(data: bytes) -> None:
    """The conversation in one piece and in many: the same outcome, short answers, a bounded rest."""
    kind, split, rest = data[:1], data[1:3], data[3:]
    credentials = (b"user", b"password") if kind >= b"\x80" else None
    if kind[:1] and kind[0] & 0x40:
        greeting = b"\x05\x01\x02\x01\x04user\x08password" if credentials else b"\x05\x01\x00"
        rest = edited(greeting + b"\x05\x01\x00\x03\x0bexample.org\x01\xbbGET", rest)
    outcomes = [_converse(credentials, given) for given in ([rest], pieces(rest, split), pieces(rest, b"\0"))]
    assert outcomes[0] == outcomes[1] == outcomes[2]


def _converse(credentials: tuple[bytes, bytes] | None, given: list[bytes]) -> tuple[object, ...]:
    parser = Socks5Parser(credentials)
    answers = bytearray()
    try:
        for piece in given:
            answers += parser.feed(piece)
            if parser.request is None:
                assert len(parser._buffer) <= SOCKS_CONVERSATION
    except SocksError as error:
        answers += error.reply
        assert len(answers) <= LONGEST_ANSWER
        assert parser.request is None
        return "refused", bytes(answers)
    assert len(answers) <= LONGEST_ANSWER
    assert len(parser.rest) <= MAX_REST_SIZE
    return parser.request, bytes(answers), parser.rest


def address(data: bytes) -> None:
    """Encoded addresses and their texts: what is taken comes back the same, through both."""
    rest = edited(TARGET.encode(), data[1:]) if data[:1] < b"\x40" else data[1:]
    for given in (rest, memoryview(b"\xff" + rest)[1:]):
        with contextlib.suppress(AddressError):
            found, end = decode_address(given)
            assert end <= len(given)
            assert decode_address(found.encode()) == (found, len(found.encode()))
            assert Address.parse(str(found)) == found
    with contextlib.suppress(AddressError):
        found = Address.parse(rest.decode("utf-8", "replace"))
        assert decode_address(found.encode())[0] == found


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="reflex-fuzz-")


def _is_misplaced(secret: bytes, given: bytes) -> bool:
    """Whether the secret also stands where none belongs, so that a message may show it as what it is taken for."""
    without = re.sub(rb'^(private_key|key|user_key|public_key|password) = "[^"\n]*"$', b"", given, flags=re.MULTILINE)
    return secret in without or b'"""' in given or b"'''" in given


def config(data: bytes) -> None:
    """Settings files: settings or a ConfigError, one line a problem, without a secret in it."""
    kind, rest = data[:1], data[1:]
    valid = INBOUND if kind < b"\x40" else OUTBOUND if kind < b"\x80" else b""
    path = Path(_directory().name) / "fuzzed.toml"
    path.touch(mode=0o600)
    given = edited(valid, rest) if valid else rest
    path.write_bytes(given)
    for load in (load_inbound, load_outbound, load_settings):
        problems: tuple[str, ...] = ("",)
        try:
            load(path)
        except ConfigError as error:
            problems = error.problems
        assert problems
        text = "\n".join(problems)
        assert text.count("\n") == len(problems) - 1
        for secret in SECRETS_OF_SETTINGS:
            assert secret.decode() not in text or _is_misplaced(secret, given)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "hello": hello,
    "record": record,
    "body": body,
    "socks5": socks5,
    "address": address,
    "config": config,
}

# Where a fuzzer may begin: inputs that get far into their target.
SEEDS: Final[dict[str, list[bytes]]] = {
    "hello": [b"\0", b"\x80", b"\0\0\x05\x01", b"\x40" + bytes(CLIENT_HELLO_SIZE), b"\xc0" + bytes(SERVER_HELLO_SIZE)],
    "record": [b"\0\0\0\0", b"\x30\x05\x10\xff", b"\0\0\0\0\0\x20\x01", b"\x80\0\0\0" + bytes(60)],
    "body": [
        b"\0\0\x0b\x08\0\x08" + bytes(PING_SIZE),
        b"\0\0\x07\x01\x01\x04data\0\x04\x02\x01\x01x",
        b"\x80\0\x07\x01\x01\x04data\0\x04\x02\x01\x01x",
        b"\0\0\x0b\x05\x05\x08\x01\x01\x7f\0\0\x01\0\x50",
        b"\0\0\x07\x04\x00\x04\0\0\1\0",
        b"\0\0\x0b\x0b\0\x08" + bytes(8),
    ],
    "socks5": [
        b"\0\x01\x02\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50rest",
        b"\x40\x01\x02",
        b"\xc0\x01\x02",
        b"\0\0\0GET / HTTP/1.1\r\n",
        b"\0\0\0\x04\x01\x00\x50",
    ],
    "address": [
        b"\0",
        b"\xff\x01\x7f\0\0\x01\0\x50",
        b"\xff\x03\x03a.b\0\x50",
        b"\xff\x04" + bytes(15) + b"\x01\0\x50",
    ],
    "config": [b"\0", b"\x40", b"\x80" + INBOUND, b"\x80" + OUTBOUND],
}
