"""reflex.worker: what a worker shares with the others, and whom it obeys."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reflex.errors import Replayed
from reflex.worker import (
    ALIVE,
    ASK,
    FAILED,
    MESSAGE_MAX_BYTES,
    QUERY,
    READY,
    REPORT,
    SEQUENCE,
    STOP,
    ParentControl,
    RemoteReplaySet,
    SharedCount,
    SharedCounts,
    SharedMemory,
    UserField,
    UserTable,
)
from tests.loops import until

USER = bytes(range(100, 116))


def test_counts_of_others() -> None:
    counts = SharedCounts(3)
    first, second = SharedCount(counts, 1), SharedCount(counts, 2)
    first.publish(5)
    second.publish(7)
    counts[0] = 100  # the parent's own is none of the workers'
    assert (first.elsewhere(), second.elsewhere(), counts.of_all_workers()) == (7, 5, 12)
    second.publish(0)
    assert first.elsewhere() == 0


def test_counts_are_shared_with_forked_processes() -> None:
    counts = SharedCounts(2)
    child = os.fork()
    if not child:
        counts[2] = 2**40
        os._exit(0)
    os.waitpid(child, 0)
    assert SharedCount(counts, 1).elsewhere() == 2**40


def test_a_worker_that_has_ended_leaves_nothing_of_its_own_in_what_all_share() -> None:
    memory = SharedMemory(2, 1)
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    first, second = (memory.context(number, [], ends[number - 1][0]) for number in (1, 2))
    assert (first.number, second.number) == (1, 2)
    memory.connections[0] = 9  # the parent's: the size of the replay set
    assert len(first.replay) == len(second.replay) == 9
    second.connections.publish(5)
    second.tunnels.publish(4)
    memory.users.row(2, 0).publish(UserField.TUNNELS, 3)
    row = memory.users.row(1, 0)
    assert (first.connections.elsewhere(), first.tunnels.elsewhere()) == (5, 4)
    assert row.elsewhere(UserField.TUNNELS) == [3]
    memory.clear(2)
    assert (first.connections.elsewhere(), first.tunnels.elsewhere()) == (0, 0)
    assert row.elsewhere(UserField.TUNNELS) == [0]
    for pair in ends:
        for sock in pair:
            sock.close()


def test_numbers_of_users_are_shared_with_forked_processes_and_cleared() -> None:
    table = UserTable(3, 2)
    rows = [table.row(1, user) for user in (0, 1)]
    child = os.fork()
    if not child:
        table.row(2, 1).publish(UserField.STREAMS, 2**40)
        table.row(3, 0).publish(UserField.STREAMS, 5)
        os._exit(0)
    os.waitpid(child, 0)
    rows[0].publish(UserField.STREAMS, 1)
    assert [row.elsewhere(UserField.STREAMS) for row in rows] == [[0, 5], [2**40, 0]]
    assert table.row(2, 0).elsewhere(UserField.STREAMS) == [1, 5]
    assert rows[0].elsewhere(UserField.TUNNELS) == [0, 0]
    table.clear(3)
    assert [row.elsewhere(UserField.STREAMS) for row in rows] == [[0, 0], [2**40, 0]]


def test_a_table_of_no_users_is_none() -> None:
    UserTable(2, 0).clear(2)


class Parent:
    """The other end of a RemoteReplaySet, in a thread: answers each question with what ``answer`` makes of it."""

    def __init__(self, answer: Callable[[tuple[Any, ...]], list[bytes]]) -> None:
        self.sock, self.workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._answer = answer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while question := self.sock.recv(4096):
            for message in self._answer(QUERY.unpack(question)):
                self.sock.send(message)

    def close(self) -> None:
        self.workers.close()
        self._thread.join()
        self.sock.close()


def test_remote_replay_set_asks_and_believes() -> None:
    questions: list[tuple[Any, ...]] = []

    def answer(question: tuple[Any, ...]) -> list[bytes]:
        questions.append(question)
        sequence = SEQUENCE.pack(question[0])
        return [SEQUENCE.pack(0) + b"too late", sequence + (b"seen" if len(questions) == 2 else b"")]

    parent = Parent(answer)
    counts = SharedCounts(1)
    replay = RemoteReplaySet(parent.workers, counts)
    replay.check_and_insert(bytes(32), USER, 10, 20)
    with pytest.raises(Replayed, match=r"^seen$"):
        replay.check_and_insert(bytes(range(32)), USER, 11, 21)
    counts[0] = 9
    assert len(replay) == 9
    parent.close()
    assert [question[1:] for question in questions] == [(bytes(32), USER, 10, 20), (bytes(range(32)), USER, 11, 21)]


def test_remote_replay_set_refuses_without_an_answer() -> None:
    parents, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    replay = RemoteReplaySet(workers, SharedCounts(1), timeout_s=0.01)
    with parents, workers:
        with pytest.raises(Replayed, match="did not answer"):
            replay.check_and_insert(bytes(32), USER, 1, 1)
        parents.close()
        with pytest.raises(Replayed):
            replay.check_and_insert(bytes(32), USER, 1, 1)


def test_remote_replay_set_refuses_when_the_parent_ends_before_it_answers() -> None:
    parents, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    replay = RemoteReplaySet(workers, SharedCounts(1))

    def end() -> None:
        parents.recv(4096)
        parents.close()

    thread = threading.Thread(target=end)
    thread.start()
    with workers, pytest.raises(Replayed, match="its process has ended"):
        replay.check_and_insert(bytes(32), USER, 1, 1)
    thread.join()


@pytest.fixture
def signals_are_put_back() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("signals_are_put_back")
def test_a_worker_obeys_its_parent_and_signals_only_when_that_has_ended() -> None:
    parents, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    orders: asyncio.Queue[int] = asyncio.Queue()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        control = ParentControl(workers)
        control.attach(orders.put_nowait, lambda: orders.put_nowait(0))
        for signum in (signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), signum)
        parents.send(b"what an older worker does not know")
        parents.send(REPORT)
        assert await orders.get() == 0
        parents.send(ASK)
        assert await loop.run_in_executor(None, parents.recv, MESSAGE_MAX_BYTES) == ALIVE
        control.ready(["127.0.0.1:1"])
        control.failed("é" * MESSAGE_MAX_BYTES)
        assert parents.recv(MESSAGE_MAX_BYTES) == READY
        text = parents.recv(MESSAGE_MAX_BYTES + 1)
        assert text.startswith(FAILED)
        assert len(text) == MESSAGE_MAX_BYTES
        assert orders.empty()
        parents.close()
        assert await orders.get() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR1)
        assert await orders.get() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert await orders.get() == signal.SIGINT
        assert orders.empty()

    with workers:
        asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.usefixtures("signals_are_put_back")
def test_the_parents_end_is_no_second_order_to_a_worker_that_drains(caplog: pytest.LogCaptureFixture) -> None:
    parents, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    orders: asyncio.Queue[int] = asyncio.Queue()

    async def run() -> None:
        ParentControl(workers).attach(orders.put_nowait, lambda: orders.put_nowait(0))
        parents.send(STOP + bytes((signal.SIGINT,)))
        assert await orders.get() == signal.SIGINT
        parents.close()
        await until(lambda: caplog.records)
        assert caplog.messages == ["the parent process has ended"]
        assert orders.empty()
        os.kill(os.getpid(), signal.SIGTERM)  # this one is
        assert await orders.get() == signal.SIGTERM

    with workers:
        asyncio.run(asyncio.wait_for(run(), 10))


def test_news_that_no_parent_hears(caplog: pytest.LogCaptureFixture) -> None:
    parents, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parents.close()
    with workers:
        ParentControl(workers).ready([])
    assert caplog.record_tuples == [
        ("reflex.worker", logging.WARNING, "cannot tell the parent process: [Errno 32] Broken pipe")
    ]
