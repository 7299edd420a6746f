"""Pools of buffers and of objects: borrow, use, return in ``finally``.

Strategy. A pool lends an object and remembers, by identity, that it did: so a double or a foreign
return is seen at once, and what is in use is counted exactly. Each object has a slot for as long as its
pool knows it, in which it stands while it is lent, behind its pool; so lending and returning move no memory,
and tiers that share their slots take a buffer back with one look-up. The common
way takes no lock: each of ``deque.pop``, ``deque.append`` and a dict's look-up is one atomic operation, and a
counter is raised between two points where the interpreter may switch threads (CPython with its global lock;
without it a counter may miss some, a buffer is never lent twice all the same). The lock is taken where several
steps must agree: when an object is made, and when the free list comes near its bound. All other
figures are derived when somebody asks, which is why statistics are always on.

Buffers are lent as writable memoryviews over bytearrays: a slice of one copies nothing, and its size
cannot change while it is lent. The part that was used is wiped on return, before the buffer can be
lent again; a return that does not say how much was used wipes all of it.

The environment variable ``REFLEX_POOL_DEBUG=1`` makes every pool record who holds an object, and
report what was never returned when the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final, Generic, TypeVar

from reflex.errors import ForeignBuffer, PoolError, WrongSize

T = TypeVar("T")

TIER_SIZES: Final = (2_048, 8_192, 32_768, 131_072)
# What each tier may keep free: 2, 2, 32 and 32 MiB, enough for a stream of the largest window whose reader is late.
TIER_MAX_FREE: Final = {2_048: 1_024, 8_192: 256, 32_768: 1_024, 131_072: 256}
# What is kept of it when nothing was needed for a while (see Pool.trim): 128 KiB, 128 KiB, 256 KiB and 1 MiB.
TIER_SPARE: Final = {2_048: 64, 8_192: 16, 32_768: 8, 131_072: 8}
WIPE_STEP_BITS: Final = 6
HOLDER_FRAMES: Final = 8  # call frames that the debug switch keeps of a holder

# The slot of an object: its pool, twice, and behind that the object while it is lent. Twice, since a list this long
# is not moved when it gets and loses a third element.
Slot = list[Any]

_debug_pools: weakref.WeakSet[Pool[object]] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """One pool's figures. ``acquired == hits + misses == released + in_use``.

    ``created`` counts every object ever made, preallocated ones too. While other threads borrow and
    return, figures of one snapshot may be a call apart from each other.
    """

    acquired: int
    released: int
    created: int
    hits: int
    misses: int
    hit_rate: float
    in_use: int
    free: int
    high_water: int


class Pool(Generic[T]):
    """What all pools share: lending by identity, a bounded free list, statistics.

    Args:
        name: for errors and reports.
        make: creates an object when none is free.
        max_free: how many returned objects are kept; what is over goes to the allocator.
        preallocate: how many to create at once.
        slots: those of all pools that take each other's objects back; by default a dict of its own.
    """

    __slots__ = (
        "__weakref__",
        "_acquired",
        "_created",
        "_free",
        "_high_water",
        "_holders",
        "_lock",
        "_make",
        "_misses",
        "_peak",
        "_released",
        "_roomy_below",
        "_slots",
        "max_free",
        "name",
    )

    def __init__(
        self,
        name: str,
        make: Callable[[], T],
        *,
        max_free: int,
        preallocate: int = 0,
        slots: dict[int, Slot] | None = None,
    ) -> None:
        if max_free < 0 or preallocate < 0 or preallocate > max_free:
            raise PoolError(
                f"{name}: max_free {max_free} and preallocate {preallocate}; expected 0 <= preallocate <= max_free"
            )
        self.name = name
        self.max_free = max_free
        self._make = make
        self._lock = Lock()
        # A deque keeps the memory that it once had; a list gives it back and needs it again.
        self._free = deque(make() for _ in range(preallocate))
        self._slots: dict[int, Slot] = {} if slots is None else slots
        self._slots.update((id(item), [self, self]) for item in self._free)
        self._acquired = 0
        self._holders: dict[int, str] | None = None  # where each was borrowed, when debugging
        self._created = preallocate
        self._misses = 0
        self._released = 0
        self._high_water = 0  # until the last trim
        self._peak = 0  # since then: the most that was lent at once
        # Below half its bound the free list takes returns without the lock: as many threads as the
        # other half would have to be between their look at its length and their append to pass it.
        self._roomy_below = max_free // 2
        if os.environ.get("REFLEX_POOL_DEBUG", "") not in ("", "0"):
            self.record_holders()

    def acquire(self) -> T:
        """Lend an object. The caller owns it until it is returned by ``release``."""
        try:
            item = self._free.pop()
        except IndexError:
            item = self._create()
        self._slots[id(item)].append(item)
        acquired = self._acquired = self._acquired + 1
        if acquired - self._released > self._peak:
            with self._lock:
                self._peak = max(self._peak, acquired - self._released)
        if self._holders is not None:
            self._holders[id(item)] = "".join(traceback.format_stack(limit=HOLDER_FRAMES)[:-1])
        return item

    def _create(self) -> T:
        item = self._make()
        with self._lock:
            self._slots[id(item)] = [self, self]
            self._created += 1
            self._misses += 1
        return item

    def _take_back(self, item: T) -> bool:
        """Take it out of its slot; False where it was not lent by this pool, or was already returned."""
        slot = self._slots.get(id(item))
        if slot is None:
            return False
        lent = slot.pop()
        if lent is not item:
            slot.append(lent)
            return False
        self._released += 1
        if self._holders is not None:
            self._holders.pop(id(item), None)
        return True

    def _keep(self, item: T) -> None:
        """It may be lent again, or goes to the allocator where enough are free."""
        free = self._free
        if len(free) < self._roomy_below:
            free.append(item)
            return
        with self._lock:
            if len(free) < self.max_free:
                free.append(item)
            else:
                del self._slots[id(item)]

    @property
    def in_use(self) -> int:
        """How many objects are lent now."""
        return self._acquired - self._released

    def trim(self, spare: int = 0) -> int:
        """Give to the allocator what has not been needed since the last trim, but for ``spare`` objects.

        To be called every so often. What a burst has left goes with the second call after it.

        Returns:
            How many objects that were.
        """
        with self._lock:
            keep = max(self._peak - self.in_use, spare)
            surplus = max(len(self._free) - keep, 0)
            for _ in range(surplus):
                with contextlib.suppress(IndexError):  # another thread has borrowed it meanwhile
                    del self._slots[id(self._free.popleft())]  # the one that was returned first
            self._high_water = max(self._high_water, self._peak)
            self._peak = self.in_use
        return surplus

    def statistics(self) -> PoolStatistics:
        """A snapshot of the pool's figures."""
        with self._lock:
            acquired = self._acquired
            in_use = acquired - self._released
            hits = acquired - self._misses
            return PoolStatistics(
                acquired=acquired,
                released=self._released,
                created=self._created,
                hits=hits,
                misses=self._misses,
                hit_rate=hits / acquired if acquired else 0.0,
                in_use=in_use,
                free=len(self._free),
                high_water=max(self._high_water, self._peak),
            )

    def record_holders(self) -> None:
        """From now on, remember where each object was borrowed (slow; for finding leaks)."""
        if self._holders is None:
            self._holders = {}
            _debug_pools.add(self)  # type: ignore[arg-type]  # a set of pools of anything

    def leaks(self) -> list[str]:
        """Where each object that is lent now was borrowed; empty unless holders are recorded."""
        return [] if self._holders is None else list(self._holders.values())


