"""Whether the memory for waiting bytes is nearly used up: asked before anything new is taken, and logged once.

And what is logged where it is used up.
"""

from __future__ import annotations

import logging
from typing import Final

from reflex.complaints import Complaints
from reflex.protocol.window import Budget

log = logging.getLogger(__name__)

_SHED: Final = Complaints()  # of the process, as the memory is


class Pressure:
    """What a daemon asks before it takes a stream or a connection.

    Args:
        budget: of the process.
        effect: what happens to what comes, for the log.
    """

    def __init__(self, budget: Budget, effect: str) -> None:
        self._budget = budget
        self._effect = effect
        self._was_high = False

    def is_high(self) -> bool:
        """Whether to refuse. The first one that is refused is logged, and the first one after that is not."""
        budget = self._budget
        is_high = budget.is_nearly_full
        if is_high is not self._was_high:
            self._was_high = is_high
            if is_high:
                log.warning(
                    "%s: %d of %d bytes (limits.buffered_bytes) wait for slow readers",
                    self._effect,
                    budget.kept,
                    budget.buffered_limit,
                )
            else:
                log.warning("enough bytes were read by now: nothing is refused any more")
        return is_high


def log_shed(budget: Budget) -> None:
    """A stream is reset because the memory is used up: logged now and then, however many are."""
    if _SHED.is_due():
        log.warning(
            "streams are reset: %d of %d bytes (limits.buffered_bytes) wait for slow readers, and more came",
            budget.kept,
            budget.buffered_limit,
        )
