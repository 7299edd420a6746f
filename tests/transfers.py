"""Transfers that know what must arrive: a target and its applications, and how each transfer went.

Nothing tells an application how much is to come but the end itself, so that an end that looks clean
although it is none would be taken for one, and counted.
"""

from __future__ import annotations

import errno
import hashlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from bench.origin import block
from tests.processes import LoopbackServer, SocksReplyError, receive_exactly, socks_connect

HANG_S: Final = 30.0  # what took longer hung
CHUNK_BYTES: Final = 65_536
HEAD: Final = struct.Struct(">cIQ")  # what to do, the offset in the block, the size
DIGEST: Final = hashlib.sha256().digest_size


def content(offset: int, size: int) -> bytes:
    """So many of the seeded bytes."""
    data = block()
    whole = data[offset:]
    while len(whole) < size:
        whole += data
    return whole[:size]


class TransferTarget(LoopbackServer):
    """Sends or takes what a connection's head says, and ends.

    Attributes:
        false_ends: uploads that ended by FIN before they were whole; damaged: that were whole and wrong.
    """

    def __init__(self) -> None:
        self.false_ends = 0
        self.damaged = 0
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        try:
            what, offset, size = HEAD.unpack(receive_exactly(sock, HEAD.size))
        except ConnectionResetError:
            return
        except ConnectionError:  # FIN amid the head, where the application never ends before it
            self.false_ends += 1
            return
        if what == b"d":
            sock.sendall(content(offset, size))
            return
        received = hashlib.sha256()
        count = 0
        while data := sock.recv(CHUNK_BYTES):
            received.update(data)
            count += len(data)
        if count != size:
            self.false_ends += 1
        elif received.digest() != hashlib.sha256(content(offset, size)).digest():
            self.damaged += 1
        sock.sendall(received.digest())


@dataclass
class Tally:
    """How transfers went, and how long the longest took.

    ``outcomes``: "whole"; "cut" (by RST); "refused" (SOCKS5 said so); and what must not be: "damaged",
    "false end" (FIN before it was whole) and "hung".
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return f"{self.outcomes.total()} transfers: {counts}; the longest took {self.longest_s:.1f} s"

    @property
    def faults(self) -> int:
        """How many went as none may."""
        return sum(self.outcomes[name] for name in ("damaged", "false end", "hung"))


def transfer(socks_port: int, target_port: int, luck: random.Random) -> str:
    """One transfer, its kind and size drawn; its outcome."""
    offset = luck.randrange(len(block()))
    size = int(2_000_000 ** luck.random())
    is_download = luck.random() < 0.6
    try:
        with socks_connect(socks_port, "127.0.0.1", target_port, timeout_s=HANG_S) as sock:
            sock.sendall(HEAD.pack(b"d" if is_download else b"u", offset, size))
            expected = content(offset, size)
            if not is_download:
                sock.sendall(expected)
                sock.shutdown(socket.SHUT_WR)
                expected = hashlib.sha256(expected).digest()
            got = bytearray()
            while data := sock.recv(CHUNK_BYTES):
                got += data
    except TimeoutError:
        return "hung"
    except SocksReplyError:
        return "refused"
    except (ConnectionResetError, BrokenPipeError):
        return "cut"
    except ConnectionError:
        return "refused"  # FIN amid the SOCKS5 conversation
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return "cut"  # the reset was there before this side's FIN
    if len(got) != len(expected):
        return "false end"
    return "whole" if hashlib.sha256(got).digest() == hashlib.sha256(expected).digest() else "damaged"


def run_transfers(
    socks_port: int,
    target: TransferTarget,
    count: int,
    *,
    at_once: int,
    seed: int,
    go_on: Callable[[], bool] = lambda: True,
) -> Tally:
    """So many transfers, so many at once, for as long as ``go_on`` says; the target's findings are counted in."""
    tally = Tally()
    lock = threading.Lock()

    def one(number: int) -> None:
        if not go_on():
            return
        begun_s = time.monotonic()
        outcome = transfer(socks_port, target.port, random.Random(f"{seed}/{number}"))
        took_s = time.monotonic() - begun_s
        if took_s > HANG_S:
            outcome = "hung"
        with lock:
            tally.outcomes[outcome] += 1
            tally.longest_s = max(tally.longest_s, took_s)
            if outcome in ("damaged", "false end", "hung"):
                tally.notes.append(f"transfer {number}: {outcome} after {took_s:.1f} s")

    false_ends, damaged = target.false_ends, target.damaged
    with ThreadPoolExecutor(at_once) as threads:
        list(threads.map(one, range(count)))
    tally.outcomes["false end"] += target.false_ends - false_ends
    tally.outcomes["damaged"] += target.damaged - damaged
    tally.outcomes += Counter()  # drop what is 0
    return tally
