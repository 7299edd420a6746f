"""A flood of strangers, as a program of its own: ``python -m tests.junk PORT RATE SECONDS [--hold] [--one-address]``.

It begins RATE connections a second to PORT on loopback, sends 76 random bytes on each and closes it; with ``--hold``
it sends 38 of them and keeps it, until it is told to end. Each comes from an address of its own, unless
``--one-address`` is given. One that is not there at once, since the listener's queue is full, is left to the kernel,
which sends its SYN again after a second, and is given up after PATIENCE_S. At the end, on stderr: ``junk: made N,
attempted A, seconds S, processor seconds P``; SECONDS is how long it took to begin them.

With ``--hold`` the line comes when all are made. Most of what one costs here is the kernel's work on both ends of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from typing import Final

from tests.webserver import loopback_source

STEP_S: Final = 0.002
PATIENCE_S: Final = 1.5  # for a connection: one more SYN
HELD_PATIENCE_S: Final = 20.0
IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h: the port is chosen by connect, so that they do not run out
EVENTS: Final = 512  # of one poll


class Flood:
    """Connections under way.

    Args:
        junk: what is sent on each.
        hold: keep them; else each is closed once it has sent.
        patience_s: how long one may take to be made.
    """

    def __init__(self, port: int, junk: bytes, *, hold: bool, patience_s: float) -> None:
        self._address = ("127.0.0.1", port)
        self._junk = junk
        self._hold = hold
        self._patience_s = patience_s
        self._epoll = select.epoll()
        self._pending: dict[int, socket.socket] = {}  # by descriptor
        self._due: deque[tuple[float, int, socket.socket]] = deque()  # when each of them is given up
        self._kept: list[socket.socket] = []
        self.made = self.attempted = 0

    def begin(self, source: str) -> None:
        """One more connection, from this address."""
        self.attempted += 1
        sock = socket.socket()
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
            sock.connect_ex(self._address)
        except OSError:
            sock.close()
            return
        if not self._send(sock):  # on loopback it is there, as a rule
            fd = sock.fileno()
            self._pending[fd] = sock
            self._due.append((time.monotonic() + self._patience_s, fd, sock))
            self._epoll.register(fd, select.EPOLLOUT)

    def _send(self, sock: socket.socket) -> bool:
        """Whether that was all: it has sent its junk, or failed."""
        try:
            sock.send(self._junk)
        except BlockingIOError:
            return False
        except OSError:
            sock.close()
            return True
        self.made += 1
        if self._hold:
            self._kept.append(sock)
        else:
            sock.close()
        return True

    def go_on(self, wait_s: float) -> None:
        """Send on those that are there by now, waiting for one for so long; give up those that took too long."""
        for fd, _ in self._epoll.poll(wait_s, EVENTS):
            sock = self._pending.pop(fd)
            self._epoll.unregister(fd)
            if not self._send(sock):
                sock.close()
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:
            _, fd, sock = self._due.popleft()
            if self._pending.get(fd) is sock:
                del self._pending[fd]
                sock.close()

    @property
    def is_over(self) -> bool:
        """Nothing is under way."""
        return not self._pending


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("rate", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--hold", action="store_true")
    parser.add_argument("--one-address", action="store_true")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    junk = b"\x00" + os.urandom(75)
    flood = Flood(
        arguments.port,
        junk[:38] if arguments.hold else junk,
        hold=arguments.hold,
        patience_s=HELD_PATIENCE_S if arguments.hold else PATIENCE_S,
    )
    total = round(arguments.rate * arguments.seconds)
    begun_s = time.monotonic()
    while flood.attempted < total:
        due = min(total, int((time.monotonic() - begun_s) * arguments.rate) + 1)
        while flood.attempted < due:
            flood.begin("127.0.0.2" if arguments.one_address else loopback_source(flood.attempted + 1))
        flood.go_on(STEP_S)
    taken_s = time.monotonic() - begun_s
    while not flood.is_over:
        flood.go_on(PATIENCE_S)
    print(
        f"junk: made {flood.made}, attempted {flood.attempted}, seconds {taken_s:.2f},"
        f" processor seconds {time.process_time():.2f}",
        file=sys.stderr,
        flush=True,
    )
    if arguments.hold:
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
