"""Name look-ups of the server: so many at a time for each user, so that none of them keeps the others waiting.

A look-up is a call of the system's resolver in a thread. Once begun it cannot be stopped, and a name whose
name server does not answer takes many seconds. A user who opens streams to such names, and resets them at
once, could occupy every thread for hours. So a look-up keeps its user's place until the resolver is done
with it, whether anybody still waits for it or not; further ones wait their turn without a thread, and one
whose dial is given up meanwhile is never begun.

The threads are daemon threads: a process that ends does not wait for the resolver.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any, Final

LOOKUPS_PER_USER: Final = 8
LOOKUP_THREADS: Final = 64  # of a process: some users may have names that take long, and others still get through


class Lookups:
    """One user's look-ups.

    Args:
        threads: a place in it is a thread; shared by all users.
        limit: how many of this user may be under way.
    """

    __slots__ = ("_places", "_threads")

    def __init__(self, threads: asyncio.Semaphore, *, limit: int = LOOKUPS_PER_USER) -> None:
        self._threads = threads
        self._places = asyncio.Semaphore(limit)

    async def getaddrinfo(self, host: str, port: int, *, family: int = 0) -> list[tuple[Any, ...]]:
        """As ``loop.getaddrinfo`` for TCP, when it is this look-up's turn.

        Raises:
            OSError, ValueError: as the resolver does.
        """
        await self._places.acquire()
        try:
            await self._threads.acquire()
        except BaseException:
            self._places.release()
            raise
        result: asyncio.Future[list[tuple[Any, ...]]] = asyncio.get_running_loop().create_future()
        result.add_done_callback(self._on_done)
        try:
            threading.Thread(target=_look_up, args=(result, host, port, family), name="lookup", daemon=True).start()
        except RuntimeError as error:
            result.set_exception(OSError(f"no thread for a look-up: {error}"))
        return await asyncio.shield(result)  # who gives up does not give its place up

    def _on_done(self, result: asyncio.Future[Any]) -> None:
        del result
        self._threads.release()
        self._places.release()


def _look_up(result: asyncio.Future[Any], host: str, port: int, family: int) -> None:
    """In a thread: ask the resolver, and tell the loop."""
    tell: tuple[Any, ...]
    try:
        tell = result.set_result, socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except Exception as error:  # whatever it is, it is the waiter's to see
        tell = result.set_exception, error
    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
        result.get_loop().call_soon_threadsafe(*tell)
