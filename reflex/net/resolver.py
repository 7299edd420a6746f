"""Names to addresses in threads of our own, shared so that nobody takes them all.

The system's resolver blocks, for 10 s and more where nobody answers, and cannot be interrupted: a look-up
that is given up goes on in its thread. Event loops have few such threads (uvloop runs two look-ups at a time),
so that two names whose servers are silent would stop everybody.

Here look-ups are counted by who asked for them. One more may start while its owner has fewer running than
there are threads free. So a single owner gets half of the threads, two a third each, and one that has
none running finds a thread as long as any is free. What may not start waits its turn, within its dial's time
limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any, Final

from reflex.errors import DialError
from reflex.protocol.wire import Status

# Family, type, protocol, canonical name, socket address: what getaddrinfo gives and connecting takes.
AddrInfo = tuple[int, int, int, str, tuple[Any, ...]]

THREADS: Final = 64  # started as they are needed
# Of each family. A name may have thousands, each of which is judged and dialled: for one who asks, and at
# everybody's cost. More than the first few are never reached within the time of a dial.
MAX_ADDRESSES: Final = 8


class _Job:
    """One look-up, and who waits for it."""

    __slots__ = ("future", "host", "owner", "port")

    def __init__(self, owner: Hashable, host: str, port: int, future: asyncio.Future[list[AddrInfo]]) -> None:
        self.owner = owner
        self.host = host
        self.port = port
        self.future = future


class Resolver:
    """The threads of one process. They end with it, whatever they hang in.

    Args:
        threads: look-ups that may run at the same time.
        look_up: stands for ``socket.getaddrinfo``; for tests.
    """

    def __init__(self, *, threads: int = THREADS, look_up: Callable[..., Any] | None = None) -> None:
        self._max_threads = threads
        self._look_up = look_up
        self._started = 0
        self._jobs: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, _Job]] = queue.SimpleQueue()
        self._running: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[_Job]] = {}

    @property
    def running(self) -> int:
        """How many look-ups run, those that nobody waits for any more included."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """How many wait for a thread."""
        return sum(map(len, self._waiting.values()))

    async def resolve(self, owner: Hashable, host: str, port: int) -> list[AddrInfo]:
        """Resolve a name to the addresses for a TCP connection, in the system's order.

        Args:
            owner: whose share of the threads is used.
            host: a name, or the text of an IP address; ASCII.
            port: put into every result.

        Returns:
            At least one result.

        Raises:
            DialError: HOST_UNREACHABLE, the name has no address or nobody could be asked; GENERAL_FAILURE,
                this machine has run out of something.
        """
        job = _Job(owner, host, port, asyncio.get_running_loop().create_future())
        if owner not in self._waiting and self._may_start(owner):
            self._start(job)
        else:
            self._waiting.setdefault(owner, deque()).append(job)
        try:
            return checked(host, await job.future)
        finally:
            waiting = self._waiting.get(owner)
            if waiting is not None and job in waiting:  # given up before it began
                waiting.remove(job)
                if not waiting:
                    del self._waiting[owner]

    def _may_start(self, owner: Hashable) -> bool:
        return self._running[owner] < self._max_threads - self.running

    def _start(self, job: _Job) -> None:
        if self._started <= self.running and self._started < self._max_threads:
            try:
                threading.Thread(target=self._work, name="resolver", daemon=True).start()
            except RuntimeError as error:  # the system grants no more threads
                if not self._started:
                    job.future.set_exception(DialError(Status.GENERAL_FAILURE, f"cannot resolve {job.host}: {error}"))
                    return
                self._max_threads = self._started
            else:
                self._started += 1
        self._running[job.owner] += 1
        self._jobs.put((job.future.get_loop(), job))

    def _work(self) -> None:
        while True:
            loop, job = self._jobs.get()
            outcome: Any
            try:
                # Bytes: for a text Python would load its IDNA codec, which wants a free descriptor.
                outcome = (self._look_up or socket.getaddrinfo)(
                    job.host.encode("ascii"), job.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
            except socket.gaierror as error:
                outcome = _want_of_descriptors() or error
            except Exception as error:
                outcome = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._ended, job, outcome)

    def _ended(self, job: _Job, outcome: Any) -> None:
        self._running[job.owner] -= 1
        if not self._running[job.owner]:
            del self._running[job.owner]
        if not job.future.done():
            if isinstance(outcome, Exception):
                error = failure(job.host, outcome)
                error.__cause__ = outcome
                job.future.set_exception(error)
            else:
                job.future.set_result(outcome)
        self._start_waiting()

    def _start_waiting(self) -> None:
        for owner, waiting in list(self._waiting.items()):
            while waiting and self._may_start(owner):
                self._start(waiting.popleft())
            if not waiting:
                del self._waiting[owner]


def _want_of_descriptors() -> OSError | None:
    """Why a socket cannot be had now, if so: the system's resolver tells that as if the name were at fault."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    except OSError as error:
        return error
    return None


def checked(host: str, found: list[Any]) -> list[AddrInfo]:
    """Those of the results that are IP addresses, MAX_ADDRESSES of each family. Raises DialError where none is."""
    room = {socket.AF_INET: MAX_ADDRESSES, socket.AF_INET6: MAX_ADDRESSES}
    infos: list[AddrInfo] = []
    for info in found:
        if room.get(info[0]):
            room[info[0]] -= 1
            infos.append(info)
    if not infos:
        raise DialError(Status.HOST_UNREACHABLE, f"cannot resolve {host}: it has no address")
    return infos


def failure(host: str, error: Exception) -> DialError:
    """What an exception of getaddrinfo means to who wants to dial."""
    is_of_name = isinstance(error, (socket.gaierror, ValueError))  # ValueError: no resolver takes such a label
    status = Status.HOST_UNREACHABLE if is_of_name else Status.GENERAL_FAILURE
    return DialError(status, f"cannot resolve {host}: {getattr(error, 'strerror', None) or error}")
