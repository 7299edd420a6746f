"""Every number that goes over the wire, in one place; each size shown as its sum.

Source: ``docs/protocol.md``. Numbers that are this implementation's choice (limits, sizes of
pools, time-outs) are not here. Integers are unsigned and big-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

# Section 1 and 2: credentials, handshake.

KEY_SIZE: Final = 32
USER_ID_SIZE: Final = 16
TAG_SIZE: Final = 16
NONCE_SIZE: Final = 12
CONFIRMATION_SIZE: Final = 8  # the server hello's tag, cut from TAG_SIZE

TIME_OPTIONS: Final = struct.Struct(">QBB2s")  # seconds since 1970, version << 4 | suite, flags, random
CLIENT_HELLO: Final = struct.Struct(">32s16s28s")  # E, EncID, C1
SERVER_HELLO: Final = struct.Struct(">32s8s")  # F, T
CLIENT_HELLO_SIZE: Final = KEY_SIZE + USER_ID_SIZE + TIME_OPTIONS.size + TAG_SIZE
SERVER_HELLO_SIZE: Final = KEY_SIZE + CONFIRMATION_SIZE
assert CLIENT_HELLO.size == CLIENT_HELLO_SIZE == 76
assert SERVER_HELLO.size == SERVER_HELLO_SIZE == 40

VERSION: Final = 1
HELLO_TIME_LIMIT_S: Final = 120  # |time − now| at the server
NOISE_NAME: Final = b"Noise_NKpsk1_25519_ChaChaPoly_SHA256"
PROLOGUE: Final = b"reflex/1"
PSK_INFO: Final = b"reflex/1 psk"
ID_INFO: Final = b"reflex/1 id"


class Suite(IntEnum):
    """The record cipher, chosen by the client."""

    AES_256_GCM = 0
    CHACHA20_POLY1305 = 1


# Section 3: traffic keys.

KEY_INFO: Final = b"reflex/1 key"
NEXT_INFO: Final = b"reflex/1 next"
RECORDS_PER_KEY: Final = 65_536

# Section 4: records.

LENGTH: Final = struct.Struct(">I")
LENGTH_CHUNK_SIZE: Final = LENGTH.size + TAG_SIZE
RECORD_OVERHEAD: Final = LENGTH_CHUNK_SIZE + TAG_SIZE
MAX_RECORD_SIZE: Final = 131_072
MAX_BODY_SIZE: Final = MAX_RECORD_SIZE - RECORD_OVERHEAD
assert LENGTH_CHUNK_SIZE == 20
assert MAX_BODY_SIZE == 131_036

# Section 5: frames.

FRAME_HEADER: Final = struct.Struct(">II")  # type << 24 | payload length, stream
FRAME_HEADER_SIZE: Final = FRAME_HEADER.size
MAX_PAYLOAD_SIZE: Final = MAX_BODY_SIZE - FRAME_HEADER_SIZE
MAX_FRAME_SIZE: Final = 0xFF_FFFF  # what the length's 24 bits can say; a record holds less
MAX_STREAM_ID: Final = 0xFFFF_FFFF
assert FRAME_HEADER_SIZE == 8


class FrameType(IntEnum):
    """What a frame is. 0x80 to 0xFF are ignored where unknown; any other unknown type is fatal."""

    PAD = 0x00
    DATA = 0x01
    DATA_FIN = 0x02
    RESET = 0x03
    WINDOW = 0x04
    OPEN = 0x05
    OPENED = 0x06
    DATAGRAM = 0x07
    PING = 0x08
    PONG = 0x09
    SETTINGS = 0x0A
    GOAWAY = 0x0B
    CLOSE = 0x0C


FIRST_IGNORED_TYPE: Final = 0x80


class Status(IntEnum):
    """How an OPEN went, as in SOCKS5's replies (RFC 1928, section 6)."""

    SUCCEEDED = 0
    GENERAL_FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    REFUSED = 5
    TIMED_OUT = 6
    NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


class Code(IntEnum):
    """Why a stream or a session ends: RESET, GOAWAY, CLOSE."""

    NONE = 0
    PROTOCOL = 1
    INTERNAL = 2
    FLOW_CONTROL = 3
    CANCELLED = 4
    LIMIT = 5
    TARGET_RESET = 6
    IDLE = 7
    SHUTTING_DOWN = 8


class Setting(IntEnum):
    """Ids in a SETTINGS frame; unknown ones are ignored."""

    MAX_STREAMS = 1
    TIME_MS = 2
    KEEPALIVE_MS = 3


class Network(IntEnum):
    """The first byte of an OPEN."""

    TCP = 1
    UDP = 2


class AddressType(IntEnum):
    """The first byte of an address, as in SOCKS5 (RFC 1928, section 5)."""

    IPV4 = 0x01
    NAME = 0x03
    IPV6 = 0x04


DEFAULT_MAX_STREAMS: Final = 100  # where the peer's SETTINGS name none
SETTING: Final = struct.Struct(">HQ")
CODE: Final = struct.Struct(">I")
INCREMENT: Final = struct.Struct(">I")
GOAWAY: Final = struct.Struct(">II")  # last stream id taken, code
PING_SIZE: Final = 8

STREAM_WINDOW: Final = 262_144
SESSION_WINDOW: Final = 1_048_576
MAX_WINDOW: Final = 2**31 - 1
DATAGRAM_BACKLOG: Final = 262_144  # bytes that wait for one stream before new datagrams are dropped

KEEPALIVE_S: Final = 30
KEEPALIVE_GRACE_S: Final = 10  # nothing for the interval and this much more: dead
FATAL_DISCARD_BYTES: Final = 65_536
FATAL_DISCARD_MIN_S: Final = 1
FATAL_DISCARD_MAX_S: Final = 30
