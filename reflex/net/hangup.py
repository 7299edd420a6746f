"""Which connections are gone, whatever the event loop tells of them.

An event loop tells of a reset only who reads or writes at that moment: not of a socket whose reader
was taken away for back-pressure or after its FIN. And uvloop tells it once, even where the reader has
only taken a part of what had arrived before: libuv gives a descriptor up at its first error. So who
must not wait for ever asks the kernel now and then, with one call for many descriptors.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Iterable
from typing import Final, Protocol

LOOK_S: Final = 5.0  # how often a lookout looks at each
STEPS: Final = 20  # that it needs for all of them where there are many: none takes long


def hung_up(descriptors: Iterable[int]) -> list[int]:
    """Those whose connection was reset, or has ended in both directions. Takes nothing from the sockets."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, 0)  # no events: errors and hang-ups are always told
    return [descriptor for descriptor, _ in poll.poll(0)]


class Watched(Protocol):
    """What a :class:`Lookout` looks at."""

    @property
    def descriptors(self) -> tuple[int, int]:
        """Of its two sockets."""

    def on_hang_up(self, fd: int) -> None:
        """Called for one that is gone, at every look."""


class Lookout:
    """Looks at each of many pairs of sockets every so often, some at a time: thousands cost one timer.

    Args:
        every_s: how often each is looked at. One that has just come may wait for twice as long.
    """

    __slots__ = ("_every_s", "_left", "_loop", "_timer", "_watched")

    def __init__(self, loop: asyncio.AbstractEventLoop, every_s: float = LOOK_S) -> None:
        self._loop = loop
        self._every_s = every_s
        self._watched: set[Watched] = set()
        self._left: list[Watched] = []  # of this round
        self._timer: asyncio.TimerHandle | None = None  # runs while there are any

    def add(self, watched: Watched) -> None:
        """Look at it from now on."""
        self._watched.add(watched)
        if self._timer is None:
            self._next()

    def remove(self, watched: Watched) -> None:
        """Look at it no more: to be called before its descriptors are closed. Nothing where it was not added."""
        self._watched.discard(watched)
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left.clear()

    def _next(self) -> None:
        count = len(self._watched)
        self._timer = self._loop.call_later(self._every_s * self._step(count) / count, self._look)

    @staticmethod
    def _step(count: int) -> int:
        return -(-count // STEPS)

    def _look(self) -> None:
        if not self._left:
            self._left = list(self._watched)
        step = self._step(len(self._watched))
        owners = {}
        for watched in self._left[-step:]:
            if watched in self._watched:
                owners.update(dict.fromkeys(watched.descriptors, watched))
        del self._left[-step:]
        self._next()
        for fd in hung_up(owners):
            if owners[fd] in self._watched:
                owners[fd].on_hang_up(fd)
