"""An event loop that calls readiness callbacks without a detour.

Every event loop keeps what ``add_reader`` was given, asks the kernel what is ready, and calls it; asyncio's
and uvloop's wrap each callback into a handle first, queue that, and run it in a context; libuv also
makes four system calls more for each new descriptor. On this data path, where a callback is a ``recv``, a
few lines and a ``send``, that is a seventh of what a new connection costs. This loop is asyncio's
``SelectorEventLoop``, through its public face, with a selector that calls readers and writers itself:

1. ``add_reader`` and ``add_writer`` register with epoll and keep the callback, nothing else.
2. ``select`` polls and calls what is ready, then what :meth:`DirectLoop.at_turn_end` collected: a turn. After a
   turn with much to do it gives the processor to whoever wants it; then it polls again. It returns to asyncio where
   asyncio has something to do: a handle, a timer, a descriptor of its own.
3. Tasks, timers, names, signals, threads are asyncio's, unchanged.

An exception that leaves a callback goes to the loop's exception handler, as everywhere. A callback runs in
the context in which the loop was started, not in that of who registered it.

Linux alone has epoll; elsewhere the daemons run on uvloop, or on asyncio's own loop: :func:`new_event_loop`.
"""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from functools import partial
from typing import Any, Final, TypeVarTuple

from reflex.errors import StartError

_Ts = TypeVarTuple("_Ts")
Callback = Callable[[], object]

# Of one poll; the kernel's answer stays below 512 bytes. A turn goes on while polls are full, so that what its
# callbacks pack for a tunnel goes out together; not for long, since others wait for its end.
MAX_EVENTS: Final = 40
POLLS_PER_TURN: Final = 8
TURN_S: Final = 0.002
# After a turn of so many events whoever wants the processor has it first: what follows from them is ready then in one
# piece, and not in pieces of its own.
BUSY_EVENTS: Final = 16
FIRST_DESCRIPTORS: Final = 256  # room for so many at first; it grows with the highest number in use

# How long a process watches for an answer that is expected soon: what a near half and its target need.
WATCH_S: Final = 0.00025
MAX_MISSES: Final = 3
POLLS_TO_SLEEP: Final = 64

_IN: Final = 0x001  # EPOLLIN, EPOLLOUT in epoll_ctl(2); what else is in a mask speaks of the end, and is for both
_OUT: Final = 0x004


