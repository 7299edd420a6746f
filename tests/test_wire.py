"""reflex.protocol.wire: the numbers of docs/protocol.md, written down a second time."""

from __future__ import annotations

from enum import IntEnum

import pytest

from reflex.protocol import wire


def test_handshake_sizes() -> None:
    assert wire.CLIENT_HELLO_SIZE == 32 + 16 + (8 + 4 + 16) == 76
    assert wire.SERVER_HELLO_SIZE == 32 + 8 == 40
    assert (wire.KEY_SIZE, wire.USER_ID_SIZE, wire.TAG_SIZE, wire.NONCE_SIZE, wire.CONFIRMATION_SIZE) == (
        32,
        16,
        16,
        12,
        8,
    )
    assert wire.HELLO_TIME_LIMIT_S == 120


def test_record_sizes() -> None:
    assert wire.LENGTH_CHUNK_SIZE == 4 + 16
    assert wire.RECORD_OVERHEAD == 20 + 16
    assert wire.MAX_BODY_SIZE == 131_036
    assert wire.MAX_RECORD_SIZE == wire.MAX_BODY_SIZE + wire.RECORD_OVERHEAD == 131_072
    assert wire.MAX_PAYLOAD_SIZE == 131_036 - 8
    assert wire.RECORDS_PER_KEY == 2**16


def test_windows_and_limits() -> None:
    assert (wire.STREAM_WINDOW, wire.SESSION_WINDOW, wire.MAX_WINDOW) == (262_144, 1_048_576, 2**31 - 1)
    assert (wire.DATAGRAM_BACKLOG, wire.DEFAULT_MAX_STREAMS, wire.MAX_STREAM_ID) == (262_144, 100, 2**32 - 1)
    assert (wire.KEEPALIVE_S, wire.KEEPALIVE_GRACE_S) == (30, 10)
    assert (wire.FATAL_DISCARD_MIN_S, wire.FATAL_DISCARD_MAX_S, wire.FATAL_DISCARD_BYTES) == (1, 30, 65_536)


def test_labels_of_the_key_schedule() -> None:
    assert wire.NOISE_NAME == b"Noise_NKpsk1_25519_ChaChaPoly_SHA256"
    assert wire.PROLOGUE == b"reflex/1"
    infos = (wire.PSK_INFO, wire.ID_INFO, wire.KEY_INFO, wire.NEXT_INFO)
    assert infos == (b"reflex/1 psk", b"reflex/1 id", b"reflex/1 key", b"reflex/1 next")


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (wire.TIME_OPTIONS.pack(0x0102030405060708, 0x10, 0xFF, b"xy"), "0102030405060708 10 ff 7879"),
        (wire.CLIENT_HELLO.pack(b"E" * 32, b"I" * 16, b"C" * 28), "45" * 32 + "49" * 16 + "43" * 28),
        (wire.SERVER_HELLO.pack(b"F" * 32, b"T" * 8), "46" * 32 + "54" * 8),
        (wire.LENGTH.pack(0x0001FFDC), "0001ffdc"),
        (wire.FRAME_HEADER.pack(0x01 << 24 | 0x010203, 0x0A0B0C0D), "01 010203 0a0b0c0d"),
        (wire.SETTING.pack(1, 256), "0001 0000000000000100"),
        (wire.CODE.pack(8), "00000008"),
        (wire.INCREMENT.pack(262_144), "00040000"),
        (wire.GOAWAY.pack(7, 8), "00000007 00000008"),
    ],
)
def test_integers_are_big_endian_and_fields_unpadded(packed: bytes, expected: str) -> None:
    assert packed == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("numbers", "first", "names"),
    [
        (wire.Suite, 0, "AES_256_GCM CHACHA20_POLY1305"),
        (
            wire.FrameType,
            0,
            "PAD DATA DATA_FIN RESET WINDOW OPEN OPENED DATAGRAM PING PONG SETTINGS GOAWAY CLOSE",
        ),
        (
            wire.Status,
            0,
            "SUCCEEDED GENERAL_FAILURE NOT_ALLOWED NETWORK_UNREACHABLE HOST_UNREACHABLE REFUSED TIMED_OUT "
            "NOT_SUPPORTED ADDRESS_TYPE_NOT_SUPPORTED",
        ),
        (
            wire.Code,
            0,
            "NONE PROTOCOL INTERNAL FLOW_CONTROL CANCELLED LIMIT TARGET_RESET IDLE SHUTTING_DOWN",
        ),
        (wire.Setting, 1, "MAX_STREAMS TIME_MS KEEPALIVE_MS"),
        (wire.Network, 1, "TCP UDP"),
    ],
)
def test_numbers_count_up_in_the_order_of_the_contract(numbers: type[IntEnum], first: int, names: str) -> None:
    assert {number.name: number.value for number in numbers} == {
        name: value for value, name in enumerate(names.split(), first)
    }


def test_other_numbers() -> None:
    assert (wire.VERSION, wire.PING_SIZE, wire.FIRST_IGNORED_TYPE) == (1, 8, 0x80)
    assert {kind.name: kind.value for kind in wire.AddressType} == {"IPV4": 1, "NAME": 3, "IPV6": 4}
