"""Every pool that a process's sessions draw from, as one bundle."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from reflex.pool import BufferPool, ObjectPool, PoolStatistics, TieredPool
from reflex.protocol.frames import Frame
from reflex.protocol.wire import CLIENT_HELLO_SIZE, SERVER_HELLO_SIZE

HELLOS_KEPT = 256  # handshakes of one burst
FRAMES_KEPT = 64  # one is lent per decoder that is being iterated

_instances: weakref.WeakSet[Pools] = weakref.WeakSet()


class Pools:
    """Buffers by tier, frame objects, and the buffers of both hellos.

    Args:
        pooled: ``False`` makes every borrow allocate and every return free: what a benchmark
            compares with.
    """

    __slots__ = ("__weakref__", "buffers", "client_hellos", "frames", "server_hellos")

    def __init__(self, *, pooled: bool = True) -> None:
        self.buffers = TieredPool() if pooled else TieredPool(0)
        self.frames = ObjectPool(Frame, Frame.clear, FRAMES_KEPT if pooled else 0, name="pool of frames")
        hellos = HELLOS_KEPT if pooled else 0
        self.client_hellos = BufferPool(CLIENT_HELLO_SIZE, hellos, name="pool of client hellos")
        self.server_hellos = BufferPool(SERVER_HELLO_SIZE, hellos, name="pool of server hellos")
        _instances.add(self)

    @property
    def in_use(self) -> int:
        """How many objects of all kinds are lent now; 0 where the pools are whole."""
        return self.buffers.in_use + self.frames.in_use + self.client_hellos.in_use + self.server_hellos.in_use

    def statistics(self) -> dict[str, PoolStatistics]:
        """The figures of every pool, by tier size or name."""
        return {
            **self.buffers.statistics(),
            "frames": self.frames.statistics(),
            "client_hello": self.client_hellos.statistics(),
            "server_hello": self.server_hellos.statistics(),
        }


def all_pools() -> Iterable[Pools]:
    """Every bundle of this process that still exists."""
    return list(_instances)
