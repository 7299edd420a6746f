"""The set of hellos that a server has taken: no hello opens two sessions.

Source: ``docs/protocol.md``, section 2, *Replay set*. Four facts keep it exact, bounded and fair:

1. A hello is refused by its time alone once ``now > time + 120``, so its key need not be kept longer.
   Keys are held in one bucket per second of hello time, and a bucket is freed as a whole.
2. What was freed, or came before this set existed, cannot be known. ``known_since_s`` is the first
   hello time about which this set knows everything; what lies before is refused. It starts at the
   server's start and rises past every bucket that is freed, so a clock that steps back does not
   make freed hellos welcome again. A clock that was wrongly ahead for a while costs nothing but the
   hellos up to the latest time that was freed.
3. Look-up and insertion are one plain call: nothing in it could yield to another connection.
4. No user holds more than a share of it: one who makes hellos without end is refused, and leaves the
   set to the others.
"""

from __future__ import annotations

import heapq
from typing import Final, Protocol

from reflex.errors import Replayed
from reflex.protocol.wire import HELLO_TIME_LIMIT_S

DEFAULT_CAPACITY: Final = 2**20  # keys; section 2 names it. About 150 MB when full
# Of the capacity, for each user. The default, 2^14 keys, is 136 new tunnels a second for two minutes on end,
# which no honest client needs, and it takes 64 users who mean harm to fill the set.
USERS_TO_FILL: Final = 64
DEFAULT_USER_CAPACITY: Final = DEFAULT_CAPACITY // USERS_TO_FILL
NOBODY: Final = b""  # whose hellos those of an earlier run are: it is not known


class ReplayMemory(Protocol):
    """Where a server asks: its own set, or, from one of several workers, the set that they share."""

    def check_and_insert(self, ephemeral: bytes, user_id: bytes, time_s: int, now_s: int) -> None:
        """As :meth:`ReplaySet.check_and_insert`."""
        ...


class ReplaySet:
    """Exact memory of the client ephemeral keys that opened a session.

    Args:
        started_s: the server's start, in seconds since 1970; hellos from before are refused, because
            an earlier run of the server may have taken them. What it took from then on can be restored.
        capacity: the most keys that are held; when so many are, new hellos are refused.
        user_capacity: the most keys that are held for one user; when so many are, that user's new hellos
            are refused. None: the capacity's 64th part, at least 1.

    ``len()`` is the number of keys held, those included that have expired since the last call.
    """

    __slots__ = ("_buckets", "_held", "_known_since_s", "_seconds", "_seen", "capacity", "user_capacity")

    def __init__(self, started_s: int, capacity: int = DEFAULT_CAPACITY, user_capacity: int | None = None) -> None:
        self.capacity = capacity
        self.user_capacity = max(1, capacity // USERS_TO_FILL) if user_capacity is None else user_capacity
        self._known_since_s = started_s
        self._seen: set[bytes] = set()
        self._held: dict[bytes, int] = {}  # user id -> how many of them; no zeros
        self._buckets: dict[int, dict[bytes, list[bytes]]] = {}  # hello time -> user id -> keys
        self._seconds: list[int] = []  # a heap of the keys of _buckets: the next to expire comes first

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def known_since_s(self) -> int:
        """Hellos with a time before this one, in seconds since 1970, are refused unseen."""
        return self._known_since_s

    def check_and_insert(self, ephemeral: bytes, user_id: bytes, time_s: int, now_s: int) -> None:
        """Take a hello that has passed every other check, or refuse it.

        Amortised O(1): each key is inserted once and freed once.

        Args:
            ephemeral: the client's ephemeral public key ``E``, 32 bytes.
            user_id: whose hello it is, 16 bytes.
            time_s: the hello's time, in seconds since 1970, already found near enough to ``now_s``.
            now_s: the server's time, in seconds since 1970; may step back between calls.

        Raises:
            Replayed: the key was seen before; or the time is one that this set knows nothing about;
                or the set, or this user's share of it, is full, so that the key could not be remembered.
                The set is as before.
        """
        self._free_expired(now_s)
        if time_s < self._known_since_s:
            raise Replayed("hello from a time about which the replay set knows nothing")
        if ephemeral in self._seen:
            raise Replayed("hello seen before")
        if len(self._seen) >= self.capacity:
            raise Replayed("replay set full: the hello could not be remembered")
        if self._held.get(user_id, 0) >= self.user_capacity:
            raise Replayed("too many hellos of one user to be remembered")
        self._insert(ephemeral, user_id, time_s)

    def restore(self, ephemeral: bytes, time_s: int) -> None:
        """Put in a hello that an earlier run of the server took. It counts for the capacity, and for no user.

        Of several with the same key the one with the latest time must come first; the others change nothing.

        Args:
            ephemeral: its ephemeral public key ``E``, 32 bytes.
            time_s: its time, in seconds since 1970, not before :attr:`known_since_s`.
        """
        if ephemeral not in self._seen:
            self._insert(ephemeral, NOBODY, time_s)

    def _insert(self, ephemeral: bytes, user_id: bytes, time_s: int) -> None:
        bucket = self._buckets.get(time_s)
        if bucket is None:
            bucket = self._buckets[time_s] = {}
            heapq.heappush(self._seconds, time_s)
        bucket.setdefault(user_id, []).append(ephemeral)
        self._seen.add(ephemeral)
        self._held[user_id] = self._held.get(user_id, 0) + 1

    def _free_expired(self, now_s: int) -> None:
        while self._seconds and self._seconds[0] + HELLO_TIME_LIMIT_S < now_s:
            time_s = heapq.heappop(self._seconds)
            for user_id, keys in self._buckets.pop(time_s).items():
                self._seen.difference_update(keys)
                self._held[user_id] -= len(keys)
                if not self._held[user_id]:
                    del self._held[user_id]
            self._known_since_s = max(self._known_since_s, time_s + 1)
