"""Bytes that a socket would not take, in order, in pooled buffers that they fill well.

What counts for the process is the memory, not the bytes in it: a backlog reserves each buffer in its owner's
share before it borrows it, and gives up where the share says so.
"""

from __future__ import annotations

from typing import Final, Protocol

from reflex.pool import TIER_SIZES, TieredPool
from reflex.protocol.share import Share

LARGEST_SPARE_BYTES: Final = 32_768  # the largest buffer taken for more than what is to be kept at once
_FILLED_PART: Final = 4  # a buffer is taken where all but so small a part of it, a quarter, is filled at once


class Owner(Protocol):
    """Whose bytes wait."""

    def on_memory_used_up(self) -> None:
        """Another one needs the memory more: end, and clear every backlog."""


class _Piece:
    """One buffer, and the part of it that waits."""

    __slots__ = ("buffer", "end", "next", "start")

    def __init__(self, buffer: memoryview, end: int) -> None:
        self.buffer = buffer
        self.start = 0
        self.end = end
        self.next: _Piece | None = None  # a chain: however long, it never has to be moved


class Backlog:
    """A queue of bytes. It owns its buffers and wipes and returns each when its last byte was taken.

    Args:
        buffers: where its memory is borrowed.
        share: where that is reserved; None where its owner bounds what it keeps.
        owner: who gives up where another one needs the memory more.

    Attributes:
        size_bytes: how much waits.
        kept_bytes: how much memory is reserved.
    """

    __slots__ = ("_buffers", "_first", "_is_over", "_last", "_share", "kept_bytes", "moved_at", "owner", "size_bytes")

    def __init__(self, buffers: TieredPool, share: Share | None = None, owner: Owner | None = None) -> None:
        self._buffers = buffers
        self._share = share
        self.owner = owner
        self._is_over = False
        self.kept_bytes = 0
        self.moved_at = 0
        self._first: _Piece | None = None
        self._last: _Piece | None = None
        self.size_bytes = 0

    def keep(self, data: memoryview) -> int:
        """Copy ``data``, 1 byte or more, behind what waits.

        Returns:
            How many bytes were copied: where there is no room, or the owner ended meanwhile, not all of them.
        """
        rest = data
        last = self._last
        if last is not None:
            size = min(len(last.buffer) - last.end, len(rest))
            last.buffer[last.end : last.end + size] = rest[:size]
            last.end += size
            self.size_bytes += size
            rest = rest[size:]
        while rest:
            # Many small pieces share a buffer that grows with what waits already.
            wanted = _tier_for(max(len(rest), min(self.size_bytes, LARGEST_SPARE_BYTES)))
            if self._share is not None:
                if not self._share.reserve(self, wanted):
                    break
                if self._is_over:  # others were shed for it, and this owner ended with one of them
                    self._share.give_back(self, wanted)
                    break
            buffer = self._buffers.acquire(wanted)
            size = min(wanted, len(rest))
            buffer[:size] = rest[:size]
            piece = _Piece(buffer, size)
            if self._last is None:
                self._first = piece
            else:
                self._last.next = piece
            self._last = piece
            self.size_bytes += size
            rest = rest[size:]
        return len(data) - len(rest)

    def shed(self) -> None:
        """Another one needs the memory more: whoever owns this gives up."""
        if self.owner is not None:
            self.owner.on_memory_used_up()
        self.clear()

    def first(self) -> memoryview:
        """The oldest bytes, in one piece; valid until the next call. Empty where nothing waits."""
        piece = self._first
        if piece is None:
            return _NOTHING
        return piece.buffer[piece.start : piece.end]

    def taken(self, size_bytes: int) -> None:
        """The first ``size_bytes`` of :meth:`first` were taken."""
        self.size_bytes -= size_bytes
        piece = self._first
        assert piece is not None  # noqa: S101  # for the type checker: something was taken
        piece.start += size_bytes
        if piece.start == piece.end:
            self._first = piece.next
            if self._first is None:
                self._last = None
            self._release(piece)

    def _release(self, piece: _Piece) -> None:
        if self._share is not None:
            self._share.give_back(self, len(piece.buffer))
        self._buffers.release(piece.buffer, piece.end)

    def clear(self) -> int:
        """Give every buffer back, at the end of the owner; return how many bytes that dropped."""
        self._is_over = True
        piece = self._first
        self._first = self._last = None
        while piece is not None:
            self._release(piece)
            piece = piece.next
        dropped, self.size_bytes = self.size_bytes, 0
        return dropped


def _tier_for(size_bytes: int) -> int:
    """The buffer to take for so many bytes: one that holds them all, or a smaller one that they fill.

    Of 100,000 bytes and more, one of the largest; of 33,000 one of 32,768, and one of 2,048 for the rest.
    """
    smaller = TIER_SIZES[0]
    for tier in TIER_SIZES:
        if size_bytes <= tier:
            return tier if size_bytes >= tier - tier // _FILLED_PART else smaller
        smaller = tier
    return TIER_SIZES[-1]


_NOTHING: Final = memoryview(b"")