class _DirectSelector(selectors.BaseSelector):
    """What asyncio sees of it: the descriptors that asyncio registered, its self-pipe as a rule."""

    def __init__(self, on_error: Callable[[Callback, BaseException], None]) -> None:
        self._on_error = on_error
        self._keys: dict[int, selectors.SelectorKey] = {}
        self.epoll = select.epoll()
        # By descriptor. Lists, since descriptors are small and a list never moves while it is not grown.
        self.readers: list[Callback | None] = [None] * FIRST_DESCRIPTORS
        self.writers: list[Callback | None] = [None] * FIRST_DESCRIPTORS
        self.fresh: list[int] = []  # registered while events of one poll are handled: none of them are theirs
        self.turn_end: list[Callback] = []
        self.is_wanted = False  # asyncio has something to do
        self.is_expecting = False  # see DirectLoop.expect_soon
        self._misses = 0
        self._polls_to_sleep = 0  # so many polls sleep at once, whatever is expected

    # For DirectLoop.

    def add(self, fd: int, own: list[Callback | None], other: list[Callback | None], callback: Callback) -> None:
        """Call ``callback`` from now on where ``own`` (readers or writers) is concerned."""
        if fd >= len(own):
            room = [None] * max(fd + 1 - len(own), len(own))
            self.readers.extend(room)
            self.writers.extend(room)
        if own[fd] is None:
            if other[fd] is not None:
                self.epoll.modify(fd, _IN | _OUT)
            else:
                self.epoll.register(fd, _IN if own is self.readers else _OUT)
                self.fresh.append(fd)
        own[fd] = callback

    def remove(self, fd: int, own: list[Callback | None], other: list[Callback | None]) -> bool:
        """The opposite; whether there was one."""
        if fd >= len(own) or own[fd] is None:
            return False
        own[fd] = None
        if other[fd] is not None:
            self.epoll.modify(fd, _OUT if own is self.readers else _IN)
        else:
            self.epoll.unregister(fd)
        return True

    # For asyncio.

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _descriptor(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        self.epoll.register(fd, _mask(events))
        self.fresh.append(fd)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(_descriptor(fileobj))
        try:
            self.epoll.unregister(key.fd)
        except OSError:  # it was closed before: then the kernel has forgotten it
            return key
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _descriptor(fileobj)
        if self._keys[fd].events != events:
            self.epoll.modify(fd, _mask(events))
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self.epoll.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Poll and call until asyncio is wanted, or ``timeout`` seconds have passed; return what is asyncio's."""
        until = None if timeout is None else time.monotonic() + timeout
        poll = self.epoll.poll
        readers = self.readers
        writers = self.writers
        fresh = self.fresh
        found: list[tuple[selectors.SelectorKey, int]] = []
        self.is_wanted = False
        if self.turn_end:
            self._end_turn()
        wait_s = 0.0 if self.is_wanted else timeout
        polls = 1
        turn_until_s = 0.0
        while True:
            if self.is_expecting:
                self.is_expecting = False
                ready = self._watch(wait_s)
            else:
                ready = poll(wait_s, MAX_EVENTS)
            if fresh:
                fresh.clear()
            for fd, mask in ready:
                if fresh and fd in fresh:
                    continue  # the event was of another connection, whose number it has now
                if mask != _OUT:
                    callback = readers[fd] if fd < len(readers) else None
                    if callback is not None:
                        try:
                            callback()
                        except (SystemExit, KeyboardInterrupt):
                            raise
                        except BaseException as error:  # of any kind: one callback must not end the loop
                            self._on_error(callback, error)
                if mask != _IN:
                    callback = writers[fd] if fd < len(writers) else None
                    if callback is not None and not (fresh and fd in fresh):
                        try:
                            callback()
                        except (SystemExit, KeyboardInterrupt):
                            raise
                        except BaseException as error:
                            self._on_error(callback, error)
                key = self._keys.get(fd)
                if key is not None:
                    found.append((key, _events(mask) & key.events))
            if len(ready) == MAX_EVENTS and polls < POLLS_PER_TURN and not (found or self.is_wanted):
                now_s = time.monotonic()
                if polls == 1:
                    turn_until_s = now_s + TURN_S
                if now_s < turn_until_s:
                    polls += 1
                    wait_s = 0.0
                    continue
            is_busy = polls > 1 or len(ready) >= BUSY_EVENTS
            polls = 1
            if self.turn_end:
                self._end_turn()
            if is_busy:
                os.sched_yield()
            if found or self.is_wanted:
                return found
            if until is None:
                wait_s = None
            else:
                wait_s = until - time.monotonic()
                if wait_s <= 0:
                    return found

    def _watch(self, timeout: float | None) -> list[tuple[int, int]]:
        """Poll, giving way to whoever wants the processor, and sleep only where nothing came for a moment."""
        poll = self.epoll.poll
        if self._polls_to_sleep:
            self._polls_to_sleep -= 1
        elif timeout is None or timeout > WATCH_S:
            now_s = time.monotonic()
            end_s = now_s + WATCH_S
            while now_s < end_s:
                ready = poll(0, MAX_EVENTS)
                if ready:
                    self._misses = 0
                    return ready
                os.sched_yield()
                now_s = time.monotonic()
            self._misses += 1
            if self._misses == MAX_MISSES:
                self._misses = 0
                self._polls_to_sleep = POLLS_TO_SLEEP
        return poll(timeout, MAX_EVENTS)

    def _end_turn(self) -> None:
        due, self.turn_end = self.turn_end, []
        for callback in due:
            try:
                callback()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self._on_error(callback, error)
        if self.turn_end:
            self.is_wanted = True  # what they collected comes with the next poll, which must not wait for it


def _descriptor(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _mask(events: int) -> int:
    return (_IN if events & selectors.EVENT_READ else 0) | (_OUT if events & selectors.EVENT_WRITE else 0)


def _events(mask: int) -> int:
    return (selectors.EVENT_READ if mask & ~_OUT else 0) | (selectors.EVENT_WRITE if mask & ~_IN else 0)


class DirectLoop(asyncio.SelectorEventLoop):
    """The loop; see the module."""

    def __init__(self) -> None:
        self._direct = _DirectSelector(self._callback_failed)
        super().__init__(self._direct)

    def _callback_failed(self, callback: Callback, error: BaseException) -> None:
        self.call_exception_handler({"message": f"Exception in callback {callback!r}", "exception": error})

    def at_turn_end(self, callback: Callback) -> None:
        """Call it once, when what is ready now has been called: ``call_soon`` without a handle."""
        self._direct.turn_end.append(callback)

    def expect_soon(self) -> None:
        """Somebody near is about to answer: watch for it for WATCH_S before the process sleeps, this once.

        A processor that has nothing to do goes to sleep itself, which on a virtual machine takes longer to wake
        from than a near peer to answer. Nobody is kept from a processor by it, and where the answer does not
        come in time for several times in a row it is left for a while.
        """
        self._direct.is_expecting = True

    def add_reader(self, fd: Any, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        """As of every loop; the callback is called from the selector."""
        direct = self._direct
        direct.add(_descriptor(fd), direct.readers, direct.writers, partial(callback, *args) if args else callback)

    def remove_reader(self, fd: Any) -> bool:
        """As of every loop."""
        direct = self._direct
        return direct.remove(_descriptor(fd), direct.readers, direct.writers) or super().remove_reader(fd)

    def forget_reader(self, fd: int) -> None:
        """As :meth:`remove_reader`, for a socket that is closed next: the kernel forgets it then by itself."""
        self._direct.readers[fd] = None
        if self._direct.writers[fd] is not None:
            self._direct.epoll.modify(fd, _OUT)

    def add_writer(self, fd: Any, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        """As of every loop; the callback is called from the selector."""
        direct = self._direct
        direct.add(_descriptor(fd), direct.writers, direct.readers, partial(callback, *args) if args else callback)

    def remove_writer(self, fd: Any) -> bool:
        """As of every loop."""
        direct = self._direct
        return direct.remove(_descriptor(fd), direct.writers, direct.readers) or super().remove_writer(fd)

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As of every loop."""
        self._direct.is_wanted = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As of every loop."""
        self._direct.is_wanted = True
        return super().call_at(when, callback, *args, context=context)


def drop_reader(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Stop reading a socket that has a reader and is closed next: on this loop without a system call."""
    if isinstance(loop, DirectLoop):
        loop.forget_reader(fd)
    else:
        loop.remove_reader(fd)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """What a daemon runs on: the loop above where there is epoll, else uvloop's where it is installed, else asyncio's.

    The environment variable ``REFLEX_LOOP`` (direct, uvloop or asyncio) wants one of them: for comparisons, and
    for finding out whether the loop is what is wrong.

    Raises:
        StartError: the one that is wanted is not to be had here.
    """
    wanted = os.environ.get("REFLEX_LOOP", "")
    if wanted not in ("", *_LOOPS):
        raise StartError(f"REFLEX_LOOP: expected one of {', '.join(_LOOPS)}, found {wanted!r}")
    for name, make in _LOOPS.items():
        if wanted in ("", name) and (loop := make()) is not None:
            return loop
    raise StartError(f"REFLEX_LOOP: {wanted} is not available on this system")


def _direct() -> asyncio.AbstractEventLoop | None:
    return DirectLoop() if hasattr(select, "epoll") else None


def _uvloop() -> asyncio.AbstractEventLoop | None:
    try:
        import uvloop  # noqa: PLC0415 - it takes its time, and is wanted only where this is called
    except ImportError:
        return None
    return uvloop.new_event_loop()


_LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop | None]]] = {
    "direct": _direct,
    "uvloop": _uvloop,
    "asyncio": asyncio.new_event_loop,
}
