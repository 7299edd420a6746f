"""Keepalive, and the round trip that it measures (docs/protocol.md, section 5, "Liveness")."""

from __future__ import annotations

from typing import Final

from reflex.protocol.wire import KEEPALIVE_GRACE_S, KEEPALIVE_S, PING_SIZE

# A peer's keepalive interval is believed within these bounds, so that a dead one is always found.
MIN_KEEPALIVE_S: Final = 1.0
MAX_KEEPALIVE_S: Final = 600.0
ROUND_TRIP_WEIGHT: Final = 0.25  # of a new sample in the running mean
ROUND_TRIP_INTERVAL_S: Final = 1.0  # between measurements, while windows are being emptied
# The same while round trips are too short for the clock: soon again, but not with every update of a window.
ROUND_TRIP_RETRY_S: Final = 0.01


class Liveness:
    """When something was last sent and received, and what follows from it. All times are monotonic seconds.

    Attributes:
        round_trip_s: the running mean of measured round trips; 0.0 until one was measured.
        is_measured: whether one was; a near peer's may be 0.0 by a clock of milliseconds.
    """

    __slots__ = (
        "_interval_s",
        "_peer_interval_s",
        "_ping_is_out",
        "_ping_sent_s",
        "_pings",
        "is_measured",
        "received_s",
        "round_trip_s",
        "sent_s",
    )

    def __init__(self, interval_s: float, now_s: float) -> None:
        self._interval_s = interval_s
        self._peer_interval_s = float(KEEPALIVE_S)
        self._pings = 0
        self._ping_is_out = False
        self._ping_sent_s = now_s
        self.received_s = now_s
        self.sent_s = now_s
        self.round_trip_s = 0.0
        self.is_measured = False

    def set_peer_interval(self, interval_ms: int) -> None:
        """The peer's SETTINGS named its interval."""
        self._peer_interval_s = min(max(interval_ms / 1000, MIN_KEEPALIVE_S), MAX_KEEPALIVE_S)

    def is_dead(self, now_s: float) -> bool:
        """Whether the peer was silent for its interval and the grace time."""
        return self.silence_left_s(now_s) < 0

    def silence_left_s(self, now_s: float) -> float:
        """How much longer the peer may be silent; negative where it is dead."""
        return self.received_s + self._peer_interval_s + KEEPALIVE_GRACE_S - now_s

    @property
    def awaits_pong(self) -> bool:
        """Whether the last PING is still unanswered."""
        return self._ping_is_out

    def ping_is_due(self, now_s: float) -> bool:
        """Whether this side was silent for its interval."""
        return now_s - self.sent_s >= self._interval_s

    def measurement_is_due(self, now_s: float) -> bool:
        """Whether a PING should be sent to learn the round trip."""
        if self._ping_is_out:
            return False
        interval_s = ROUND_TRIP_INTERVAL_S if self.round_trip_s else ROUND_TRIP_RETRY_S
        return not self._pings or now_s - self._ping_sent_s >= interval_s

    def next_ping(self, now_s: float) -> bytes:
        """The payload of a PING that is sent now."""
        self._pings += 1
        self._ping_is_out = True
        self._ping_sent_s = now_s
        return self._pings.to_bytes(PING_SIZE)

    def pong(self, payload: memoryview, now_s: float) -> None:
        """A PONG arrived. One that answers an older PING, or none, is ignored."""
        if not self._ping_is_out or int.from_bytes(payload) != self._pings:
            return
        self._ping_is_out = False
        self.is_measured = True
        sample_s = max(now_s - self._ping_sent_s, 0.0)
        if self.round_trip_s:
            sample_s = self.round_trip_s + ROUND_TRIP_WEIGHT * (sample_s - self.round_trip_s)
        self.round_trip_s = sample_s
