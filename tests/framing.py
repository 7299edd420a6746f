"""Frames and records by hand: what tests of the encoder and of the decoder share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import pytest
from hypothesis import strategies as st

from reflex.pool import TIER_SIZES
from reflex.protocol.frames import (
    FrameDecoder,
    FrameEncoder,
)
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.wire import (
    MAX_PAYLOAD_SIZE,
    MAX_STREAM_ID,
    RECORD_OVERHEAD,
    FrameType,
    Suite,
)
from tests.vectors import VECTORS

PlainFrame = tuple[int, int, bytes]  # type, stream, payload, as Frame.copy() gives them

ROOT = bytes(range(32))
DATA = int(FrameType.DATA)
SECRET = b"a secret that nobody may find in a free buffer "

each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v.client_hello[:4].hex()}-suite-{v.suite}")
each_suite = pytest.mark.parametrize("suite", list(Suite), ids=lambda s: s.name)


def cipher(suite: Suite = Suite.AES_256_GCM) -> CipherState:
    return CipherState(suite, ROOT)


def encoder(pools: Pools) -> FrameEncoder:
    return FrameEncoder(cipher(), pools.buffers)


def decoder(pools: Pools) -> FrameDecoder:
    return FrameDecoder(cipher(), pools.buffers, pools.frames)


def frame_bytes(frame: PlainFrame) -> bytes:
    """A frame as the contract lays it out, written down a second time."""
    frame_type, stream_id, payload = frame
    return bytes([frame_type]) + len(payload).to_bytes(3) + stream_id.to_bytes(4) + payload


def record_of(sealer: CipherState, body: bytes) -> bytes:
    """One sealed record with any body, well-formed or not."""
    out = bytearray(len(body) + RECORD_OVERHEAD)
    sealer.seal(memoryview(body), memoryview(out))
    return bytes(out)


def take_output(of: FrameEncoder) -> list[bytes]:
    """Every sealed piece, taken as a socket with room would."""
    pieces = []
    while (view := of.output()) is not None:
        pieces.append(bytes(view))
        of.sent(len(view))
    return pieces


def sealed(of: FrameEncoder) -> list[bytes]:
    """End the record, then every record."""
    of.seal()
    return take_output(of)


def drawn(of: FrameDecoder) -> list[PlainFrame]:
    """The frames that can be drawn now."""
    return [frame.copy() for frame in of]


def fed(of: FrameDecoder, data: bytes, sizes: Iterator[int]) -> list[PlainFrame]:
    """All of ``data`` by ``feed``, cut into pieces of ``sizes``."""
    frames = []
    position = 0
    while position < len(data):
        size = next(sizes)
        position += of.feed(data[position : position + size])
        frames += drawn(of)
    return frames


def received(
    of: FrameDecoder, data: bytes, sizes: Iterator[int], frames: list[PlainFrame] | None = None
) -> list[PlainFrame]:
    """The same by ``receive_buffer`` and ``received``, as a socket does it; into ``frames``, which outlive an error."""
    frames = [] if frames is None else frames
    position = 0
    while position < len(data):
        room = of.receive_buffer()
        size = min(len(room), next(sizes), len(data) - position)
        assert size > 0
        room[:size] = data[position : position + size]
        of.received(size)
        position += size
        frames.extend(frame.copy() for frame in of)
    return frames


def at_most_pieces(total: int, sizes: Iterator[int]) -> Iterator[int]:
    """The same sizes, but none so small that the total falls into more than some hundred pieces."""
    return (max(size, total // 300) for size in sizes)


def free_memory(pools: Pools) -> bytes:
    """Everything that the free buffers of all tiers hold."""
    return b"".join(bytes(buffer) for size in TIER_SIZES for buffer in pools.buffers.tier(size)._free)


def body_acquires(pools: Pools, size: int) -> int:
    return pools.buffers.tier(size).statistics().acquired


def payload_of(size: int, seed: int) -> bytes:
    """A payload that is cheap to make and whose bytes differ from place to place."""
    pattern = bytes((seed + 7 * at) & 0xFF for at in range(min(size, 251)))
    return (pattern * (size // max(len(pattern), 1) + 1))[:size]


payloads = st.builds(payload_of, st.integers(0, 300), st.integers(0, 255))
any_payloads = st.one_of(
    payloads,
    payloads,
    st.builds(
        payload_of,
        st.one_of(st.integers(0, MAX_PAYLOAD_SIZE), st.sampled_from([2_047, 16_384, 32_724, 32_725, MAX_PAYLOAD_SIZE])),
        st.integers(0, 255),
    ),
)
stream_ids = st.one_of(st.integers(0, 9), st.just(MAX_STREAM_ID), st.integers(0, MAX_STREAM_ID))
small_frames = st.lists(st.tuples(st.integers(0, 255), stream_ids, payloads), max_size=12)
any_frames = st.lists(st.tuples(st.integers(0, 255), stream_ids, any_payloads), max_size=8)
splits = st.lists(st.integers(1, 60_000), min_size=1, max_size=8).map(cycle)


def records_of(pools: Pools, frames: list[PlainFrame], seal_before: set[int]) -> list[bytes]:
    """Frames packed into records that end before the given frames, and where they are full."""
    packer = encoder(pools)
    records = []
    for number, frame in enumerate(frames):
        if number in seal_before:
            packer.seal()
        packer.write(*frame)
        records += take_output(packer)
    return records + sealed(packer)
