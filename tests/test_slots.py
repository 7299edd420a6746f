"""reflex.slots: a worker's place, its process and its channels; nothing waits, and nothing is kept of who has ended."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from typing import NoReturn

import pytest

from reflex.slots import (
    END,
    MAX_DELAY_S,
    STEADY_S,
    Slot,
    close_all,
    how_it_ended,
    receive,
    replacement_delay_s,
    send,
)
from reflex.worker import MESSAGE_MAX_BYTES, SIGNALS


class InChildError(Exception):
    """Stands for the end of the new process, which a test cannot make."""


def no_worker(control: socket.socket, replay: socket.socket) -> NoReturn:
    raise AssertionError("this is the parent")


def test_the_parent_keeps_its_ends_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: 4711)
    slot = Slot(1, [], is_ready=True, failure="of the one before")
    ends = slot.fork(no_worker)
    assert ends == (slot.control, slot.replay)
    assert (slot.pid, slot.is_ready, slot.failure) == (4711, False, "")
    assert slot.started_s > 0
    for sock in ends:
        assert sock.getblocking() is False
        assert receive(sock) == END  # nobody has the other end: this process closed it
        send(sock, b"dropped")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert slot.take_channels() == list(ends)
    assert slot.take_channels() == []
    assert (slot.control, slot.replay) == (None, None)
    close_all(ends)
    assert [sock.fileno() for sock in ends] == [-1, -1]


def test_the_worker_has_the_other_ends_and_signals_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: 0)
    slot = Slot(1, [])

    def be_worker(control: socket.socket, replay: socket.socket) -> NoReturn:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(SIGNALS)
        control.send(b"ready")
        replay.send(b"question")
        close_all([control, replay])
        raise InChildError

    with pytest.raises(InChildError):
        slot.fork(be_worker)
    assert (receive(slot.control), receive(slot.replay)) == (b"ready", b"question")
    assert (receive(slot.control), receive(slot.replay)) == (END, END)
    close_all(slot.take_channels())


def test_where_there_is_no_room_for_a_process_there_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    slot = Slot(1, [])
    with pytest.raises(BlockingIOError):
        slot.fork(no_worker)
    assert slot.pid == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    close_all(slot.take_channels())


def test_killing_a_worker_waits_for_nobody() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        slot = Slot(1, [], pid=process.pid)
        slot.kill()
        assert slot.pid == process.pid  # until it is reaped
        assert process.wait() == -signal.SIGKILL
        slot.pid = 0
        slot.kill()  # nobody is there


def test_who_dies_early_again_and_again_is_replaced_later_and_later() -> None:
    slot = Slot(1, [], started_s=time.monotonic())
    assert [slot.delay_replacement() for _ in range(3)] == [0, 0.2, 0.4]
    assert slot.not_before_s > time.monotonic()
    slot.started_s -= STEADY_S
    assert [slot.delay_replacement(), slot.early_deaths] == [0, 0]


def test_replacement_delays_grow() -> None:
    delays = [replacement_delay_s(deaths) for deaths in (0, 1, 2, 3, 4, 1000)]
    assert delays == [0, 0, 0.2, 0.4, 0.8, MAX_DELAY_S]


def test_every_end_has_a_text() -> None:
    texts = [how_it_ended(code) for code in (3, -signal.SIGSEGV, -(signal.SIGRTMIN + 1))]
    assert texts == ["ended with code 3", "was ended by SIGSEGV", f"was ended by signal {signal.SIGRTMIN + 1}"]


def test_what_is_not_there_is_not_waited_for() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.setblocking(False)
        assert receive(near) is None
        far.send(bytes(MESSAGE_MAX_BYTES))
        assert receive(near) == bytes(MESSAGE_MAX_BYTES)
        for _ in range(10_000):  # far more than its buffer takes
            send(near, bytes(MESSAGE_MAX_BYTES))
        far.close()
        assert receive(near) == END
    assert receive(near) == END  # closed here
    assert receive(None) is None
    send(None, b"dropped")
