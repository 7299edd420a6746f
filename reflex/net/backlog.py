"""Bytes that a socket would not take, in pooled buffers of the smallest tier that fits, in order."""

from __future__ import annotations

from typing import Final

from reflex.pool import TieredPool

LARGEST_SPARE_BYTES: Final = 32_768  # the largest buffer taken for more than what is to be kept at once


class _Piece:
    """One buffer, and the part of it that waits."""

    __slots__ = ("buffer", "end", "start")

    def __init__(self, buffer: memoryview, end: int) -> None:
        self.buffer = buffer
        self.start = 0
        self.end = end


class Backlog:
    """A queue of bytes. It owns its buffers and wipes and returns each when its last byte was taken.

    Attributes:
        size_bytes: how much waits.
    """

    __slots__ = ("_buffers", "_pieces", "size_bytes")

    def __init__(self, buffers: TieredPool) -> None:
        self._buffers = buffers
        self._pieces: list[_Piece] = []
        self.size_bytes = 0

    def keep(self, data: memoryview) -> None:
        """Copy ``data``, 1 byte or more, behind what waits."""
        rest = data
        if self._pieces:
            last = self._pieces[-1]
            size = min(len(last.buffer) - last.end, len(rest))
            last.buffer[last.end : last.end + size] = rest[:size]
            last.end += size
            rest = rest[size:]
        if rest:
            size = len(rest)
            # Many small pieces share a buffer that grows with what waits already.
            buffer = self._buffers.acquire(max(size, min(self.size_bytes, LARGEST_SPARE_BYTES)))
            buffer[:size] = rest
            self._pieces.append(_Piece(buffer, size))
        self.size_bytes += len(data)

    def first(self) -> memoryview:
        """The oldest bytes, in one piece; valid until the next call. Empty where nothing waits."""
        if not self._pieces:
            return _NOTHING
        piece = self._pieces[0]
        return piece.buffer[piece.start : piece.end]

    def taken(self, size_bytes: int) -> None:
        """The first ``size_bytes`` of :meth:`first` were taken."""
        self.size_bytes -= size_bytes
        piece = self._pieces[0]
        piece.start += size_bytes
        if piece.start == piece.end:
            del self._pieces[0]
            self._buffers.release(piece.buffer, piece.end)

    def clear(self) -> int:
        """Give every buffer back; return how many bytes that dropped."""
        for piece in self._pieces:
            self._buffers.release(piece.buffer, piece.end)
        self._pieces.clear()
        dropped, self.size_bytes = self.size_bytes, 0
        return dropped


_NOTHING: Final = memoryview(b"")
