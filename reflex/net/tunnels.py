"""Tunnels that are kept and shared, per server: who gets which, and which are to be closed.

Pure bookkeeping: it dials nothing and closes nothing. It decides (``expire`` names what is to be
closed), the caller acts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Shared(Protocol):
    """What the pool asks of a tunnel."""

    idle_since_s: float

    @property
    def stream_count(self) -> int: ...
    @property
    def has_room(self) -> bool: ...
    @property
    def is_blocked(self) -> bool: ...


T = TypeVar("T", bound=Shared)


class TunnelPool(Generic[T]):
    """The tunnels of one client, by server.

    Args:
        max_idle: idle tunnels kept per server.
        idle_timeout_s: how long an idle tunnel is kept.
        max_streams: streams on one tunnel before it counts as full.
    """

    def __init__(self, *, max_idle: int, idle_timeout_s: float, max_streams: int) -> None:
        self._max_idle = max_idle
        self._idle_timeout_s = idle_timeout_s
        self._max_streams = max_streams
        self._tunnels: dict[Hashable, list[T]] = {}

    def add(self, key: Hashable, tunnel: T) -> None:
        """Take a new tunnel to this server in."""
        self._tunnels.setdefault(key, []).append(tunnel)

    def remove(self, key: Hashable, tunnel: T) -> None:
        """Forget a tunnel that has ended; nothing where it is not known."""
        tunnels = self._tunnels.get(key, [])
        if tunnel in tunnels:
            tunnels.remove(tunnel)
            if not tunnels:
                del self._tunnels[key]

    def acquire(self, key: Hashable) -> T | None:
        """A tunnel to this server with room for a stream, or None.

        The oldest that is not blocked comes first, so that those opened for a peak run empty and
        expire; where all are blocked, the one with the fewest streams.
        """
        blocked: T | None = None
        for tunnel in self._tunnels.get(key, ()):
            if not tunnel.has_room or tunnel.stream_count >= self._max_streams:
                continue
            if not tunnel.is_blocked:
                return tunnel
            if blocked is None or tunnel.stream_count < blocked.stream_count:
                blocked = tunnel
        return blocked

    def release(self, tunnel: T, now_s: float) -> None:
        """A stream on the tunnel has ended; with its last one it is idle from now on."""
        if tunnel.stream_count == 0:
            tunnel.idle_since_s = now_s

    def expire(self, now_s: float) -> list[tuple[Hashable, T]]:
        """The idle tunnels that are to be closed: idle too long, too many (oldest idle first), or
        of no use any more, since they take no new streams. They stay in the pool until removed."""
        expired: list[tuple[Hashable, T]] = []
        for key, tunnels in self._tunnels.items():
            idle = sorted((each for each in tunnels if not each.stream_count), key=lambda each: each.idle_since_s)
            surplus = len(idle) - self._max_idle
            for position, tunnel in enumerate(idle):
                is_stale = now_s - tunnel.idle_since_s >= self._idle_timeout_s
                if is_stale or position < surplus or not tunnel.has_room:
                    expired.append((key, tunnel))
        return expired

    def count(self, key: Hashable) -> int:
        """How many tunnels there are to this server."""
        return len(self._tunnels.get(key, ()))

    def idle_count(self, key: Hashable | None = None) -> int:
        """How many tunnels, of this server or of all, have no stream."""
        lists = self._tunnels.values() if key is None else [self._tunnels.get(key, [])]
        return sum(not tunnel.stream_count for tunnels in lists for tunnel in tunnels)

    def __iter__(self) -> Iterator[T]:
        """All tunnels."""
        return iter([tunnel for tunnels in self._tunnels.values() for tunnel in tunnels])

    def __len__(self) -> int:
        return sum(map(len, self._tunnels.values()))