def _release(self: BufferPool | TieredPool, buffer: memoryview, used_bytes: int | None = None) -> None:
    """Take a buffer back and wipe its first ``used_bytes``, or a little more (all where not given, nothing for 0).

    Of tiers, it goes back into the one that it came from.

    Raises:
        WrongSize: the buffer is of another size than the pool's.
        ForeignBuffer: it was not lent by this pool, or was already returned.
        In both cases the pool is as it was.
    """
    # Pool._take_back and _keep, without the calls, and for the tiers without a second look-up: this is asked for
    # every record.
    slot = self._slots.get(id(buffer))
    if slot is None or (lent := slot.pop()) is not buffer:
        if slot is not None:
            slot.append(lent)
        self._refuse(buffer)
        return
    pool: BufferPool = slot[0]
    if used_bytes != 0:
        try:
            part, zeros = pool._wipes[-1 if used_bytes is None else used_bytes - 1 >> pool._wipe_shift]
        except IndexError:  # more than all of it
            part, zeros = pool._wipes[-1]
        buffer[part] = zeros
    pool._released += 1
    if pool._holders is not None:
        pool._holders.pop(id(buffer), None)
    free = pool._free
    if len(free) < pool._roomy_below:
        free.append(buffer)
    else:
        pool._keep(buffer)


