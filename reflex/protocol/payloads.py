"""Reads what frames carry, but for DATA (docs/protocol.md, section 5, the table)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from reflex.errors import AddressError, FrameError
from reflex.protocol.address import Address, decode_address
from reflex.protocol.frames import Frame
from reflex.protocol.wire import SETTING, AddressType, Network, Status

# 1 /* network */ + 1 /* type */ + address + 2 /* port */; a name has its length in the byte behind the type.
_OPEN_SIZE_IPV4 = 1 + 1 + 4 + 2
_OPEN_SIZE_IPV6 = 1 + 1 + 16 + 2
_OPEN_SIZE_NAME = 1 + 1 + 1 + 2
TARGETS_CACHED: Final = 256  # the last targets that were asked for, 100 to 400 bytes each


def check_session_frame(frame: Frame) -> None:
    """Raise FrameError unless the frame is on stream 0."""
    if frame.stream_id:
        raise FrameError(f"a frame of type {frame.type:#04x} on stream {frame.stream_id}; it belongs to the session")


def check_size(frame: Frame, size_bytes: int) -> None:
    """Raise FrameError unless the payload has exactly this size."""
    if len(frame.payload) != size_bytes:
        raise FrameError(f"a frame of type {frame.type:#04x} with {len(frame.payload)} bytes, not {size_bytes}")


def read_settings(frame: Frame) -> Iterator[tuple[int, int]]:
    """The (id, value) pairs of SETTINGS.

    Raises:
        FrameError: the payload is no whole number of them.
    """
    if len(frame.payload) % SETTING.size:
        raise FrameError(f"SETTINGS of {len(frame.payload)} bytes; expected a multiple of {SETTING.size}")
    return SETTING.iter_unpack(frame.payload)


def read_open(frame: Frame) -> tuple[Network | None, Address | None, Status]:
    """What an OPEN asks for: network, address (none for UDP), and SUCCEEDED or why it must be refused.

    A payload that no version 1 peer may send is an error; one that asks for what this side does not
    have (another network, another kind of address, a name that cannot be one) is refused.

    Raises:
        FrameError: the payload's length does not fit what it says.
    """
    payload = frame.payload
    size = len(payload)
    if not size:
        raise FrameError("an empty OPEN")
    network = payload[0]
    if network == Network.UDP:
        check_size(frame, 1)
        return Network.UDP, None, Status.SUCCEEDED
    if network != Network.TCP:
        return None, None, Status.NOT_SUPPORTED
    kind = payload[1] if size > 1 else 0
    if kind == AddressType.IPV4:
        check_size(frame, _OPEN_SIZE_IPV4)
    elif kind == AddressType.IPV6:
        check_size(frame, _OPEN_SIZE_IPV6)
    elif kind == AddressType.NAME:
        check_size(frame, _OPEN_SIZE_NAME + (payload[2] if size > 2 else 1))
    elif size == 1:
        raise FrameError("an OPEN for TCP without an address")
    else:
        return Network.TCP, None, Status.ADDRESS_TYPE_NOT_SUPPORTED
    try:
        return Network.TCP, _target(bytes(payload[1:])), Status.SUCCEEDED
    except AddressError:
        return Network.TCP, None, Status.HOST_UNREACHABLE


@lru_cache(TARGETS_CACHED)
def _target(encoded: bytes) -> Address:
    """The address that ``encoded`` is. Most targets are asked for many times in a row."""
    return decode_address(encoded)[0]
