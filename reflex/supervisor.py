"""Several processes as one daemon: ``workers = N``.

The parent serves no connection. Its story:

1. It opens, for each address, one listening socket for each worker (SO_REUSEPORT: the kernel spreads the
   connections among them), and keeps them open. So nobody is refused from then on, and who waits in the queue
   of a worker that dies is served by the next one on the same socket.
2. It forks the workers off. There is no thread and no event loop yet that a fork could break. Each runs the
   daemon as if it were alone, with a :class:`reflex.worker.WorkerContext`.
3. When all are ready, it says so, once.
4. It owns the one replay set and answers the workers' questions. It hands on orders: the first SIGINT or SIGTERM
   drains, the second ends all at once, SIGUSR1 asks each for its statistics.
5. A worker that dies is replaced, with a growing delay if it does so again and again. One that cannot start in
   the first place ends the daemon. One that does not become ready, or does not answer any more, is killed, and so
   replaced: the kernel would go on to give it connections.

The parent never waits for one worker: all its sockets are non-blocking, and what a worker does not take is
dropped. A worker whose question is not answered refuses the hello.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from reflex.daemon import (
    EXIT_NOT_STARTED,
    EXIT_SIGNAL_BASE,
    EXIT_STOPPED,
    Control,
    Daemon,
    log_ready,
    one_line,
    prepare_process,
    run_daemon,
)
from reflex.errors import Replayed, StartError
from reflex.net.listener import listening_address, open_shared
from reflex.saved_replay import SavedReplaySet
from reflex.slots import END, MAX_DELAY_S, NEVER_S, Slot, close_all, how_it_ended, receive, send
from reflex.worker import (
    ALIVE,
    ASK,
    FAILED,
    QUERY,
    READY,
    REPORT,
    SEQUENCE,
    SIGNALS,
    STOP,
    ParentControl,
    SharedMemory,
    WorkerContext,
)

EXIT_WORKER_LOST: Final = 1  # a worker did not drain, but died
# A worker is asked so often whether it is alive, and killed instead of asked again after so many questions without an
# answer. They are counted, not timed: a machine that has slept, or stopped all of them, finds none dead.
LOOK_INTERVAL_S: Final = 10.0
MAX_UNANSWERED: Final = 3
# After the second signal, for a worker that does not heed it; one that does may need reflex.usage.LAST_WRITE_S.
KILL_AFTER_S: Final = 3.0

ORDERS_TO_END: Final = 2  # the first one drains

RunWorker = Callable[[WorkerContext, Control], int]


def run_workers(
    prepare: Callable[[Sequence[socket.socket]], Callable[[WorkerContext], Daemon]],
    *,
    listen: Sequence[tuple[str, int]],
    workers: int,
    name: str,
    log_level: str,
    limited_users: int = 0,
    replay_file: Path | None = None,
) -> int:
    """Runs several daemons as one; returns the process's exit code.

    Args:
        prepare: called once, before there are workers, with one listening socket for each address; may raise
            StartError. It returns what makes the daemon: called once in each worker, inside the running event loop;
            may raise StartError or OSError.
        listen: the addresses, host and port (0: any free one), in the order in which a worker gets its sockets.
        workers: how many.
        name: the name of the daemon's logger, such as ``reflex.inbound``.
        log_level: debug, info, warning or error.
        limited_users: how many users have limits of their own, which hold for all workers together.
        replay_file: where the hellos that were taken are saved; None: nowhere.

    Returns:
        0 after a drain that SIGINT or SIGTERM asked for, 1 if a worker died meanwhile, 2 if the daemon could not
        start, 128 + its number after a second signal.
    """
    log = prepare_process(name, log_level=log_level)

    def run_worker(context: WorkerContext, control: Control) -> int:
        label = f"worker {context.number}"
        return run_daemon(lambda: make(context), name=name, log_level=log_level, control=control, label=label)

    groups: list[list[socket.socket]] = []
    replay: SavedReplaySet | None = None
    try:
        replay = SavedReplaySet(replay_file)
        for host, port in listen:
            groups.append(open_shared(host, port, count=workers))
        make = prepare([group[0] for group in groups])
    except StartError as error:
        for group in groups:
            close_all(group)
        if replay is not None:
            replay.close()
        log.error("cannot start: %s", error)
        return EXIT_NOT_STARTED
    return Supervisor(groups, run_worker, log, limited_users=limited_users, replay=replay).run()


class Supervisor:
    """The parent. ``run`` once.

    Args:
        groups: for each address its listening sockets, as many as there are to be workers; closed in the end.
        run_worker: what a worker does, in its own process; returns its exit code.
        limited_users: how many users have limits of their own.
        replay: the hellos that were taken, of all workers; closed in the end.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[socket.socket]],
        run_worker: RunWorker,
        log: logging.Logger,
        *,
        limited_users: int = 0,
        replay: SavedReplaySet | None = None,
    ) -> None:
        self._slots = [Slot(number, list(sockets)) for number, sockets in enumerate(zip(*groups, strict=True), start=1)]
        self._addresses = [listening_address(group[0]) for group in groups]
        self._run_worker = run_worker
        self._log = log
        self._replay = SavedReplaySet(None) if replay is None else replay
        self._memory = SharedMemory(len(self._slots), limited_users)
        self._memory.connections[0] = len(self._replay)
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._was_ready = False
        self._stop_orders = 0
        self._kill_at_s: float | None = None
        self._exit_code = EXIT_STOPPED

    @property
    def _is_stopping(self) -> bool:
        return self._stop_orders > 0

    def run(self) -> int:
        """Until it is told to stop; returns the process's exit code."""
        old = self._take_signals()
        try:
            try:
                for slot in self._slots:
                    self._start(slot)
            except OSError as error:
                self._cannot_start(one_line(error))
            while not self._is_stopping or any(slot.pid for slot in self._slots):
                for key, _ in self._selector.select(self._wait_s()):
                    handle: Callable[[], object] = key.data
                    handle()
                self._replace_dead()
                self._look_after()
            if self._exit_code == EXIT_STOPPED:
                self._log.info("stopped")
            return self._exit_code
        finally:
            self._kill_all()
            self._close(old)

    def _take_signals(self) -> dict[signal.Signals, object]:
        """Every signal becomes a byte on the wake-up socket. Returns what was there before."""
        for sock in (self._wakeup, self._wakeup_writer):
            sock.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_signals)
        old: dict[signal.Signals, object] = {signum: signal.signal(signum, _noted) for signum in SIGNALS}
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        return old

    def _close(self, old: dict[signal.Signals, object]) -> None:
        signal.set_wakeup_fd(-1)
        for signum, handler in old.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]  # it came from there
        self._selector.close()
        self._wakeup.close()
        self._wakeup_writer.close()
        self._close_listening()
        self._replay.close()

    def _close_listening(self) -> None:
        for slot in self._slots:
            close_all(slot.sockets)

    # Workers start.

    def _start(self, slot: Slot) -> None:
        control, replay = slot.fork(partial(self._be_worker, slot))
        for sock, handle in ((control, self._on_control), (replay, self._on_question)):
            self._selector.register(sock, selectors.EVENT_READ, partial(handle, slot))
        slot.next_look_s = time.monotonic() + LOOK_INTERVAL_S

    def _be_worker(self, slot: Slot, control: socket.socket, replay: socket.socket) -> NoReturn:
        """What the new process does. It has the parent's everything, and gives back what is not its own."""
        code = EXIT_WORKER_LOST
        try:
            signal.set_wakeup_fd(-1)
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_DFL)
            self._selector.close()
            self._wakeup.close()
            self._wakeup_writer.close()
            for each in self._slots:
                # The others' ends above all: a worker knows by them that its parent has ended.
                close_all(each.take_channels())
                if each is not slot:
                    close_all(each.sockets)
            context = self._memory.context(slot.number, slot.sockets, replay)
            code = self._run_worker(context, ParentControl(control))
        except BaseException:
            self._log.exception("ended unexpectedly")
        finally:
            logging.shutdown()
            os._exit(code)  # the frames below are the parent's

    # Workers speak.

    def _on_control(self, slot: Slot) -> bool:
        """One message, of which there may be none; returns whether there was one."""
        message = receive(slot.control)
        if message == READY:
            slot.is_ready = True
            slot.unanswered = 0
            slot.next_look_s = time.monotonic() + LOOK_INTERVAL_S
            if self._was_ready:
                self._log.info("worker %d is ready again, as process %d", slot.number, slot.pid)
            elif all(each.is_ready for each in self._slots) and not self._is_stopping:
                self._was_ready = True
                log_ready(self._log, self._addresses)
        elif message == ALIVE and slot.is_ready:  # before, every question counts: a start has an end
            slot.unanswered = 0
        elif message is not None and message.startswith(FAILED):
            slot.failure = message[len(FAILED) :].decode(errors="replace")
        elif message == END:
            self._drop_channels(slot)  # the worker has ended, or is about to: SIGCHLD tells
        return bool(message)

    def _on_question(self, slot: Slot) -> bool:
        """One question about the replay set, of which there may be none; returns whether there was one."""
        question = receive(slot.replay)
        if question is not None and len(question) == QUERY.size:
            sequence, ephemeral, user_id, time_s, now_s = QUERY.unpack(question)
            reason = ""
            try:
                self._replay.check_and_insert(ephemeral, user_id, time_s, now_s)
            except Replayed as error:
                reason = str(error)
            self._memory.connections[0] = len(self._replay)
            send(slot.replay, SEQUENCE.pack(sequence) + reason.encode())
        elif question == END:
            self._drop_channels(slot)
        return bool(question)

    def _drop_channels(self, slot: Slot) -> None:
        for sock in slot.take_channels():
            self._selector.unregister(sock)
            sock.close()

    # Workers end.

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.pid:
                pid, status = os.waitpid(slot.pid, os.WNOHANG)
                if pid:
                    self._on_end(slot, os.waitstatus_to_exitcode(status))

    def _on_end(self, slot: Slot, code: int) -> None:
        pid, slot.pid = slot.pid, 0
        while self._on_control(slot):
            pass  # what it said last
        self._drop_channels(slot)
        self._memory.clear(slot.number)
        how = how_it_ended(code) + (f": {slot.failure}" if slot.failure else "")
        if self._is_stopping:
            if code != EXIT_STOPPED and self._stop_orders < ORDERS_TO_END:
                self._log.warning("worker %d (process %d) %s", slot.number, pid, how)
                self._exit_code = self._exit_code or EXIT_WORKER_LOST
            return
        if not self._was_ready and code >= 0:
            self._cannot_start(slot.failure or f"worker {slot.number} {how}")
            return
        delay_s = slot.delay_replacement()
        when = f"in {delay_s:g} s" if delay_s else "now"
        self._log.warning("worker %d (process %d) %s; replaced %s", slot.number, pid, how, when)

    def _cannot_start(self, text: str) -> None:
        self._log.error("cannot start: %s", text)
        self._exit_code = EXIT_NOT_STARTED
        # None has been announced, so none has work. Most find out by themselves that they cannot start.
        self._stop_orders = ORDERS_TO_END
        self._kill_at_s = time.monotonic() + KILL_AFTER_S

    def _replace_dead(self) -> None:
        if self._is_stopping:
            if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
                self._kill_at_s = None
                self._kill_all()
            return
        for slot in self._slots:
            if not slot.pid and slot.not_before_s <= time.monotonic():
                self._start_again(slot)

    def _look_after(self) -> None:
        now_s = time.monotonic()
        for slot in self._slots:
            if not slot.pid or slot.next_look_s > now_s:
                continue
            if slot.unanswered < MAX_UNANSWERED:
                slot.unanswered += 1
                slot.next_look_s = now_s + LOOK_INTERVAL_S
                send(slot.control, ASK)
            else:
                slot.next_look_s = NEVER_S
                what = "does not answer" if slot.is_ready else "does not become ready"
                self._log.error("worker %d (process %d) %s: killed", slot.number, slot.pid, what)
                slot.kill()

    def _start_again(self, slot: Slot) -> None:
        try:
            self._start(slot)
        except OSError as error:  # no memory, or too many processes
            slot.not_before_s = time.monotonic() + MAX_DELAY_S
            self._log.error("cannot start worker %d: %s", slot.number, one_line(error))

    def _wait_s(self) -> float | None:
        """How long until something is to be done although nothing happens; None for ever."""
        due = [slot.next_look_s for slot in self._slots if slot.pid and slot.next_look_s < NEVER_S]
        if self._kill_at_s is not None:
            due.append(self._kill_at_s)
        if not self._is_stopping:
            due += [slot.not_before_s for slot in self._slots if not slot.pid]
        return max(0.0, min(due) - time.monotonic()) if due else None

    # Orders.

    def _on_signals(self) -> None:
        noted = receive(self._wakeup) or b""
        # Whatever woke us: a signal that comes twice may be noted once. And before the orders: a stop replaces who
        # has died, for those who wait in its queue.
        self._reap()
        for signum in noted:
            if signum in (signal.SIGINT, signal.SIGTERM):
                self._stop(signum)
            elif signum == signal.SIGUSR1:
                self._tell_all(REPORT)

    def _stop(self, signum: int) -> None:
        name = signal.Signals(signum).name
        if not self._is_stopping:
            self._log.info("%s: draining %d workers; a second signal ends at once", name, len(self._slots))
            for slot in self._slots:
                if not slot.pid:
                    self._start_again(slot)  # somebody must serve those who wait in its queue
            self._close_listening()  # what is left of the sockets is the workers', to the last connection in them
            self._stop_orders = 1
            self._tell_all(STOP + bytes((signum,)))
        else:
            self._log.warning("%s: ending at once", name)
            self._exit_code = EXIT_SIGNAL_BASE + signum
            self._stop_orders = ORDERS_TO_END
            self._kill_at_s = self._kill_at_s or time.monotonic() + KILL_AFTER_S
            self._tell_all(STOP + bytes((signum,)))

    def _tell_all(self, message: bytes) -> None:
        for slot in self._slots:
            send(slot.control, message)

    def _kill_all(self) -> None:
        for slot in self._slots:
            slot.kill()


def _noted(signum: int, frame: FrameType | None) -> None:
    """A handler that does nothing: the signal's number is on the wake-up socket."""
