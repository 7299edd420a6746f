"""The server's relay for a user whose bytes in a second are limited.

What comes from the target is read as far as the pace allows, and not read where it does not: TCP slows the target
down. What comes from the tunnel is delivered as far as the pace allows, and kept where it does not, as if the
target's socket had not taken it: the stream's window slows the client down. The tunnel itself is always read, so
that one stream's bytes do not hold up another's OPEN, nor a PING.
"""

from __future__ import annotations

from typing import Any

from reflex.net.backlog import Backlog
from reflex.net.pace import Pace
from reflex.net.target import TargetRelay


class PacedRelay(TargetRelay):
    """A relay that asks before it moves bytes.

    Args:
        up: of what goes to the target.
        down: of what comes from the target.
        more: as of :class:`TargetRelay`; ``counters`` must be those of the user alone.
    """

    __slots__ = ("_down", "_fin_is_kept", "_kept", "_up")

    def __init__(self, *arguments: Any, up: Pace, down: Pace, **more: Any) -> None:
        self._up = up
        self._down = down
        self._kept: Backlog | None = None
        self._fin_is_kept = False
        super().__init__(*arguments, **more)

    # From the target into the tunnel.

    def _on_readable(self) -> None:
        allowed = self._down.allowance(self._read_size)
        if not allowed:
            self._pause()
            self._down.wait(self._read_in_turn)
            return
        self._read_size = min(self._read_size, allowed)
        before = self._counters.bytes_into_tunnels
        super()._on_readable()
        self._down.take(self._counters.bytes_into_tunnels - before)

    def _read_last(self) -> None:
        """Nothing goes beside the pace, also where the target has gone."""

    def _read_in_turn(self) -> None:
        if self._wants_to_read and not self.ended and not self._is_reading:
            self._read_again()
            self._on_readable()

    # From the tunnel to the target.

    def on_data(self, data: memoryview) -> None:
        """Deliver what may go now, keep the rest."""
        if self._kept is None and not self.ended:
            allowed = self._up.allowance(len(data))
            if allowed:
                self._up.take(allowed)
                super().on_data(data[:allowed])
                data = data[allowed:]
        if self.ended:
            if data:
                super().on_data(data)
            return
        if data:
            self.last_tick = self.tunnel.tick
            kept = self._kept
            if kept is None:
                kept = self._kept = Backlog(self._buffers, self.tunnel.session.share, self)
                self._up.wait(self._deliver_in_turn)
            size = kept.keep(data)
            if size < len(data):
                self.tunnel.session.consumed(self.stream, len(data) - size)
                self.on_memory_used_up()

    def _deliver_in_turn(self) -> None:
        kept = self._kept
        if kept is None or self.ended:
            return
        tunnel = self.tunnel
        session = tunnel.session
        session.now_s = self._loop.time()
        while not self.ended and (waiting := kept.first()) and (allowed := self._up.allowance(len(waiting))):
            self._up.take(allowed)
            # From a copy: to deliver may need memory, and that may end this relay and all that it keeps.
            piece = self._buffers.acquire(allowed)
            try:
                piece[:allowed] = waiting[:allowed]
                kept.taken(allowed)
                super().on_data(piece[:allowed])
            finally:
                self._buffers.release(piece, allowed)
        if self.ended:
            return
        if kept.size_bytes:
            self._up.wait(self._deliver_in_turn)
        else:
            self._kept = None
            if self._fin_is_kept:
                self._fin_is_kept = False
                super().on_fin()
        if not tunnel.ended and session.unsent_bytes:
            tunnel.flush_soon()

    def on_fin(self) -> None:
        """The peer has sent its last; it comes behind what is kept."""
        if self._kept is None:
            super().on_fin()
            return
        self._fin_is_kept = True
        if self.stream.is_closed and not self.tunnel.ended:
            self.tunnel.draining.add(self)

    # The end.

    @property
    def waiting_bytes(self) -> int:
        """How much has arrived that was not delivered."""
        return super().waiting_bytes + (0 if self._kept is None else self._kept.size_bytes)

    def end(self, *, reset: bool) -> None:
        """As of every relay; what is kept is dropped, and nothing waits any more."""
        self._up.forget(self._deliver_in_turn)
        self._down.forget(self._read_in_turn)
        kept, self._kept = self._kept, None
        if kept is not None:
            tunnel = self.tunnel
            tunnel.session.consumed(self.stream, kept.clear())
            if not tunnel.ended and tunnel.session.unsent_bytes:
                tunnel.flush_soon()
        super().end(reset=reset)
