"""How fast a user may go: bytes in a second for one direction, and dials in a second.

Both are token buckets. Of bytes, all workers of a server have each the whole bucket, and take from theirs as well
what they see that the others took (:class:`reflex.worker.UserRow`): so the rate holds for all together, without a
question and an answer for it. Between two looks they may take too much, and make up for it after the next one.
Of dials there is one bucket, which all of them read and write.

Who finds the bucket of bytes empty waits in a queue. One timer, which runs while somebody waits, serves it in turn.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from reflex.worker import UserField, UserRow

BURST_S: Final = 0.125  # what a bucket holds: so much time's worth of its rate
TICK_S: Final = 0.04  # how often those who wait are served, and the other workers looked at
MIN_BURST_BYTES: Final = 2_048
MIN_GRANT_BYTES: Final = 1_024  # less is not worth a record
MIN_SHARE_BYTES: Final = 4_096  # of one who waits, in one turn: more of them get less often, not less at once

NS_PER_S: Final = 1_000_000_000

Waiter = Callable[[], None]

_WAITING: Final = {UserField.BYTES_UP: UserField.WAITING_UP, UserField.BYTES_DOWN: UserField.WAITING_DOWN}


class Pace:
    """Bytes in a second.

    Args:
        bytes_per_s: of all workers together.
        row: this worker's numbers of the user, and the others'.
        direction: BYTES_UP or BYTES_DOWN, where what was taken is published.
        on_wait: called whenever somebody has to wait.
    """

    __slots__ = (
        "_balance",
        "_burst",
        "_crowd",
        "_grant",
        "_last_s",
        "_looked_s",
        "_loop",
        "_on_wait",
        "_rate",
        "_row",
        "_seen",
        "_share",
        "_taken",
        "_taken_field",
        "_timer",
        "_waiting",
        "_waiting_field",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        bytes_per_s: int,
        row: UserRow,
        direction: UserField,
        on_wait: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._rate = bytes_per_s
        self._burst = max(bytes_per_s * BURST_S, MIN_BURST_BYTES)
        self._grant = max(bytes_per_s * TICK_S / 2, MIN_GRANT_BYTES)
        self._balance: float = self._burst
        self._last_s = self._looked_s = loop.time()
        self._row = row
        self._taken_field = direction
        self._waiting_field = _WAITING[direction]
        self._seen = row.elsewhere(direction)
        self._crowd = 1.0  # who waits in all workers, for each that waits in this one
        self._taken = 0
        self._on_wait = on_wait
        self._waiting: OrderedDict[Waiter, None] = OrderedDict()  # in their order
        self._share: float | None = None  # what is left for whom the timer serves just now
        self._timer: asyncio.TimerHandle | None = None

    def allowance(self, wanted_bytes: int) -> int:
        """How much may go now, of 1 byte or more that could; 0: :meth:`wait`."""
        if self._share is not None:
            return int(min(wanted_bytes, self._share, self._balance / self._crowd))
        if self._waiting:
            return 0  # they came first
        self._refill()
        room = self._balance / self._crowd
        return 0 if room < min(wanted_bytes, self._grant / self._crowd) else int(min(wanted_bytes, room))

    def take(self, size_bytes: int) -> None:
        """So much has gone, not more than was allowed."""
        self._balance -= size_bytes
        if self._share is not None:
            self._share -= size_bytes
        self._taken += size_bytes
        self._row.publish(self._taken_field, self._taken)

    def wait(self, waiter: Waiter) -> None:
        """Call the waiter, once, when its turn has come: it may ask again, and wait again."""
        if waiter not in self._waiting:
            self._waiting[waiter] = None
            self._on_wait()
        if self._timer is None and self._share is None:
            self._row.publish(self._waiting_field, len(self._waiting))
            self._timer = self._loop.call_later(TICK_S, self._serve)

    def forget(self, waiter: Waiter) -> None:
        """It waits no longer, if it did: what has ended is not kept until its turn comes."""
        self._waiting.pop(waiter, None)

    def _refill(self) -> None:
        now_s = self._loop.time()
        gained = self._rate * (now_s - self._last_s)
        self._last_s = now_s
        if self._seen and now_s - self._looked_s >= TICK_S:
            self._looked_s = now_s
            taken, self._seen = _growth(self._row.elsewhere(self._taken_field), self._seen)
            gained -= taken
            here = max(1, len(self._waiting))
            self._crowd = (here + sum(self._row.elsewhere(self._waiting_field))) / here
        self._balance = min(self._burst, self._balance + gained)

    def _serve(self) -> None:
        """Everybody who waits gets a share, as far as the bucket reaches; who comes back is the last."""
        self._timer = None
        self._refill()
        left = len(self._waiting)
        try:
            while left and self._waiting and self._balance >= self._grant:
                room = self._balance / self._crowd
                self._share = max(room / left, min(room, MIN_SHARE_BYTES))
                left -= 1
                waiter, _ = self._waiting.popitem(last=False)
                waiter()
        finally:
            self._share = None
            self._row.publish(self._waiting_field, len(self._waiting))
            if self._waiting:
                self._timer = self._loop.call_later(TICK_S, self._serve)


class DialPace:
    """Dials in a second. Who comes too early gets a time of its own, so that nobody is overtaken.

    Args:
        dials_per_s: of all workers together. So many, and one at least, may be dialled at once.
        row: this worker's numbers of the user, and the others'.
        max_wait_s: who would have to wait for longer is refused.
    """

    __slots__ = ("_burst_ns", "_interval_ns", "_loop", "_max_wait_ns", "_row")

    def __init__(self, loop: asyncio.AbstractEventLoop, dials_per_s: float, row: UserRow, *, max_wait_s: float) -> None:
        self._loop = loop
        self._interval_ns = round(NS_PER_S / dials_per_s)
        self._burst_ns = max(self._interval_ns, NS_PER_S)
        self._row = row
        self._max_wait_ns = round(max_wait_s * NS_PER_S)

    def book(self) -> float | None:
        """How long the next dial has to wait, in seconds; None where that would be too long.

        The bucket is known by the time when it is full again (ITU-T I.371 calls it the theoretical arrival time),
        which every dial puts off. The latest that any worker has published counts: so that what the others have
        dialled is known to a worker that was idle. Two that book within the same microsecond may see one dial as both.
        """
        now_ns = int(self._loop.time() * NS_PER_S)
        full_ns = max(now_ns, self._row.own(UserField.DIALS_FULL_NS), *self._row.elsewhere(UserField.DIALS_FULL_NS))
        full_ns += self._interval_ns
        wait_ns = max(0, full_ns - self._burst_ns - now_ns)
        if wait_ns > self._max_wait_ns:
            return None
        self._row.publish(UserField.DIALS_FULL_NS, full_ns)
        return wait_ns / NS_PER_S


def _growth(numbers: list[int], before: list[int]) -> tuple[int, list[int]]:
    """By how much the numbers have grown in all, and the numbers. A worker that was replaced began at 0 again."""
    return sum(max(0, new - old) for new, old in zip(numbers, before, strict=True)), numbers
