"""Flow-control arithmetic (docs/protocol.md, section 5, "Flow control").

Two windows for each stream and each session: what may still be sent, and what the peer may still
send. The receiving one grows by itself: where the reader empties half a window faster than a round
trip or two can refill it, the window and not the network is the limit, and it grows, up to a bound
for the stream and a budget for all of the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from reflex.errors import FlowControlError
from reflex.protocol.wire import MAX_WINDOW

if TYPE_CHECKING:
    from reflex.protocol.share import Share

MAX_STREAM_RECEIVE_WINDOW: Final = 16 * 1024 * 1024
BUFFER_BUDGET: Final = 256 * 1024 * 1024  # memory for received bytes that wait for their reader, in a process
GROWTH_PART: Final = 2  # the part of it that all windows of a process may have grown together: a half
# From so much of it in use, new streams are refused: what is left is for those that there are.
NEARLY_FULL_PERCENT: Final = 95
# Credit is told at half a window, and no later than this: of a large window the sender would otherwise
# use up the second half before the credit for the first has come back over a long way.
MAX_UPDATE_BYTES: Final = 1024 * 1024
# Half a window emptied within this many round trips: the reader waits for credit, not for the network.
GROWTH_ROUND_TRIPS: Final = 2.0
# Each growth takes a round trip to have an effect; three of them lead from the first window to the largest.
GROWTH_FACTOR: Final = 4
# So much on one stream, with no pause between two credits, is bulk data.
BULK_BYTES: Final = 1024 * 1024
BULK_PAUSE_S: Final = 0.5


class Budget:
    """What all sessions of a process share: window growth, and memory for received bytes not yet taken.

    Plain counters for one thread: the one that runs the sessions.

    Attributes:
        growth: bytes by which windows have grown; never above ``growth_limit``.
        buffered: received bytes that the application has, and has not consumed.
        kept: bytes of memory in which some of those wait (:mod:`reflex.protocol.share`); never above
            ``buffered_limit``.
        high_water: the most that ``kept`` ever was.
        reservations: how often memory was asked for.
        shares: those that keep anything.
    """

    __slots__ = ("buffered", "buffered_limit", "growth", "growth_limit", "high_water", "kept", "reservations", "shares")

    def __init__(self, *, buffered_limit: int = BUFFER_BUDGET, growth_limit: int | None = None) -> None:
        self.growth = 0
        self.growth_limit = buffered_limit // GROWTH_PART if growth_limit is None else growth_limit
        self.buffered = 0
        self.buffered_limit = buffered_limit
        self.kept = 0
        self.high_water = 0
        self.reservations = 0
        self.shares: dict[Share, None] = {}

    @property
    def is_nearly_full(self) -> bool:
        """Whether no new streams should be taken."""
        return 100 * self.kept >= NEARLY_FULL_PERCENT * self.buffered_limit

    @property
    def growth_left(self) -> int:
        """How much windows may still grow."""
        return self.growth_limit - self.growth


class SendWindow:
    """What may still be sent, in payload bytes. The session takes off what it sends.

    Attributes:
        size: the most that it ever was.
    """

    __slots__ = ("available", "size")

    def __init__(self, size_bytes: int) -> None:
        self.available = self.size = size_bytes

    def add(self, increment_bytes: int) -> None:
        """Count a WINDOW frame.

        Raises:
            FlowControlError: the increment is 0, or the window would pass 2³¹ − 1.
        """
        if increment_bytes < 1 or self.available + increment_bytes > MAX_WINDOW:
            raise FlowControlError(
                f"a window of {self.available} bytes raised by {increment_bytes}; at most {MAX_WINDOW} are allowed"
            )
        self.available += increment_bytes
        self.size = max(self.size, self.available)


class ReceiveWindow:
    """What the peer may still send, in payload bytes.

    ``available + owed + held == size``, where ``owed`` is credit that the peer may have but was not
    told of, and ``held`` what was received and not yet released by its reader (counted by the caller).
    The session does the arithmetic of ``receive`` and ``release`` itself where DATA is concerned.

    Attributes:
        due: the peer is to be told of what is owed once it is as much as this.
    """

    __slots__ = ("available", "due", "owed", "size", "updated_s")

    def __init__(self, size_bytes: int) -> None:
        self.size = size_bytes
        self.available = size_bytes
        self.owed = 0
        self.due = min((size_bytes + 1) // 2, MAX_UPDATE_BYTES)
        self.updated_s = 0.0

    def receive(self, size_bytes: int) -> None:
        """Count bytes that arrived.

        Raises:
            FlowControlError: the peer overran the window.
        """
        if size_bytes > self.available:
            raise FlowControlError(f"{size_bytes} bytes arrived for a window of {self.available}")
        self.available -= size_bytes

    def release(self, size_bytes: int) -> bool:
        """Count bytes that need no room any more; True where the peer should be told now.

        That is at half a window, or at MAX_UPDATE_BYTES: often enough that the peer never waits, rarely
        enough to cost nothing.
        """
        self.owed += size_bytes
        return self.owed >= self.due

    def wants_growth(self, now_s: float, round_trip_s: float) -> bool:
        """Whether what is owed went by so fast that the window itself is the limit.

        Measured by half a window: a smaller share of it must have gone by in as much less time.
        """
        share_of_half = 2 * self.owed / self.size
        return now_s - self.updated_s < GROWTH_ROUND_TRIPS * round_trip_s * share_of_half

    def grow(self, size_bytes: int) -> None:
        """Make the window larger; the peer is told with the next update."""
        self.size += size_bytes
        self.owed += size_bytes
        self.due = min((self.size + 1) // 2, MAX_UPDATE_BYTES)

    def update(self, now_s: float) -> int:
        """The increment to send, in bytes; from then on the peer may use it."""
        increment = min(self.owed, MAX_WINDOW - self.available)
        self.available += increment
        self.owed -= increment
        self.updated_s = now_s
        return increment
