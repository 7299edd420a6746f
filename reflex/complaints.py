"""Lines of the log that could come in floods, because strangers, a user or a full disk would have it so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 10.0
BURST_LINES: Final = 10  # of a kind at once: a client's eight tunnels that are lost together are all seen


class Complaints:
    """Whether a line about one and the same trouble may be written again.

    Args:
        clock: seconds of a clock that is never set.
        interval_s: at most one line in so many seconds.
    """

    __slots__ = ("_about", "_clock", "_interval_s", "_next_s")

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._next_s = -float("inf")
        self._about = ""

    def is_due(self, about: str = "") -> bool:
        """Whether to write it; it is taken as written then.

        Args:
            about: what the trouble is; another one than the last is written at once.
        """
        now_s = self._clock()
        if now_s < self._next_s and about == self._about:
            return False
        self._about = about
        self._next_s = now_s + self._interval_s
        return True


class Throttle:
    """The level of lines that one user can cause without end: ``BURST_LINES`` of each kind at once, and one in
    ``INTERVAL_S`` from then on; the others are for debug.

    Args:
        clock: seconds of a clock that is never set.
    """

    __slots__ = ("_clock", "_due_s")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due_s: dict[str, float] = {}  # by kind: when the next line would be due if they came evenly

    def level(self, kind: str, level: int) -> int:
        """``level``, or debug where there were too many of the kind. One of few kinds: each is kept."""
        now_s = self._clock()
        due_s = max(now_s, self._due_s.get(kind, now_s))
        if due_s - now_s > (BURST_LINES - 1) * INTERVAL_S:
            return logging.DEBUG
        self._due_s[kind] = due_s + INTERVAL_S
        return level
