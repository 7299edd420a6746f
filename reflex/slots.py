"""The places of a daemon's workers, as their parent sees them: sockets that stay, processes that come and go.

A :class:`Slot` is forked for whoever is to serve its listening sockets, and holds the parent's ends of two socket
pairs to it: one for orders and what becomes of them, one for questions about the replay set. They are read and
written without waiting, see :func:`receive` and :func:`send`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NoReturn

from reflex.worker import MESSAGE_MAX_BYTES, SIGNALS

NEVER_S: Final = float("inf")
END: Final = b""  # what is received after the last message
STEADY_S: Final = 10.0  # a worker that lived so long did not die because it started
FIRST_DELAY_S: Final = 0.2  # before the second replacement in a row; doubles
MAX_DELAY_S: Final = 10.0


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one worker: its sockets stay, who serves them may change."""

    number: int
    sockets: list[socket.socket]
    pid: int = 0  # 0: nobody
    control: socket.socket | None = None
    replay: socket.socket | None = None
    is_ready: bool = False
    failure: str = ""  # what it said before it ended
    started_s: float = 0.0
    early_deaths: int = 0  # in a row
    not_before_s: float = 0.0  # of the next start
    next_look_s: float = NEVER_S  # when to ask again whether it is alive
    unanswered: int = 0  # questions in a row

    def fork(
        self, be_worker: Callable[[socket.socket, socket.socket], NoReturn]
    ) -> tuple[socket.socket, socket.socket]:
        """Start a worker. Returns the parent's ends, for control and for the replay set; they stay the slot's.

        Args:
            be_worker: called in the new process with its two ends, the signals held back; ends the process.

        Raises:
            OSError: there is no room for a process, or no descriptor.
        """
        control, workers_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        replay, workers_replay = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control, self.replay = control, replay
        self.started_s = time.monotonic()
        self.is_ready = False
        self.failure = ""
        self.next_look_s = NEVER_S
        self.unanswered = 0
        # A signal that comes before the worker can handle it waits until it can.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.pid = os.fork()
            if not self.pid:
                be_worker(workers_control, workers_replay)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        workers_control.close()
        workers_replay.close()
        control.setblocking(False)
        replay.setblocking(False)
        return control, replay

    def take_channels(self) -> list[socket.socket]:
        """The parent's ends, if there are any: the caller's from now on, and no longer the slot's."""
        channels = [sock for sock in (self.control, self.replay) if sock is not None]
        self.control = self.replay = None
        return channels

    def kill(self) -> None:
        """End the worker, if there is one, with SIGKILL. SIGCHLD tells when it is done: after a disk's answer, say."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def delay_replacement(self) -> float:
        """The worker has died: returns for how long nobody comes after it, seconds."""
        now_s = time.monotonic()
        self.early_deaths = 0 if now_s - self.started_s >= STEADY_S else self.early_deaths + 1
        delay_s = replacement_delay_s(self.early_deaths)
        self.not_before_s = now_s + delay_s
        return delay_s


def replacement_delay_s(early_deaths: int) -> float:
    """How long to wait before a worker is replaced that was the ``early_deaths``-th in a row to die early."""
    return 0.0 if early_deaths <= 1 else min(FIRST_DELAY_S * 2.0 ** min(early_deaths - 2, 16), MAX_DELAY_S)


def how_it_ended(code: int) -> str:
    """For the log. ``code``: as of os.waitstatus_to_exitcode, negative for a signal."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"  # not all real-time signals have a name


def receive(sock: socket.socket | None) -> bytes | None:
    """A message; END after the last; None where there is none now, or no socket any more."""
    try:
        return None if sock is None else sock.recv(MESSAGE_MAX_BYTES)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return END


def send(sock: socket.socket | None, message: bytes) -> None:
    """Send the message, or drop it: where there is no socket, or it is full or gone."""
    if sock is not None:
        with contextlib.suppress(OSError):  # who asked does not wait for ever
            sock.send(message)


def close_all(sockets: Iterable[socket.socket]) -> None:
    """Close each of them."""
    for sock in sockets:
        sock.close()
