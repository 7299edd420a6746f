"""Runs a daemon as a process: log, event loop, signals, exit code.

The story of :func:`run_daemon`: the log goes to stderr, the limit of open files up to what the system grants,
large buffers get memory that the system has back when they go, the loop is the one of :mod:`reflex.loop`. The
signals are taken before the daemon starts, so that none ends in a traceback. Then: start, say where it listens,
wait for SIGINT or SIGTERM, drain, exit with 0. A second one ends the process at once, even while a thread of the
resolver hangs. SIGUSR1 asks for a report.

Who gives these orders and hears how the start went is a :class:`Control`: the user, by signals and the log, or,
for a worker (:mod:`reflex.supervisor`), its parent process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NoReturn, Protocol

from reflex.errors import StartError
from reflex.loop import new_event_loop

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOG_TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"

LARGE_BYTES: Final = 32_768  # of the pools' third tier: what is as large is a memory map of its own
HEAP_STEP_BYTES: Final = LARGE_BYTES // 2  # the heap grows by so little that none of them fits into the rest
KEPT_HEAP_BYTES: Final = 1 << 20  # free at the heap's end, for what comes next
COLLECT_AFTER: Final = 10_000  # objects more than there were; 700 is Python's own
_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
EXIT_STOPPED: Final = 0
EXIT_NOT_STARTED: Final = 2
EXIT_SIGNAL_BASE: Final = 128  # a shell's way to tell the signal that ended a process


class Daemon(Protocol):
    """What :func:`run_daemon` runs. All calls come from the event loop's thread."""

    async def start(self) -> Sequence[str]:
        """Binds and serves; returns every address it listens on. Raises StartError or OSError, with nothing bound."""
        ...

    async def drain(self) -> None:
        """Takes no new work; returns when running work has ended or its time is up, with nothing left open."""
        ...

    def abort(self) -> None:
        """Ends everything at once; called in any state, also while ``start`` or ``drain`` is running."""
        ...

    def report(self) -> None:
        """Logs statistics, at INFO, with the logger that :func:`run_daemon` was told."""
        ...


class Control(Protocol):
    """Who tells a daemon to stop, and is told how its start went."""

    def attach(self, on_stop: Callable[[int], None], on_report: Callable[[], None]) -> None:
        """Called once, inside the running loop, before the daemon is made: from now on, hand on what is ordered.

        ``on_stop`` wants the number of the signal that the order stands for; a second call ends the process.
        """
        ...

    def ready(self, addresses: Sequence[str]) -> None:
        """The daemon listens on these."""
        ...

    def failed(self, text: str) -> None:
        """The daemon could not start; ``text`` is one line."""
        ...


class SignalControl:
    """The user: orders are signals, news are log lines."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def attach(self, on_stop: Callable[[int], None], on_report: Callable[[], None]) -> None:
        """Take SIGINT, SIGTERM and SIGUSR1."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, on_stop, signum)
        loop.add_signal_handler(signal.SIGUSR1, on_report)

    def ready(self, addresses: Sequence[str]) -> None:
        """Log it."""
        log_ready(self._log, addresses)

    def failed(self, text: str) -> None:
        """Log it."""
        self._log.error("cannot start: %s", text)


def run_daemon(
    make: Callable[[], Daemon], *, name: str, log_level: str, control: Control | None = None, label: str = ""
) -> int:
    """Runs the daemon that ``make`` returns, until it is told to stop; returns the process's exit code.

    Args:
        make: called once, inside the running event loop; may raise StartError or OSError.
        name: the name of the daemon's logger, such as ``reflex.inbound``.
        log_level: debug, info, warning or error.
        control: who stops it; the user by default.
        label: stands in every log line of this process, where several write to one log.

    Returns:
        0 after a drain that SIGINT or SIGTERM asked for, 2 if the daemon could not start.
        A second signal does not return: it ends the process with 128 + its number.
    """
    log = prepare_process(name, log_level=log_level, label=label)
    control = control or SignalControl(log)
    try:
        runner = asyncio.Runner(loop_factory=new_event_loop)
        runner.get_loop()  # made now, so that what fails here is not taken for the daemon's
    except StartError as error:
        control.failed(one_line(error))
        return EXIT_NOT_STARTED
    with runner:
        return runner.run(_serve(make, log, control))


def prepare_process(name: str, *, log_level: str, label: str = "") -> logging.Logger:
    """The log goes to stderr, the limit of open files up, and freed memory back; returns the logger ``name``."""
    form = LOG_FORMAT.replace("%(message)s", f"{label}: %(message)s") if label else LOG_FORMAT
    logging.basicConfig(stream=sys.stderr, level=log_level.upper(), format=form, datefmt=LOG_TIME_FORMAT, force=True)
    log = logging.getLogger(name)
    _raise_file_limit(log)
    _return_large_buffers_to_the_system()
    return log


async def _serve(make: Callable[[], Daemon], log: logging.Logger, control: Control) -> int:
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()
    daemon: Daemon | None = None

    def on_stop(signum: int) -> None:
        if not stop.done():
            stop.set_result(signum)
            return
        log.warning("%s: ending at once", signal.Signals(signum).name)
        if daemon is not None:
            daemon.abort()
        _end_process(EXIT_SIGNAL_BASE + signum)

    def on_report() -> None:
        if daemon is not None:
            with _everything_of(log):
                daemon.report()

    control.attach(on_stop, on_report)
    try:
        daemon = make()
        addresses = await daemon.start()
    except (StartError, OSError) as error:
        control.failed(one_line(error))
        return EXIT_NOT_STARTED
    _spare_the_collector()
    control.ready(addresses)

    first = await stop
    log.info("%s: draining; a second signal ends at once", signal.Signals(first).name)
    await daemon.drain()
    log.info("stopped")
    return EXIT_STOPPED


def _spare_the_collector() -> None:
    """What is there now stays; what comes is freed by its reference counts, but for a few cycles a second.

    A collection looks at every connection's objects, so that it is made when there is something to find.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 20)


def _return_large_buffers_to_the_system() -> None:
    """What pools let go of leaves the process: every buffer of their larger tiers is a memory map of its own.

    glibc begins that way and leaves it once the first of them is freed: from then on they lie in the heap, which
    a burst leaves full of holes and at its size. Other C libraries have their own ways, and no such call.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TOP_PAD, HEAP_STEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_HEAP_BYTES)  # what glibc would have come to by itself, or more


def _end_process(code: int) -> NoReturn:
    """Ends the process without waiting for its threads: one of them may hang in the resolver for a long time."""
    logging.shutdown()
    os._exit(code)


def log_ready(log: logging.Logger, addresses: Sequence[str]) -> None:
    """Logs at INFO whatever the log level: who starts a daemon waits for this line."""
    text = "ready: listening on " + ", ".join(addresses)
    log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, text, (), None))


@contextlib.contextmanager
def _everything_of(log: logging.Logger) -> Iterator[None]:
    """Meanwhile the logger says whatever is of INFO and above, at every log level: somebody has asked for it."""
    level = log.level
    log.setLevel(min(log.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        log.setLevel(level)


def one_line(error: Exception) -> str:
    """What went wrong, on one line, without the number that Python puts before a system error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(text.split()) or type(error).__name__


def _raise_file_limit(log: logging.Logger) -> None:
    """Every connection is an open file, and the usual soft limit of 1,024 is too few of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems grant less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("open files: at most %d", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