class BufferPool(Pool[memoryview]):
    """A pool of buffers of one size.

    Args:
        size_bytes: of each buffer.
        max_free: how many returned buffers are kept.
        preallocate: how many to create at once.
        name: for errors and reports; by default the size.
        slots: as of :class:`Pool`.
    """

    __slots__ = ("_wipe_shift", "_wipes", "size_bytes")

    def __init__(
        self,
        size_bytes: int,
        max_free: int,
        preallocate: int = 0,
        *,
        name: str = "",
        slots: dict[int, Slot] | None = None,
    ) -> None:
        if size_bytes < 1:
            raise PoolError(f"a buffer of {size_bytes} bytes; expected 1 or more")
        super().__init__(
            name or f"pool of {size_bytes}-byte buffers",
            lambda: memoryview(bytearray(size_bytes)),
            max_free=max_free,
            preallocate=preallocate,
            slots=slots,
        )
        self.size_bytes = size_bytes
        # What is wiped is rounded up to a 64th of the buffer or so: nothing has to be sliced for it.
        self._wipe_shift = max((size_bytes - 1).bit_length() - WIPE_STEP_BITS, 0)
        step = 1 << self._wipe_shift
        zeros = memoryview(bytes(size_bytes))
        self._wipes = [(slice(end), zeros[:end]) for end in range(step, size_bytes + step, step)]

    def _refuse(self, buffer: memoryview) -> None:
        if len(buffer) != self.size_bytes:
            raise WrongSize(self.name, len(buffer), self.size_bytes)
        raise ForeignBuffer(self.name)

    release = _release


class ObjectPool(Pool[T]):
    """A pool of objects of one kind.

    Args:
        make: creates one.
        reset: makes a returned one as good as new; called on every return.
        max_free: how many returned objects are kept.
        name: for errors and reports.
    """

    __slots__ = ("_reset",)

    def __init__(
        self,
        make: Callable[[], T],
        reset: Callable[[T], None],
        max_free: int,
        preallocate: int = 0,
        *,
        name: str = "pool of objects",
    ) -> None:
        super().__init__(name, make, max_free=max_free, preallocate=preallocate)
        self._reset = reset

    def release(self, item: T) -> None:
        """Take an object back and reset it.

        Raises:
            ForeignBuffer: it was not lent by this pool, or was already returned. The pool is as it was.
        """
        if not self._take_back(item):
            raise ForeignBuffer(self.name)
        self._reset(item)
        self._keep(item)


class TieredPool:
    """Buffers of any size: the smallest tier that fits, above the top one an unpooled buffer.

    Args:
        max_free: how many buffers each tier keeps, by its size; ``0`` for all switches pooling off,
            which is what a benchmark compares with.
    """

    __slots__ = ("_acquire", "_by_size", "_slots", "_tiers", "_unpooled", "unpooled_created")

    def __init__(self, max_free: dict[int, int] | int | None = None) -> None:
        if max_free is None:
            max_free = TIER_MAX_FREE
        limits = dict.fromkeys(TIER_SIZES, max_free) if isinstance(max_free, int) else max_free
        self._slots: dict[int, Slot] = {}
        self._tiers = tuple(BufferPool(size, limits[size], slots=self._slots) for size in TIER_SIZES)
        self._by_size = {pool.size_bytes: pool for pool in self._tiers}
        # Looked at for every buffer: the tiers' sizes and a bound method of each, in order.
        self._acquire = tuple((pool.size_bytes, pool.acquire) for pool in self._tiers)
        self._unpooled: dict[int, memoryview] = {}
        self.unpooled_created = 0

    def acquire(self, size_bytes: int) -> memoryview:
        """Lend a buffer of at least ``size_bytes``. The caller owns it until it is returned."""
        for tier_bytes, acquire in self._acquire:
            if size_bytes <= tier_bytes:
                return acquire()
        buffer = memoryview(bytearray(size_bytes))
        self._unpooled[id(buffer)] = buffer
        self.unpooled_created += 1
        return buffer

    def _refuse(self, buffer: memoryview) -> None:
        if self._unpooled.pop(id(buffer), None) is None:
            raise ForeignBuffer("tiered pool")

    release = _release

    def tier(self, size_bytes: int) -> BufferPool:
        """The pool of exactly this size, for callers that always need the same tier."""
        return self._by_size[size_bytes]

    def trim(self) -> None:
        """Give to the allocator what no tier has needed since the last trim, but for a few of each."""
        for pool in self._tiers:
            pool.trim(TIER_SPARE[pool.size_bytes])

    @property
    def in_use(self) -> int:
        """How many buffers are lent now, unpooled ones included."""
        return sum(pool.in_use for pool in self._tiers) + len(self._unpooled)

    @property
    def unpooled_in_use(self) -> int:
        """How many buffers above the top tier are lent now."""
        return len(self._unpooled)

    def statistics(self) -> dict[str, PoolStatistics]:
        """The figures of each tier, by its size."""
        return {str(pool.size_bytes): pool.statistics() for pool in self._tiers}


@atexit.register
def report_leaks() -> int:
    """Write to stderr what pools with recorded holders never got back; return how many that is."""
    count = 0
    for pool in list(_debug_pools):
        for holder in pool.leaks():
            count += 1
            sys.stderr.write(f"{pool.name}: never returned, borrowed at\n{holder}")
    return count
