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
    is_suspect: bool

    @property
    def stream_count(self) -> int: ...
    @property
    def has_room(self) -> bool: ...
    @property
    def is_blocked(self) -> bool: ...
    @property
    def is_bulk(self) -> bool: ...


T = TypeVar("T", bound=Shared)


class TunnelPool(Generic[T]):
    """The tunnels of one client, by server.

    Args:
        min_idle: tunnels that are to be there before anybody asks, and to stay, used or not.
        max_idle: idle tunnels kept per server; not fewer than ``min_idle``.
        idle_timeout_s: how long an idle tunnel is kept.
        max_streams: streams on one tunnel before it counts as full.
    """

    def __init__(self, *, max_idle: int, idle_timeout_s: float, max_streams: int, min_idle: int = 0) -> None:
        self._min_idle = min_idle
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

        The oldest that carries no bulk data and is not blocked comes first, so that small requests do not
        queue behind large ones, and those opened for a peak run empty and expire. Then the oldest that is not
        blocked; where all are, the one with the fewest streams. One that does not answer
        (:mod:`reflex.net.vigil`) gets nothing until it does.
        """
        bulk: T | None = None
        blocked: T | None = None
        for tunnel in self._tunnels.get(key, ()):
            if tunnel.is_suspect or not tunnel.has_room or tunnel.stream_count >= self._max_streams:
                continue
            if not tunnel.is_blocked:
                if not tunnel.is_bulk:
                    return tunnel
                if bulk is None:
                    bulk = tunnel
            elif blocked is None or tunnel.stream_count < blocked.stream_count:
                blocked = tunnel
        return bulk or blocked

    def wants_spare(self, key: Hashable) -> bool:
        """Whether each tunnel to this server carries bulk data, and there is one: what comes next has to queue.

        Never where no idle tunnels are to be kept.
        """
        if not self._max_idle:
            return False
        useful = [each for each in self._tunnels.get(key, ()) if not each.is_suspect and each.has_room]
        return bool(useful) and all(each.is_bulk for each in useful)

    def release(self, tunnel: T, now_s: float) -> None:
        """A stream on the tunnel has ended; with its last one it is idle from now on."""
        if tunnel.stream_count == 0:
            tunnel.idle_since_s = now_s

    def missing(self) -> int:
        """How many tunnels more must be dialled for ``min_idle`` of them to be there, to whatever server."""
        return max(0, self._min_idle - sum(tunnel.has_room and not tunnel.is_suspect for tunnel in self))

    def expire(self, now_s: float, favourite: Hashable = None) -> list[tuple[Hashable, T]]:
        """The idle tunnels that are to be closed: idle too long, too many (oldest idle first), or
        of no use any more, since they take no new streams. They stay in the pool until removed.

        ``min_idle`` tunnels to the ``favourite`` server stay, however long they are idle. Those to
        another do not: what is dialled in their place may go to the favourite again. Beside bulk data one more
        stays, the spare that :meth:`wants_spare` asked for.
        """
        expired: list[tuple[Hashable, T]] = []
        for key, tunnels in self._tunnels.items():
            unused = sorted((each for each in tunnels if not each.stream_count), key=lambda each: each.idle_since_s)
            expired += [(key, each) for each in unused if not each.has_room]
            idle = [each for each in unused if each.has_room]  # who is on its way out is no surplus of theirs
            surplus = len(idle) - self._max_idle
            useful = [each for each in tunnels if each.has_room and not each.is_suspect]
            stay = self._min_idle if key == favourite else 0
            if bulk := sum(each.is_bulk for each in useful):
                stay = max(stay, bulk + 1)
            spare = len(useful) - stay
            for position, tunnel in enumerate(idle):
                is_stale = now_s - tunnel.idle_since_s >= self._idle_timeout_s
                if (is_stale or position < surplus) and spare > 0:
                    expired.append((key, tunnel))
                    spare -= not tunnel.is_suspect
        return expired

    def count(self, key: Hashable) -> int:
        """How many tunnels to this server are of use: not one that does not answer, nor one that is on its way
        out, idle and without room.
        """
        return sum(
            1
            for tunnel in self._tunnels.get(key, ())
            if not tunnel.is_suspect and (tunnel.stream_count or tunnel.has_room)
        )

    def idle_count(self, key: Hashable | None = None) -> int:
        """How many tunnels, of this server or of all, have no stream."""
        lists = self._tunnels.values() if key is None else [self._tunnels.get(key, [])]
        return sum(not tunnel.stream_count for tunnels in lists for tunnel in tunnels)

    def __iter__(self) -> Iterator[T]:
        """All tunnels."""
        return iter([tunnel for tunnels in self._tunnels.values() for tunnel in tunnels])

    def __len__(self) -> int:
        return sum(map(len, self._tunnels.values()))
