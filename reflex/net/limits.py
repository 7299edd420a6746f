"""A user's own limits at the server: one object for each user that has any, shared by all of its tunnels.

Counting costs the data path nothing: the user's relays count their bytes as every relay does, in counters that are
the user's alone. What is of all workers together is in :class:`reflex.worker.UserRow`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from reflex.metrics import Counters
from reflex.net.pace import DialPace, Pace
from reflex.net.paced import PacedRelay
from reflex.net.target import TargetRelay
from reflex.net.tunnel import Tunnel
from reflex.protocol.streams import Stream
from reflex.protocol.wire import Code, Status
from reflex.worker import UserField, UserRow

if TYPE_CHECKING:
    from reflex.usage import MonthlyUsage  # which imports SQLite, and most servers need none

log = logging.getLogger(__name__)

NOTE_INTERVAL_S: Final = 60.0  # between two log lines about the same limit of the same user


class UserLimits:
    """One user's limits, and what counts against them in this process. A limit that is None is none.

    Args:
        name: for the log.
        user_id: by which ``usage`` knows the user.
        row: this worker's numbers of the user, and the others'.
        max_tunnels: that may be open at the same time.
        max_streams: the same; a stream counts until its relay has ended, which may deliver for longer than it is open.
        dials_per_s: targets dialled in a second; who would wait for more than ``max_wait_s`` is refused.
        bytes_per_s: in each direction.
        monthly_bytes: in both directions; needs ``usage``.

    Attributes:
        counters: of the user's relays alone, and of what was limited.
        make_relay: makes the relay of a stream; takes what :class:`TargetRelay` takes.
        relays: those that have not ended; whoever makes one gives it to :meth:`add_relay`, and at its end to
            :meth:`remove_relay`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        user_id: str,
        row: UserRow,
        *,
        max_tunnels: int | None = None,
        max_streams: int | None = None,
        dials_per_s: float | None = None,
        bytes_per_s: int | None = None,
        monthly_bytes: int | None = None,
        max_wait_s: float = 10.0,
        usage: MonthlyUsage | None = None,
    ) -> None:
        self._loop = loop
        self._name = name
        self._user_id = user_id
        self._row = row
        self._max_tunnels = max_tunnels
        self._max_streams = max_streams
        self._dials_per_s = dials_per_s
        self._monthly_bytes = monthly_bytes
        self._usage = usage
        self.counters = Counters()
        self._tunnel_count = 0
        self._tunnels: set[Tunnel] = set()
        self.relays: set[TargetRelay] = set()
        self._dials = None if dials_per_s is None else DialPace(loop, dials_per_s, row, max_wait_s=max_wait_s)
        self.make_relay: Callable[..., TargetRelay] = TargetRelay
        if bytes_per_s is not None:
            on_wait = partial(self._on_wait, bytes_per_s)
            self.make_relay = partial(
                PacedRelay,
                up=Pace(loop, bytes_per_s, row, UserField.BYTES_UP, on_wait),
                down=Pace(loop, bytes_per_s, row, UserField.BYTES_DOWN, on_wait),
            )
        self._metered = 0  # bytes that usage was told of
        self._noted_s: dict[str, float] = {}
        self._noted_month = 0

    # Tunnels.

    def take_tunnel(self) -> bool:
        """Count a tunnel more, if there may be one.

        Then comes :meth:`add`, or :meth:`give_tunnel` where it came to nothing.
        """
        self._tunnel_count += 1
        self._row.publish(UserField.TUNNELS, self._tunnel_count)
        count = self._tunnel_count + sum(self._row.elsewhere(UserField.TUNNELS))
        if self._max_tunnels is not None and count > self._max_tunnels:
            self.give_tunnel()
            self.counters.tunnels_limited += 1
            self._note("max_tunnels (%d): a tunnel was closed at once", self._max_tunnels)
            return False
        if self._usage is not None:
            self._usage.write()  # other processes may have written since this one looked
        return True

    def give_tunnel(self) -> None:
        """There is one less."""
        self._tunnel_count -= 1
        self._row.publish(UserField.TUNNELS, self._tunnel_count)

    def add(self, tunnel: Tunnel) -> None:
        """Count this tunnel, which was taken, until it is removed."""
        self._tunnels.add(tunnel)

    def remove(self, tunnel: Tunnel) -> None:
        """The tunnel has ended; nothing where it was never added."""
        if tunnel in self._tunnels:
            self._tunnels.remove(tunnel)
            self.give_tunnel()

    def tunnel_streams(self, max_streams: int) -> int:
        """How many streams one tunnel of the user may have, of those that every tunnel may have."""
        return max_streams if self._max_streams is None else min(max_streams, self._max_streams)

    # Streams.

    def add_relay(self, relay: TargetRelay) -> None:
        """Count the relay of a stream that was admitted."""
        self.relays.add(relay)

    def remove_relay(self, relay: TargetRelay) -> None:
        """It has ended."""
        self.relays.discard(relay)
        self._publish_streams(len(self.relays))

    def _publish_streams(self, count: int) -> None:
        self._row.publish(UserField.STREAMS, count)

    def admit(self, tunnel: Tunnel, stream: Stream) -> float | None:
        """Judge a stream that was just opened on one of the user's tunnels.

        Where it is admitted, its relay is made next, and counts already.

        Returns:
            How long its target has to wait until it is dialled, in seconds; None where it was refused.
        """
        if self._is_month_used():
            self._refuse(tunnel, stream, Status.NOT_ALLOWED)
            return None
        self._publish_streams(len(self.relays) + 1)
        if self._max_streams is not None:
            count = len(self.relays) + 1 + sum(self._row.elsewhere(UserField.STREAMS))
            if count > self._max_streams:
                self._note("max_streams (%d): a stream was refused", self._max_streams)
                self._refuse(tunnel, stream, Code.LIMIT)
                return None
        if self._dials is None:
            return 0.0
        wait_s = self._dials.book()
        if wait_s is None:
            self._note("dials_per_s (%g): a stream was refused, for it would have waited too long", self._dials_per_s)
            self._refuse(tunnel, stream, Code.LIMIT)
        elif wait_s:
            self.counters.dials_delayed += 1
            self._note("dials_per_s (%g): dials wait", self._dials_per_s)
        return wait_s

    def _refuse(self, tunnel: Tunnel, stream: Stream, reason: Status | Code) -> None:
        self.counters.streams_limited += 1
        self._publish_streams(len(self.relays))
        if isinstance(reason, Status):
            tunnel.session.refuse(stream, reason)
        else:
            tunnel.session.reset(stream, reason)
        tunnel.flush_soon()
        tunnel.stream_ended()

    def _on_wait(self, bytes_per_s: int) -> None:
        self.counters.reads_delayed += 1
        self._note("bytes_per_s (%d): its streams are slowed down", bytes_per_s)

    # The month.

    def meter(self) -> None:
        """To be called now and then: have what went by counted, and end what runs where the month is used up."""
        if self._usage is None:
            return
        counters = self.counters
        moved = counters.bytes_into_tunnels + counters.bytes_out_of_tunnels
        self._usage.count(self._user_id, moved - self._metered)
        self._metered = moved
        if self.relays and self._is_month_used():
            for relay in list(self.relays):
                relay.limit_reached()

    def _is_month_used(self) -> bool:
        usage, monthly_bytes = self._usage, self._monthly_bytes
        if usage is None or monthly_bytes is None:
            return False
        if usage.used(self._user_id) < monthly_bytes:
            return False
        month = int(usage.month.replace("-", ""))
        if month not in (self._noted_month, *self._row.elsewhere(UserField.NOTED_MONTH)):
            log.warning(
                "%s has used up monthly_bytes (%d): its streams are reset, and new ones refused until %s",
                self._name,
                monthly_bytes,
                usage.next_month,
            )
        self._noted_month = month
        self._row.publish(UserField.NOTED_MONTH, month)
        return True

    def _note(self, text: str, limit: float | None) -> None:
        now_s = self._loop.time()
        if now_s - self._noted_s.get(text, -NOTE_INTERVAL_S) >= NOTE_INTERVAL_S:
            self._noted_s[text] = now_s
            log.info("%s is over its " + text, self._name, limit)
