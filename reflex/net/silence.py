"""A connection that gets no answer any more: what comes is read and discarded, and then it is closed.

For peers that must not learn from the moment of the close what was wrong with what they sent: those of a
failed hello, and those of a session that has ended by a fatal error.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import Final

from reflex.loop import drop_reader

_READ_BYTES: Final = 4_096
_NO_LIMIT: Final = sys.maxsize


class Silence:
    """One such connection, until its peer leaves, a time is over, or more has come than is read.

    Args:
        sock: connected and non-blocking; this object's from now on. A reader that it has is replaced.
        wait_s: for how long; random, its maker's to draw.
        limit_bytes: how much is read at the most; random as well, where there is a limit.
        on_end: called once, when the socket is closed.
    """

    __slots__ = ("_left_bytes", "_loop", "_on_end", "_sock", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        *,
        wait_s: float,
        limit_bytes: int = _NO_LIMIT,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._left_bytes = limit_bytes
        self._on_end = on_end
        self._timer = loop.call_later(wait_s, self.end)
        loop.add_reader(sock, self._on_readable)

    def _on_readable(self) -> None:
        try:
            size = len(self._sock.recv(_READ_BYTES))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            size = 0
        self._left_bytes -= size
        if not size or self._left_bytes < 0:
            self.end()

    def end(self) -> None:
        """Close the connection. To be called once."""
        self._timer.cancel()
        drop_reader(self._loop, self._sock.fileno())
        self._sock.close()
        on_end, self._on_end = self._on_end, None  # no cycle is left
        if on_end is not None:
            on_end()
