"""What a peer may ask of this side without use to anybody (docs/protocol.md, section 8).

Frames that carry nothing of a stream cost this side time and its peer next to none: PING, PAD, SETTINGS,
GOAWAY, WINDOW with a few bytes or with more than was sent, whatever comes late for a stream that has
ended, streams that are opened and reset. Each of them is charged to an allowance that fills up again
with time. No peer that does its work comes near its end; a peer that passes it only wants to keep this
side busy, and its session is over.

DATA of a live stream is never charged: its windows bound it, and it is the work.
"""

from __future__ import annotations

from typing import Final

from reflex.errors import ProtocolError

# In units of the cheapest frames, which take about a microsecond each. Honest peers with thousands of new
# streams a second have been seen to need one or two units for each of them, and none for bulk.
BURST_UNITS: Final = 20_000
UNITS_PER_S: Final = 10_000

PLAIN_COST: Final = 1
RESET_COST: Final = 2
ABANDONED_COST: Final = 10  # a RESET before OPENED: a stream was made for nothing, and perhaps a connection
SESSION_COST: Final = 100  # SETTINGS and GOAWAY, of which a session needs one or two
# A session may end all the streams that it may have at once, unanswered and with answers under way.
UNITS_PER_STREAM: Final = 2 * ABANDONED_COST
# A WINDOW or a late DATA frame below this is charged: so few bytes are not worth a frame.
USEFUL_BYTES: Final = 1_024


class Allowance:
    """What one peer has left. Times are monotonic seconds.

    Attributes:
        burst_units: the most that it can have.
    """

    __slots__ = ("_left", "_updated_s", "burst_units")

    def __init__(self, now_s: float) -> None:
        self.burst_units = BURST_UNITS
        self._left = float(BURST_UNITS)
        self._updated_s = now_s

    def allow_streams(self, count: int) -> None:
        """The session may have so many streams at once: the burst is enough for the end of all of them."""
        more_units = UNITS_PER_STREAM * count - self.burst_units
        if more_units > 0:
            self.burst_units += more_units
            self._left += more_units

    def charge(self, cost_units: int, now_s: float) -> None:
        """Take ``cost_units`` away.

        Raises:
            ProtocolError: there were not so many left.
        """
        refill = max(now_s - self._updated_s, 0.0) * UNITS_PER_S
        left = min(self._left + refill, self.burst_units) - cost_units
        if left < 0:
            raise ProtocolError("the peer sends frames without use, faster than anybody needs them")
        self._left = left
        self._updated_s = now_s
