"""reflex.protocol.payloads: what a frame carries, or why it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import FrameError
from reflex.protocol.address import Address
from reflex.protocol.frames import Frame
from reflex.protocol.payloads import check_session_frame, check_size, read_open, read_settings
from reflex.protocol.wire import SETTING, AddressType, FrameType, Network, Setting, Status

TARGETS = [
    (Address(AddressType.IPV4, "192.0.2.7", 80), "01 c0000207 0050"),
    (Address(AddressType.NAME, "example.org", 443), "03 0b 6578616d706c652e6f7267 01bb"),
    (Address(AddressType.IPV6, "2001:db8::1", 53), "04 20010db8000000000000000000000001 0035"),
]


def frame_of(payload: bytes | str, frame_type: int = FrameType.OPEN, stream_id: int = 1) -> Frame:
    """A frame as the decoder would give it; a payload that is text is hex."""
    frame = Frame()
    frame.type = frame_type
    frame.stream_id = stream_id
    frame.payload = memoryview(bytes.fromhex(payload) if isinstance(payload, str) else payload)
    return frame


def test_a_frame_of_the_session_is_on_stream_0() -> None:
    check_session_frame(frame_of(b"", FrameType.PING, 0))
    for stream_id in (1, 2**32 - 1):
        with pytest.raises(FrameError, match=f"type 0x08 on stream {stream_id}"):
            check_session_frame(frame_of(b"", FrameType.PING, stream_id))


@given(st.integers(0, 20), st.integers(0, 20))
def test_a_payload_has_the_size_of_its_type(size: int, expected: int) -> None:
    frame = frame_of(bytes(size), FrameType.WINDOW)
    if size == expected:
        check_size(frame, expected)
        return
    with pytest.raises(FrameError, match=f"type 0x04 with {size} bytes, not {expected}"):
        check_size(frame, expected)


@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1)), max_size=10))
def test_settings_are_pairs_in_their_order(pairs: list[tuple[int, int]]) -> None:
    payload = b"".join(SETTING.pack(*pair) for pair in pairs)
    assert list(read_settings(frame_of(payload, FrameType.SETTINGS, 0))) == pairs


def test_a_known_settings_payload() -> None:
    frame = frame_of("0001 0000000000000100  0003 0000000000007530", FrameType.SETTINGS, 0)
    assert list(read_settings(frame)) == [(Setting.MAX_STREAMS, 256), (Setting.KEEPALIVE_MS, 30_000)]


@pytest.mark.parametrize("size", [1, 9, 11, 19])
def test_settings_that_are_no_whole_number_of_pairs_are_refused(size: int) -> None:
    with pytest.raises(FrameError, match=f"SETTINGS of {size} bytes"):
        read_settings(frame_of(bytes(size), FrameType.SETTINGS, 0))


@pytest.mark.parametrize(("address", "wire"), TARGETS)
def test_an_open_for_tcp_names_its_target(address: Address, wire: str) -> None:
    assert read_open(frame_of("01" + wire)) == (Network.TCP, address, Status.SUCCEEDED)


def test_an_open_for_udp_names_none() -> None:
    assert read_open(frame_of("02")) == (Network.UDP, None, Status.SUCCEEDED)


@pytest.mark.parametrize(("_address", "wire"), TARGETS)
def test_an_open_cut_short_or_too_long_is_a_frame_error(_address: Address, wire: str) -> None:
    whole = bytes.fromhex("01" + wire)
    for size in range(len(whole)):
        with pytest.raises(FrameError):
            read_open(frame_of(whole[:size]))
    with pytest.raises(FrameError):
        read_open(frame_of(whole + b"\x00"))


@pytest.mark.parametrize("wire", ["", "01", "0200", "0203", "0103", "010300", "01030a61"])
def test_an_open_whose_length_does_not_fit_what_it_says_is_a_frame_error(wire: str) -> None:
    with pytest.raises(FrameError):
        read_open(frame_of(wire))


@pytest.mark.parametrize(
    ("wire", "network", "status"),
    [
        ("00", None, Status.NOT_SUPPORTED),
        ("03 01 c0000207 0050", None, Status.NOT_SUPPORTED),
        ("ff", None, Status.NOT_SUPPORTED),
        ("01 00", Network.TCP, Status.ADDRESS_TYPE_NOT_SUPPORTED),
        ("01 02 c0000207 0050", Network.TCP, Status.ADDRESS_TYPE_NOT_SUPPORTED),
        ("01 05", Network.TCP, Status.ADDRESS_TYPE_NOT_SUPPORTED),
        ("01 03 00 0050", Network.TCP, Status.HOST_UNREACHABLE),
        ("01 03 01 20 0050", Network.TCP, Status.HOST_UNREACHABLE),
        ("01 03 02 c3a4 0050", Network.TCP, Status.HOST_UNREACHABLE),
        ("01 01 c0000207 0000", Network.TCP, Status.HOST_UNREACHABLE),
    ],
    ids=[
        "network 0",
        "network 3",
        "network 255",
        "address type 0",
        "address type 2",
        "address type 5",
        "empty name",
        "name of a space",
        "name that is not ASCII",
        "port 0",
    ],
)
def test_an_open_for_what_cannot_be_had_is_refused_and_no_error(
    wire: str, network: Network | None, status: Status
) -> None:
    assert read_open(frame_of(wire)) == (network, None, status)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda tail: b"\x01" + tail)))
def test_any_open_gives_an_answer_or_a_frame_error(payload: bytes) -> None:
    try:
        network, address, status = read_open(frame_of(payload))
    except FrameError:
        return
    assert (address is not None) == (status == Status.SUCCEEDED and network == Network.TCP)
    if address is not None:
        assert Address.parse(str(address)) == address


@given(st.binary(max_size=60))
def test_any_settings_give_pairs_or_a_frame_error(payload: bytes) -> None:
    try:
        pairs = list(read_settings(frame_of(payload, FrameType.SETTINGS, 0)))
    except FrameError:
        assert len(payload) % SETTING.size
        return
    assert b"".join(SETTING.pack(*pair) for pair in pairs) == payload
