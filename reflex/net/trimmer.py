"""Gives buffers back to the allocator when nobody has needed them for a while."""

from __future__ import annotations

import asyncio
from typing import Final

from reflex.pool import TieredPool

TRIM_INTERVAL_S: Final = 60.0  # what a burst has left is gone after two of them; what comes every minute stays


class Trimmer:
    """Calls :meth:`TieredPool.trim` every so often, until it is stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, buffers: TieredPool) -> None:
        self._loop = loop
        self._buffers = buffers
        self._timer = loop.call_later(TRIM_INTERVAL_S, self._trim)

    def _trim(self) -> None:
        self._buffers.trim()
        self._timer = self._loop.call_later(TRIM_INTERVAL_S, self._trim)

    def stop(self) -> None:
        """Trim no more. Any number of times."""
        self._timer.cancel()
