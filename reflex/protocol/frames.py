"""Records and the frames in them (docs/protocol.md, sections 4 and 5): an encoder, a decoder, as twins.

A record has one buffer for all of its life. The encoder packs frames where they will be sealed, seals
them in place, and lets go of the buffer when its last byte was taken; the ciphertext has then overwritten
the plaintext. DATA can be received straight into place: :meth:`FrameEncoder.reserve` gives the room
behind a header that :meth:`FrameEncoder.commit` writes.

The decoder tells where the next bytes are to be received, decrypts each record where it lies, and gives
out its frames once it has verified. Between records nothing is held. For a large record it asks for
exactly the rest of its body and the length chunk that follows, so that a run of large records takes one
read each and no byte is moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from reflex.errors import FrameError, WindowExceeded
from reflex.pool import ObjectPool, TieredPool
from reflex.protocol.keys import CipherState
from reflex.protocol.wire import (
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    LENGTH_CHUNK_SIZE,
    MAX_FRAME_SIZE,
    MAX_PAYLOAD_SIZE,
    MAX_RECORD_SIZE,
    TAG_SIZE,
)

# The tier that a record starts in: room for what many small streams say in one turn.
FIRST_RECORD_BUFFER: Final = 32_768
# A body with no more than this in it moves to a larger buffer, rather than ending its record early.
MOVABLE_BODY_BYTES: Final = 1_024
# A sealed record that fills less than this part of its buffer moves to a smaller one, where it has to wait.
SHRINK_FROM: Final = 4
# Less room than this is not worth receiving into: the record is ended.
MIN_RESERVED_BYTES: Final = 2_048
# Bodies from this size on are asked for exactly; below, whatever has arrived is taken in one read.
EXACT_READ_BYTES: Final = 16_384

_pack_header = FRAME_HEADER.pack_into
_unpack_header = FRAME_HEADER.unpack_from


class Frame:
    """One frame as it was received. Lent by the decoder: valid until the next one is drawn.

    ``payload`` is a view of the decoder's buffer, under the same terms.
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
        buffers: where records' buffers are borrowed.

    Attributes:
        records: what is sealed and not yet taken: buffer and size of each; read by others, changed here alone.
        control_bytes: what :meth:`write` has packed since everything was last taken.
    """

    __slots__ = (
        "_buffer",
        "_buffers",
        "_cipher",
        "_end",
        "_room_end",
        "_sealed_bytes",
        "_sent",
        "control_bytes",
        "records",
    )

    def __init__(self, cipher: CipherState, buffers: TieredPool) -> None:
        self._cipher = cipher
        self._buffers = buffers
        self._buffer: memoryview | None = None  # the record that is being packed
        self._end = LENGTH_CHUNK_SIZE  # of what is packed in it
        self._room_end = 0  # of what may be packed there
        self.records: list[tuple[memoryview, int]] = []  # seldom more than one
        self._sealed_bytes = 0
        self._sent = 0  # bytes of the first record that were taken
        self.control_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        """Bytes that are packed or sealed and not yet taken."""
        return self._end - LENGTH_CHUNK_SIZE + self._sealed_bytes - self._sent

    @property
    def is_packing(self) -> bool:
        """Whether anything is packed and not yet sealed."""
        return self._end > LENGTH_CHUNK_SIZE

    @property
    def has_output(self) -> bool:
        """Whether sealed bytes wait to be taken."""
        return bool(self.records)

    def write(self, frame_type: int, stream_id: int, payload: bytes | memoryview = b"") -> None:
        """Pack a frame, copying its payload of 0 to MAX_PAYLOAD_SIZE bytes.

        Raises:
            FrameError: the payload is too large.
        """
        size = len(payload)
        if size > MAX_PAYLOAD_SIZE:
            raise FrameError(f"a payload of {size} bytes; at most {MAX_PAYLOAD_SIZE} are allowed")
        needed = FRAME_HEADER_SIZE + size
        buffer = self._buffer
        if buffer is None or self._room_end - self._end < needed:
            buffer = self._make_room(needed)
        start = self._end
        _pack_header(buffer, start, frame_type << 24 | size, stream_id)
        end = start + needed
        if size:
            buffer[start + FRAME_HEADER_SIZE : end] = payload
        self._end = end
        self.control_bytes += needed

    def reserve(self, wanted_bytes: int) -> memoryview:
        """Room for up to ``wanted_bytes`` (1 to MAX_PAYLOAD_SIZE) of payload, to be filled in place.

        The view is the encoder's; it is valid until the next call of any other method. It may be shorter
        than wanted, but not shorter than the smaller of ``wanted_bytes`` and MIN_RESERVED_BYTES.
        What is filled must be committed, since only what was committed is wiped.
        """
        start = self._end + FRAME_HEADER_SIZE
        end = start + wanted_bytes
        buffer = self._buffer
        if buffer is None or end > self._room_end:
            buffer = self._more_room(wanted_bytes)
            start = self._end + FRAME_HEADER_SIZE
            end = min(start + wanted_bytes, self._room_end)
        return buffer[start:end]

    def _more_room(self, wanted_bytes: int) -> memoryview:
        """The buffer to reserve in, where what is left is less than wanted: perhaps all the same that one."""
        buffer = self._buffer
        packed = self._end - LENGTH_CHUNK_SIZE
        is_movable = packed <= MOVABLE_BODY_BYTES
        if (
            buffer is not None
            and self._room_end - self._end - FRAME_HEADER_SIZE >= MIN_RESERVED_BYTES
            and not (is_movable and len(buffer) < MAX_RECORD_SIZE)
        ):
            return buffer
        return self._make_room(FRAME_HEADER_SIZE + min(wanted_bytes, MAX_PAYLOAD_SIZE - (packed if is_movable else 0)))

    def commit(self, frame_type: int, stream_id: int, size_bytes: int) -> None:
        """Write the header before the first ``size_bytes`` of the view that :meth:`reserve` gave."""
        start = self._end
        end = start + FRAME_HEADER_SIZE + size_bytes
        buffer = self._buffer
        if buffer is None or end > self._room_end:
            raise WindowExceeded(size_bytes, max(0, self._room_end - start - FRAME_HEADER_SIZE))
        _pack_header(buffer, start, frame_type << 24 | size_bytes, stream_id)
        self._end = end

    def _make_room(self, needed_bytes: int) -> memoryview:
        """A record with room for ``needed_bytes``: the same in a larger buffer where it is nearly empty, or a new."""
        old, end = self._buffer, self._end
        if old is not None and (
            end > LENGTH_CHUNK_SIZE + MOVABLE_BODY_BYTES
            or end + needed_bytes + TAG_SIZE > MAX_RECORD_SIZE
            or len(old) == MAX_RECORD_SIZE
        ):
            self.seal()
            old, end = None, LENGTH_CHUNK_SIZE
        size = end + needed_bytes + TAG_SIZE
        buffer = self._buffers.acquire(size if size > FIRST_RECORD_BUFFER else FIRST_RECORD_BUFFER)
        if old is not None:
            buffer[:end] = old[:end]
            self._buffers.release(old, end)
        self._buffer = buffer
        self._end = end
        self._room_end = len(buffer) - TAG_SIZE
        return buffer

    def seal(self) -> None:
        """End the record that is being packed, if there is one, and seal it where it is.

        A buffer that was only reserved and never filled goes back unsealed.
        """
        buffer = self._buffer
        if buffer is None:
            return
        end = self._end
        self._buffer = None
        self._end = LENGTH_CHUNK_SIZE
        self._room_end = 0
        if end == LENGTH_CHUNK_SIZE:
            self._buffers.release(buffer, 0)
            return
        try:
            size = self._cipher.seal(buffer[LENGTH_CHUNK_SIZE:end], buffer)
        except BaseException:
            self._buffers.release(buffer, end)
            raise
        self.records.append((buffer, size))
        self._sealed_bytes += size

    def output(self) -> memoryview | None:
        """The next sealed bytes to send, in one piece; None where there are none.

        The view is the encoder's; it is valid until :meth:`sent` or :meth:`close`.
        """
        if not self.records:
            return None
        buffer, size = self.records[0]
        return buffer[self._sent : size]

    def sent(self, size_bytes: int) -> None:
        """The first ``size_bytes`` of :meth:`output` were taken."""
        self._sent += size_bytes
        buffer, size = self.records[0]
        if self._sent >= size:
            del self.records[0]
            self._sealed_bytes -= size
            self._sent = 0
            self._buffers.release(buffer, 0)
            if not self.records:
                self.control_bytes = 0

    def shrink(self) -> None:
        """Keep what waits in the smallest buffers that fit; for when the peer takes nothing for a while."""
        buffers = self._buffers
        for index, (old, size) in enumerate(self.records):
            if size * SHRINK_FROM <= len(old):
                new = buffers.acquire(size)
                new[:size] = old[:size]
                self.records[index] = new, size
                buffers.release(old, 0)

    def close(self) -> None:
        """Give every buffer back; what was not sent is lost."""
        if self._buffer is not None:
            self._buffers.release(self._buffer, self._end)
            self._buffer = None
        self._end = LENGTH_CHUNK_SIZE
        self._room_end = 0
        for buffer, _ in self.records:
            self._buffers.release(buffer, 0)
        self.records.clear()
        self._sealed_bytes = self._sent = 0


class FrameDecoder:
    """Opens records and gives out their frames.

    Use: receive into :meth:`receive_buffer`, say how much by :meth:`received` (or hand bytes to
    :meth:`feed`), then iterate; an iteration ends when no whole record is left. Who wants whole bodies
    rather than frames calls :meth:`next_body` until it gives None, and :meth:`settle` whatever happens.

    Args:
        cipher: the direction's cipher state; used by nobody else.
        buffers: where records' buffers are borrowed.
        frames: where frame objects are borrowed.
    """

    __slots__ = ("_body_size", "_buffer", "_buffers", "_cipher", "_end", "_frames", "_plain_end", "_start", "_top")

    def __init__(self, cipher: CipherState, buffers: TieredPool, frames: ObjectPool[Frame]) -> None:
        self._cipher = cipher
        self._buffers = buffers
        self._frames = frames
        self._top = buffers.tier(MAX_RECORD_SIZE)  # what is received into
        self._buffer: memoryview | None = None  # what has arrived; up to _plain_end, decrypted
        self._start = 0
        self._end = 0
        self._plain_end = 0  # what is to be wiped when the buffer goes back
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
            if self._body_size < EXACT_READ_BYTES:
                return buffer
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
            self.settle()

    def feed(self, data: bytes | memoryview) -> int:
        """Copy bytes in, as many as there is room for; return how many. Iterate before feeding the rest."""
        room = self.receive_buffer()
        size = min(len(room), len(data))
        room[:size] = data[:size]
        self.received(size)
        return size

    def next_body(self) -> memoryview | None:
        """Open the next whole record, in place; None where none is left.

        The body (1 to MAX_BODY_SIZE bytes) is the decoder's; it is valid until the next call of any method.

        Raises:
            RecordError: it does not verify, or its length is out of range. The session is over then.
        """
        buffer = self._buffer
        if buffer is None:
            return None
        start = self._start
        size = self._body_size
        if not size:
            body_start = start + LENGTH_CHUNK_SIZE
            if body_start > self._end:
                return None
            size = self._body_size = self._cipher.open_length(buffer[start:body_start])
            start = self._start = body_start
        chunk_end = start + size + TAG_SIZE
        if chunk_end > self._end:
            return None
        body = buffer[start : start + size]
        self._plain_end = chunk_end
        self._cipher.open_body(buffer[start:chunk_end], body)
        self._body_size = 0
        self._start = chunk_end
        return body

    def __iter__(self) -> Iterator[Frame]:
        """Give out the frames of every whole record; each is valid until the next is drawn.

        Raises:
            RecordError: a record does not verify, or its length is out of range.
            FrameError: a body is not a sequence of whole frames.
            The session is over then; nothing of the bad record was given out that did not verify.
        """
        frame = self._frames.acquire()
        try:
            while self._start < self._end and (body := self.next_body()) is not None:
                size = len(body)
                position = 0
                while position < size and self._buffer is not None:  # None: it was closed meanwhile
                    position = read_frame(body, position, size, frame)
                    yield frame
        finally:
            self._frames.release(frame)
            self.settle()

    def settle(self) -> None:
        """Hold only what has not arrived whole, in the smallest buffer that fits it."""
        buffer = self._buffer
        if buffer is None:
            return
        held = self._end - self._start
        if held == 0:
            self._buffers.release(buffer, self._plain_end)
            self._buffer = None
            self._start = self._end = self._plain_end = 0
        elif self._start or (len(buffer) >= MAX_RECORD_SIZE and held <= MAX_RECORD_SIZE // 4):
            self._move(held)

    def _move(self, size_bytes: int) -> memoryview:
        """Bring what is held to the front of a buffer that fits ``size_bytes``, and return that."""
        old = self._buffer
        assert old is not None  # noqa: S101  # for the type checker: both callers have one
        held = old[self._start : self._end]
        new = self._buffers.acquire(size_bytes)
        new[: len(held)] = held
        self._buffers.release(old, self._plain_end)
        self._buffer = new
        self._end -= self._start
        self._start = self._plain_end = 0
        return new

    def close(self) -> None:
        """Give every buffer back; what was held is lost."""
        if self._buffer is not None:
            self._buffers.release(self._buffer, self._plain_end)
            self._buffer = None
        self._start = self._end = self._plain_end = self._body_size = 0


def read_frame(body: memoryview, position: int, size: int, frame: Frame) -> int:
    """Read the frame at ``position`` of a body of ``size`` bytes into ``frame``; return where it ends.

    Raises:
        FrameError: there is no whole frame.
    """
    payload_start = position + FRAME_HEADER_SIZE
    if payload_start > size:
        raise FrameError(f"{size - position} bytes at the end of a body are no frame")
    type_and_size, frame.stream_id = _unpack_header(body, position)
    end: int = payload_start + (type_and_size & MAX_FRAME_SIZE)
    if end > size:
        raise FrameError(f"a frame passes the end of its body by {end - size} bytes")
    frame.type = type_and_size >> 24
    frame.payload = body[payload_start:end]
    return end
