"""A TCP relay that holds everything back for a while, in both directions: a long way on one machine.

``python -m bench.delay --listen PORT --to PORT --delay-ms 50`` makes a round trip of 100 ms. Each direction
of a connection has a thread that reads and one that writes; between them waits what is on its way. The
way has a length, not a width, unless ``--rate-mbit`` gives it one: then bytes leave one after the other at
that rate. Connecting takes no longer than without the relay.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
import time
from collections import deque
from typing import Final

LOOPBACK: Final = "127.0.0.1"
READ_BYTES: Final = 256 * 1024
SOCKET_BUFFER_BYTES: Final = 1 << 20  # few wake-ups; the kernel bounds it
# What one direction may have on its way: 10 Gbit/s for 50 ms are 60 MiB, four times that is never full.
MAX_UNDERWAY_BYTES: Final = 256 * 1024 * 1024
BACKLOG: Final = 128


class Way:
    """One direction: what is read at the one end is written at the other, ``delay_s`` later."""

    def __init__(self, source: socket.socket, sink: socket.socket, delay_s: float, bytes_per_s: float) -> None:
        """``bytes_per_s`` 0 is no limit."""
        self._source, self._sink = source, sink
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._underway: deque[tuple[float, bytes]] = deque()  # (due, bytes); no bytes: the end
        self._underway_bytes = 0
        self._free_s = 0.0  # when the way's entrance is free again
        self._changed = threading.Condition()
        for run in (self._read, self._write):
            threading.Thread(target=run, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = self._source.recv(READ_BYTES)
            except OSError:
                data = b""
            now_s = time.monotonic()
            if self._bytes_per_s:
                now_s = self._free_s = max(now_s, self._free_s) + len(data) / self._bytes_per_s
            with self._changed:
                while self._underway_bytes > MAX_UNDERWAY_BYTES:
                    self._changed.wait()
                self._underway.append((now_s + self._delay_s, data))
                self._underway_bytes += len(data)
                self._changed.notify_all()
            if not data:
                return

    def _write(self) -> None:
        is_open = True
        while True:
            with self._changed:
                while not self._underway:
                    self._changed.wait()
                due_s, data = self._underway.popleft()
                self._underway_bytes -= len(data)
                self._changed.notify_all()
            if (wait_s := due_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            try:
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                elif is_open:
                    self._sink.sendall(data)
            except OSError:
                is_open = False
                with contextlib.suppress(OSError):
                    self._source.shutdown(socket.SHUT_RD)  # nobody reads it any more: the reader ends
            if not data:
                return


def serve(listen_port: int, to_port: int, delay_s: float, bytes_per_s: float) -> None:
    """Relay every connection to ``listen_port`` until the process is ended."""
    with socket.create_server((LOOPBACK, listen_port), backlog=BACKLOG) as listener:
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection((LOOPBACK, to_port))
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
            Way(near, far, delay_s, bytes_per_s)
            Way(far, near, delay_s, bytes_per_s)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.delay", description="a TCP relay that delays")
    parser.add_argument("--listen", type=int, required=True, metavar="PORT")
    parser.add_argument("--to", type=int, required=True, metavar="PORT")
    parser.add_argument("--delay-ms", type=float, default=50.0, help="of each direction (default: 50)")
    parser.add_argument("--rate-mbit", type=float, default=0.0, help="of each direction (default: no limit)")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        serve(arguments.listen, arguments.to, arguments.delay_ms / 1e3, arguments.rate_mbit * 1e6 / 8)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
