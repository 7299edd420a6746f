"""A flood of strangers, as a program of its own: ``python -m tests.junk PORT RATE SECONDS [--hold] [--one-address]``.

It makes RATE connections a second to PORT on loopback, sends 76 random bytes on each and closes it; with ``--hold`` it
sends 38 of them and keeps it, until it is told to end. Each comes from an address of its own, unless
``--one-address`` is given. At the end, on stderr, how many were made, how many could not be (the listener's
queue was full), and what they took: ``junk: made N, failed M, seconds S, processor seconds P``.

With ``--hold`` the line comes when all are made.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from typing import Final

from tests.webserver import loopback_source

STEP_S: Final = 0.002
IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h: the port is chosen by connect, so that they do not run out


def stranger(port: int, source: str) -> socket.socket | None:
    """A connection, under way or done; None where it could not even be tried."""
    sock = socket.socket()
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
        sock.connect_ex(("127.0.0.1", port))
    except OSError:
        sock.close()
        return None
    return sock


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
    kept: list[socket.socket] = []
    made = failed = number = 0
    total = round(arguments.rate * arguments.seconds)
    begun_s = time.monotonic()
    while number < total:
        due = min(total, int((time.monotonic() - begun_s) * arguments.rate) + 1)
        while number < due:
            number += 1
            source = "127.0.0.2" if arguments.one_address else loopback_source(number)
            sock = stranger(arguments.port, source)
            try:
                if sock is None:
                    raise BlockingIOError
                sock.send(junk[:38] if arguments.hold else junk)
                made += 1
            except OSError:
                failed += 1
            if sock is not None:
                if arguments.hold:
                    kept.append(sock)
                else:
                    sock.close()
        time.sleep(STEP_S)
    taken_s = time.monotonic() - begun_s
    print(
        f"junk: made {made}, failed {failed}, seconds {taken_s:.2f}, processor seconds {time.process_time():.2f}",
        file=sys.stderr,
        flush=True,
    )
    if arguments.hold:
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
