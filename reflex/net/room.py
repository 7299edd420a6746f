"""How many connections a server may have at the same time, in all of its workers, and who gives way at the limit.

Strangers cannot lock users out: one connection more takes the place of the oldest one that is not authenticated.
Nor can a user with more tunnels than it may have, or with one fatal error after the other: what is left of such
tunnels gives way first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sized
from typing import Final

from reflex.metrics import Counters
from reflex.net.greeting import Greeting
from reflex.net.tunnel import Tunnel
from reflex.worker import WorkerContext

DISPLACED_PER_ACCEPT: Final = 2  # more than come, so that an excess (see Room.has_room) grows smaller


class Room:
    """The connections of one process, beside those of the other workers.

    Args:
        limit: of connections in all workers.
        greetings: the connections that are not authenticated, in the order of their arrival; the caller's.
        tunnels: those that are; the caller's.
        shared: what it shares with the other workers, where it is one of several.

    Attributes:
        turned_away: those of the tunnels that were closed at once, and wait for their peer to see it, in the order
            of their arrival; the caller's, as the others.
    """

    def __init__(
        self,
        limit: int,
        greetings: OrderedDict[Greeting, None],
        tunnels: Sized,
        *,
        counters: Counters,
        shared: WorkerContext | None,
    ) -> None:
        self._limit = limit
        self._greetings = greetings
        self._tunnels = tunnels
        self.turned_away: OrderedDict[Tunnel, None] = OrderedDict()
        self._counters = counters
        self._shared = shared
        # They ended by a fatal error, their sockets not yet.
        self._discarding: OrderedDict[Tunnel, None] = OrderedDict()

    @property
    def own(self) -> int:
        """How many connections this process has."""
        return len(self._greetings) + len(self._tunnels) + len(self._discarding)

    def has_room(self) -> bool:
        """Whether one more connection may be served; at the limit, made by closing one that gives way.

        That is the oldest tunnel that was turned away, else the oldest that failed, else the oldest greeting: which
        one depends on nothing but its age. Where the limit is reached because of such connections of other workers,
        a worker without any takes one connection beyond it: the others make up for that with the next connections
        that they accept.
        """
        for _ in range(DISPLACED_PER_ACCEPT):
            if self._all() < self._limit or not self._gives_way:
                break
            self._counters.connections_displaced += 1
            self._displace_one()
        if self._all() < self._limit:
            return True
        tunnels_elsewhere = 0 if self._shared is None else self._shared.tunnels.elsewhere()
        return not self._gives_way and self._staying + tunnels_elsewhere < self._limit

    @property
    def _gives_way(self) -> bool:
        """Whether there is any connection here that gives way."""
        return bool(self.turned_away or self._discarding or self._greetings)

    def _displace_one(self) -> None:
        if self.turned_away:
            next(iter(self.turned_away)).cut("turned away")
        elif self._discarding:
            next(iter(self._discarding)).silence.end()  # type: ignore[union-attr]  # it is what discards
        else:
            next(iter(self._greetings)).end(reset=False)

    @property
    def _staying(self) -> int:
        """Connections that give way to nobody."""
        return len(self._tunnels) - len(self.turned_away)

    def _all(self) -> int:
        return self.own + (0 if self._shared is None else self._shared.connections.elsewhere())

    def discard(self, tunnel: Tunnel, change: int) -> None:
        """A tunnel has failed; its connection is kept for a while (1), or not any more (-1), and counts meanwhile."""
        if change > 0:
            self._discarding[tunnel] = None
        else:
            del self._discarding[tunnel]
        self.publish()

    def publish(self) -> None:
        """Tell the other workers; called whenever a greeting or a tunnel has come or gone."""
        if self._shared is not None:
            self._shared.connections.publish(self.own)
            self._shared.tunnels.publish(self._staying)
