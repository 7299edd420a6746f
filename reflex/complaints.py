"""Lines of the log that could come in floods, because strangers or a full disk would have it so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 10.0


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
