"""Asks a web server for its ``Date`` (docs/protocol.md, section 6; RFC 9110, section 6.6.1)."""

from __future__ import annotations

import asyncio
from email.utils import parsedate_to_datetime
from typing import Final

from reflex.errors import DialError
from reflex.net.dial import LookUp, dial, resolve
from reflex.protocol.address import Address

MAX_ANSWER_BYTES: Final = 8_192


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
                return int(parsedate_to_datetime(value.strip().decode("ascii")).timestamp())
            except (ValueError, OverflowError):
                return None
    return None
