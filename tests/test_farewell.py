"""reflex.net.farewell: a socket behind its FIN is kept until the kernel has delivered all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from reflex.net.farewell import Farewell, undelivered_bytes
from tests.ends import End, tcp_pair
from tests.loops import in_loop, turns, until

pytestmark = pytest.mark.usefixtures("each_loop")

WAIT_S = 0.01


@pytest.fixture
def pair() -> Iterator[tuple[End, socket.socket]]:
    """The peer's end, and the one that says farewell."""
    near, far = tcp_pair()
    with End(near) as peer, far:
        far.setblocking(False)
        yield peer, far


def begun(sock: socket.socket, *, idle_s: float = 3600.0) -> tuple[Farewell, list[str]]:
    sock.shutdown(socket.SHUT_WR)
    ends: list[str] = []
    loop = asyncio.get_running_loop()
    return Farewell(loop, sock, wait_s=WAIT_S, idle_s=idle_s, on_end=lambda: ends.append("end")), ends


@in_loop
async def test_where_all_is_delivered_the_peers_fin_is_awaited_shortly(pair: tuple[End, socket.socket]) -> None:
    _, ends = begun(pair[1])
    assert not ends
    await until(lambda: ends)
    await asyncio.sleep(3 * WAIT_S)
    assert ends == ["end"]


@in_loop
async def test_bytes_that_the_peer_has_not_taken_are_waited_for(pair: tuple[End, socket.socket]) -> None:
    peer, sock = pair
    End(sock).fill()
    left = undelivered_bytes(sock)
    assert left > 0
    _, ends = begun(sock)
    await asyncio.sleep(3 * WAIT_S)
    assert not ends
    await peer.receive_all()
    await until(lambda: ends)
    assert undelivered_bytes(sock) == 0


@in_loop
async def test_a_peer_that_takes_nothing_is_not_waited_for_without_end(pair: tuple[End, socket.socket]) -> None:
    End(pair[1]).fill()
    _, ends = begun(pair[1], idle_s=3 * WAIT_S)
    await until(lambda: ends)
    assert undelivered_bytes(pair[1]) > 0


@in_loop
async def test_each_byte_that_is_taken_is_a_reason_to_wait_again(
    pair: tuple[End, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [9, 8, 7, 6, 5, 5, 5, 5]
    monkeypatch.setattr("reflex.net.farewell.undelivered_bytes", lambda _: left.pop(0) if len(left) > 1 else left[0])
    farewell, ends = begun(pair[1], idle_s=10 * WAIT_S)
    begun_s = farewell._until_s
    await until(lambda: ends)
    assert farewell._until_s > begun_s, "moved on by what was taken"
    assert left == [5]


@in_loop
async def test_who_is_cancelled_says_nothing(pair: tuple[End, socket.socket]) -> None:
    farewell, ends = begun(pair[1])
    farewell.cancel()
    await asyncio.sleep(3 * WAIT_S)
    await turns()
    assert not ends


def test_a_socket_that_is_closed_has_nothing_left(pair: tuple[End, socket.socket]) -> None:
    pair[1].close()
    assert undelivered_bytes(pair[1]) == 0
