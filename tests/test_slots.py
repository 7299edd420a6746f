"""reflex.slots: a worker's place, its process and its channels; nothing waits, and nothing is kept of who has ended."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from typing import NoReturn

import pytest

from reflex.slots import END, Slot, close_all, receive, send
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


def test_a_killed_worker_is_gone_at_once() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        slot = Slot(1, [], pid=process.pid)
        slot.kill()
        assert slot.pid == 0
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)  # it was waited for
        slot.kill()  # nobody is there


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
