"""What a worker has of the others: one of several processes that share a daemon's ports.

The parent (:mod:`reflex.supervisor`) makes a :class:`WorkerContext` for each worker before it forks it off:

- its own listening sockets, one of a group for each address, among which the kernel spreads the connections;
- the replay set, which is the parent's and is asked through a socket pair (:class:`RemoteReplaySet`);
- the other workers' numbers of connections, and of tunnels among them, in shared memory (:class:`SharedCount`),
  and what each of them counts of the users that have limits of their own (:class:`UserTable`).

A worker takes its orders from the parent alone (:class:`ParentControl`): a terminal and a service manager send
their signals to every process, and what is one order must not look like two. If the parent is gone, the worker
drains, and signals count again.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from reflex.errors import Replayed

log = logging.getLogger(__name__)

# What the processes say to each other, one message a datagram.
QUERY: Final = struct.Struct("!I32s16sqq")  # sequence, ephemeral key, user id, hello's time, now
SEQUENCE: Final = struct.Struct("!I")  # an answer: this, then why the hello is refused; nothing if it is taken
READY: Final = b"ready"
FAILED: Final = b"failed:"  # then why
REPORT: Final = b"report"
STOP: Final = b"stop:"  # then the signal's number, one byte
ASK: Final = b"ask"  # whether the worker's loop still runs
ALIVE: Final = b"alive"  # the answer
MESSAGE_MAX_BYTES: Final = 4_096

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)  # which the parent handles

# The worker stands still meanwhile. The parent needs a ten-thousandth of it, and with a replay file as long as a write
# to it takes.
ANSWER_TIMEOUT_S: Final = 1.0
COUNT: Final = struct.Struct("@Q")


class SharedCounts:
    """One number for each worker and one of the parent's (number 0), in memory that processes forked off share.

    Each number has one writer, and is written as a whole.
    """

    def __init__(self, workers: int) -> None:
        self._values = memoryview(mmap.mmap(-1, COUNT.size * (workers + 1))).cast("Q")

    def __getitem__(self, number: int) -> int:
        return self._values[number]

    def __setitem__(self, number: int, value: int) -> None:
        self._values[number] = value

    def of_all_workers(self) -> int:
        """The sum of the workers' numbers."""
        return sum(self._values[1:])


class SharedCount:
    """A worker's own number, and the sum of the others'.

    Who checks a limit against the sum and then raises its own number may be overtaken by the others between the
    two: a limit may be exceeded by one for each other worker, for connections accepted at the same moment.
    """

    def __init__(self, counts: SharedCounts, number: int) -> None:
        self._counts = counts
        self._number = number

    def publish(self, value: int) -> None:
        """The worker's own number is this from now on."""
        self._counts[self._number] = value

    def elsewhere(self) -> int:
        """The sum of the other workers' numbers."""
        return self._counts.of_all_workers() - self._counts[self._number]


class UserField(IntEnum):
    """What a worker counts of one user."""

    TUNNELS = 0  # that are open
    STREAMS = 1  # that are open, or still deliver what had arrived
    DIALS_FULL_NS = 2  # when its bucket of dials is full again, by what the worker has dialled; the loop's clock
    BYTES_UP = 3  # so far, from the tunnels to the targets
    BYTES_DOWN = 4  # so far, from the targets into the tunnels
    WAITING_UP = 5  # streams that wait to go on
    WAITING_DOWN = 6
    NOTED_MONTH = 7  # the last one whose bytes it said were used up, such as 202611


class UserTable:
    """For each worker and each user a row of numbers, in memory that processes forked off share.

    Each row has one writer, the worker, and each number is written as a whole.
    """

    def __init__(self, workers: int, users: int) -> None:
        self._workers = workers
        self._row_size = len(UserField)
        self._worker_size = self._row_size * users
        # Memory of no bytes cannot be mapped; pages that nobody writes to cost nothing.
        self._values = memoryview(mmap.mmap(-1, COUNT.size * max(1, workers * self._worker_size))).cast("Q")

    def row(self, worker: int, user: int) -> UserRow:
        """One worker's row of one user; workers count from 1, users from 0."""
        offsets = [number * self._worker_size + user * self._row_size for number in range(self._workers)]
        own = offsets.pop(worker - 1)
        return UserRow(self._values, own, offsets)

    def clear(self, worker: int) -> None:
        """A worker has ended: its numbers are 0 from now on."""
        start = (worker - 1) * self._worker_size
        for index in range(start, start + self._worker_size):
            self._values[index] = 0


class UserRow:
    """A worker's own numbers of one user, and those of the other workers.

    Who raises a number that has a limit publishes it first and then looks at the sum. Of two workers that race for
    the last place at least one sees the other's number, so the limit holds; both may see it, and refuse.
    """

    __slots__ = ("_others", "_own", "_values")

    def __init__(self, values: memoryview, own: int, others: list[int]) -> None:
        self._values = values
        self._own = own
        self._others = others

    def publish(self, field: UserField, value: int) -> None:
        """The worker's own number is this from now on."""
        self._values[self._own + field] = value

    def own(self, field: UserField) -> int:
        """What the worker published last."""
        return self._values[self._own + field]

    def elsewhere(self, field: UserField) -> list[int]:
        """The other workers' numbers."""
        return [self._values[offset + field] for offset in self._others]


