"""The end of a tunnel behind its CLOSE and FIN: when its socket may be closed.

What arrives for a socket that is closed is answered by RST, and the kernel drops what it had not delivered yet.
A peer that takes the last bytes of a stream gives credit for them, so that it does send. The socket is kept, and
read, until all is delivered.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from collections.abc import Callable


class Farewell:
    """Waits for the peer's FIN: shortly, but for as long as the kernel delivers what was sent.

    Args:
        sock: FIN was sent on it; it stays the caller's.
        wait_s: for the peer's FIN, once all is delivered; how often it is looked.
        idle_s: for a peer that takes nothing of what is left.
        on_end: called once, unless cancelled: the socket may be closed.
    """

    __slots__ = ("_idle_s", "_left_bytes", "_loop", "_on_end", "_sock", "_timer", "_until_s", "_wait_s")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        *,
        wait_s: float,
        idle_s: float,
        on_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._wait_s = wait_s
        self._idle_s = idle_s
        self._on_end = on_end
        self._left_bytes = undelivered_bytes(sock)
        self._until_s = loop.time() + idle_s
        self._timer = loop.call_later(wait_s, self._look)

    def _look(self) -> None:
        left_bytes = undelivered_bytes(self._sock)
        now_s = self._loop.time()
        if left_bytes < self._left_bytes:
            self._left_bytes = left_bytes
            self._until_s = now_s + self._idle_s
        if left_bytes and now_s < self._until_s:
            self._timer = self._loop.call_later(self._wait_s, self._look)
        else:
            self._on_end()

    def cancel(self) -> None:
        """The peer's FIN is there, or nobody waits for it any longer."""
        self._timer.cancel()


def undelivered_bytes(sock: socket.socket) -> int:
    """How many bytes were sent that the peer's machine has not acknowledged; the FIN is not counted."""
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return 0  # it is gone
    return max(0, int.from_bytes(answer, sys.byteorder) - 1)
