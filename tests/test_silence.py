"""reflex.net.silence: what comes is read and discarded, and each of the ends that it has."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reflex.net.silence import Silence
from tests.ends import End, tcp_pair
from tests.loops import in_loop, turns, until

pytestmark = pytest.mark.usefixtures("each_loop")

HOUR_S = 3_600.0


class Met:
    """A connection that is met by silence: its other end, and how often it has ended."""

    def __init__(self, end: End, sock: socket.socket, wait_s: float, limit_bytes: int) -> None:
        self.end = end
        self.ends = 0
        self.silence = Silence(
            asyncio.get_running_loop(), sock, wait_s=wait_s, limit_bytes=limit_bytes, on_end=self._on_end
        )

    def _on_end(self) -> None:
        self.ends += 1


@contextmanager
def met(*, wait_s: float = HOUR_S, limit_bytes: int = 1 << 40) -> Iterator[Met]:
    near, far = tcp_pair()
    with far, End(near) as end:
        yield (made := Met(end, far, wait_s, limit_bytes))
        assert far.fileno() < 0
        assert made.ends == 1


@in_loop
async def test_it_reads_without_an_answer_until_its_peer_leaves() -> None:
    with met() as made:
        for _ in range(3):
            await made.end.send(bytes(100_000))
            await turns()
        assert made.end.is_silent
        assert made.ends == 0
        made.end.finish()
        await made.end.expect_fin()
        await until(lambda: made.ends)


@in_loop
async def test_a_peer_that_resets_has_left() -> None:
    with met() as made:
        made.end.reset()
        await until(lambda: made.ends)


@in_loop
async def test_it_ends_when_more_has_come_than_it_reads() -> None:
    with met(limit_bytes=1_000) as made:
        await made.end.send(bytes(1_000))
        await turns()
        assert made.end.is_silent
        await made.end.send(b"x")
        await made.end.expect_fin()


@in_loop
async def test_it_ends_when_its_time_is_over() -> None:
    with met(wait_s=0.01) as made:
        await made.end.expect_fin()


@in_loop
async def test_it_may_be_ended_and_nothing_is_left_of_it() -> None:
    with met() as made:
        made.silence.end()
        assert made.silence._timer.cancelled()
        await made.end.expect_fin()


@in_loop
async def test_a_readiness_that_was_none_changes_nothing() -> None:
    with met() as made:
        made.silence._on_readable()
        assert made.ends == 0
        made.silence.end()


@in_loop
async def test_nobody_need_be_told() -> None:
    near, far = tcp_pair()
    with End(near) as end:
        Silence(asyncio.get_running_loop(), far, wait_s=0.0)
        await end.expect_fin()