class RemoteReplaySet:
    """The replay set that all workers share, as one of them sees it: each call asks the parent and waits.

    Args:
        sock: a worker's end of a SOCK_SEQPACKET pair.
        counts: where the parent writes the size of the set, as its own number.
        timeout_s: how long to wait for the answer.
    """

    def __init__(self, sock: socket.socket, counts: SharedCounts, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        sock.settimeout(timeout_s)
        self._sock = sock
        self._counts = counts
        self._sequence = 0

    def __len__(self) -> int:
        return self._counts[0]

    def check_and_insert(self, ephemeral: bytes, user_id: bytes, time_s: int, now_s: int) -> None:
        """As :meth:`reflex.protocol.replay.ReplaySet.check_and_insert`; refuses as well what gets no answer."""
        self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
        try:
            self._sock.send(QUERY.pack(self._sequence, ephemeral, user_id, time_s, now_s))
            while True:
                answer = self._sock.recv(MESSAGE_MAX_BYTES)
                if not answer:
                    raise Replayed("the replay set cannot be asked: its process has ended")
                if SEQUENCE.unpack_from(answer)[0] == self._sequence:
                    break  # any other is the answer to an earlier question, which came too late
        except OSError as error:
            raise Replayed(f"the replay set did not answer: {error}") from None
        if reason := answer[SEQUENCE.size :].decode():
            raise Replayed(reason)

    def close(self) -> None:
        """Nothing: the set is the parent's."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a daemon needs to be one of several workers.

    ``number`` counts from 1. ``sockets`` listen, one for each address of the settings, in their order.
    ``tunnels`` counts those of the connections that are authenticated; a client's half leaves it alone. ``users``
    are those with limits; None where nobody asked for them.
    """

    number: int
    sockets: Sequence[socket.socket]
    replay: RemoteReplaySet
    connections: SharedCount
    tunnels: SharedCount
    users: UserTable | None = None


class SharedMemory:
    """What all workers read and write; the parent makes it before it forks them off.

    Args:
        workers: how many there are.
        limited_users: how many users have limits of their own.

    Attributes:
        connections: of each worker; the parent's own number is the size of the replay set.
        tunnels: of each worker, those of its connections that are authenticated.
        users: what each worker counts of the users that have limits of their own.
    """

    def __init__(self, workers: int, limited_users: int) -> None:
        self.connections = SharedCounts(workers)
        self.tunnels = SharedCounts(workers)
        self.users = UserTable(workers, limited_users)

    def context(self, worker: int, sockets: Sequence[socket.socket], replay: socket.socket) -> WorkerContext:
        """What one worker needs, with its listening sockets and its end of the replay set's socket pair."""
        return WorkerContext(
            worker,
            sockets,
            RemoteReplaySet(replay, self.connections),
            SharedCount(self.connections, worker),
            SharedCount(self.tunnels, worker),
            self.users,
        )

    def clear(self, worker: int) -> None:
        """A worker has ended: its numbers are 0 from now on."""
        self.connections[worker] = self.tunnels[worker] = 0
        self.users.clear(worker)


class ParentControl:
    """The parent, as the one who gives the orders; see :class:`reflex.daemon.Control`.

    Args:
        sock: a worker's end of a SOCK_SEQPACKET pair.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._is_stopping = False
        self._is_orphan = False
        self._on_stop: Callable[[int], None] = _ignore
        self._on_report: Callable[[], None] = _nothing

    def attach(self, on_stop: Callable[[int], None], on_report: Callable[[], None]) -> None:
        """Take the parent's messages, and the signals, which the parent held back when it forked."""
        self._on_stop = on_stop
        self._on_report = on_report
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sock, self._on_message)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            loop.add_signal_handler(signum, self._on_signal, signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def ready(self, addresses: Sequence[str]) -> None:
        """The parent says where all of them listen."""
        del addresses
        self._say(READY)

    def failed(self, text: str) -> None:
        """The parent says it, once for all."""
        self._say(FAILED + text.encode()[: MESSAGE_MAX_BYTES - len(FAILED)])

    def _say(self, message: bytes) -> None:
        try:
            self._sock.send(message)
        except OSError as error:
            log.warning("cannot tell the parent process: %s", error)

    def _on_message(self) -> None:
        try:
            message = self._sock.recv(MESSAGE_MAX_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            message = b""
        if message.startswith(STOP):
            self._is_stopping = True
            self._on_stop(message[-1])
        elif message == REPORT:
            self._on_report()
        elif message == ASK:
            self._say(ALIVE)
        elif not message:
            log.warning("the parent process has ended")
            asyncio.get_running_loop().remove_reader(self._sock)
            self._is_orphan = True
            if not self._is_stopping:  # what drains goes on: a second order would end it at once
                self._on_stop(signal.SIGTERM)

    def _on_signal(self, signum: int) -> None:
        if not self._is_orphan:
            return
        if signum == signal.SIGUSR1:
            self._on_report()
        else:
            self._on_stop(signum)


def _ignore(signum: int) -> None:
    """Until somebody is attached, there is nobody to stop."""


def _nothing() -> None:
    """Until somebody is attached, there is nobody to report."""
