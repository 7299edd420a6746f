"""Records and the frames in them (docs/protocol.md, sections 4 and 5): an encoder, a decoder, as twins.

The encoder packs frames into the body of the record that is being written, which lives in one
plaintext buffer for as long as something is packed (one turn of a loop), and seals it into a ciphertext
buffer, which lives until its last byte was taken. DATA can be received straight into place:
:meth:`FrameEncoder.reserve` gives the room behind a header that :meth:`FrameEncoder.commit` writes.

The decoder tells where the next bytes are to be received, and gives out the frames of each record
that verified. Between records nothing is held. For a large record it asks for exactly the rest of its
body and the length chunk that follows, so that a run of large records is received and decrypted in
place, with one read each and no byte moved.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

from reflex.errors import FrameError, WindowExceeded
from reflex.pool import ObjectPool, TieredPool
from reflex.protocol.keys import CipherState
from reflex.protocol.wire import (
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    LENGTH_CHUNK_SIZE,
    MAX_BODY_SIZE,
    MAX_PAYLOAD_SIZE,
    MAX_RECORD_SIZE,
    RECORD_OVERHEAD,
    TAG_SIZE,
)

# The tier that a body starts in: room for what many small streams say in one turn. A body and its
# record share a tier, so a body fills its buffer but for RECORD_OVERHEAD.
FIRST_BODY_BUFFER: Final = 32_768
# A body with no more than this in it moves to a larger buffer, rather than ending its record early.
MOVABLE_BODY_BYTES: Final = 1_024
# Less room than this is not worth receiving into: the record is ended.
MIN_RESERVED_BYTES: Final = 2_048
# Bodies from this size on are asked for exactly; below, whatever has arrived is taken in one read.
EXACT_READ_BYTES: Final = 16_384

_pack_header = FRAME_HEADER.pack_into
_unpack_header = FRAME_HEADER.unpack_from


class Frame:
    """One frame as it was received. Lent by the decoder: valid until the next one is drawn.

    ``payload`` is a view of the decoder's plaintext buffer, under the same terms.
    """

    __slots__ = ("payload", "stream_id", "type")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """As good as new."""
        self.type = 0
        self.stream_id = 0
        self.payload = _NO_PAYLOAD

    def copy(self) -> tuple[int, int, bytes]:
        """Type, stream id and payload, for keeping."""
        return self.type, self.stream_id, bytes(self.payload)


_NO_PAYLOAD: Final = memoryview(b"")


class FrameEncoder:
    """Packs frames into records and seals them.

    Args:
        cipher: the direction's cipher state; used by nobody else.
        buffers: where plaintext and ciphertext buffers are borrowed.

    Attributes:
        control_bytes: what :meth:`write` has packed since everything was last taken.
    """

    __slots__ = (
        "_body",
        "_buffers",
        "_cipher",
        "_end",
        "_records",
        "_room_end",
        "_sealed_bytes",
        "_sent",
        "control_bytes",
    )

    def __init__(self, cipher: CipherState, buffers: TieredPool) -> None:
        self._cipher = cipher
        self._buffers = buffers
        self._body: memoryview | None = None
        self._end = 0  # of what is packed in the body
        self._room_end = 0  # of what may be packed there
        self._records: list[tuple[memoryview, int]] = []  # ciphertext buffer, record size; seldom more than one
        self._sealed_bytes = 0
        self._sent = 0  # bytes of the first record that were taken
        self.control_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        """Bytes that are packed or sealed and not yet taken."""
        return self._end + self._sealed_bytes - self._sent

    @property
    def is_packing(self) -> bool:
        """Whether anything is packed and not yet sealed."""
        return self._end > 0

    @property
    def has_output(self) -> bool:
        """Whether sealed bytes wait to be taken."""
        return bool(self._records)

    def write(self, frame_type: int, stream_id: int, payload: bytes | memoryview = b"") -> None:
        """Pack a frame, copying its payload of 0 to MAX_PAYLOAD_SIZE bytes.

        Raises:
            FrameError: the payload is too large.
        """
        size = len(payload)
        if size > MAX_PAYLOAD_SIZE:
            raise FrameError(f"a payload of {size} bytes; at most {MAX_PAYLOAD_SIZE} are allowed")
        needed = FRAME_HEADER_SIZE + size
        body = self._body
        if body is None or self._room_end - self._end < needed:
            body = self._make_room(needed)
        start = self._end
        _pack_header(body, start, frame_type << 24 | size, stream_id)
        end = start + needed
        if size:
            body[start + FRAME_HEADER_SIZE : end] = payload
        self._end = end
        self.control_bytes += needed

    def reserve(self, wanted_bytes: int) -> memoryview:
        """Room for up to ``wanted_bytes`` (1 to MAX_PAYLOAD_SIZE) of payload, to be filled in place.

        The view is the encoder's; it is valid until the next call of any other method. It may be shorter
        than wanted, but not shorter than the smaller of ``wanted_bytes`` and MIN_RESERVED_BYTES.
        What is filled must be committed, since only what was committed is wiped.
        """
        end = self._end
        room = self._room_end - end - FRAME_HEADER_SIZE
        body = self._body
        if body is None or (
            room < wanted_bytes
            and (room < MIN_RESERVED_BYTES or (end <= MOVABLE_BODY_BYTES and len(body) < MAX_RECORD_SIZE))
        ):
            body = self._make_room(
                FRAME_HEADER_SIZE + min(wanted_bytes, MAX_PAYLOAD_SIZE - min(end, MOVABLE_BODY_BYTES))
            )
        start = self._end + FRAME_HEADER_SIZE
        return body[start : min(start + wanted_bytes, self._room_end)]

    def commit(self, frame_type: int, stream_id: int, size_bytes: int) -> None:
        """Write the header before the first ``size_bytes`` of the view that :meth:`reserve` gave."""
        start = self._end
        end = start + FRAME_HEADER_SIZE + size_bytes
        body = self._body
        if body is None or end > self._room_end:
            raise WindowExceeded(size_bytes, max(0, self._room_end - start - FRAME_HEADER_SIZE))
        _pack_header(body, start, frame_type << 24 | size_bytes, stream_id)
        self._end = end

    def _make_room(self, needed_bytes: int) -> memoryview:
        """A body with room for ``needed_bytes``: the same in a larger buffer where it is nearly empty, or a new one."""
        old, end = self._body, self._end
        if old is not None and (
            end > MOVABLE_BODY_BYTES or end + needed_bytes > MAX_BODY_SIZE or len(old) == MAX_RECORD_SIZE
        ):
            self.seal()
            old, end = None, 0
        body = self._buffers.acquire(max(FIRST_BODY_BUFFER, end + needed_bytes + RECORD_OVERHEAD))
        if old is not None:
            body[:end] = old[:end]
            self._buffers.release(old, end)
        self._body = body
        self._end = end
        self._room_end = len(body) - RECORD_OVERHEAD
        return body

    def seal(self) -> None:
        """End the record that is being packed, if there is one, and seal it.

        A body that was only reserved and never filled goes back unsealed.
        """
        body = self._body
        if body is None:
            return
        end = self._end
        self._body = None
        self._end = self._room_end = 0
        try:
            if end:
                record = self._buffers.acquire(end + RECORD_OVERHEAD)
                size = self._cipher.seal(body[:end], record)
                self._records.append((record, size))
                self._sealed_bytes += size
        finally:
            self._buffers.release(body, end)

    def output(self) -> memoryview | None:
        """The next sealed bytes to send, in one piece; None where there are none.

        The view is the encoder's; it is valid until :meth:`sent` or :meth:`close`.
        """
        if not self._records:
            return None
        record, size = self._records[0]
        return record[self._sent : size]

    def sent(self, size_bytes: int) -> None:
        """The first ``size_bytes`` of :meth:`output` were taken."""
        self._sent += size_bytes
        record, size = self._records[0]
        if self._sent >= size:
            del self._records[0]
            self._sealed_bytes -= size
            self._sent = 0
            self._buffers.release(record, 0)
            if not self._records:
                self.control_bytes = 0

    def close(self) -> None:
        """Give every buffer back; what was not sent is lost."""
        if self._body is not None:
            self._buffers.release(self._body, self._end)
            self._body = None
        self._end = self._room_end = 0
        for record, _ in self._records:
            self._buffers.release(record, 0)
        self._records.clear()
        self._sealed_bytes = self._sent = 0


class FrameDecoder:
    """Opens records and gives out their frames.

    Use: receive into :meth:`receive_buffer`, say how much by :meth:`received` (or hand bytes to
    :meth:`feed`), then iterate; an iteration ends when no whole record is left.

    Args:
        cipher: the direction's cipher state; used by nobody else.
        buffers: where plaintext and ciphertext buffers are borrowed.
        frames: where frame objects are borrowed.
    """

    __slots__ = ("_body_size", "_buffer", "_buffers", "_cipher", "_end", "_frames", "_start", "_top")

    def __init__(self, cipher: CipherState, buffers: TieredPool, frames: ObjectPool[Frame]) -> None:
        self._cipher = cipher
        self._buffers = buffers
        self._frames = frames
        self._top = buffers.tier(MAX_RECORD_SIZE)  # what is received into
        self._buffer: memoryview | None = None  # ciphertext that has arrived
        self._start = 0
        self._end = 0
        self._body_size = 0  # of the record whose length is verified and whose body has not arrived; else 0

    @property
    def held_bytes(self) -> int:
        """Ciphertext that waits for the rest of its record; never more than one record."""
        return self._end - self._start

    def receive_buffer(self) -> memoryview:
        """Where the next bytes are to be received: at least one byte of room.

        The view is the decoder's; it is valid until the next call of any other method.
        """
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = self._top.acquire()
        elif len(buffer) < MAX_RECORD_SIZE:
            buffer = self._move(MAX_RECORD_SIZE)
        end = self._end
        if self._body_size >= EXACT_READ_BYTES:
            return buffer[end : self._body_size + TAG_SIZE + LENGTH_CHUNK_SIZE]
        return buffer[end:]

    def received(self, size_bytes: int) -> None:
        """``size_bytes`` were received into :meth:`receive_buffer`; with 0 it goes back to what is held."""
        self._end += size_bytes
        if not size_bytes:
            self._settle()

    def feed(self, data: bytes | memoryview) -> int:
        """Copy bytes in, as many as there is room for; return how many. Iterate before feeding the rest."""
        room = self.receive_buffer()
        size = min(len(room), len(data))
        room[:size] = data[:size]
        self.received(size)
        return size

    def __iter__(self) -> Generator[Frame, None, None]:
        """Give out the frames of every whole record; each is valid until the next is drawn.

        Raises:
            RecordError: a record does not verify, or its length is out of range.
            FrameError: a body is not a sequence of whole frames.
            The session is over then; nothing of the bad record was given out that did not verify.
        """
        cipher = self._cipher
        buffers = self._buffers
        frame = self._frames.acquire()
        try:
            while (buffer := self._buffer) is not None:
                if not self._body_size:
                    body_start = self._start + LENGTH_CHUNK_SIZE
                    if body_start > self._end:
                        return
                    self._body_size = cipher.open_length(buffer[self._start : body_start])
                    self._start = body_start
                size = self._body_size
                chunk_start = self._start
                chunk_end = chunk_start + size + TAG_SIZE
                if chunk_end > self._end:
                    return
                lent = buffers.acquire(size)
                try:
                    body = lent[:size]
                    cipher.open_body(buffer[chunk_start:chunk_end], body)
                    self._body_size = 0
                    self._start = chunk_end
                    position = 0
                    while position < size:
                        payload_start = position + FRAME_HEADER_SIZE
                        if payload_start > size:
                            raise FrameError(f"{size - position} bytes at the end of a body are no frame")
                        type_and_size, frame.stream_id = _unpack_header(body, position)
                        position = payload_start + (type_and_size & 0xFF_FFFF)
                        if position > size:
                            raise FrameError(f"a frame passes the end of its body by {position - size} bytes")
                        frame.type = type_and_size >> 24
                        frame.payload = body[payload_start:position]
                        yield frame
                finally:
                    buffers.release(lent, size)
        finally:
            self._frames.release(frame)
            self._settle()

    def _settle(self) -> None:
        """Hold only what has not arrived whole, in the smallest buffer that fits it."""
        buffer = self._buffer
        if buffer is None:
            return
        held = self._end - self._start
        if held == 0:
            self._buffers.release(buffer, 0)
            self._buffer = None
            self._start = self._end = 0
        elif self._start or (len(buffer) >= MAX_RECORD_SIZE and held <= MAX_RECORD_SIZE // 4):
            self._move(held)

    def _move(self, size_bytes: int) -> memoryview:
        """Bring what is held to the front of a buffer that fits ``size_bytes``, and return that."""
        old = self._buffer
        assert old is not None  # noqa: S101  # for the type checker: both callers have one
        held = old[self._start : self._end]
        new = self._buffers.acquire(size_bytes)
        new[: len(held)] = held
        self._buffers.release(old, 0)
        self._buffer = new
        self._end -= self._start
        self._start = 0
        return new

    def close(self) -> None:
        """Give every buffer back; what was held is lost."""
        if self._buffer is not None:
            self._buffers.release(self._buffer, 0)
            self._buffer = None
        self._start = self._end = self._body_size = 0
