"""Clocks: a web server's ``Date``, and one of this machine that is never set and never sleeps.

For the ``Date`` see docs/protocol.md, section 6, and RFC 9110, section 6.6.1.
"""

from __future__ import annotations

import asyncio
import time
from email.utils import parsedate_to_datetime
from typing import Final

from reflex.errors import DialError
from reflex.net.dial import LookUp, dial, resolve
from reflex.protocol.address import Address

MAX_ANSWER_BYTES: Final = 8_192
WAKE_S: Final = 5.0  # what a clock must jump by to be a sleep, and not a busy moment
# Goes on while the machine sleeps, where there is such a clock (Linux).
_BOOT_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


async def ask_date(address: Address, *, timeout_s: float, look_up: LookUp = resolve) -> int | None:
    """The server's time, in seconds since 1970, by plain HTTP; None where it does not tell one in time."""
    request = f"HEAD / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    try:
        sock = await dial(address, timeout_s=timeout_s, look_up=look_up)
    except DialError:
        return None
    answer = b""
    try:
        async with asyncio.timeout(timeout_s):
            await loop.sock_sendall(sock, request)
            while b"\r\n\r\n" not in answer and len(answer) < MAX_ANSWER_BYTES:
                part = await loop.sock_recv(sock, MAX_ANSWER_BYTES)
                if not part:
                    break
                answer += part
    except (OSError, TimeoutError):
        pass  # what came until then may hold the date
    finally:
        sock.close()
    return parse_date(answer)


def parse_date(answer: bytes) -> int | None:
    """The Date of an HTTP response's head, in seconds since 1970; None where it has none that is valid."""
    lines = answer.split(b"\r\n\r\n", 1)[0].split(b"\r\n")
    if not lines[0].startswith(b"HTTP/1."):
        return None
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"date":
            try:
                date_s = int(parsedate_to_datetime(value.strip().decode("ascii")).timestamp())
            except (ValueError, OverflowError):
                return None
            return date_s if date_s >= 0 else None
    return None


def boot_time_s() -> float:
    """Seconds since some moment, those of sleep included; it is never set."""
    return time.clock_gettime(_BOOT_CLOCK)


class WakeWatch:
    """Tells that the machine, or this process, slept: by the clocks that went on meanwhile.

    The boot clock goes on while the machine or the process sleeps, the wall clock also where a virtual
    machine was stopped and its clock then set. A clock that an operator sets forward looks like that too.
    """

    __slots__ = ("_boot_s", "_wall_s")

    def __init__(self) -> None:
        self._boot_s = boot_time_s()
        self._wall_s = time.time()

    def slept_s(self, planned_s: float) -> float:
        """How much more than planned has passed since the last call; 0.0 where that is less than WAKE_S."""
        boot_s, wall_s = boot_time_s(), time.time()
        slept_s = max(boot_s - self._boot_s, wall_s - self._wall_s) - planned_s
        self._boot_s, self._wall_s = boot_s, wall_s
        return slept_s if slept_s >= WAKE_S else 0.0
